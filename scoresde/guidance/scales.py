"""How strong guidance is: a number, or a function of the noise level.

Functions are of log-SNR and not of the step index, so that they mean the same on every grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..schedules import wide
from ..sde import LinearSDE

Scale = float | Callable[[LinearSDE, Tensor], Tensor]
"""A number, or (sde, t) -> float64 of the shape of t."""


def checked_scale(scale: Scale, name: str = "scale") -> Scale:
    """The scale. Raises TypeError for what is none, ValueError for NaN and infinity."""
    if callable(scale):
        return scale
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"{name}: expected a number or a function of (sde, t), found {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"{name}: expected a finite number, found {scale}")
    return float(scale)


def at(scale: Scale, sde: LinearSDE, t: Tensor) -> Tensor:
    """The scale at the float64 times t, float64 of the same shape."""
    return wide(scale(sde, t)).to(t.device).expand(t.shape) if callable(scale) else torch.full_like(t, scale)


@dataclass(frozen=True)
class Interval:
    """See `interval`."""

    scale: Scale
    low: float
    high: float
    outside: Scale

    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        level = sde.log_snr(t)
        inside = (self.low <= level) & (level <= self.high)
        return torch.where(inside, at(self.scale, sde, t), at(self.outside, sde, t))


def interval(scale: Scale, low: float, high: float, *, outside: Scale = 0.0) -> Scale:
    """`scale` where `low <= log_snr(t) <= high`, and `outside` elsewhere: 0 is no guidance for `classifier`,
    1 the conditional model alone for `classifier_free`. Where guidance does nothing it also costs no call,
    in solvers of fixed steps.

    (Kynkaanniemi et al. 2024, arXiv:2404.07724, in noise levels: `log_snr = -2 log(sigma/alpha)`.)
    """
    _checked_range(low, high)
    return Interval(checked_scale(scale), float(low), float(high), checked_scale(outside, "outside"))


@dataclass(frozen=True)
class Ramp:
    """See `ramp`."""

    at_low: float
    at_high: float
    low: float
    high: float

    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        share = ((sde.log_snr(t) - self.low) / (self.high - self.low)).clamp(0, 1)
        return self.at_low + (self.at_high - self.at_low) * share


def ramp(at_low: float, at_high: float, low: float, high: float) -> Scale:
    """Linear in log-SNR from `at_low` (at `low` and noisier) to `at_high` (at `high` and cleaner)."""
    _checked_range(low, high)
    if not math.isfinite(high - low + at_high - at_low):
        raise ValueError(f"expected finite numbers, found {(at_low, at_high, low, high)}")
    return Ramp(float(at_low), float(at_high), float(low), float(high))


@dataclass(frozen=True)
class OnePlus:
    """See `ho_salimans`."""

    w: Scale

    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return 1 + at(self.w, sde, t)


def ho_salimans(w: Scale) -> Scale:
    """The scale `1 + w` of classifier-free guidance for the `w` of its paper, `(1 + w) D_cond - w D_null`.

    Ho and Salimans 2022, arXiv:2207.12598, eq. 6: w = 0 is the conditional model, w = -1 the unconditional
    one. Here, and in most code ("guidance scale", CFG scale), those are 1 and 0.
    """
    w = checked_scale(w, "w")
    return OnePlus(w) if callable(w) else 1 + w


def _checked_range(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"expected log-SNRs low < high, found low={low}, high={high}")
