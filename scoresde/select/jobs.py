"""What is to be run: solvers on grids with numbers of calls, as tables where they have one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import grids, solvers
from ..grids import Grid
from ..sde import LinearSDE
from ..solvers.base import Solver, TableSolver
from ..tableau import Tableau
from .candidates import Candidate, GridFunction, solver_name
from .comparison import LeftOut
from .measures import Label
from .runs import How, digest

Entry = Solver | Candidate | Tableau
GUESS = 100  # calls of an adaptive solver, until it has run


class Job(NamedTuple):
    """A run to be made: its place in the table, how, the calls it should take, the states that it holds."""

    label: Label
    how: How
    calls: int
    kept: int | None
    stochastic: bool


def named(entries: Entry | Iterable[Entry] | Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries by name. Raises TypeError for what is none, ValueError for none, or two of one name."""
    found: dict[str, Entry]
    if isinstance(entries, Mapping):
        found = {str(name): entry for name, entry in entries.items()}
    elif isinstance(entries, Candidate | Tableau | Solver):
        found = {_name(entries): entries}
    else:
        found = {}
        for entry in entries:
            if found.setdefault(_name(entry), entry) is not entry:
                raise ValueError(
                    f"expected solvers with different names, found {_name(entry)} twice; give a mapping from "
                    "names to solvers"
                )
    for name, entry in found.items():
        if isinstance(entry, type) or not isinstance(entry, Candidate | Tableau | Solver):
            raise TypeError(
                f"expected solvers, Candidates or Tableaus, such as solvers.dpmpp(2), found {name}: {entry!r}"
            )
    if not found:
        raise ValueError("expected at least one solver, found none")
    return found


def _name(entry: Any) -> str:
    return entry.name if isinstance(entry, Candidate | Tableau) else solver_name(entry)


def listed(
    entries: Mapping[str, Entry],
    spacings: Mapping[str, GridFunction],
    numbers: Sequence[int],
    sde: LinearSDE,
    end: float,
) -> tuple[list[Job], list[LeftOut]]:
    """All runs, those with the fewest calls first, and those that there are no tables for."""
    jobs: list[Job] = []
    unfit: list[LeftOut] = []
    for name, entry in entries.items():
        if isinstance(entry, Tableau):
            jobs.append(of_table(Label(name, "", len(entry)), entry, end))
            continue
        if isinstance(entry, Candidate):
            on, solver = {entry.grid_name: entry.grid}, entry.solver
            short = name.removesuffix(f" on {entry.grid_name}")
        else:
            on, solver, short = spacings, entry, name
        if solver.steps_for(1000) == 1:  # its steps follow a tolerance, not the grid
            jobs.append(of_solver(Label(short, "", None), solver, grids.uniform(sde, 1, end), GUESS))
            continue
        for (grid_name, grid), number in itertools.product(on.items(), numbers):
            label = Label(short, grid_name, number)
            try:
                nodes = grid(sde, solver.steps_for(number), end)
                if not isinstance(solver, TableSolver):
                    jobs.append(of_solver(label, solver, nodes, number))
                elif table := Candidate(solver, grid, grid_name).table(sde, number, end):
                    jobs.append(of_table(label, table, end))
                else:
                    unfit.append(LeftOut(short, grid_name, number, "its coefficients are not finite there"))
            except ValueError as error:
                unfit.append(LeftOut(short, grid_name, number, str(error)))
    return sorted(jobs, key=lambda job: job.label.budget or math.inf), unfit


def of_table(label: Label, table: Tableau, end: float) -> Job:
    ends = table.ends
    if not math.isclose(float(ends[1]), end, rel_tol=1e-9, abs_tol=1e-12):
        raise ValueError(
            f"expected tables that end at t = {end:g}, found {label.solver} that ends at {float(ends[1]):g}; "
            "give that as end"
        )
    how = How(solvers.from_tableau(table), ends, digest(table.to_json()))
    return Job(label, how, len(table), table.mix.shape[1] + 1, bool(table.noise.any()))


def of_solver(label: Label, solver: Solver, nodes: Grid, calls: int) -> Job:
    card = getattr(solver, "card", None)
    kept = None if card is None else card.memory + 1
    how = How(solver, nodes, digest(solver, nodes.t))
    return Job(label, how, calls, kept, bool(card is not None and card.stochastic))
