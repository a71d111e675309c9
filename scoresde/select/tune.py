"""`tune`: a better table for a model and a number of calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, evaluating
from ..laws import Gaussian, Law
from ..noise import Noise
from ..sampling import GridFunction
from ..sde import LinearSDE
from ..solvers import from_tableau
from ..solvers.base import TableSolver, execute
from ..tableau import Tableau
from .candidates import GRIDS
from .measures import FLIP
from .references import USUAL
from .runs import sample_shape
from .tuning_fit import Best, Errors
from .tuning_form import natural
from .tuning_runs import Meter, Noises, distance
from .tuning_search import AGREED, RANKED, Ranked, Search, Sets, Task, more_flips, whole

# The usual grids come first, for there may not be time for all.
USUAL_FIRST = {name: GRIDS[name] for name in ("quadratic", "karras(rho=7)")} | GRIDS
SCREENED, SHORTLIST = 64, 16  # noises that every configuration runs on; how many run on RANKED
SCREENING = 0.3  # of the time after references


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
    n, seed          noises held out, and the seed of all; None where errors are exact
    status           "finished": no fit ended by its share of the time, so that the same call would find the
                     same again | "out of time" | "interrupted"
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
        return self.table.ends

    def __repr__(self) -> str:
        return f"{self.report}\n{self.table}"


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
    wide: int = 4,
    reference: int = 100,
    batch: int | None = None,
    flip: float | None = None,
    progress: bool = False,
) -> Tuned:
    """A table of at most `calls` network calls for this model, better than `solver` on the best of `grids`.

    The error is the distance to the probability-flow solution from the same noise, which `reference` steps of
    the solver that is `compare`'s reference find. Noises are samples 0, 1, ... of the seed: `wide` n to fit
    on, as many to choose by, and n that are held out. All solvers run on all grids, and where times move the
    best on a few with a longer first step. From the `starts` best of these the table is fitted on some of the
    first n, by Levenberg-Marquardt with derivatives by back-propagation (see `tuning_fit`). A few samples
    between two modes are most of an error, and which these are the best tables then tell, by how far apart
    they end: the last fits are on n noises or fewer that are drawn, by that, from all to fit on, and tables
    are chosen by such a draw from all to choose by. The best one there is reported on the noises held out
    beside the best fixed one. Where no table is better there, or it sends significantly more samples to other
    ends, the fixed one is returned.

    solver     a deterministic TableSolver, or several
    what       "grid": the times of the nodes and the one that the first call is about (see `tuning_form`),
               with the solver's own coefficients, which then suit other models of such data as well;
               "coefficients": all weights of the table, on the best of `grids`; "all": the times, then both.
               With weights the table is the model's own (bespoke): its end keeps the law of a point mass
               whatever the solver did, its states on the way need not
    seconds    for everything; the model is at least called for references and fixed configurations
    shape      of one sample, without the batch
    start      states ((2 wide + 1) n, *shape) at t_max to use instead, where runs do not start from the prior
    condition  keywords for the model; tensors with n entries are one a sample, for every n noises the same
    wide       how many times n noises those that matter are drawn from
    batch      samples in one call of the model; by default n, and more if samples are small
    flip       samples further than this from the reference (root mean square over coordinates) count as
               having gone elsewhere; by default 0.4 of the standard deviation of the reference's ends
    progress   a bar of the time, with the error on the second set

    Fitting can be stopped with Ctrl-C: what is best so far is returned, with status "interrupted". With time
    enough for all fits to finish the result is a function of the arguments alone.

    Raises TypeError or ValueError for arguments that do not fit, before any call of the model, and
    RuntimeError for a model that cannot be differentiated by its state.
    """
    started = time.perf_counter()
    if not isinstance(model, BaseDenoiser):
        raise TypeError(f"expected a denoiser such as Denoiser(network, sde) as model, found {model!r}")
    task = Task.of(model.sde, solver, calls, what, seconds, end, grids, starts)
    whole(n=n, wide=wide, reference=reference, batch=n if batch is None else batch)
    if n < 2:
        raise ValueError(f"expected n of at least 2 noises, found {n}")
    if flip is not None and not flip > 0:
        raise ValueError(f"expected flip > 0, found {flip!r}")
    shape = sample_shape(shape)
    batch = max(n, 2**15 // max(math.prod(shape), 1)) if batch is None else batch
    total = (2 * wide + 1) * n
    if start is None:
        dtype = torch.promote_types(model.dtype, torch.float32)
        noise = Noise.of(seed, batch=total, device=model.device, dtype=dtype)
        start = noise.prior((total, *shape)) * model.sde.prior_std
    if tuple(start.shape) != (total, *shape):
        raise ValueError(f"expected start of shape {(total, *shape)}, found {tuple(start.shape)}")
    with torch.no_grad(), evaluating(model):
        sets = _sampled(model.given(**(condition or {})), start, n, seed, end, reference, batch, flip)
        sets.train.first(8).check_derivatives()
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


def _sampled(
    model: BaseDenoiser,
    start: Tensor,
    n: int,
    seed: int,
    end: float | None,
    steps: int,
    batch: int,
    flip: float | None,
) -> Sets:
    """Sets of states (N, ...): the last n held out, the others to draw from."""
    meter = Meter()

    def solved(some: BaseDenoiser, x: Tensor, steps: int = steps) -> Tensor:
        table = USUAL.solver.tableau(model.sde, USUAL.grid(model.sde, steps, end))
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(batch):
            parts.append(execute(table, some.narrowed(rows, len(x)), x[rows]).x)
            meter.calls += len(table)
            meter.samples += len(table) * len(rows)
        return torch.cat(parts)

    def noises(x: Tensor) -> Noises:
        which = torch.arange(len(x), device=x.device) % n
        return Noises(model.narrowed(which, n), x, solved, batch, meter)

    wide = (len(start) - n) // 2
    train, judge, held_out = (noises(x) for x in start.split([wide, wide, n]))
    few, ends = held_out.first(32), held_out.target.double()
    halved = distance(solved(few.model, few.start, max(1, steps // 2)), ends[: len(few)])
    spread = (ends - ends.mean(0)).square().mean().sqrt().item()
    limit = FLIP * spread if flip is None else flip
    return Sets(train, judge, held_out, limit, halved.square().mean().sqrt().item(), seed)


def _tuned(task: Task, sets: Sets, started: float, progress: bool) -> Tuned:
    """Choose, fit, choose, report."""
    meter, first = sets.train.meter, sets.first()
    with _bar(task.seconds, started, progress) as tell:
        now = time.perf_counter()
        ranked, tried = _ranked(task, first, now + SCREENING * (started + task.seconds - now))
        fixed, fixed_table = ranked[0]
        before = time.perf_counter()
        first.judge.distances(natural(fixed_table))
        # Each of the runs that are still to come takes as long as this one, by their number of noises.
        runs = 2 * len(sets.held_out) / len(first.judge) + max(2 * task.starts, 2 * AGREED) + 1
        search = Search(
            task, sets, first, started + task.seconds - runs * (time.perf_counter() - before), tell
        )
        try:
            search.run(ranked)
            status = "finished" if all(fit.best.done for fit in search.fits) else "out of time"
        except KeyboardInterrupt:
            status = "interrupted"
        table, start = search.chosen(fixed_table)
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
        history=tuple(entry for fit in search.fits for entry in fit.best.history),
    )
    return Tuned(table, report)


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
