"""How the order of a solver is measured.

Everything is stated in half-log-SNR `lam` and in the scaled coordinate `y = x/alpha`, in which the
probability-flow ODE is `dy/dlam = D - y` for every process, so that one problem serves all of them.

The span of lam starts noisy (-2 by default): from further out the start-up errors of low order would be
hidden. Several laws and starting points are measured together and the largest error is regressed, because a
single one may superconverge. A solver is an object with `.tableau(sde, times)`, one with `.solve(...)`, or a
function as in `black_box`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..grids import Grid
from ..laws import Gaussian, Law, Mixture
from ..noise import BrownianPath, Noise
from ..schedules import Time, wide
from ..sde import VPSDE, LinearSDE
from ..tableau import Tableau
from .black_box import is_stochastic, run_sampler, sampler_law, zero_noise

STEPS = (40, 80, 160, 320)
WEAK_STEPS = (160, 320, 640)
STRONG_STEPS = (32, 64, 128, 256)
SPAN = (-2.0, 1.0)
MEANS = (0.7, -0.3, 0.4, 0.9, -1.0)
VARIANCES = (0.04, 0.15, 0.5, 1.3, 2.0)
STARTS = (-1.5, 0.2, 1.1)

# A black box starts with steps that grow by RATIO from the GROWTH-th power of its inverse times the common
# one, so that what its first steps of lower order cost, the square of the very first, does not show.
RATIO, GROWTH = 1.5, 32


class Problem(NamedTuple):
    """Independent 1-D problems, (B,): the denoiser `D(y, lam)` and the exact solution `y(lam)`; `cases` says
    what they are."""

    denoised: Callable[[np.ndarray, float], np.ndarray]
    solution: Callable[[float], np.ndarray]
    cases: Sequence[str]


class Measured(NamedTuple):
    """The regressed order, the errors it was regressed from, and the case with the largest last error."""

    order: float
    errors: list[float]
    worst: str


def gaussians() -> Problem:
    """All pairs of a Gaussian and a starting point: `y = mean + (variance + e^(-2 lam))^(1/2) z` keeps z."""
    mean, variance = np.repeat(MEANS, len(STARTS)), np.repeat(VARIANCES, len(STARTS))
    z = np.tile(STARTS, len(MEANS))
    return Problem(
        lambda y, lam: mean + variance / (variance + np.exp(-2 * lam)) * (y - mean),
        lambda lam: mean + np.sqrt(variance + np.exp(-2 * lam)) * z,
        [f"N({m}, {v}) from z = {s}" for m, v, s in zip(mean, variance, z, strict=True)],
    )


def mixture(first: float = -3.0, last: float = SPAN[1]) -> Problem:
    """0.3 N(-1, 0.5^2) + 0.7 N(1.2, 0.8^2) from starts at lam = `first`; solution by DOP853 to 1e-12."""
    from scipy.integrate import solve_ivp

    log_w, mean, variance = np.log([0.3, 0.7]), np.array([-1.0, 1.2]), np.array([0.25, 0.64])

    def denoised(y: np.ndarray, lam: float) -> np.ndarray:
        d, v = y[:, None] - mean, variance + np.exp(-2 * lam)
        logits = log_w - 0.5 * (d**2 / v + np.log(v))
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return (weights * (mean + variance / v * d)).sum(1) / weights.sum(1)

    start = np.exp(-first) * np.array([-1.5, -0.6, 0.1, 0.4, 1.3])
    exact = solve_ivp(
        lambda lam, y: denoised(y, lam) - y, (first, last), start,
        method="DOP853", rtol=1e-13, atol=1e-13, max_step=0.02, dense_output=True,
    ).sol  # fmt: skip
    cases = [f"the mixture from y = {y:.4g} at lam = {first}" for y in start]
    return Problem(denoised, lambda lam: exact(min(lam, last)), cases)


def even_grid(sde: LinearSDE, steps: int, span: tuple[float, float] = SPAN, before: int = 0) -> Grid:
    """`steps` equal steps in lam over the span, and `before` more of them in front of it."""
    h = (span[1] - span[0]) / steps
    return Grid.of(sde, sde.time(2 * (span[0] + h * torch.arange(-before, steps + 1, dtype=torch.float64))))


def growing_grid(sde: LinearSDE, steps: int, span: tuple[float, float] = SPAN) -> Grid:
    """`steps` equal steps in lam over the span, with steps that grow up to their size in front of it."""
    h = (span[1] - span[0]) / steps
    head = h * RATIO ** -torch.arange(GROWTH, 0, -1, dtype=torch.float64)
    lam = torch.cat([-head.flip(0).cumsum(0).flip(0), h * torch.arange(steps + 1, dtype=torch.float64)])
    return Grid.of(sde, sde.time(2 * (span[0] + lam)))


def propagate(
    table: Tableau, denoised: Callable[[np.ndarray, int], np.ndarray], pinned: Sequence[np.ndarray]
) -> np.ndarray:
    """The last state of a deterministic table, row by row; rows k < len(pinned) see `pinned[k]`, not their
    own state.
    """
    skip, out, keep, mix = (value.tolist() for value in (table.skip, table.out, table.keep, table.mix))
    outputs: list[np.ndarray] = []  # newest first
    x = pinned[0]
    for k in range(len(table)):
        x = pinned[k] if k < len(pinned) else x
        outputs.insert(0, skip[k] * x + out[k] * denoised(x, k))
        x = keep[k] * x + sum(w * m for w, m in zip(mix[k], outputs, strict=False))
    return x


def order(
    solver: Any,
    sde: LinearSDE | None = None,
    problem: Problem | None = None,
    steps: Sequence[int] = STEPS,
    span: tuple[float, float] = SPAN,
) -> Measured:
    """Convergence order of a deterministic solver: slope of the largest error at the end of the span.

    The history of a multistep solver is seeded: of a table, the rows in front of the span, and those at its
    start, see the exact trajectory; of any other solver the first steps are tiny. (A method that starts by
    itself has a first step of order 1, hence is only of second order.)

    Raises ValueError for a solver with noise; see `weak_order` and `strong_order`.
    """
    sde, problem = sde or VPSDE(), problem or gaussians()
    denoise, coarse = Gaussian(torch.zeros(1), 0.5).denoiser(sde), even_grid(sde, 4, span).t
    if is_stochastic(solver, sde, denoise, torch.ones(1, 1, dtype=torch.float64), coarse):
        raise ValueError(f"expected a deterministic solver, found noise in {solver}; measure weak_order")
    measure = _error_of_table if hasattr(solver, "tableau") else _error_of_run
    gaps = [np.abs(measure(solver, sde, problem, n, span)) for n in steps]
    return _slope(steps, [float(gap.max()) for gap in gaps], problem.cases[int(gaps[-1].argmax())])


def _error_of_table(
    solver: Any, sde: LinearSDE, problem: Problem, steps: int, span: tuple[float, float]
) -> np.ndarray:
    memory = solver.tableau(sde, even_grid(sde, 4, span)).mix.shape[1]
    table = solver.tableau(sde, even_grid(sde, steps, span, before=memory))
    alpha, lam = sde.alpha(table.times).tolist(), (0.5 * sde.log_snr(table.times)).tolist()
    seeded = next(k for k, value in enumerate(lam) if value > span[0] + 1e-9)
    x = propagate(
        table,
        lambda x, k: problem.denoised(x / alpha[k], lam[k]),
        [alpha[k] * problem.solution(lam[k]) for k in range(seeded)],
    )
    return x / alpha[-1] - problem.solution(lam[-1])


def _error_of_run(
    solver: Any, sde: LinearSDE, problem: Problem, steps: int, span: tuple[float, float]
) -> np.ndarray:
    grid = growing_grid(sde, steps, span)
    alpha, lam = sde.alpha(grid.t), grid.lam.tolist()

    def denoise(x: Tensor, t: Time) -> Tensor:
        t = wide(t).flatten()[0]
        y = (x.double() / sde.alpha(t)).flatten().numpy()
        return torch.from_numpy(problem.denoised(y, 0.5 * float(sde.log_snr(t)))).to(x).reshape(x.shape)

    start = alpha[0] * torch.from_numpy(problem.solution(lam[0]))[None]
    x = run_sampler(solver, sde, denoise, start, grid.t, zero_noise)
    return (x.flatten() / alpha[-1]).numpy() - problem.solution(lam[-1])


def weak_order(
    solver: Any,
    sde: LinearSDE | None = None,
    steps: Sequence[int] = WEAK_STEPS,
    span: tuple[float, float] = SPAN,
    rounding: float = 1e-9,
) -> Measured:
    """Weak order of a stochastic solver, by exact law: slope of the largest error of mean and variance of y
    at the end.

    The run starts from the exact marginal and builds its history by itself: the one step of first order with
    which a multistep solver begins costs O(h^2), so weak orders up to 2 are seen, and not more. More steps
    than for `order`, because terms of the ODE's higher order fade slowly where there is little noise.
    `rounding` is the `tolerance` of `black_box.response`.
    """
    sde, law = sde or VPSDE(), Gaussian(torch.tensor(MEANS), torch.tensor(VARIANCES))
    errors, gaps = [], torch.zeros(0)
    for n in steps:
        grid = even_grid(sde, n, span)
        start, truth = law.marginal(sde, grid.t[0]), law.marginal(sde, grid.t[-1])
        if hasattr(solver, "tableau"):
            found = solver.tableau(sde, grid).law(law, sde, prior=start)
        else:
            found = sampler_law(solver, law, sde, grid.t, start=start, tolerance=rounding)
        alpha = sde.alpha(grid.t[-1])
        gaps = torch.cat([(found.mean - truth.mean) / alpha, (found.variance - truth.variance) / alpha**2])
        errors.append(float(gaps.abs().max()))
    moment, which = divmod(int(gaps.abs().argmax()), len(MEANS))
    return _slope(steps, errors, f"{('mean', 'variance')[moment]} of N({MEANS[which]}, {VARIANCES[which]})")


def snr(sde: LinearSDE, t: Tensor) -> Tensor:
    """alpha^2/sigma^2, the clock of the Brownian motion behind the reverse SDE with the data remembered."""
    return sde.log_snr(t).exp()


def strong_order(
    solver: Any,
    sde: LinearSDE | None = None,
    clock: Callable[[LinearSDE, Tensor], Tensor] = snr,
    law: Law | None = None,
    steps: Sequence[int] = STRONG_STEPS,
    span: tuple[float, float] = SPAN,
    *,
    paths: int = 256,
    seed: int = 0,
) -> Measured:
    """Strong order of a stochastic solver: slope of the root mean square distance of y between runs of n and
    of 2 n steps along the same Brownian paths.

    clock   what the solver's noise is an increment of, as a function of (sde, t): by default `snr`; of
            Euler-Maruyama it is t itself
    law     of the data, a mixture by default, for a linear drift hides terms

    The slope has a sampling error of about 0.4 paths^(-1/2).
    """
    sde = sde or VPSDE()
    law = law or Mixture([0.3, 0.7], torch.tensor([-1.0, 1.2]), torch.tensor([0.25, 0.64]))
    source = Noise.of(seed, batch=paths, dtype=torch.float64)
    ends = even_grid(sde, 1, span)
    times = torch.sort(clock(sde, ends.t)).values
    path = BrownianPath(source, (paths, *law.event_shape), float(times[0]), float(times[1]), depth=24)
    alpha, sigma = sde.alpha(ends.t), sde.sigma(ends.t)
    data = law.sample(paths, generator=torch.Generator(law.device).manual_seed(seed))
    start, denoise = alpha[0] * data + sigma[0] * source.prior(data.shape), law.denoiser(sde)

    def end(n: int) -> Tensor:
        grid = even_grid(sde, n, span)
        nodes = solver.tableau(sde, grid).times if hasattr(solver, "tableau") else grid.t
        ticks = clock(sde, nodes).clamp(path.start, path.stop)
        return run_sampler(solver, sde, denoise, start, grid.t, path.noise(ticks)) / alpha[1]

    ends_of = {n: end(n) for n in sorted({*steps, *(2 * n for n in steps)})}
    errors = [float((ends_of[n] - ends_of[2 * n]).square().mean().sqrt()) for n in steps]
    return _slope(steps, errors, f"{paths} paths of seed {seed}, {law}")


def _slope(steps: Sequence[int], errors: list[float], worst: str) -> Measured:
    if not all(0 < error < math.inf for error in errors):
        return Measured(math.nan, errors, worst)
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    return Measured(-float(slope), errors, worst)
