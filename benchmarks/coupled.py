"""Exact samples that follow a stochastic sampler along its noise, so that few samples tell their laws apart.

A sample of n ends has a distance of its own to the law that it comes from, 100 times what good samplers are
off. Ends of an exact solution from the same states, along the same noise, have nearly the same one: what is
left of the difference of both is the sampler's error. It is unbiased however well the two agree, for the
solution's ends have the right law by themselves.

A sampler's noise level: in the step from t_k to t_{k+1} the reverse SDE of level tau, dA = tau^2 d lam, adds
noise of variance

    sigma_{k+1}^2 (1 - exp(-2 (A_{k+1} - A_k))),

so that A follows from one run on unit vectors of noise. The solution is that of the reverse SDE of this
level, in many steps within each of the sampler's. Their normals are xi = eta + u (z - <u, eta>) with fresh
eta: independent and standard for every unit vector u, and with u_j^2 in proportion to exp(2 A_{j+1}) -
exp(2 A_j) their sum over the step is the sampler's normal z.

`scoresde.select.coupling` does this for tables, many at once and on one Brownian motion; public samplers are
no tables, and are followed at the level of each of their steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import solvers
from scoresde.denoiser import BaseDenoiser
from scoresde.grids import Grid
from scoresde.schedules import Time
from scoresde.sde import LinearSDE

# Steps of the solution for t from 1 to 0, the closer the smaller t, and 1 + tau times as many: its error in
# law is in proportion to tau^4. It follows no higher level than the last, at which it would be unstable.
DENSE, HIGHEST = 80, 1.5
Solve = Callable[[BaseDenoiser, Tensor, int, Callable[[int], Tensor]], Tensor | None]
Noise = Callable[[int], Tensor]


class Probe(BaseDenoiser):
    """D = 0, and what was in each row of x (R, 1) when it was first not zero."""

    def __init__(self, sde: LinearSDE, rows: int) -> None:
        super().__init__()
        self.sde, self.first = sde, torch.zeros(rows, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        self.first = torch.where(self.first == 0, x[:, 0], self.first)

    def forward(self, x: Tensor, t: Time) -> Tensor:
        self.see(x)
        return torch.zeros_like(x)


class Way(NamedTuple):
    """A sampler's nodes (N + 1,), A there, and what each of its normals (N, R), R a step, adds."""

    grid: Grid
    A: Tensor
    responses: Tensor

    def key(self) -> tuple[float, ...]:
        """The same for samplers that one solution serves."""
        parts = self.grid.t, self.A, self.responses
        return tuple(round(value, 6) for part in parts for value in part.flatten().tolist())

    def levels(self) -> Tensor:
        """tau (N,) of every step."""
        return (self.A.diff() / self.grid.lam.diff()).sqrt().clamp_max(HIGHEST)

    def level(self, lam: Tensor) -> Tensor:
        """tau, constant in a step."""
        tau = self.levels()
        return tau[
            (torch.searchsorted(self.grid.lam, lam.contiguous(), right=True) - 1).clamp(0, len(tau) - 1)
        ]

    def normal(self, k: int, noise: Noise) -> Tensor | None:
        """Of step k; None if it adds no noise."""
        response, each = self.responses[k], self.responses.shape[1]
        size = response.norm()
        if size == 0:
            return None
        parts = [weight / size * noise(each * k + r) for r, weight in enumerate(response) if weight != 0]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def way_of(solve: Solve, sde: LinearSDE, grid: Grid, calls: int) -> Way | None:
    """How a sampler adds noise; None if it cannot do so few steps. One that asks for noise a number of times
    that steps do not share evenly is followed as far as that goes."""
    most, asked = 4 * calls, 0
    probe = Probe(sde, most)

    def unit(k: int) -> Tensor:
        nonlocal asked
        asked = max(asked, k + 1)
        return torch.eye(most, dtype=torch.float64)[:, k : k + 1]

    with torch.no_grad():
        ends = solve(probe, torch.zeros(most, 1, dtype=torch.float64), calls, unit)
    if ends is None:
        return None
    probe.see(ends)
    each = max(1, asked // len(grid))
    responses = probe.first[: len(grid) * each].view(len(grid), each)
    share = responses.square().sum(1) / sde.sigma(grid.t[1:]) ** 2
    A = -0.5 * torch.log1p(-share.clamp_max(1 - 1e-9))
    return Way(grid, torch.cat([A.new_zeros(1), A.cumsum(0)]), responses)


def dense(t: Tensor, tau: Tensor) -> tuple[Tensor, list[int]]:
    """Nodes between those of t (N + 1,), and how many steps each step has: even in sqrt(t)."""
    nodes, pieces = [t[:1]], []
    for k, (a, b) in enumerate(itertools.pairwise(t.sqrt().tolist())):
        m = max(1, math.ceil(DENSE * (1 + tau[k].item()) * (a - b) - 1e-9))
        inner = torch.linspace(a, b, m + 1, dtype=t.dtype)[1:-1] ** 2
        nodes += [inner, t[k + 1 : k + 2]]
        pieces.append(m)
    return torch.cat(nodes), pieces


def shared(z: Tensor | None, etas: list[Tensor], weights: Tensor) -> list[Tensor]:
    """The normals of the steps within one, from what is fresh and that of the whole: xi = eta + u (z - <u,
    eta>)."""
    if z is None:
        return etas
    u = weights.sqrt() / weights.sum().sqrt()
    rest = z - sum(part * eta for part, eta in zip(u, etas, strict=True))
    return [eta + part * rest for part, eta in zip(u, etas, strict=True)]


def follow(
    way: Way, model: BaseDenoiser, x: Tensor, noise: Noise, fresh: Callable[[int, int], Tensor]
) -> Tensor:
    """Ends of the solution from x: noise(k) are the sampler's normals, fresh(k, j) those of step j within its
    step k."""
    t, pieces = dense(way.grid.t, way.levels())
    grid = Grid.of(model.sde, t)
    tau = way.level(grid.lam[:-1])
    A = torch.cat([tau.new_zeros(1), (tau**2 * grid.lam.diff()).cumsum(0)])
    variances = ((2 * (A - A[-1])).exp().diff()).split(pieces)
    stochastic = bool((tau > 0).any())
    solver = solvers.exponential(
        3, corrector=4, stored="data", variable="t", tau=way.level if stochastic else 0.0
    )
    owner = [(k, j) for k, m in enumerate(pieces) for j in range(m)]
    step: list[Tensor] = []

    def source(i: int, shape: object) -> Tensor:
        nonlocal step
        k, j = owner[i]
        if j == 0:
            etas = [fresh(k, i) for i in range(pieces[k])]
            step = shared(way.normal(k, noise), etas, variances[k])
        return step[j]

    return solver.solve(model, x, grid, noise=source if stochastic else None).x
