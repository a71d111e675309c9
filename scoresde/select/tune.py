"""`tune`: a better table for a model and a number of calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser
from ..laws import Gaussian, Law
from ..noise import Noise
from ..sampling import GridFunction
from ..sde import LinearSDE
from ..solvers import from_tableau
from ..solvers.base import TableSolver, evaluating, execute
from ..tableau import Tableau
from .candidates import GRIDS, Candidate
from .measures import FLIP
from .references import USUAL
from .tuning_fit import Best, Errors, Fit, importance
from .tuning_form import Space, natural
from .tuning_runs import Meter, Noises, distance

# What may change, stage by stage: (times of the nodes, weights).
STAGES = {
    "grid": ((True, False),),
    "coefficients": ((False, True),),
    "all": ((True, False), (True, True)),
}
# The usual grids come first, for there may not be time for all.
USUAL_FIRST = {name: GRIDS[name] for name in ("quadratic", "karras(rho=7)")} | GRIDS
SCREENED, RANKED, SHORTLIST = 64, 512, 16  # noises that every configuration runs on; that the best ones do
SCREENING = 0.3  # of the time after references
SCOUTING = 0.6  # of the time that is left then: fits from all starts
# What is drawn from a set, as a share of it and at least: to fit on from every start, from the best end, and
# to judge by. Fits get at least so many numbers for each parameter.
SCOUTS, FITTED, JUDGED = (1 / 64, 24), (1 / 4, 64), (1 / 4, 64)
NUMBERS = 8
ROUNDS = 2  # fits from the best end
EARLY = 0.25  # share of a fit's time for a stage that another one follows
SUSPECT = 0.05  # p-value of having more flips on the noises tables are chosen on


@dataclass(frozen=True)
class Report:
    """What tuning did. Errors are those on noises that neither fit nor choice has seen.

    untuned, tuned   the best fixed configuration, and what was made; the same where nothing better was found
    start            the configuration that the tuned table comes from; None if it is the untuned one
    more_flips       p-value of the tuned table's flips if it had no more than the untuned one, by the exact
                     paired binomial test
    reference_error  root mean square difference of references with half as many steps
    flip             distance (root mean square over coordinates) from which on a sample counts as a flip
    calls            of the tuned table
    batches, samples calls of the model on a batch while tuning, and samples in all of them
    tried            fixed configurations that were run
    iterations       of the fits that were kept or not
    n, seed          noises in each of three sets (to fit on, to choose on, held out), and their seed; None
                     where errors are exact
    status           "finished" | "out of time" | "interrupted"
    history          (fitted on, chosen on): root mean squares after every iteration of every fit
    """

    untuned_name: str
    untuned: Errors
    tuned: Errors
    start: str | None
    more_flips: float
    reference_error: float
    flip: float
    calls: int
    batches: int
    samples: int
    seconds: float
    tried: int
    n: int | None
    seed: int | None
    status: str
    history: tuple[tuple[float, float], ...]

    def __repr__(self) -> str:
        made = "tuned" if self.start is None else f"tuned from {self.start}"
        rows = [(self.untuned_name, self.untuned), (made, self.tuned)]
        width = max(len(name) for name, _ in rows)
        lines = [
            f"{self.calls} calls; errors "
            + ("over all noises, exact" if self.n is None else f"on {self.n} held-out noises"),
            f"{'':{width}}       RMS   flips    median",
            *(f"{name:{width}}  {e.rms:.2e}  {e.flips:6.2%}  {e.median:.2e}" for name, e in rows),
            f"RMS is over samples that are no flips, less than {self.flip:.3g} off; more flips than before: "
            f"p = {self.more_flips:.2g}; the reference is exact to {self.reference_error:.1e}",
            f"{self.status} after {self.seconds:.1f} s, {self.batches} calls of the model on {self.samples} "
            f"samples in all; {self.tried} fixed configurations, {len(self.history)} iterations; seed "
            f"{self.seed}",
        ]
        return "\n".join(lines)


class Tuned(NamedTuple):
    """A tuned table, and how good it is."""

    table: Tableau
    report: Report

    @property
    def solver(self) -> TableSolver:
        """The table as a solver, for its own times: `sample(model, shape, tuned.solver, grid=tuned.grid)`."""
        return from_tableau(self.table)

    @property
    def grid(self) -> Tensor:
        """The ends of the table."""
        return self.table.times[[0, -1]]

    def __repr__(self) -> str:
        return f"{self.report}\n{self.table}"


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
        _whole(calls=calls, starts=starts)
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
        if not listed or not grids:
            raise ValueError(f"expected at least one solver and one grid, found {listed} and {list(grids)}")
        candidates = [Candidate(one, grid, name) for name, grid in grids.items() for one in listed]
        if all(candidate.table(sde, calls, end) is None for candidate in candidates):
            raise ValueError(f"expected calls that pay for a step of one of {listed}, found {calls}")
        return cls(sde, candidates, calls, STAGES[what], seconds, end, starts)


class Sets(NamedTuple):
    """Three sets of noises, and the distance that is a flip."""

    train: Noises
    judge: Noises
    held_out: Noises
    flip: float
    reference_error: float
    seed: int | None


def tune(
    model: BaseDenoiser,
    solver: TableSolver | Iterable[TableSolver],
    calls: int,
    seconds: float = 60.0,
    what: str = "grid",
    *,
    shape: Sequence[int],
    n: int = 256,
    seed: int = 0,
    start: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    end: float | None = None,
    grids: Mapping[str, GridFunction] = USUAL_FIRST,
    starts: int = 3,
    reference: int = 100,
    batch: int | None = None,
    flip: float | None = None,
    progress: bool = False,
) -> Tuned:
    """A table of at most `calls` network calls for this model, better than `solver` on the best of `grids`.

    The error is the distance to the probability-flow solution from the same noise. Three sets of n noises
    (samples 0..3n-1 of the seed) are taken to their ends with `reference` steps of the solver that is
    `compare`'s reference. All solvers run on all grids; from the `starts` best ones the table is fitted on a
    few noises of the first set, and from the best end of these on more, by Levenberg-Marquardt from
    evaluations of the model alone (see `tuning_fit`); which noises is drawn, those with large errors more
    often. Of all tables on the way those that are best on noises drawn from the second set are kept, the best
    of these on the whole set is taken, and reported on the third beside the best fixed one. Where no table is
    better there, or it sends significantly more samples to other ends, the fixed one is returned.

    solver     a deterministic TableSolver, or several
    what       "grid": the times, with the solver's own coefficients, which then suit other models of such
               data as well; "coefficients": all weights of the table, on the best of `grids`; "all": the
               times, then both. With weights the table is the model's own (bespoke): its end keeps the law
               of a point mass whatever the solver did, its states on the way need not
    seconds    for everything; the model is at least called for references and fixed configurations
    shape      of one sample, without the batch
    start      states (3n, *shape) at t_max to use instead, where runs do not start from the sde's prior
    condition  keywords for the model; tensors with n entries are one a sample, the same for each of the sets
    batch      samples in one call of the model; by default n, and more if samples are small
    flip       samples further than this from the reference (root mean square over coordinates) count as
               having gone elsewhere; by default 0.4 of the standard deviation of the reference's ends
    progress   a bar of the time, with the error on the second set

    Fitting can be stopped with Ctrl-C: what is best so far is returned, with status "interrupted". With time
    enough for all fits to finish the result is a function of the arguments alone.

    Raises TypeError or ValueError for arguments that do not fit, before any call of the model.
    """
    started = time.perf_counter()
    if not isinstance(model, BaseDenoiser):
        raise TypeError(f"expected a denoiser such as Denoiser(network, sde) as model, found {model!r}")
    task = Task.of(model.sde, solver, calls, what, seconds, end, grids, starts)
    _whole(n=n, reference=reference, batch=n if batch is None else batch)
    batch = max(n, 2**15 // max(math.prod(shape), 1)) if batch is None else batch
    if start is None:
        dtype = torch.promote_types(model.dtype, torch.float32)
        noise = Noise.of(seed, batch=3 * n, device=model.device, dtype=dtype)
        start = noise.prior((3 * n, *shape)) * model.sde.prior_std
    if tuple(start.shape) != (3 * n, *shape):
        raise ValueError(f"expected start of shape {(3 * n, *shape)}, found {tuple(start.shape)}")
    with torch.no_grad(), evaluating(model):
        sets = _sampled(model.given(**(condition or {})), start, seed, end, reference, batch, flip)
        return _tuned(task, sets, started, progress)


def tune_for(
    sde: LinearSDE,
    law: Law,
    solver: TableSolver | Iterable[TableSolver],
    calls: int,
    seconds: float = 10.0,
    what: str = "grid",
    *,
    end: float | None = None,
    grids: Mapping[str, GridFunction] = USUAL_FIRST,
    starts: int = 3,
    progress: bool = False,
) -> Tuned:
    """As `tune`, but without a network: for data of a known law, such as that of `mixture_surrogate(batch)`.

    On a Gaussian errors are exact. Every direction of the covariance is a scalar affine map; so the root mean
    square distance to the probability flow over *all* noises, which is also the 2-Wasserstein distance of the
    output's law to the flow's (over the root of the dimension), is that over two noises: +1 and -1 in all
    directions. For another law this is `tune` on its exact denoiser, with 512 noises.
    """
    started = time.perf_counter()
    if not isinstance(law, Law):
        raise TypeError(f"expected a law of the data, such as laws.Gaussian, found {law!r}")
    if not isinstance(law, Gaussian):
        model, shape = law.denoiser(sde), law.event_shape
        options = {"end": end, "grids": grids, "starts": starts, "progress": progress}
        return tune(model, solver, calls, seconds, what, shape=shape, n=512, **options)
    task = Task.of(sde, solver, calls, what, seconds, end, grids, starts)
    inside = _in_eigenbasis(law)
    times = torch.tensor([sde.t_max, sde.default_end if end is None else end], dtype=torch.float64)
    alpha, sigma = sde.alpha(times), sde.sigma(times)
    std = (alpha[:, None] ** 2 * inside.variance + sigma[:, None] ** 2).sqrt()
    start = sde.prior_std * torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, inside.dim)
    target = alpha[1] * inside.mean + std[1] / std[0] * (start - alpha[0] * inside.mean)
    exact = Noises(inside.denoiser(sde), start, target, 2**15)
    with torch.no_grad():
        return _tuned(task, Sets(exact, exact, exact, math.inf, 0.0, None), started, progress)


def _in_eigenbasis(law: Gaussian) -> Gaussian:
    """The law turned so that its covariance is diagonal; solvers do not see rotations."""
    basis, values = law.eigen()
    mean = law.mean.flatten()
    return Gaussian(mean if basis is None else basis.T @ mean, values)


def _whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected a whole number {name} >= 1, found {value!r}")


def _sampled(
    model: BaseDenoiser,
    start: Tensor,
    seed: int,
    end: float | None,
    steps: int,
    batch: int,
    flip: float | None,
) -> Sets:
    """Three sets of states (3n, ...), with references."""
    meter = Meter()

    def end_of(some: BaseDenoiser, x: Tensor, steps: int) -> Tensor:
        table = USUAL.solver.tableau(model.sde, USUAL.grid(model.sde, steps, end))
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(batch):
            parts.append(execute(table, some.narrowed(rows, len(x)), x[rows]).x)
            meter.calls += len(table)
            meter.samples += len(table) * len(rows)
        return torch.cat(parts)

    made = [Noises(model, part, end_of(model, part, steps), batch, meter) for part in start.chunk(3)]
    few = made[1].first(32)
    halved = distance(end_of(few.model, few.start, max(1, steps // 2)), few.target)
    ends = torch.cat([noises.target for noises in made]).double()
    spread = (ends - ends.mean(0)).square().mean().sqrt().item()
    limit = FLIP * spread if flip is None else flip
    return Sets(made[0], made[1], made[2], limit, halved.square().mean().sqrt().item(), seed)


def _tuned(task: Task, sets: Sets, started: float, progress: bool) -> Tuned:
    """Choose, fit, choose, report."""
    meter, fits = sets.train.meter, []
    with _bar(task.seconds, started, progress) as tell:
        now = time.perf_counter()
        ranked, tried = _ranked(task, sets, now + SCREENING * (started + task.seconds - now))
        fixed, fixed_table = ranked[0]
        before = time.perf_counter()
        untuned = sets.judge.distances(natural(fixed_table))
        # Of the runs that are still to come each takes as long as this one.
        runs = task.starts * (len(task.stages) + 2) + ROUNDS + 2
        until = started + task.seconds - runs * (time.perf_counter() - before)
        try:
            _fitted(task, sets, _spread(ranked, task.starts), fits, until, tell)
            status = "finished" if all(fit.best.done for fit in fits) else "out of time"
        except KeyboardInterrupt:
            status = "interrupted"
        table, start, lowest = fixed_table, None, Errors.of(untuned, sets.flip).rank
        for fit in fits:
            if fit.rank < lowest and more_flips(untuned, fit.distances, sets.flip) >= SUSPECT:
                table, start, lowest = fit.best.table, fit.candidate.name, fit.rank
        before, after = (sets.held_out.distances(natural(t)) for t in (fixed_table, table))
    report = Report(
        untuned_name=fixed.name,
        untuned=Errors.of(before, sets.flip),
        tuned=Errors.of(after, sets.flip),
        start=start,
        more_flips=more_flips(before, after, sets.flip),
        reference_error=sets.reference_error,
        flip=sets.flip,
        calls=len(table),
        batches=meter.calls,
        samples=meter.samples,
        seconds=time.perf_counter() - started,
        tried=tried,
        n=None if sets.seed is None else len(sets.held_out),
        seed=sets.seed,
        status=status,
        history=tuple(entry for fit in fits for entry in fit.best.history),
    )
    return Tuned(table, report)


Ranked = list[tuple[Candidate, Tableau]]


def _ranked(task: Task, sets: Sets, until: float) -> tuple[Ranked, int]:
    """Fixed configurations, best first, and how many were tried: all (as far as there is time) on the first
    noises, the best of those on more."""
    few, more, tried = sets.train.first(SCREENED), sets.train.first(RANKED), []
    for candidate in task.candidates:
        table = candidate.table(task.sde, task.calls, task.end)
        if table is not None and not (tried and time.perf_counter() > until):
            tried.append((Errors.of(few.distances(natural(table)), sets.flip).rank, candidate, table))
    short = [entry[1:] for entry in sorted(tried, key=lambda entry: entry[0])[:SHORTLIST]]
    ranks = [Errors.of(more.distances(natural(table)), sets.flip).rank for _, table in short]
    return [short[k] for k in sorted(range(len(short)), key=ranks.__getitem__)], len(tried)


def _spread(ranked: Ranked, starts: int) -> Ranked:
    """The best configuration of each solver, then the next best ones."""
    firsts = {repr(entry[0].solver): k for k, entry in reversed(list(enumerate(ranked)))}
    order = sorted(range(len(ranked)), key=lambda k: (k not in firsts.values(), k))
    return [ranked[k] for k in order[:starts]]


@dataclass(eq=False)
class Attempt:
    """A fit: the configuration that it comes from, its best parameters, and the distances (n,) of these on
    all the noises that tables are chosen on, to be asked for when it has ended."""

    candidate: Candidate
    best: Best
    sets: Sets

    @cached_property
    def distances(self) -> Tensor:
        return self.sets.judge.distances(self.best.form)

    @property
    def rank(self) -> float:
        return Errors.of(self.distances, self.sets.flip).rank


def _fitted(
    task: Task,
    sets: Sets,
    chosen: Ranked,
    fits: list[Attempt],
    until: float,
    tell: Callable[[Best], None],
) -> None:
    """Fit from every start on a few noises, for where a fit ends depends on where it starts, and from the
    best end on more. `fits` gets each before it begins."""
    forms = [natural(table) for _, table in chosen]
    train, judge = (
        partial(noises.drawn, importance([noises.distances(form) for form in forms], sets.flip))
        for noises in (sets.train, sets.judge)
    )

    def fit(candidate: Candidate, best: Best, n: tuple[float, int], limit: float) -> Best:
        """On noises of its own, so that none is judged by those that another was lucky on."""
        fits.append(Attempt(candidate, best, sets))
        enough = NUMBERS * len(best.space) / max(sets.train.start[0].numel(), 1)
        few = train(_number(sets.train, n, enough), len(fits))
        Fit(few, judge(_number(sets.judge, JUDGED), len(fits)), sets.flip, limit, tell)(best)
        return best

    ends, now = [], time.perf_counter()
    scouted = now + SCOUTING * (until - now)
    for k, (candidate, _) in enumerate(chosen):
        now = time.perf_counter()
        limit = now + (scouted - now) / (len(chosen) - k)
        _in_stages(task, candidate, limit, partial(fit, candidate, n=SCOUTS))
        ends.append(fits[-1])
    end = min(ends, key=lambda end: end.rank)
    best = end.best
    for _ in range(ROUNDS):
        best = fit(end.candidate, Best(best.space, best.parameters), FITTED, until)


def _number(noises: Noises, n: tuple[float, int], enough: float = 0.0) -> int:
    """A share of the noises, at least a number, and enough."""
    share, least = n
    return math.ceil(max(share * len(noises), least, enough))


def _in_stages(task: Task, candidate: Candidate, until: float, fit: Callable[..., Best]) -> None:
    """Fit what may change, each stage from the best grid of the one before."""
    steps = candidate.steps(task.calls)
    assert steps is not None  # it has a table
    grid = candidate.grid(task.sde, steps, task.end)
    for k, (moves, free) in enumerate(task.stages, 1):
        space, now = Space(task.sde, candidate.solver, grid, moves, free), time.perf_counter()
        limit = until if k == len(task.stages) else now + EARLY * (until - now)
        best = fit(Best(space, torch.zeros(len(space), dtype=torch.float64)), limit=limit)
        grid = space.moved(best.parameters[: len(grid)]) if moves else grid


def more_flips(before: Tensor, after: Tensor, flip: float) -> float:
    """P(at least so many new flips) if of the samples that flip in one of two runs (distances (n,) of the
    same noises) each were as likely to do so in either."""
    new = int(((after > flip) & (before <= flip)).sum())
    either = new + int(((after <= flip) & (before > flip)).sum())
    return sum(math.comb(either, k) for k in range(new, either + 1)) / 2**either


@contextmanager
def _bar(seconds: float, started: float, progress: bool) -> Iterator[Callable[[Best], None]]:
    """Who is told of every iteration: nobody, or a bar of the time that is gone afterwards."""
    if not progress:
        yield lambda best: None
        return
    from tqdm.auto import tqdm

    with tqdm(
        total=seconds, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}", leave=False
    ) as bar:

        def tell(best: Best) -> None:
            bar.set_postfix_str(f"{len(best.history)} iterations, RMS {best.errors.rms:.2e}", refresh=False)
            bar.update(min(time.perf_counter() - started, seconds) - bar.n)

        yield tell
