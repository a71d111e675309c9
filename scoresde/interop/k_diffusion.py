"""k-diffusion (Katherine Crowson): a model is `model(x, sigma, **extra)`, `x = x_0 + sigma eps`, sigma (B,),
and returns the denoised data. Its samplers get decreasing sigmas that may end with 0, where no call is made;
those of a grid of ours are `(-grid.lam).exp()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..denoiser import BaseDenoiser, Denoiser
from ..sde import EDM
from .matched import under


class Network(nn.Module):
    """A k-diffusion model, a module or a function, as the network of a denoiser."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return self.model(x, sigma, **extra)


def denoiser(
    model: Callable[..., Tensor], sigma_min: float | None = None, sigma_max: float | None = None
) -> Denoiser:
    """A k-diffusion model as a denoiser of `EDM(sigma_min, sigma_max)`, whose time is sigma.

    The range is that of the model's own `sigma_min, sigma_max`, as the wrappers of discrete schedules have
    them, unless given. Conditions are passed on as keywords. Raises ValueError where there is no range.
    """
    least, most = (
        getattr(model, name, None) if given is None else given
        for name, given in (("sigma_min", sigma_min), ("sigma_max", sigma_max))
    )
    if least is None or most is None:
        raise ValueError(
            f"expected a model with sigma_min and sigma_max, found {type(model)} without; pass the range of "
            "noise levels on which it was trained"
        )
    return Denoiser(Network(model), EDM(float(least), float(most)), "data")


def model(model: BaseDenoiser, end: float | None = None, start: float | None = None) -> BaseDenoiser:
    """A denoiser as a k-diffusion model: `model(x, sigma, **extra)` is the denoised data, in the dtype of x.

    Its `.sde` is `EDM(sigma_min, sigma_max)` with the noise levels sigma/alpha of the denoiser's own process
    at `end` and `start` (None: its default end, and t_max): the range for `get_sigmas_karras`. Raises
    ValueError where no signal is left at `start` and the level is infinite.
    """
    sde = model.sde
    times = sde.default_end if end is None else end, sde.t_max if start is None else start
    least, most = (float((-0.5 * sde.log_snr(t)).exp()) for t in times)
    if not most < math.inf:
        raise ValueError(f"expected some signal at the start, found none at t = {times[1]}; pass start=0.999")
    return under(model, EDM(least, most))
