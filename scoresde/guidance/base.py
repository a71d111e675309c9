"""What all guided denoisers share."""

from __future__ import annotations

import torch

from ..denoiser import BaseDenoiser
from ..sde import LinearSDE


class Guided(BaseDenoiser):
    """A denoiser made of another one, on the same process, device and dtype."""

    def __init__(self, model: BaseDenoiser) -> None:
        super().__init__()
        if not isinstance(model, BaseDenoiser):
            raise TypeError(f"model: expected a denoiser to guide, found {type(model).__name__}")
        self.model = model

    @property
    def sde(self) -> LinearSDE:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.sde

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype
