"""`sample`: prior, grid, solver."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import grids
from .denoiser import BaseDenoiser
from .grids import Grid
from .noise import Noise
from .sde import LinearSDE
from .solvers.base import Callback, Samples, Solver
from .solvers.reversible import Reversible

GridFunction = Callable[..., Grid]


def sample(
    model: BaseDenoiser,
    shape: Sequence[int],
    solver: Solver,
    *,
    steps: int = 20,
    grid: GridFunction | Grid | Tensor | None = None,
    end: float | None = None,
    seed: int = 0,
    ids: Tensor | Sequence[int] | None = None,
    condition: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Samples:
    """Draw samples of `shape` (B, ...) from the model with a solver.

    steps, grid, end  the grid is `grid(sde, steps, end)` (default: `default_grid`), or is given as a Grid or
                      a decreasing tensor of times; `end=None` is `sde.default_end`,
                      and `end=0` finishes with the denoised data
    seed, ids         sample i is a function of (seed, ids[i]) only, whatever the batch, its order, or the
                      device; ids default to 0..B-1
    condition         passed on to the model as keywords; what has as many entries as the batch belongs to the
                      samples, see `BaseDenoiser.given`
    callback          called with a `Step` before every row; what it returns is kept in `Samples.path`
    progress          a bar on the terminal, one tick a network call
    device, dtype     of the state; by default the model's, at least float32

    Raises ValueError or TypeError for arguments that do not fit, before the first network call, and
    FloatingPointError naming call and time if the network returns NaN or Inf. Warns if the run starts at a
    time t where x_t is still far from the prior: `KL(q(x_t | x_0) || prior) > 1e-3` nats a number.
    """
    _check_parts(model, solver, condition, callback)
    shape = _checked_shape(shape)
    device = _checked_device(model.device if device is None else device)
    dtype = torch.promote_types(model.dtype, torch.float32) if dtype is None else dtype
    _check_dtype(dtype)
    times = make_grid(model.sde, grid, steps, end)
    _check_prior(model.sde, float(times.t[0]))
    noise = Noise.of(seed, ids, batch=shape[0], device=device, dtype=dtype)
    x = noise.prior(shape) * model.sde.prior_std
    calls = getattr(solver, "calls", None)
    with _ticking(callback, progress, None if calls is None else calls(len(times))) as watched:
        drawn = solver.solve(model.given(**(condition or {})), x, times, noise=noise, callback=watched)
    return replace(drawn, seed=seed)


def encode(
    model: BaseDenoiser,
    x: Tensor,
    solver: Solver,
    *,
    steps: int = 20,
    grid: GridFunction | Grid | Tensor | None = None,
    end: float | None = None,
    condition: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> Samples:
    """The latent of data `x` (B, ...): the probability-flow ODE from `end` (where x is taken to be) to t_max
    with a deterministic solver on the same grid as `sample`, reversed."""
    _check_parts(model, solver, condition, callback)
    _check_state(x)
    times = make_grid(model.sde, grid, steps, end).reversed()
    return solver.solve(model.given(**(condition or {})), x, times, callback=callback)


def decode(
    model: BaseDenoiser,
    latent: Tensor | Samples,
    solver: Solver,
    *,
    steps: int = 20,
    grid: GridFunction | Grid | Tensor | None = None,
    end: float | None = None,
    condition: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> Samples:
    """Data from a latent at t_max (B, ...): `sample` without the drawing. What `encode` returned may be
    passed whole; a reversible solver then undoes it exactly, others start from its `x`."""
    _check_parts(model, solver, condition, callback)
    _check_state(latent.x if isinstance(latent, Samples) else latent)
    start: Any = latent
    if isinstance(latent, Samples):
        paired = isinstance(solver, Reversible) and latent.companion is not None
        start = (latent.x, latent.companion) if paired else latent.x
    return solver.solve(
        model.given(**(condition or {})), start, make_grid(model.sde, grid, steps, end), callback=callback
    )


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation between latents `a` (weight 0) and `b` (weight 1), both (B, ...): (B, ...) for
    one weight, (W, B, ...) for weights (W,).

        (sin((1 - w) theta) a + sin(w theta) b)/sin(theta),   theta the angle between a and b of a sample

    Between normal latents in many dimensions it keeps their norm, so that `decode` finds the in-between ones
    as likely as the ends; the straight line shrinks it (Shoemake 1985; White 2016, arXiv:1609.04468). For
    parallel latents it is the straight line. Raises ValueError for other shapes.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"expected two latents of one shape (B, ...), found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    w = torch.as_tensor(weight, dtype=torch.float64, device=a.device)
    if w.ndim > 1:
        raise ValueError(f"expected one weight or weights of shape (W,), found {tuple(w.shape)}")
    w = w.view(*w.shape, *[1] * a.ndim)
    first, second = a.double(), b.double()
    p, q = first.flatten(1), second.flatten(1)
    norms = (p.norm(dim=1) * q.norm(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
    theta = ((p * q).sum(1) / norms).clamp(-1, 1).acos().view(-1, *[1] * (a.ndim - 1))
    sine = theta.sin()
    # Without an angle to speak of (or with half a turn, where no way is the shortest): the straight line.
    flat = sine < 1e-6
    sine = torch.where(flat, 1, sine)
    left = torch.where(flat, 1 - w, ((1 - w) * theta).sin() / sine)
    right = torch.where(flat, w, (w * theta).sin() / sine)
    return (left * first + right * second).to(a.dtype)


def make_grid(
    sde: LinearSDE, grid: GridFunction | Grid | Tensor | None, steps: int, end: float | None
) -> Grid:
    """The grid that `sample` uses."""
    if isinstance(grid, Grid | Tensor):
        given = Grid.of(sde, grid)
        if float(given.t[0]) < float(given.t[-1]):
            raise ValueError(
                "expected a grid from noise to data, found a reversed one: give it as it was, `encode` "
                "itself goes backwards"
            )
        if end is not None and float(given.t[-1]) != float(end):
            raise ValueError(
                f"expected a grid that ends at end={end}, found one that ends at {given.t[-1].item()}; give "
                "one of the two"
            )
        return given
    if grid is not None and not callable(grid):
        raise TypeError(
            "expected a function such as grids.karras, a Grid, or a tensor of decreasing times as grid, "
            f"found {grid!r}"
        )
    return Grid.of(sde, (default_grid if grid is None else grid)(sde, steps, end))  # times will do too


def default_grid(sde: LinearSDE, steps: int, end: float | None = None) -> Grid:
    """Karras' spacing where noise is added to a signal that is kept (EDM, VE), else quadratic in t."""
    return (grids.karras if sde.alpha(sde.t_max) == 1 else grids.quadratic)(sde, steps, end)


def _check_parts(
    model: BaseDenoiser, solver: Solver, condition: Mapping[str, Any] | None, callback: Callback | None
) -> None:
    if not isinstance(model, BaseDenoiser):
        raise TypeError(
            "expected a denoiser as model, such as Denoiser(network, sde) or law.denoiser(sde), "
            f"found {model!r}"
        )
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(f"expected a solver object such as solvers.dpmpp(order=2), found {solver!r}")
    if not isinstance(condition, Mapping | None):
        raise TypeError(f"expected a mapping from names to values as condition, found {condition!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"expected a function of a Step as callback, found {callback!r}")


def _check_prior(sde: LinearSDE, t: float) -> None:
    """Warn who called the caller if N(alpha x_0, sigma^2) is far from N(0, prior_std^2), x_0 of mean square
    1."""
    with torch.no_grad():
        signal, noise = (float(v / sde.prior_std) ** 2 for v in (sde.alpha(t), sde.sigma(t)))
    gap = 0.5 * (signal + noise - 1 - math.log(noise)) if noise > 0 else math.inf
    if gap > 1e-3:
        warnings.warn(
            f"sampling starts at t = {t:g} from noise alone, but x_t still holds data there: alpha = "
            f"{float(sde.alpha(t)):.3g}, a KL divergence of {gap:.2g} nats for each number; use a schedule "
            "that ends in more noise, a grid from t_max, or decode with a state of your own",
            stacklevel=3,
        )


def _check_state(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor of shape (batch, ...), found {x!r}")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating state, found {x.dtype}; scale integer images to floats first")
    _check_dtype(x.dtype)
    if x.ndim < 2:
        raise ValueError(f"expected a state of shape (batch, ...), found {tuple(x.shape)}")


def _check_dtype(dtype: Any) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expected a state in float32 or float64, found {dtype!r}; the network may have any dtype"
        )


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"expected a device such as 'cpu' or 'cuda:0', found {device!r}") from None


def whole_sizes(shape: Any) -> tuple[int, ...]:
    """The sizes of a shape; none where it is not one of whole numbers >= 0."""
    sizes = tuple(shape) if isinstance(shape, Iterable) else ()
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0 for n in sizes)
    return tuple(map(int, sizes)) if whole else ()


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = whole_sizes(shape)
    if len(sizes) < 2:
        raise ValueError(
            "expected a shape (batch, ...) of whole numbers with at least one axis after the batch, found "
            f"{shape}"
        )
    return sizes


@contextmanager
def _ticking(callback: Callback | None, progress: bool, total: int | None) -> Iterator[Callback | None]:
    """The callback, and if wanted a bar that it moves on; the bar is gone afterwards, also after an error."""
    if not progress:
        yield callback
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="call", leave=False) as bar:

        def tick(step: Any) -> Any:
            bar.update(step.k + 1 - bar.n)
            return None if callback is None else callback(step)

        yield tick
