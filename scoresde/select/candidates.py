"""The configurations there are to choose from: solvers, each on every named grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

from torch import nn

from .. import grids, solvers
from ..grids import Grid
from ..sde import LinearSDE
from ..solvers.base import TableSolver
from ..solvers.exponential import er_noise_level
from ..tableau import Tableau

GridFunction = Callable[..., Grid]

_CUBIC, _QUARTIC = (partial(grids.power, exponent=p) for p in (3, 4))
_FIFTH = partial(grids.karras, rho=5)
GRIDS: dict[str, GridFunction] = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    **{f"power(exponent={p})": partial(grids.power, exponent=p) for p in (1.25, 1.5, 2.5, 3, 4)},
    "log_snr": grids.log_snr,
    **{f"karras(rho={rho})": partial(grids.karras, rho=rho) for rho in (3, 5, 7, 10)},
    **{
        f"{w} power(exponent=3) + {1 - w:.2g} karras(rho=5)": partial(
            grids.blend, one=_CUBIC, other=_FIFTH, weight=w
        )
        for w in (0.3, 0.5, 0.7, 0.85)
    },
}
# Stochastic solvers have use for more nodes near the data (benchmarks.accuracy_sde).
STOCHASTIC_GRIDS: dict[str, GridFunction] = {
    **GRIDS,
    "power(exponent=5)": partial(grids.power, exponent=5),
    **{
        f"{w} power(exponent=4) + {1 - w:.2g} log_snr": partial(
            grids.blend, one=_QUARTIC, other=grids.log_snr, weight=w
        )
        for w in (0.5, 0.7, 0.85)
    },
}
REMEMBERED = 8192  # tables


class Candidate(NamedTuple):
    """A configuration: a solver, a grid for it, and the grid's name."""

    solver: TableSolver
    grid: GridFunction
    grid_name: str

    @property
    def name(self) -> str:
        """Such as "unipc(3) on karras(rho=5)"."""
        return f"{solver_name(self.solver)} on {self.grid_name}"

    def __repr__(self) -> str:
        return self.name

    def steps(self, calls: int) -> int | None:
        """The largest number of grid steps that takes at most `calls` network calls; None if there is
        none."""
        return self.solver.steps_for(calls) if calls >= self.solver.calls(1) else None

    def table(
        self, sde: LinearSDE, calls: int, end: float | None = None, *, backwards: bool = False
    ) -> Tableau | None:
        """The table of as many steps as `calls` network calls allow, remembered for this sde unless its
        schedule learns; `backwards`, from data to noise. None if there is none: the calls do not pay for a
        step, or the sde ends where the solver has no finite coefficients.

        Raises ValueError for an end that the sde does not have.
        """
        steps = self.steps(calls)
        learns = isinstance(getattr(sde, "schedule", None), nn.Module)
        made = _table if learns else _remembered_table
        return None if steps is None else made(self, sde, steps, end, backwards)


def _table(
    candidate: Candidate, sde: LinearSDE, steps: int, end: float | None, backwards: bool
) -> Tableau | None:
    grids.uniform(sde, 1, end)  # says what is wrong with the end, or the sde
    try:
        grid = candidate.grid(sde, steps, end)
        return candidate.solver.tableau(sde, grid.reversed() if backwards else grid)
    except ValueError:  # nodes that coincide, or an infinite rate at an end without signal or without noise
        return None


_remembered_table = lru_cache(REMEMBERED)(_table)


def solver_name(solver: Any) -> str:
    """How a solver prints, in short: the order by itself, then the options that are not the defaults."""
    options = dict(getattr(solver, "options", ()))
    make = getattr(solvers, getattr(solver, "name", ""), None)
    if not options or make is None:
        return repr(solver)
    usual = {key: p.default for key, p in inspect.signature(make).parameters.items()}
    shown = [str(options["order"])] if "order" in options else []
    shown += [
        f"{key}={_value(value)}"
        for key, value in options.items()
        if key != "order" and value != usual.get(key)
    ]
    return f"{solver.name}({', '.join(shown)})"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return getattr(value, "__name__", repr(value))


def _member(order: int, corrector: int, stored: str, variable: str, tau: Any = 0.0) -> TableSolver:
    return solvers.exponential(order, corrector=corrector, stored=stored, variable=variable, tau=tau)


def _deterministic() -> list[TableSolver]:
    """Presets that people know, and the members of the family that win somewhere (benchmarks.accuracy)."""
    named = [
        solvers.ddim(),
        solvers.heun(),
        solvers.midpoint(),
        *(solvers.dpm(p) for p in (2, 3)),
        *(solvers.dpmpp(p) for p in (2, 3)),
        *(solvers.dpmpp(p, singlestep=True) for p in (2, 3)),
        solvers.dpmpp(2, rule="bh2"),
        solvers.dpmpp(3, rule="half3"),
        *(solvers.unipc(p) for p in (1, 2, 3, 4)),
        solvers.unipc(2, "bh2"),
        *(solvers.deis(p) for p in (2, 3)),
        *(solvers.adams(p) for p in (3, 4)),
        *(solvers.adams(p, "adams") for p in (3, 4)),
    ]
    members = [
        *((2, c, "flow", variable) for c in (0, 3) for variable in ("lam", "sigma", "t")),
        *((2, 3, "data", variable) for variable in ("sigma", "t")),
        *((3, 0, "data", variable) for variable in ("sigma", "t")),
        *((3, c, "flow", "sigma") for c in (0, 4)),
        *((4, 0, stored, "sigma") for stored in ("data", "flow", "velocity")),
        *((4, 5, "flow", variable) for variable in ("lam", "sigma")),
        *((5, 6, "data", variable) for variable in ("sigma", "t")),
        *((6, 7, "data", variable) for variable in ("sigma", "t")),
        *((7, 8, stored, "sigma") for stored in ("data", "flow", "velocity")),
        (7, 0, "flow", "sigma"),
        (1, 2, "velocity", "sigma"),
        (6, 7, "velocity", "sigma"),
    ]
    return [*named, *(_member(*member) for member in members)]


def _stochastic() -> list[TableSolver]:
    """As `_deterministic`, from benchmarks.accuracy_sde."""
    tiny, little, half = (eta**0.5 for eta in (0.02, 0.1, 0.5))
    named = [
        *(solvers.ddpm(variance) for variance in ("small", "large")),
        solvers.ddim(0.5),
        solvers.euler_maruyama(),
        solvers.reverse_diffusion(),
        *(solvers.sde_dpmpp(p) for p in (2, 3)),
        solvers.sde_dpmpp(2, rule="bh2"),
        solvers.sde_dpmpp(3, rule="half3"),
        solvers.sde_dpmpp(2, singlestep=True),
        *(solvers.sde_dpmpp(2, eta, rule="bh2") for eta in (0.1, 0.5)),
        *(solvers.sa(p, p + 1) for p in (2, 3)),
        solvers.sa(3, 4, 0.3),
        *(solvers.er_sde(p) for p in (2, 3)),
        solvers.seeds(2),
        solvers.edm(),
        solvers.restart(),
    ]
    members = [
        *((2, c, "flow", variable, er_noise_level) for c in (0, 3) for variable in ("lam", "t")),
        (2, 3, "data", "t", er_noise_level),
        *((3, 4, "flow", variable, er_noise_level) for variable in ("lam", "sigma", "t")),
        *((3, 4, "data", variable, er_noise_level) for variable in ("lam", "t")),
        *((p, p + 1, "data", variable, er_noise_level) for p in (4, 5) for variable in ("sigma", "t")),
        (2, 0, "flow", "lam", little),
        (2, 3, "flow", "sigma", little),
        (2, 3, "flow", "sigma", half),
        (2, 3, "data", "t", half),
        (2, 3, "flow", "sigma", er_noise_level),
        (3, 4, "data", "t", little),
        (3, 4, "flow", "sigma", little),
        (3, 4, "flow", "t", half),
        (4, 5, "flow", "t", er_noise_level),
        (5, 7, "data", "sigma", er_noise_level),
        *((6, 7, "data", variable, er_noise_level) for variable in ("sigma", "t")),
        *((2, 0, "flow", variable, tiny) for variable in ("lam", "t")),
        *((p, p + 1, "flow", variable, tiny) for p in (2, 3) for variable in ("sigma", "t")),
        (2, 3, "data", "t", tiny),
        (5, 6, "data", "sigma", tiny),
        (5, 7, "data", "t", tiny),
        (5, 7, "flow", "t", tiny),
        (6, 7, "data", "sigma", tiny),
    ]
    return [*named, *(_member(*member) for member in members)]


def pool(stochastic: bool = False) -> list[Candidate]:
    """Tens of solvers: deterministic ones on all of `GRIDS`, or stochastic ones on all of `STOCHASTIC_GRIDS`.
    No two have the same tables.

    What benchmarks.accuracy and benchmarks.accuracy_sde found best for some problem and number of calls is
    among them."""
    return list(_pool(stochastic))


@cache
def _pool(stochastic: bool) -> tuple[Candidate, ...]:
    listed, spacings = (_stochastic(), STOCHASTIC_GRIDS) if stochastic else (_deterministic(), GRIDS)
    return tuple(Candidate(solver, grid, name) for solver in listed for name, grid in spacings.items())
