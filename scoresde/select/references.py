"""The solution that errors are distances to, and how far it can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import grids, solvers
from ..sde import LinearSDE
from ..solvers.base import Solver
from .candidates import GRIDS, Candidate, solver_name
from .jobs import GUESS, Job, of_solver, of_table
from .measures import Label
from .runs import How, Runner, Store, digest

# Networks are not smooth: on benchmarks/digits.safetensors order 3 is a few times more accurate than order 5
# with 100 calls, and as good with 200. On smooth denoisers it is behind, but with 100 calls good enough.
USUAL = Candidate(
    solvers.exponential(3, corrector=4, stored="flow", variable="sigma"),
    GRIDS["power(exponent=3)"],
    "power(exponent=3)",
)
LEAST = 100  # calls


class Reference(NamedTuple):
    """How a reference is made, or the samples themselves; the usual one of half the calls beside it; the name
    of the first, and the calls of both."""

    how: How | Tensor
    check: How
    name: str
    calls: int


class Solution(NamedTuple):
    """Samples (n, ...) of the reference, and of the one that it is checked against."""

    x: Tensor
    check: Tensor


def planned(
    given: Solver | Candidate | Tensor | None, numbers: Sequence[int], sde: LinearSDE, end: float
) -> Reference:
    """With four times the most of `numbers`, and at least LEAST calls. Raises TypeError for what is no
    reference, ValueError for one with noise of its own."""
    calls = max(LEAST, 4 * max(numbers))
    check = _of_candidate(USUAL, calls // 2, sde, end)
    both = calls + calls // 2
    if isinstance(given, Tensor):
        return Reference(given, check, "given", calls // 2)
    if given is None or isinstance(given, Candidate):
        chosen = USUAL if given is None else given
        return Reference(_of_candidate(chosen, calls, sde, end), check, f"{chosen.name}, {calls} calls", both)
    if isinstance(given, type) or not isinstance(given, Solver):
        raise TypeError(f"expected a solver, a Candidate or the solution as reference, found {given!r}")
    name = solver_name(given)
    if given.steps_for(1000) == 1:  # its steps follow a tolerance
        how = _still(of_solver(Label(name, "", None), given, grids.uniform(sde, 1, end), GUESS))
        return Reference(how, check, name, both)
    nodes = USUAL.grid(sde, given.steps_for(calls), end)
    how = _still(of_solver(Label(name, USUAL.grid_name, calls), given, nodes, calls))
    return Reference(how, check, f"{name} on {USUAL.grid_name}, {calls} calls", both)


def _of_candidate(candidate: Candidate, calls: int, sde: LinearSDE, end: float) -> How:
    table = candidate.table(sde, calls, end)
    if table is None:
        raise ValueError(
            f"expected a reference with a table of {calls} calls, found none of {candidate.name}"
        )
    return _still(of_table(Label(candidate.name, "", calls), table, end))


def _still(job: Job) -> How:
    if job.stochastic:
        raise ValueError(f"expected a deterministic reference, found {job.label.solver}: its ends are random")
    return job.how


def solution(
    plan: Reference,
    run: Runner,
    most_calls: float,
    until: float,
    store: Store | None,
    identity: str,
    tick: Callable[[int], Any],
) -> Solution:
    """The samples, from the store if it has them. Raises ValueError if they cost more than `most_calls` or
    are not there at the time `until` (of `perf_counter`), or a given one has another shape or is not
    finite."""
    how = plan.how
    if isinstance(how, Tensor) and how.shape != run.shape:
        raise ValueError(f"expected a reference of shape {run.shape}, found {tuple(how.shape)}")
    if isinstance(how, Tensor) and not bool(how.isfinite().all()):
        raise ValueError("expected a finite reference, found NaN or infinity")
    key = digest(identity, how.key if isinstance(how, How) else how, plan.check.key)
    kept = None if store is None else store.tensors(key)
    if kept is None:
        if plan.calls * run.parts > most_calls:
            raise ValueError(
                f"expected a budget of more than the reference's {plan.calls * run.parts} network calls, "
                f"found {most_calls:g}"
            )

        def timed(calls: int) -> None:
            tick(calls)
            if time.perf_counter() > until:
                raise ValueError(
                    f"expected a budget that the {plan.calls * run.parts} calls of the reference fit into, "
                    "found its seconds spent before: give more, a smaller n, or another reference"
                )

        check = run(plan.check, timed).x
        kept = {"x": run(how, timed).x if isinstance(how, How) else how, "check": check}
        if store is not None:
            store.put_tensors(key, kept)
    else:
        tick(plan.calls)
    return Solution(*(kept[name].to(run.model.device) for name in Solution._fields))
