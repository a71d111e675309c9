"""How the order of a solver is measured, and which solvers are measured.

Everything is stated in half-log-SNR `lam` and in the scaled coordinate `y = x/alpha`, in which the
probability-flow ODE is `dy/dlam = D - y` for every process, so that one problem serves all of them.

The span of lam starts noisy (-2 by default): from further out the start-up errors of low order would be
hidden. Several laws and starting points are measured together and the largest error is regressed, because a
single one may superconverge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp

from scoresde import solvers
from scoresde.grids import Grid
from scoresde.laws import Gaussian
from scoresde.sde import LinearSDE
from scoresde.solvers.base import Solver, TableSolver
from scoresde.tableau import Tableau

STEPS = (40, 80, 160, 320)
WEAK_STEPS = (160, 320, 640)
SPAN = (-2.0, 1.0)
MEANS = (0.7, -0.3, 0.4, 0.9, -1.0)
VARIANCES = (0.04, 0.15, 0.5, 1.3, 2.0)
STARTS = (-1.5, 0.2, 1.1)


class Problem(NamedTuple):
    """Independent 1-D problems, (B,): the denoiser `D(y, lam)` and the exact solution `y(lam)`."""

    denoised: Callable[[np.ndarray, float], np.ndarray]
    solution: Callable[[float], np.ndarray]


class Measured(NamedTuple):
    """The regressed order and the errors it was regressed from."""

    order: float
    errors: list[float]


def gaussians() -> Problem:
    """All pairs of a Gaussian and a starting point: `y = mean + (variance + e^(-2 lam))^(1/2) z` keeps z."""
    mean, variance = np.repeat(MEANS, len(STARTS)), np.repeat(VARIANCES, len(STARTS))
    z = np.tile(STARTS, len(MEANS))
    return Problem(
        lambda y, lam: mean + variance / (variance + np.exp(-2 * lam)) * (y - mean),
        lambda lam: mean + np.sqrt(variance + np.exp(-2 * lam)) * z,
    )


def mixture(first: float = -3.0, last: float = SPAN[1]) -> Problem:
    """0.3 N(-1, 0.5^2) + 0.7 N(1.2, 0.8^2) from starts at lam = `first`; solution by DOP853 to 1e-12."""
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
    return Problem(denoised, lambda lam: exact(min(lam, last)))


def even_grid(sde: LinearSDE, steps: int, span: tuple[float, float] = SPAN, before: int = 0) -> Grid:
    """`steps` equal steps in lam over the span, and `before` more of them in front of it."""
    h = (span[1] - span[0]) / steps
    return Grid.of(sde, sde.time(2 * (span[0] + h * torch.arange(-before, steps + 1, dtype=torch.float64))))


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
    solver: TableSolver,
    sde: LinearSDE,
    problem: Problem | None = None,
    steps: Sequence[int] = STEPS,
    span: tuple[float, float] = SPAN,
) -> Measured:
    """Convergence order of a deterministic solver: slope of the largest error at the end of the span.

    The history of a multistep solver is seeded: the rows in front of the span, and those at its start, see
    the exact trajectory. (A method that starts by itself has a first step of order 1, hence is only of second
    order.)
    """
    problem = gaussians() if problem is None else problem
    return _slope(steps, [_error(solver, sde, problem, n, span) for n in steps])


def _error(
    solver: TableSolver, sde: LinearSDE, problem: Problem, steps: int, span: tuple[float, float]
) -> float:
    table = solver.tableau(sde, even_grid(sde, steps, span, before=solver.card.memory))
    alpha, lam = sde.alpha(table.times).tolist(), (0.5 * sde.log_snr(table.times)).tolist()
    seeded = next(k for k, value in enumerate(lam) if value > span[0] + 1e-9)
    x = propagate(
        table,
        lambda x, k: problem.denoised(x / alpha[k], lam[k]),
        [alpha[k] * problem.solution(lam[k]) for k in range(seeded)],
    )
    return float(np.abs(x / alpha[-1] - problem.solution(lam[-1])).max())


def weak_order(
    solver: TableSolver, sde: LinearSDE, steps: Sequence[int] = WEAK_STEPS, span: tuple[float, float] = SPAN
) -> Measured:
    """Weak order of a stochastic solver, by exact law: slope of the largest error of mean and variance of y
    at the end.

    The run starts from the exact marginal and builds its history by itself: the one step of first order with
    which a multistep solver begins costs O(h^2), so weak orders up to 2 are seen, and not more. More steps
    than for `order`, because terms of the ODE's higher order fade slowly where there is little noise.
    """
    law = Gaussian(torch.tensor(MEANS), torch.tensor(VARIANCES))
    errors = []
    for n in steps:
        grid = even_grid(sde, n, span)
        start, truth = law.marginal(sde, grid.t[0]), law.marginal(sde, grid.t[-1])
        found, alpha = solver.tableau(sde, grid).law(law, sde, prior=start), sde.alpha(grid.t[-1])
        gaps = [(found.mean - truth.mean) / alpha, (found.variance - truth.variance) / alpha**2]
        errors.append(float(torch.cat(gaps).abs().max()))
    return _slope(steps, errors)


def _slope(steps: Sequence[int], errors: list[float]) -> Measured:
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    return Measured(-float(slope), errors)


def examples() -> dict[str, Solver]:
    """Name -> solver object with all options worth testing: the library's own list, and further members of
    its family.
    """
    corners = [
        *(solvers.exponential(2, stored=stored) for stored in ("noise", "velocity", "flow")),
        *(solvers.exponential(2, variable=variable) for variable in ("sigma/alpha", "sigma", "t")),
        *(
            solvers.exponential(p, corrector=p + 1, stored=s)
            for p, s in ((1, "data"), (2, "noise"), (3, "velocity"))
        ),
        solvers.exponential(3, stored="flow", variable="sigma"),
        solvers.exponential(4, stored="velocity", variable="t"),
        solvers.exponential(2, corrector=3, tau=1.3),
        solvers.exponential(2, stored="noise", tau=0.5),
    ]
    return {**{repr(solver): solver for solver in corners}, **solvers.examples()}


def table_solvers() -> dict[str, TableSolver]:
    """The examples that are tables on any grid."""
    return {name: s for name, s in examples().items() if isinstance(s, TableSolver) and not is_historical(s)}


def is_historical(solver: TableSolver) -> bool:
    """Whether the solver is a sampler of score_sde, which steps by 1/K on K times whatever they are."""
    return ("rule", "score_sde") in solver.options
