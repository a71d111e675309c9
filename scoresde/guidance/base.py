"""What guided denoisers share."""

from __future__ import annotations

from ..denoiser import BaseDenoiser, Wrapper


class Guided(Wrapper):
    """A denoiser made of another one. Raises TypeError for what is none."""

    def __init__(self, model: BaseDenoiser) -> None:
        if not isinstance(model, BaseDenoiser):
            raise TypeError(f"model: expected a denoiser to guide, found {type(model).__name__}")
        super().__init__(model)
