"""Deterministic tables in the coordinates that they are tuned in.

Every deterministic table is a non-stationary solver over states and denoised outputs (Shaul et al. 2024,
arXiv:2403.01329),

    x_{k+1} = keep_k x_k + sum_{j <= k} weights_kj D_j,        D_j = D(x_j, t_j).

On data concentrated at a point c all outputs are c, and the states `A_k c + S_k eps` with

    S_{k+1} = keep_k S_k,        A_{k+1} = keep_k A_k + sum_j weights_kj.

The law of the point is kept iff the first and the last are (alpha, sigma) at the ends of the grid. Between
them a tuned table may leave the marginals: the model is asked at a time of its own for a state that looks
like one of another time and scale, as far as that helps. So a table is given by its times, the A_k and S_k
inside, and its weights below the diagonal.

Nor need the first call be about the time of the start. At t_max a state is almost pure noise, and D(x_0, t_0)
is all but the mean of the data: a call for nothing. Asked about the same x_0 as if it were of a time between
t_0 and t_1 the model says nearly what it will say there, since until then little but noise has gone by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..grids import Grid
from ..sde import LinearSDE
from ..solvers.base import TableSolver
from ..tableau import Tableau

# Nodes move in (sigma/(alpha + sigma))^(1/4): finite at both ends, and on good grids nearly even.
ROOT = 4


class Form(NamedTuple):
    """M tables of K rows: `times` (M, K + 1), `keep` (M, K), `weights` (M, K, K), 0 above the diagonal."""

    times: Tensor
    keep: Tensor
    weights: Tensor


def flat(form: Form) -> Tensor:
    """(M, F): the times, what is kept and the weights of every table, in one axis."""
    return torch.cat([form.times, form.keep, form.weights.flatten(-2)], -1)


@torch.no_grad()
def natural(table: Tableau) -> Form:
    """A deterministic table as a form of one. Raises ValueError for a stochastic one."""
    if bool(table.noise.any()):
        raise ValueError(f"expected a deterministic solver to tune, found noise in {table.name}")
    form = table.canonical()
    keep = form.a[1:] / form.a[:-1]
    weights = (form.B[1:] - keep[:, None] * form.B[:-1]).tril()
    return Form(table.times[None], keep[None], weights[None])


@torch.no_grad()
def completed(sde: LinearSDE, times: Tensor, below: Tensor, shift: Tensor, stretch: Tensor) -> Form:
    """The tables with these times (M, K + 1) and weights (M, K, K), of which only those below the diagonal
    are read, that keep the law of a point mass by way of

        A_k = alpha_k + shift_k sigma_k,        S_k = sigma_k e^{stretch_k}

    at the nodes inside, (M, K - 1)."""
    shift, stretch = pad(shift, (1, 1)), pad(stretch, (1, 1))
    S = sde.sigma(times)
    A, S = sde.alpha(times) + shift * S, S * stretch.exp()
    keep = S[:, 1:] / S[:, :-1]
    below = below.tril(-1)
    newest = A[:, 1:] - keep * A[:, :-1] - below.sum(2)
    return Form(times, keep, below + torch.diag_embed(newest))


@dataclass(frozen=True, eq=False)
class Space:
    """The tables around a solver on a grid, by parameters (P,) that are 0 for the solver itself.

    If `moves`, the first `len(grid)` of them are logarithms of factors on the steps between the grid's nodes,
    whose ends stay, and the next one is added to `late`: the first call is about the time 1 - e^{-late^2} of
    the way to the second node. If weights are `free`, the next ones are added to those below the diagonal, in
    units of the largest weight of their row in the solver's table, and the last ones are the shifts and
    stretches of the states inside (see `completed`): such tables keep the law of a point mass.
    """

    sde: LinearSDE
    solver: TableSolver
    grid: Grid
    moves: bool
    free: bool
    late: float = 0.0

    def __len__(self) -> int:
        """P."""
        rows = self.solver.calls(len(self.grid))
        return self.timing + self.free * (rows - 1) * (rows + 4) // 2

    @property
    def timing(self) -> int:
        """How many of the parameters, from the first, are about times."""
        return self.moves * (len(self.grid) + 1)

    @torch.no_grad()
    def forms(self, parameters: Tensor) -> Form:
        """The tables of parameters (M, P). Raises ValueError where steps vanish."""
        timing, rest = parameters.split([self.timing, len(self) - self.timing], 1)
        timing = timing if self.moves else parameters.new_zeros(len(parameters), len(self.grid) + 1)
        different, which = timing[:, :-1].unique(dim=0, return_inverse=True)
        tables = [self._natural(factors) for factors in different]
        form = Form(*(torch.cat(parts)[which] for parts in zip(*tables, strict=True)))
        asked = torch.cat([self._first(form.times, timing[:, -1])[:, None], form.times[:, 1:]], 1)
        if not self.free:
            return form._replace(times=asked)
        below = torch.ones_like(form.weights[0], dtype=torch.bool).tril(-1)
        inside = len(below) - 1
        weights, shift, stretch = rest.split([int(below.sum()), inside, inside], 1)
        change = torch.zeros_like(form.weights)
        change[:, below] = weights
        unit = self._own.weights.abs().amax(2, keepdim=True)
        # Where the state is first is where the grid begins, whatever the solver asks there.
        places = torch.cat([self.grid.t[:1].expand(len(asked), 1), form.times[:, 1:]], 1)
        made = completed(self.sde, places, form.weights + unit * change, shift, stretch)
        return made._replace(times=asked)

    def jacobian(self, parameters: Tensor) -> Tensor:
        """(F, P): derivatives of `flat(forms(parameters))`, which take no call of a model, by differences."""
        width = torch.finfo(torch.float64).eps ** 0.5
        steps = width * torch.eye(1 + len(self), dtype=torch.float64)[:, 1:]  # none, then each
        here, *beside = flat(self.forms(parameters + steps))
        return (torch.stack(beside) - here).T / width

    def _natural(self, logs: Tensor) -> Form:
        """The solver's own table on a grid moved by `logs`."""
        return natural(self.solver.tableau(self.sde, self.moved(logs))) if bool(logs.any()) else self._own

    def _first(self, times: Tensor, later: Tensor) -> Tensor:
        """(M,): the time that the first call is about, for nodes `times` (M, K + 1) and what `late` is
        changed by (M,)."""
        late = self.late + later
        place = self._place(times[:, :2])
        moved = self._time(place[:, 0] - torch.expm1(-late.square()) * (place[:, 1] - place[:, 0]))
        return torch.where(late == 0, times[:, 0], moved)

    def _place(self, t: Tensor) -> Tensor:
        """What nodes move in."""
        return (-0.5 * self.sde.log_snr(t)).sigmoid() ** (1 / ROOT)

    def _time(self, place: Tensor) -> Tensor:
        share = place**ROOT
        return self.sde.time(2 * (torch.log1p(-share) - share.log()))

    @cached_property
    def _own(self) -> Form:
        return natural(self.solver.tableau(self.sde, self.grid))

    def table(self, parameters: Tensor) -> Tableau:
        """The table of parameters (P,): the solver's own on another grid, or if weights are free one that
        remembers outputs D."""
        name, start = f"{self.solver.name} tuned", float(self.grid.t[0])
        times, keep, weights = (part[0] for part in self.forms(parameters[None]))
        start = None if float(times[0]) == start else start
        if not self.free:
            own = self.solver.tableau(self.sde, self.moved(parameters))
            return replace(own, times=times, name=name, start=start)
        rows = len(keep)
        mix = torch.zeros(rows, rows, dtype=torch.float64)
        for k in range(rows):
            mix[k, : k + 1] = weights[k, : k + 1].flip(0)
        none, one = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
        return Tableau(times, none, one, keep, mix, none, name, start)

    def retimed(self, parameters: Tensor, *, moves: bool, free: bool) -> Space:
        """The tables around the solver with the times of parameters (P,), where others may change."""
        made = replace(self, moves=moves, free=free)
        if not self.moves:
            return made
        late = self.late + float(parameters[len(self.grid)])
        return replace(made, grid=self.moved(parameters), late=late)

    def moved(self, logs: Tensor) -> Grid:
        """The grid with its steps times exp(logs) (what follows in `logs` is not read), scaled to its ends;
        where a last step leaves the sde's range for sigma = 0, it starts from the last node in range as
        before."""
        t = self.grid.t
        apart = int(t[-1] < self.sde.t_min * (1 - 1e-12))
        held = t[: len(t) - apart]
        logs = logs[: len(held) - 1]
        if not bool(logs.any()):
            return self.grid
        place = self._place(held)
        steps = place.diff() * logs.exp()
        inner = self._time(place[0] + steps.cumsum(0)[:-1] * (place[-1] - place[0]) / steps.sum())
        return Grid.of(self.sde, torch.cat([t[:1], inner, t[len(held) - 1 :]]))
