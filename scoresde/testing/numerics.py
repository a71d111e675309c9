"""Numbers that checks stand on: derivatives and integrals with their errors, and times at which to look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .failure import holds

EPS = 2.0**-52


def derivative(
    function: Callable[[Tensor], Tensor],
    t: Tensor,
    low: float,
    high: float,
    scale: float | None = None,
    size: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(d function/dt, what it may be off by) of an elementwise function at t (K,) inside (low, high).

    By autograd where the function takes it, else by differences of fourth order, whose error is estimated
    with half the step and the rounding. `scale` is that on which the function varies, by default the distance
    to the nearer end; `size` is how large the numbers are that it is computed from, at least its own values.
    """
    try:
        with torch.enable_grad():
            leaf = t.detach().clone().requires_grad_()
            value = function(leaf)
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
                if slope is not None:
                    return slope, torch.zeros_like(slope)
    except RuntimeError:  # not a function of torch alone
        pass
    h = 1e-3 * (torch.minimum(t - low, high - t) if scale is None else torch.full_like(t, scale))
    rounding = 16 * EPS * function(t).detach().abs().clamp_min(size)

    coarse, fine = (_differences(function, t, step) for step in (h, h / 2))
    return fine, (fine - coarse).abs() + rounding / h


def _differences(function: Callable[[Tensor], Tensor], t: Tensor, h: Tensor) -> Tensor:
    near, far = function(t + h) - function(t - h), function(t + 2 * h) - function(t - 2 * h)
    return ((8 * near - far) / (12 * h)).detach()


def integral(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], s: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """(int_s^t function(u, s, t) du, what it may be off by), by Gauss-Legendre rules of 8, 16, 32 points."""
    values = []
    for points in (8, 16, 32):
        nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(points))
        half = 0.5 * (t - s)
        u = s[:, None] + half[:, None] * (1 + nodes)
        shape = u.shape
        at = function(u.flatten(), *(v[:, None].expand(shape).flatten() for v in (s, t)))
        values.append(half * (at.reshape(shape) * weights).sum(1))
    coarse, middle, fine = values
    # Where a kink falls between the points, the error goes with their distance squared, and by chance.
    return fine.detach(), (4 * (fine - middle).abs() + 0.5 * (fine - coarse).abs()).detach()


def shares() -> Tensor:
    """Fractions of (0, 1), small steps and large, close to both ends."""
    exponents, inner = [-8.0 + k / 2 for k in range(13)], [0.02 + 0.03 * k for k in range(33)]
    near = [0.99, 0.995, 0.998, 0.999]
    return torch.tensor([10**e for e in exponents] + inner + near, dtype=torch.float64)


def inside(sde: Any) -> Tensor:
    """Times strictly inside the range: evenly in t and close to t_min = 0, or evenly in log t."""
    if sde.t_min > 0:
        return sde.t_min * (sde.t_max / sde.t_min) ** torch.linspace(0, 1, 50, dtype=torch.float64)[1:-1]
    return sde.t_max * shares()


def a_few(sde: Any) -> Tensor:
    t = inside(sde)
    t = t[sde.log_snr(t).abs() < 14]
    return t[:: max(1, len(t) // 6)]


def has(thing: Any, what: str, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise AssertionError(
            f"expected a {what} with {', '.join(names)}; {thing!r} lacks {', '.join(missing)}"
        )


def something(**tensors: Tensor) -> None:
    """ValueError for tensors without entries: nothing would be looked at, and so nothing found."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise ValueError(f"{name}: expected something to look at, found shape {tuple(tensor.shape)}")


def name_of(method: Any) -> str:
    return getattr(method, "__name__", repr(method))


def is_float64(method: Callable[[Tensor], Tensor], t: Tensor, what: str, owner: Any) -> None:
    for argument in (t, t[len(t) // 2], t[:4].reshape(2, 2)):
        try:
            value = method(argument)
        except Exception as error:  # of code that is not ours, such as functions of one number
            raise AssertionError(
                f"{what} takes float64 tensors of any shape: {type(error).__name__} ({error}) for shape "
                f"{tuple(argument.shape)}, of {owner!r}"
            ) from error
        kept = isinstance(value, Tensor) and value.shape == argument.shape and value.dtype == torch.float64
        found = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        holds(f"{what} is float64, of the shape of its times", kept, found=found, of=owner)
