"""azula (Francois Rozet): a denoiser is `model(x_t, t, **cond)`, which returns a posterior with `.mean`, and
has `.schedule(t) -> (alpha, sigma)`; t runs from 1, noise, to 0, where a little noise is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import BaseDenoiser, checked
from ..schedules import Time, unit_interval, wide
from ..sde import LinearSDE, clock

Pair = tuple[Tensor, Tensor]


class Scheduled(LinearSDE):
    """The process of a schedule `t -> (alpha, sigma)` on [0, 1], which must take float64 times.

    `time` is found by bisection, `rates` by differentiation.
    """

    default_end = 0.0

    def __init__(self, schedule: Callable[[Tensor], Pair]) -> None:
        self.schedule = schedule
        first, last = (float(self.sigma(t)) for t in (0.0, 1.0))
        if not (0 <= first < last < math.inf):
            raise ValueError(f"expected a schedule with 0 <= sigma(0) < sigma(1), found {first}, {last}")
        self.prior_std = last

    def __repr__(self) -> str:
        return f"Scheduled({type(self.schedule).__name__})"

    def _at(self, t: Time) -> Pair:
        alpha, sigma = self.schedule(unit_interval(clock(t)))
        return alpha.double(), sigma.double()

    def alpha(self, t: Time) -> Tensor:
        return self._at(t)[0]

    def sigma(self, t: Time) -> Tensor:
        return self._at(t)[1]

    def log_snr(self, t: Time) -> Tensor:
        alpha, sigma = self._at(t)
        return 2 * (alpha.log() - sigma.log())

    def time(self, log_snr: Time) -> Tensor:
        wanted = wide(log_snr)
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            noisier = self.log_snr(middle) < wanted
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return torch.where(self.log_snr(torch.ones_like(wanted)) >= wanted, 1.0, low)

    def rates(self, t: Time) -> Pair:
        t = wide(t)
        values, slopes = torch.func.jvp(self._at, (t,), (torch.ones_like(t),))[:2]
        (alpha, sigma), (d_alpha, d_sigma) = values, slopes
        f = d_alpha / alpha
        return f, 2 * sigma * (d_sigma - f * sigma)

    def innovation(self, s: Time, t: Time) -> Tensor:
        # sigma_t^2 (1 - SNR_t/SNR_s)
        return -(self.sigma(t) ** 2) * torch.expm1(self.log_snr(t) - self.log_snr(s))


class Theirs(BaseDenoiser):
    """See `denoiser`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not callable(model) or not callable(getattr(model, "schedule", None)):
            raise TypeError(f"expected an azula denoiser with a schedule, found {type(model)}")
        self.model: Any = model
        self.sde = Scheduled(self.model.schedule)

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return checked(self.model(x, wide(t).to(x.device), **cond).mean, x)


def denoiser(model: Any) -> BaseDenoiser:
    """An azula denoiser as one of ours, on its own process and clock; conditions are keywords.

    The network is reached through azula's own preconditioning. For another process: `under`.
    """
    return Theirs(model)


class Unit:
    """The schedule `t -> (alpha, sigma)` of a process on azula's clock, from `end` at t = 0 to `start` at 1;
    float64 inside."""

    def __init__(self, sde: LinearSDE, start: float, end: float) -> None:
        self.sde, self.start, self.end = sde, start, end

    def time(self, t: Tensor) -> Tensor:
        """The process's own time, float64."""
        return self.end + wide(t) * (self.start - self.end)

    def __call__(self, t: Tensor) -> Pair:
        own = self.time(t)
        return self.sde.alpha(own).to(t.dtype), self.sde.sigma(own).to(t.dtype)


class Ours(nn.Module):
    """See `model`."""

    def __init__(self, denoiser: BaseDenoiser, start: float, end: float) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, Unit(denoiser.sde, start, end)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Any:
        from azula.denoise import DiracPosterior  # pyright: ignore

        return DiracPosterior(mean=checked(self.denoiser(x_t, self.schedule.time(t), **cond), x_t))


def model(denoiser: BaseDenoiser, end: float | None = None, start: float | None = None) -> nn.Module:
    """A denoiser as azula's: `model(x_t, t, **cond).mean`, with `.schedule`, for its samplers and guidance.

    azula's clock t in [0, 1] is stretched to [end, start] of the denoiser's process (None: its default end,
    and t_max). Raises ValueError where no signal is left at `start`: its samplers divide by alpha.
    """
    sde = denoiser.sde
    first, last = (
        float(v) for v in (sde.t_max if start is None else start, sde.default_end if end is None else end)
    )
    if not float(sde.alpha(first)) > 0:
        raise ValueError(f"expected some signal at the start, found none at t = {first}; pass start=0.999")
    return Ours(denoiser, first, last)
