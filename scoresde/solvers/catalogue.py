"""The list of all solvers: for tests, the command line, and readers."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..text import Kind, read_call
from . import exponential as e
from . import onestep as o
from . import singlestep as s
from .adaptive_ode import adaptive_ode
from .adaptive_sde import adaptive_sde
from .base import Solver
from .external import TORCHSDE, scipy_ode, torchsde_solver
from .langevin import annealed_langevin, predictor_corrector
from .reversible import reversible


def examples() -> dict[str, Any]:
    """Every solver with the options worth telling apart, by how it prints."""
    orders = (1, 2, 3)
    made = [
        *(o.ddpm(variance) for variance in ("small", "large")),
        *(o.ddim(eta) for eta in (0.0, 0.5, 1.0)),
        o.euler_maruyama(),
        o.reverse_diffusion(),
        *(e.dpm(p, single) for p in orders for single in (False, True)),
        e.dpm(2, rule="bh2"),
        e.dpm(3, rule="half3"),
        *(e.dpmpp(p, single) for p in orders for single in (False, True)),
        e.dpmpp(2, rule="bh2"),
        e.dpmpp(3, rule="half3"),
        *(e.sde_dpmpp(p) for p in orders),
        e.sde_dpmpp(2, rule="bh2"),
        e.sde_dpmpp(3, rule="half3"),
        e.sde_dpmpp(2, singlestep=True),
        *(e.unipc(p) for p in (1, 2, 3, 4)),
        *(e.unipc(p, rule) for p in (1, 2) for rule in ("bh1", "bh2")),
        *(e.deis(p, variable) for p in (1, 2, 3, 4) for variable in ("t", "sigma/alpha", "lam")),
        *(e.adams(p) for p in (1, 2, 3, 4)),
        *(e.adams(p, "adams") for p in (2, 3, 4)),
        *(
            e.exponential(3, corrector=4, stored=stored, variable="sigma")
            for stored in ("data", "noise", "velocity", "flow")
        ),
        *(e.sa(p, c, tau) for p, c, tau in ((2, 0, 1.0), (2, 3, 1.0), (3, 4, 1.0), (3, 4, 0.3))),
        *(e.seeds(p) for p in orders),
        *(e.er_sde(p) for p in orders),
        e.er_sde(3, "backward"),
        s.heun(),
        s.midpoint(),
        s.dpm_fast(),
        s.edm(),
        s.restart(),
        *(reversible(p) for p in (1, 2)),
        predictor_corrector(o.reverse_diffusion()),
        predictor_corrector(e.dpmpp(2), norm="sigma"),
        annealed_langevin(),
        adaptive_ode(),
        adaptive_sde(),
        *(scipy_ode(method) for method in ("RK45", "DOP853", "LSODA")),
        *(torchsde_solver(method) for method in TORCHSDE),
    ]
    return {repr(solver): solver for solver in made}


class CardTable(dict):
    """Solver by name to its `Card`; prints as a table."""

    def __repr__(self) -> str:
        rows = [
            (
                "solver",
                "order",
                "weak",
                "calls/step",
                "memory",
                "noise",
                "to sigma=0",
                "properties",
                "reference",
            )
        ]
        for name, card in self.items():
            rows.append(
                (
                    name,
                    _shown(card.order),
                    _shown(card.weak_order),
                    str(card.calls_per_step),
                    str(card.memory),
                    "yes" if card.stochastic else "-",
                    card.final,
                    " ".join(sorted(card.properties)),
                    card.reference,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows
        )

    __str__ = __repr__


def _shown(order: int | None) -> str:
    return "-" if order is None else str(order)


def card() -> CardTable:
    """What is known of every solver in `examples()`."""
    return CardTable({name: solver.card for name, solver in examples().items()})


@cache
def _makers() -> dict[str, Any]:
    """The functions that made `examples()`, by name."""
    from .. import solvers  # complete by the time of a call

    return {name: getattr(solvers, name) for name in {made.partition("(")[0] for made in examples()}}


def parse(text: str) -> Solver:
    """The solver that a text names, as it prints: "dpmpp" or "dpmpp(order=3)". Nothing is evaluated. Raises
    ValueError for anything else."""
    return read_call(text, Kind("solver", 'dpmpp" or "dpmpp(order=3)', _makers(), " See: scoresde solvers"))
