"""The search for a table: where fits start, on which noises they are, and which end is taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..grids import Grid
from ..sampling import GridFunction
from ..sde import LinearSDE
from ..solvers.base import TableSolver
from ..tableau import Tableau
from .candidates import Candidate
from .tuning_fit import Best, Errors, Fit, importance
from .tuning_form import Form, Space, natural
from .tuning_runs import Noises

# What may change, stage by stage: (times of the nodes, weights).
STAGES = {
    "grid": ((True, False),),
    "coefficients": ((False, True),),
    "all": ((True, False), (True, True)),
}
RANKED = 512  # noises that the best configurations run on
SCOUTING = 0.25  # of the time that ranking left: fits from all starts
# Noises that scouts and the ranking are on, and as many as are drawn for the last fits: share of n, at least.
NEAR = 1 / 4, RANKED
# What is drawn of these to fit a scout on and to judge a fit by. Fits get at least NUMBERS for a parameter.
SCOUTS, JUDGED = (1 / 4, 64), (1 / 2, 64)
NUMBERS = 8
AGREED = 3  # the best scouts, whose differences tell which noises matter, and which go on on those
# How fits may begin where times move: on a grid of so many nodes more, whose second and next ones are left
# out, and with such a `late` of `Space`: the first call is not lost on t_max then, and a first step may be
# longer.
BEGUN = (1, 0.7), (1, 0.9), (2, 0.7), (2, 0.9)
BEGINNING = 0.1  # of the time that ranking left, at most: to find where fits begin
HALVING = 0.5  # of the time that is left then they go on together, before the best of them has the rest
EARLY = 0.25  # share of a fit's time for a stage that another one follows
SUSPECT = 0.05  # p-value of having more flips on the noises tables are chosen on


class Task(NamedTuple):
    """What is asked for: configurations to start from, `calls` of each until `end`, what may change in each
    stage, how long all may take, and from how many to start."""

    sde: LinearSDE
    candidates: list[Candidate]
    calls: int
    stages: tuple[tuple[bool, bool], ...]
    seconds: float
    end: float | None
    starts: int

    @classmethod
    def of(
        cls,
        sde: LinearSDE,
        solver: TableSolver | Iterable[TableSolver],
        calls: int,
        what: str,
        seconds: float,
        end: float | None,
        grids: Mapping[str, GridFunction],
        starts: int,
    ) -> Task:
        """Raises TypeError or ValueError for arguments that do not fit."""
        whole(calls=calls, starts=starts)
        if not 0 < seconds < math.inf:
            raise ValueError(f"expected seconds > 0 and finite, found {seconds!r}")
        if what not in STAGES:
            raise ValueError(f"expected what to be one of {sorted(STAGES)}, found {what!r}")
        listed = list(solver) if isinstance(solver, Iterable) else [solver]
        for one in listed:
            if not isinstance(one, TableSolver):
                raise TypeError(f"expected solvers that are tables, such as solvers.unipc(3), found {one!r}")
            if one.card.stochastic:
                raise ValueError(f"expected deterministic solvers, found {one}: its ends are random")
        if not isinstance(grids, Mapping):
            raise TypeError(
                f"expected a mapping from names to functions such as grids.karras, found {grids!r}"
            )
        if not listed or not grids:
            raise ValueError(f"expected at least one solver and one grid, found {listed} and {list(grids)}")
        candidates = [Candidate(one, grid, name) for name, grid in grids.items() for one in listed]
        if all(candidate.table(sde, calls, end) is None for candidate in candidates):
            raise ValueError(f"expected calls that pay for a step of one of {listed}, found {calls}")
        return cls(sde, candidates, calls, STAGES[what], seconds, end, starts)


def whole(**numbers: int) -> None:
    """ValueError unless each is a whole number >= 1."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected a whole number {name} >= 1, found {value!r}")


class Sets(NamedTuple):
    """Noises to draw those to fit on and those to choose by from, those held out, and the distance that is a
    flip."""

    train: Noises
    judge: Noises
    held_out: Noises
    flip: float
    reference_error: float
    seed: int | None

    def first(self) -> Sets:
        """With the first noises of those to draw from: for rankings and scouts."""
        n = _number(len(self.held_out), NEAR)
        return self._having(self.train.first(n), self.judge.first(n))

    def mattering(self, forms: Sequence[Form]) -> Sets:
        """With as many of those to draw from on which tables differ. In time it is the same as `first`, in
        what it tells of tables like these as good as several times more noises: where these agree, they are
        right."""
        n = _number(len(self.held_out), NEAR)
        train, judge = (
            noises.drawn(importance(noises.apart(forms), self.flip), n) if n < len(noises) else noises
            for noises in (self.train, self.judge)
        )
        return self._having(train, judge)

    def _having(self, train: Noises, judge: Noises) -> Sets:
        _, _ = train.target, judge.target  # now, so that no other run seems to take this time
        return self._replace(train=train, judge=judge)


Ranked = list[tuple[Candidate, Tableau]]
Draw = Callable[..., Noises]  # so many of them, from another place for another number
Chosen = TypeVar("Chosen", bound=tuple[Candidate, Any])


class Start(NamedTuple):
    """A configuration, and the tables that its times may be fitted in."""

    candidate: Candidate
    space: Space

    @property
    def form(self) -> Form:
        """As it stands."""
        return self.space.forms(torch.zeros(1, len(self.space), dtype=torch.float64))


def _own(task: Task, candidate: Candidate) -> Start:
    """The solver on its grid."""
    steps = candidate.steps(task.calls)
    assert steps is not None  # it has a table
    grid = candidate.grid(task.sde, steps, task.end)
    return Start(candidate, Space(task.sde, candidate.solver, grid, moves=False, free=False))


def _begun(task: Task, candidate: Candidate) -> list[Start]:
    """The solver on longer grids without nodes after the first, or on its own if that is the only one."""
    own, found = _own(task, candidate), []
    for skipped, late in BEGUN:
        steps = len(own.space.grid) + skipped
        try:
            t = candidate.grid(task.sde, steps, task.end).t
        except ValueError:  # it has no so many steps
            continue
        if len(t) == steps + 1:
            grid = Grid.of(task.sde, torch.cat([t[:1], t[1 + skipped :]]))
            found.append(Start(candidate, replace(own.space, grid=grid, late=late)))
    return found or [own]


def _spread(listed: list[Chosen], number: int) -> list[Chosen]:
    """The best configuration of each solver, then the next best ones."""
    firsts = {repr(entry[0].solver): k for k, entry in reversed(list(enumerate(listed)))}
    order = sorted(range(len(listed)), key=lambda k: (k not in firsts.values(), k))
    return [listed[k] for k in order[:number]]


class Attempt(NamedTuple):
    """A fit: the configuration that it comes from, and its best parameters."""

    candidate: Candidate
    best: Best


@dataclass(eq=False)
class Search:
    """Fits from every start on a few noises, for where a fit ends depends on where it starts; from the best
    ends on those noises that matter, and from the best of these with what time is left. `used` are the sets
    that tables are chosen by so far, `fits` all fits, each from before it begins, `ends` those to choose
    from."""

    task: Task
    sets: Sets
    used: Sets
    until: float
    tell: Callable[[Best], None]
    fits: list[Attempt] = field(default_factory=list)
    ends: list[Attempt] = field(default_factory=list)

    def run(self, ranked: Ranked) -> None:
        """From these configurations, the best first."""
        self.ends = self.fits
        forms = [natural(table) for _, table in _spread(ranked, AGREED)]
        train, judge = (
            partial(noises.drawn, importance([noises.distances(form) for form in forms], self.sets.flip))
            for noises in (self.used.train, self.used.judge)
        )
        found = self._starts(ranked, train(_number(len(self.used.train), SCOUTS)))
        scouts = self._scouted(_spread(found, self.task.starts), train, judge)
        scouts = sorted(scouts, key=self.rank)[:AGREED]
        forms = [scout.best.form for scout in scouts]
        self.used = self.sets.mattering(forms if len(forms) > 1 else [*forms, natural(ranked[0][1])])
        self.ends = list(scouts)
        now = time.perf_counter()
        for k, scout in enumerate(scouts, 1):
            self._again(scout, now + HALVING * (self.until - now) * k / len(scouts))
        for end in sorted(self.ends[len(scouts) :], key=lambda end: end.best.errors.rank):
            if not end.best.done:
                self._again(end, self.until)

    def rank(self, end: Attempt) -> float:
        """On the noises that tables are chosen by."""
        return self._errors(self._distances(end.best.form)).rank

    def chosen(self, fixed: Tableau) -> tuple[Tableau, str | None]:
        """The best table that has not significantly more flips than this one, and where it comes from."""
        untuned = self._distances(natural(fixed))
        table, start, lowest = fixed, None, self._errors(untuned).rank
        for end in self.ends:
            distances = self._distances(end.best.form)
            rank, suspect = self._errors(distances).rank, more_flips(untuned, distances, self.sets.flip)
            if rank < lowest and suspect >= SUSPECT:
                table, start, lowest = end.best.table, end.candidate.name, rank
        return table, start

    def _distances(self, form: Form) -> Tensor:
        return self.used.judge.distances(form)

    def _errors(self, distances: Tensor) -> Errors:
        return Errors.of(distances, self.sets.flip, self.used.judge.weight)

    def _starts(self, ranked: Ranked, noises: Noises) -> list[Start]:
        """Where fits from these configurations begin, one for each: as it is or, where times move, what is
        best on these noises of those that `BEGUN` names, best first; as far as there is time."""
        if not self.task.stages[0][0]:
            return [_own(self.task, candidate) for candidate, _ in ranked]
        found: list[tuple[float, Start]] = []
        now = time.perf_counter()
        for candidate, _ in ranked:
            if found and time.perf_counter() > now + BEGINNING * (self.until - now):
                break
            each = _begun(self.task, candidate)
            ranks = [
                Errors.of(noises.distances(start.form), self.sets.flip, noises.weight).rank for start in each
            ]
            found.append(min(zip(ranks, each, strict=True), key=lambda pair: pair[0]))
        return [start for _, start in sorted(found, key=lambda pair: pair[0])]

    def _scouted(self, chosen: list[Start], train: Draw, judge: Draw) -> list[Attempt]:
        """The last stages' fits, each on noises of its own, so that none is judged by those that another was
        lucky on."""
        n, ends, now = len(self.used.train), [], time.perf_counter()
        scouted = now + SCOUTING * (self.until - now)

        def fit(candidate: Candidate, best: Best, limit: float) -> Best:
            attempt, number = Attempt(candidate, best), len(self.fits)
            enough = NUMBERS * len(best.space) / max(self.used.train.start[0].numel(), 1)
            few = train(_number(n, SCOUTS, enough), number)
            self._fit(attempt, few, judge(_number(n, JUDGED), number), limit)
            return best

        for k, start in enumerate(chosen):
            now = time.perf_counter()
            limit = now + (scouted - now) / (len(chosen) - k)
            _in_stages(self.task, start, limit, partial(fit, start.candidate))
            ends.append(self.fits[-1])
        return ends

    def _again(self, end: Attempt, until: float) -> None:
        """From there, on those noises that matter."""
        again = Attempt(end.candidate, Best(end.best.space, end.best.parameters))
        self.ends.append(again)
        self._fit(again, self.used.train, self.used.judge, until)

    def _fit(self, attempt: Attempt, train: Noises, judge: Noises, until: float) -> None:
        self.fits.append(attempt)
        Fit(train, judge, self.sets.flip, until, self.tell)(attempt.best)


def _number(n: int, part: tuple[float, int], enough: float = 0.0) -> int:
    """A share of n, at least a number, and enough; n at most."""
    share, least = part
    return min(n, math.ceil(max(share * n, least, enough)))


def _in_stages(task: Task, start: Start, until: float, fit: Callable[..., Best]) -> None:
    """Fit what may change, each stage from the best times of the one before."""
    space, parameters = start.space, torch.zeros(0, dtype=torch.float64)
    for k, (moves, free) in enumerate(task.stages, 1):
        space, now = space.retimed(parameters, moves=moves, free=free), time.perf_counter()
        limit = until if k == len(task.stages) else now + EARLY * (until - now)
        parameters = fit(Best(space, torch.zeros(len(space), dtype=torch.float64)), limit=limit).parameters


def more_flips(before: Tensor, after: Tensor, flip: float) -> float:
    """P(at least so many new flips) if of the samples that flip in one of two runs (distances (n,) of the
    same noises) each were as likely to do so in either."""
    new = int(((after > flip) & (before <= flip)).sum())
    either = new + int(((after <= flip) & (before > flip)).sum())
    return sum(math.comb(either, k) for k in range(new, either + 1)) / 2**either
