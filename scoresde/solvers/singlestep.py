"""Exponential singlestep (Runge-Kutta) solvers: every step starts from scratch and makes one call a stage.

Stage i gives an approximation `y_i = A_i x_s + sum_j w_ij m_j + C_i z` at the time where lam has gone the fraction c_i of the step; the last has c = 1.
Because exponential transitions compose, the base x_s is not stored: row i eliminates it,

    y_i = (A_i/A_{i-1}) y_{i-1} + sum_j (w_ij - A_i/A_{i-1} w_{i-1,j}) m_j + (C_i^2 - (A_i/A_{i-1})^2 C_{i-1}^2)^(1/2) z'.

The noise of a stage is thereby the first part of the noise of the next: one Brownian path inside the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..grids import Grid
from ..sde import LinearSDE
from ..tableau import Tableau
from .base import Card, TableSolver
from .weights import STORED, singular_step, step_weights


class Stage(NamedTuple):
    """Target, as a fraction of the step in lam, and the earlier outputs (0: at the base, j: at stage j's target) its polynomial goes through."""

    target: float
    nodes: tuple[int, ...]


def singlestep_table(
    sde: LinearSDE, grid: Grid, stages: tuple[Stage, ...], *, stored: str, variable: str = "lam", tau: float = 0.0, name: str = "singlestep"
) -> Tableau:
    """All stages of every step; a step to sigma = 0 or from alpha = 0 is a single row."""
    regular = torch.isfinite(grid.lam[:-1]) & torch.isfinite(grid.lam[1:])
    steps = regular.nonzero()[:, 0]
    s, t = grid.t[steps], grid.t[steps + 1]
    lam_s, lam_t = grid.lam[steps], grid.lam[steps + 1]
    targets = [t if stage.target == 1 else sde.time(2 * (lam_s + stage.target * (lam_t - lam_s))) for stage in stages]
    at = torch.stack([s, *targets], 1)  # (N, stages + 1): times of the outputs, and the end
    keep, mix, noise = _rows(sde, at, stages, {"stored": stored, "variable": variable, "tau": tau})
    parts, done = [], 0
    for k in range(len(grid)):
        if regular[k]:
            i, done = done, done + 1
            parts.append((at[i, :-1], keep[i], mix[i], noise[i]))
        else:
            first, weight, c = singular_step(sde, grid, k, stored, tau)
            parts.append((grid.t[k : k + 1], first[None], torch.nn.functional.pad(weight[None, None], (0, len(stages) - 1)), c[None]))
    times, keep, mix, noise = (torch.cat(column) for column in zip(*parts, strict=True))
    skip, out = STORED[stored].rows(sde.alpha(times), sde.sigma(times))
    return Tableau(torch.cat([times, grid.t[-1:]]), skip, out, keep, mix, noise, name)


def _rows(sde: LinearSDE, at: Tensor, stages: tuple[Stage, ...], options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """keep (N, S), mix (N, S, S), noise (N, S) of all stages; mix by lag."""
    n, width = len(at), len(stages)
    rows = []
    A_before, w_before, C_before = torch.ones(n, dtype=torch.float64), torch.zeros(n, width, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)  # noqa: N806
    for i, stage in enumerate(stages):
        A, b, C = step_weights(sde, at[:, 0], at[:, i + 1], at[:, list(stage.nodes)], **options)  # noqa: N806
        w = torch.zeros_like(w_before)
        w[:, list(stage.nodes)] = b
        ratio = A / A_before
        fresh = (C**2 - (ratio * C_before) ** 2).clamp_min(0).sqrt()
        lags = (w - ratio[:, None] * w_before)[:, list(range(i, -1, -1))]
        rows.append((ratio, torch.nn.functional.pad(lags, (0, width - i - 1)), fresh))
        A_before, w_before, C_before = A, w, C  # noqa: N806
    keep, mix, noise = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    return keep, mix, noise


STAGES = {
    1: (Stage(1.0, (0,)),),
    2: (Stage(0.5, (0,)), Stage(1.0, (0, 1))),
    3: (Stage(1 / 3, (0,)), Stage(2 / 3, (0, 1)), Stage(1.0, (0, 1, 2))),
}
HEUN = (Stage(1.0, (0,)), Stage(1.0, (0, 1)))
MIDPOINT = (Stage(0.5, (0,)), Stage(1.0, (1,)))


def singlestep_solver(
    name: str, order: int, stages: tuple[Stage, ...], stored: str, variable: str = "lam", tau: float = 0.0, options: tuple = (), reference: str = ""
) -> TableSolver:
    """A singlestep solver as a named preset."""
    stochastic = tau > 0
    properties = frozenset({"clock_free", "scale_covariant", "marginal_exact"} - ({"marginal_exact"} if stochastic and stored != "data" else set()))
    card = Card(None if stochastic else order, order if stochastic else None, len(stages), stochastic, reference, properties, memory=len(stages))

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        return singlestep_table(sde, grid, stages, stored=stored, variable=variable, tau=tau, name=name)

    return TableSolver(name, build, card, options, calls=lambda steps: len(stages) * steps)


def heun() -> TableSolver:
    """Heun's method on `d(x/alpha) = eps d(sigma/alpha)`: Euler to the end of the step, then the trapezoid (Karras et al. 2022, arXiv:2206.00364, algorithm 1). Second order, two calls a step."""
    return singlestep_solver("heun", 2, HEUN, "noise", "sigma/alpha", reference="Karras et al. 2022, arXiv:2206.00364")


def midpoint() -> TableSolver:
    """The midpoint rule on `d(x/alpha) = eps d(sigma/alpha)`, the middle taken in lam (the "DPM-Solver-2" of Karras et al.'s comparison). Second order, two calls a step."""
    return singlestep_solver("midpoint", 2, MIDPOINT, "noise", "sigma/alpha", reference="Karras et al. 2022, arXiv:2206.00364")
