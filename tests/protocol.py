"""Which solvers are tested, and what they are tried on. How orders are measured: scoresde.testing.orders."""

from __future__ import annotations

from functools import cache

import torch

from scoresde import solvers
from scoresde.denoiser import BaseDenoiser
from scoresde.grids import Grid
from scoresde.schedules import Cosine
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE
from scoresde.solvers.base import Solver, TableSolver
from scoresde.tableau import Tableau

VP = VPSDE()
SDES: dict[str, LinearSDE] = {
    "vp": VP,
    "cosine": VPSDE(schedule=Cosine()),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDM(),
    "rectified": Rectified(),
}


@cache
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


@cache
def table_solvers() -> dict[str, TableSolver]:
    """The examples that are tables on any grid."""
    return {name: s for name, s in examples().items() if isinstance(s, TableSolver) and not is_historical(s)}


def is_historical(solver: TableSolver) -> bool:
    """Whether the solver is a sampler of score_sde, which steps by 1/K on K times whatever they are."""
    return ("rule", "score_sde") in solver.options


class Wavy(BaseDenoiser):
    """Some smooth non-linear function of x and t; equality with a loop needs no more."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.sde = sde

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 + (x / (1 + self.sde.sigma(t))).tanh()


class Point(Wavy):
    """E[x_0 | x_t] of data concentrated at 1."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def regular(sde: LinearSDE, steps: int) -> Grid:
    """Nodes with signal and noise, unevenly spaced."""
    lam = torch.linspace(-2.2, 1.9, steps + 1, dtype=torch.float64)
    return Grid.of(sde, sde.time(2 * (lam + 0.1 * (3 * lam).sin())))


def spread(table: Tableau, other: Tableau) -> float:
    """The largest difference of the canonical forms of two tables, relative to their largest coefficient if
    that is above 1."""
    assert torch.equal(table.times, other.times)
    a, b = table.canonical(), other.canonical()
    scale = max(1.0, *(float(value.abs().max()) for value in a[1:]))
    return max(float((x - y).abs().max()) for x, y in zip(a[1:], b[1:], strict=True)) / scale
