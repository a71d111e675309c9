"""Exponential singlestep (Runge-Kutta) solvers: every step starts from scratch and makes one call a stage.

Stage i gives an approximation `y_i = A_i x_s + sum_j w_ij m_j + C_i z` at the time where lam has gone the
fraction c_i of the step; the last has c = 1. Because exponential transitions compose, the base x_s is not
stored: row i eliminates it,

    y_i = (A_i/A_{i-1}) y_{i-1} + sum_j (w_ij - A_i/A_{i-1} w_{i-1,j}) m_j + (C_i^2 - (A_i/A_{i-1})^2
    C_{i-1}^2)^(1/2) z'.

The noise of a stage is thereby the first part of the noise of the next: one Brownian path inside the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..grids import Grid
from ..sde import LinearSDE
from ..tableau import Tableau, join
from .base import Card, TableSolver
from .weights import STORED, singular_step, step_weights


class Stage(NamedTuple):
    """Target, as a fraction of the step in lam, and the earlier outputs (0: at the base, j: at stage j's
    target) its polynomial goes through."""

    target: float
    nodes: tuple[int, ...]


def singlestep_table(
    sde: LinearSDE,
    starts: Tensor,
    ends: Tensor,
    stages: tuple[Stage, ...],
    *,
    stored: str,
    variable: str = "lam",
    tau: float = 0.0,
    spread: float = 1.0,
    name: str = "singlestep",
) -> Tableau:
    """All stages of the steps `starts[k] -> ends[k]`; a step to sigma = 0 or from alpha = 0 is a single row.

    Where the next step starts noisier than this one ends, forward noise (times `spread`) carries the state
    there, within the row that ends this step.
    """
    lam_s, lam_t = 0.5 * sde.log_snr(starts), 0.5 * sde.log_snr(ends)
    regular = torch.isfinite(lam_s) & torch.isfinite(lam_t)
    s, t, h = starts[regular], ends[regular], (lam_t - lam_s)[regular]
    targets = [
        t if stage.target == 1 else sde.time(2 * (lam_s[regular] + stage.target * h)) for stage in stages
    ]
    at = torch.stack([s, *targets], 1)  # (N, stages + 1): times of the outputs, and the end
    inner = at[:, :-1], *_rows(sde, at, stages, {"stored": stored, "variable": variable, "tau": tau})
    place = regular.cumsum(0) - 1  # of a regular step among its kind
    scale, forward = sde.transition(ends, torch.cat([starts[1:], ends[-1:]]))
    parts = []
    for k in range(len(starts)):
        if regular[k]:
            times, keep, mix, noise = (column[place[k]] for column in inner)
        else:
            first, weight, c = singular_step(sde, starts[k], ends[k], stored, tau)
            times, keep, mix, noise = (
                starts[k : k + 1],
                first[None],
                torch.nn.functional.pad(weight[None, None], (0, len(stages) - 1)),
                c[None],
            )
        if forward[k] > 0:
            last = torch.arange(len(times)) == len(times) - 1
            factor = torch.where(last, scale[k], 1.0)
            keep, mix, noise = (
                keep * factor,
                mix * factor[:, None],
                (noise * factor).hypot(spread * forward[k] * last),
            )
        parts.append((times, keep, mix, noise))
    times, keep, mix, noise = (torch.cat([part[i] for part in parts]) for i in range(4))
    skip, out = STORED[stored].rows(sde.alpha(times), sde.sigma(times))
    return Tableau(torch.cat([times, ends[-1:]]), skip, out, keep, mix, noise, name)


def _rows(
    sde: LinearSDE, at: Tensor, stages: tuple[Stage, ...], options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """keep (N, S), mix (N, S, S), noise (N, S) of all stages; mix by lag."""
    n, width = len(at), len(stages)
    rows = []
    A_before, w_before, C_before = (
        torch.ones(n, dtype=torch.float64),
        torch.zeros(n, width, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
    )
    for i, stage in enumerate(stages):
        A, b, C = step_weights(sde, at[:, 0], at[:, i + 1], at[:, list(stage.nodes)], **options)
        w = torch.zeros_like(w_before)
        w[:, list(stage.nodes)] = b
        ratio = A / A_before
        fresh = (C**2 - (ratio * C_before) ** 2).clamp_min(0).sqrt()
        lags = (w - ratio[:, None] * w_before)[:, list(range(i, -1, -1))]
        rows.append((ratio, torch.nn.functional.pad(lags, (0, width - i - 1)), fresh))
        A_before, w_before, C_before = A, w, C
    keep, mix, noise = (torch.stack([row[i] for row in rows], 1) for i in range(3))
    return keep, mix, noise


STAGES = {
    1: (Stage(1.0, (0,)),),
    2: (Stage(0.5, (0,)), Stage(1.0, (0, 1))),
    3: (Stage(1 / 3, (0,)), Stage(2 / 3, (0, 1)), Stage(1.0, (0, 1, 2))),
}
HEUN = (Stage(1.0, (0,)), Stage(1.0, (0, 1)))
MIDPOINT = (Stage(0.5, (0,)), Stage(1.0, (1,)))


def singlestep_solver(
    name: str,
    order: int,
    stages: tuple[Stage, ...],
    stored: str,
    variable: str = "lam",
    tau: float = 0.0,
    options: tuple = (),
    reference: str = "",
) -> TableSolver:
    """A singlestep solver as a named preset."""
    stochastic = tau > 0
    properties = frozenset(
        {"clock_free", "scale_covariant", "marginal_exact"}
        - ({"marginal_exact"} if stochastic and stored != "data" else set())
    )
    card = Card(
        None if stochastic else order,
        order if stochastic else None,
        len(stages),
        stochastic,
        reference,
        properties,
        memory=len(stages),
    )

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        return singlestep_table(
            sde, grid.t[:-1], grid.t[1:], stages, stored=stored, variable=variable, tau=tau, name=name
        )

    return TableSolver(name, build, card, options, calls=lambda steps: len(stages) * steps)


def heun() -> TableSolver:
    """Heun's method on `d(x/alpha) = eps d(sigma/alpha)`: Euler to the end of the step, then the trapezoid
    (Karras et al. 2022, arXiv:2206.00364, algorithm 1). Second order, two calls a step."""
    return singlestep_solver(
        "heun", 2, HEUN, "noise", "sigma/alpha", reference="Karras et al. 2022, arXiv:2206.00364"
    )


def midpoint() -> TableSolver:
    """The midpoint rule on `d(x/alpha) = eps d(sigma/alpha)`, the middle taken in lam (the "DPM-Solver-2" of
    Karras et al.'s comparison). Second order, two calls a step."""
    return singlestep_solver(
        "midpoint", 2, MIDPOINT, "noise", "sigma/alpha", reference="Karras et al. 2022, arXiv:2206.00364"
    )


def dpm_fast(stored: str = "noise") -> TableSolver:
    """DPM-Solver-fast: on a grid of N steps exactly N calls, taken as singlesteps of order 3 with one of
    order 2 and/or 1 at the end (Lu et al. 2022, arXiv:2206.00927, section 3.4)."""
    if stored not in ("noise", "data"):
        raise ValueError(f"expected stored 'noise' or 'data', found {stored!r}")

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        edges, parts = grid.t[torch.tensor([0, *_fast_orders(len(grid))]).cumsum(0)], []
        orders = _fast_orders(len(grid))
        for order in sorted(set(orders), reverse=True):
            chosen = torch.tensor([k for k, o in enumerate(orders) if o == order])
            parts.append(
                singlestep_table(
                    sde, edges[chosen], edges[chosen + 1], STAGES[order], stored=stored, name="dpm_fast"
                )
            )
        return join(parts)

    reference = "Lu et al. 2022, arXiv:2206.00927"
    return TableSolver(
        "dpm_fast",
        build,
        Card(
            None,
            None,
            1,
            False,
            reference,
            frozenset({"clock_free", "scale_covariant", "marginal_exact"}),
            memory=3,
        ),
        (("stored", stored),),
    )


def _fast_orders(calls: int) -> list[int]:
    """3, 3, ..., and a rest of 2 + 1, 1 or 2 calls, as published."""
    threes, rest = divmod(calls, 3)
    if rest:
        return [3] * threes + [rest]
    return [3] * (threes - 1) + [2, 1]


def edm(churn: float = 40.0, low: float = 0.05, high: float = 50.0, spread: float = 1.003) -> TableSolver:
    """The stochastic sampler of EDM: before each Heun step the noise level sigma/alpha within [low, high] is
    raised by the factor `1 + min(churn/N, 2^(1/2) - 1)`.

    `spread` is S_noise, the factor on the fresh noise (Karras et al. 2022, arXiv:2206.00364, algorithm 2).
    The first node, where the state is the prior's, is not raised, and none beyond the noise of t_max.
    """
    if not (churn >= 0 and 0 <= low <= high and spread > 0):
        raise ValueError(
            f"expected churn >= 0, 0 <= low <= high, spread > 0; found {churn}, {low}, {high}, {spread}"
        )

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        level = (-grid.lam[:-1]).exp()
        raised = (level >= low) & (level <= high) & (torch.arange(len(grid)) > 0)
        gamma = min(churn / len(grid), 2**0.5 - 1)
        starts = (
            torch.where(raised, _raised(sde, grid.lam[:-1], gamma), grid.t[:-1]) if gamma else grid.t[:-1]
        )
        return singlestep_table(
            sde, starts, grid.t[1:], HEUN, stored="noise", variable="sigma/alpha", spread=spread, name="edm"
        )

    options = (("churn", churn), ("low", low), ("high", high), ("spread", spread))
    card = Card(
        None,
        None,
        2,
        churn > 0,
        "Karras et al. 2022, arXiv:2206.00364",
        frozenset(
            {"clock_free", "scale_covariant"} | ({"marginal_exact"} if spread == 1 or churn == 0 else set())
        ),
        memory=2,
    )
    return TableSolver("edm", build, card, options, calls=lambda steps: 2 * steps)


def _raised(sde: LinearSDE, lam: Tensor, gamma: float) -> Tensor:
    """Times at which sigma/alpha is 1 + gamma times what it is at lam, at most t_max: no network knows later
    ones."""
    return sde.time(2 * (lam - math.log1p(gamma))).clamp(max=sde.t_max)


def restart(intervals: Sequence[tuple[float, float, int, int]] = ((0.1, 0.3, 2, 4),)) -> TableSolver:
    """Restart sampling: Heun down the grid; on reaching `low`, go back to `high` with forward noise and come
    down again in `steps` Heun steps, `times` over.

    intervals: (low, high, times, steps) in noise levels sigma/alpha, not overlapping (Xu et al. 2023,
    arXiv:2306.14878, algorithm 1). The inner grids are Karras' with rho 7. Each interval hangs at the grid
    node nearest to `low` from above the end. Raises ValueError in `solve` for a `high` above that of
    t_max.
    """
    if not isinstance(intervals, Sequence) or not all(len(interval) == 4 for interval in intervals):
        raise ValueError(f"expected intervals (low, high, times, steps), found {intervals!r}")
    for low, high, times, steps in intervals:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (times, steps))
        if not (0 < low < high and whole and times >= 1 and steps >= 1):
            raise ValueError(
                "expected intervals (low, high, times, steps) with 0 < low < high, times >= 1, steps >= 1, "
                f"the last two whole numbers; found {(low, high, times, steps)}"
            )
    repeats = sum(2 * times * steps for _, _, times, steps in intervals)

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        most = float((-0.5 * sde.log_snr(sde.t_max)).exp())
        for _, high, _, _ in intervals:
            if high > most * (1 + 1e-9):
                raise ValueError(
                    f"expected to restart within the process, from sigma/alpha <= {most:.6g} at t_max, "
                    f"found high={high}"
                )
        starts, ends = grid.t[:-1].tolist(), grid.t[1:].tolist()
        regular = [k for k in range(len(ends)) if float(sde.sigma(ends[k])) > 0]
        inserts = []
        for low, high, times, steps in intervals:
            if regular:
                node = min(regular, key=lambda k: abs(float(grid.lam[k + 1]) + math.log(low)))
                bottom = math.exp(-float(grid.lam[node + 1]))
                if bottom < high:
                    inner = _noise_levels(sde, high, bottom, steps)
                    inserts.append((node, inner[:-1] * times, [*inner[1:-1], ends[node]] * times))
        for node, more_starts, more_ends in sorted(inserts, reverse=True):
            starts[node + 1 :] = [*more_starts, *starts[node + 1 :]]
            ends[node + 1 :] = [*more_ends, *ends[node + 1 :]]
        steps_from, steps_to = (torch.tensor(column, dtype=torch.float64) for column in (starts, ends))
        return singlestep_table(
            sde, steps_from, steps_to, HEUN, stored="noise", variable="sigma/alpha", name="restart"
        )

    card = Card(
        None,
        None,
        2,
        True,
        "Xu et al. 2023, arXiv:2306.14878",
        frozenset({"clock_free", "scale_covariant", "marginal_exact"}),
        memory=2,
    )
    return TableSolver(
        "restart", build, card, (("intervals", tuple(intervals)),), calls=lambda steps: 2 * steps + repeats
    )


def _noise_levels(sde: LinearSDE, high: float, low: float, steps: int, rho: float = 7.0) -> list[float]:
    """Times with sigma/alpha from high to low, equidistant in its rho-th root."""
    fraction = torch.arange(steps + 1, dtype=torch.float64) / steps
    root = high ** (1 / rho) + fraction * (low ** (1 / rho) - high ** (1 / rho))
    return sde.time(-2 * rho * root.log()).clamp(max=sde.t_max).tolist()
