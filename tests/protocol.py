"""Which solvers are tested, and what they are tried on. How orders are measured: scoresde.testing.orders."""

from __future__ import annotations

from scoresde import solvers
from scoresde.solvers.base import Solver, TableSolver


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
