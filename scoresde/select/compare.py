"""`compare`: which solver, on which grid, with how many calls, measured on a model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import grids as spacing
from .. import solvers as made
from ..denoiser import BaseDenoiser
from ..metrics import energy_distance
from ..solvers.base import Solver, TableSolver
from ..solvers.exponential import er_noise_level
from .candidates import GRIDS, Candidate, GridFunction
from .comparison import About, Comparison, LeftOut
from .jobs import Entry, Job, listed, named
from .measures import FLIP, GROUPS, Distance, Label, Laws, Paired, Record, rms_distance
from .references import Solution, planned, solution
from .runs import Runner, Store, digest, sample_shape

USUAL_GRIDS = (
    "uniform",
    "quadratic",
    "power(exponent=3)",
    "log_snr",
    "karras(rho=7)",
    "0.5 power(exponent=3) + 0.5 karras(rho=5)",
)


class Budget(NamedTuple):
    """What a comparison may cost: seconds, network calls on a batch."""

    seconds: float = math.inf
    calls: float = math.inf


def usual(stochastic: bool = False) -> list[TableSolver]:
    """What `compare` tries by default: presets that people know, and members of the family that were best in
    benchmarks.accuracy; with `stochastic` some of either kind, for distances between laws."""
    family = made.exponential
    if stochastic:
        return [
            made.ddim(),
            made.dpmpp(2),
            made.unipc(3),
            made.ddpm(),
            made.euler_maruyama(),
            made.sde_dpmpp(2),
            made.sa(2, 3),
            made.er_sde(3),
            family(4, corrector=5, stored="data", variable="t", tau=er_noise_level),
        ]
    return [
        made.ddim(),
        made.heun(),
        made.dpm(2),
        *(made.dpmpp(p) for p in (2, 3)),
        *(made.unipc(p) for p in (2, 3)),
        made.deis(3),
        made.adams(3, "adams"),
        *(family(p, stored="flow", variable="sigma") for p in (2, 3, 4)),
        family(2, corrector=3, stored="flow", variable="sigma"),
        family(4, corrector=5, stored="flow", variable="lam"),
        family(6, corrector=7, stored="data", variable="t"),
    ]


def compare(
    model: BaseDenoiser,
    solvers: Entry | Iterable[Entry] | Mapping[str, Entry] | None = None,
    grids: Mapping[str, GridFunction] | None = None,
    calls: Sequence[int] = (5, 10, 20, 50),
    *,
    shape: Sequence[int],
    reference: Solver | Candidate | Float[Tensor, "n ..."] | None = None,
    metric: Distance | None = None,
    n: int = 256,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
    data: Float[Tensor, "m ..."] | None = None,
    end: float | None = None,
    budget: Budget | float | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    flip: float | None = None,
) -> Comparison:
    """Run solvers on grids with numbers of network calls on a model, from the same noise, and measure them.

    Without `data` the solvers are deterministic, and the error is how far their samples are from a solution
    of high accuracy from the same noise: with the distance d_i of sample i (root mean square over its
    coordinates),

        error = sqrt(mean of d_i^2 over samples with d_i <= flip),   flips = share of the others,

    beside the median of all, which rows are ordered by (`Row.score`). A sample beyond `flip` has ended in
    another mode: its distance is that of two modes, and says nothing of the accuracy. With `data` the error
    is a distance between laws, of the samples from the data, for solvers with and without noise;
    `About.floor` is what true samples reach.

    solvers    solver objects (each is run on all grids), Candidates (with their own grid), Tableaus (with
               their own grid and calls), or a mapping that names them; default: `usual()`. Adaptive solvers
               run once, and stand where their calls turn out to be
    grids      name -> function as in scoresde.grids; default: USUAL_GRIDS of `candidates.GRIDS`
    calls      numbers of network calls; each configuration makes as many steps as these pay for
    shape, n   of one sample (...), and how many are drawn, `batch` at a time (default: all)
    reference  a solver with or without a grid, run with four times the most calls, at least 100, or the
               solution itself (n, ...). How far it is from the default reference with half of these calls is
               `About.reference_error`
    metric     without data: (x, reference) -> (n,) distances; with data: (x, data) -> float. Default: root
               mean square, `metrics.energy_distance`
    condition  passed on to the model as keywords; tensors of n entries belong to the samples
    end        last time of all grids; `sde.default_end` if None
    budget     seconds, or Budget(seconds, calls): what does not fit is left out, the dearest first; the
               reference must fit
    cache      a folder: every run is kept there as soon as it is done, and not made again. A run is known by
               its coefficients and grid, the noises, the metric's value on noise, and the model, which is
               known by how it prints and by its outputs on four noises, at four times each
    progress   a bar, one tick a network call
    dtype      of the state, as in `sample`
    flip       default: 0.4 standard deviations of the reference; with a metric of one's own: none

    Intervals (95 %) are of the samples' randomness: the bootstrap's percentiles, the same resamples for all
    runs; with data, the delete-a-group jackknife in 10 blocks of samples (Student's t). Seconds are those of
    one run without the making of its table. Ctrl-C ends it with what is done; again with the same cache it
    goes on. Raises ValueError or TypeError for arguments that do not fit, before the first network call, and
    ValueError where the reference does not fit into the budget.
    """
    started = time.perf_counter()
    size = (n, *sample_shape(shape))
    numbers = _checked(model, calls, size, data)
    if data is not None and (reference is not None or flip is not None):
        raise ValueError("expected a reference (and flip), or data to compare with; found both: give one")
    if flip is not None and not flip > 0:
        raise ValueError(f"expected flip > 0, found {flip!r}")
    spacing.uniform(model.sde, 1, end)  # says what is wrong with the end
    last = float(model.sde.default_end if end is None else end)
    jobs, unfit = listed(
        named(usual(data is not None) if solvers is None else solvers),
        {name: GRIDS[name] for name in USUAL_GRIDS} if grids is None else dict(grids),
        numbers,
        model.sde,
        last,
    )
    if data is None and (noisy := sorted({job.label.solver for job in jobs if job.stochastic})):
        raise ValueError(
            f"expected deterministic solvers, found {', '.join(noisy[:4])}: samples with noise of their own "
            "have no reference from the same noise; give data=... for a distance between laws"
        )
    limit = _limit(budget)
    given = dict(condition or {})
    run = Runner(model.given(**given), size, seed, last, dtype, n if batch is None else batch)
    store = None if cache is None else Store(Path(cache))
    identity = "" if store is None else run.identity(given)
    plan = planned(reference, numbers, model.sde, last)
    with _bar(progress, sum(job.calls for job in jobs) + plan.calls * (data is None)) as tick:
        if data is not None:
            measure, about = _laws(data, metric or energy_distance, n)
        else:
            probe = run.noise(size, 1)
            Paired(probe, metric or rms_distance, flip)(probe)  # says what is wrong with the metric
            until = started + limit.seconds
            known = solution(plan, run, limit.calls, until, store, identity, tick)
            measure, about = _paired(known, plan.name, metric, flip)
        # Reference and metric are known by what the measure makes of noise.
        key = "" if store is None else digest(identity, measure(run.noise(size, 1)))
        found, missed, interrupted = _run_all(jobs, run, measure, store, key, limit, started, tick)
    if interrupted and not found:
        raise KeyboardInterrupt("No run was done.")
    rows = tuple(measure.rows(found))
    spent = {"calls": run.calls, "seconds": round(time.perf_counter() - started, 3)}
    place = {"device": str(model.device), "interrupted": interrupted}
    setting = {"n": n, "shape": tuple(shape), "seed": seed, "end": last, "flip": measure.flip}
    return Comparison(rows, About(**setting, **about, **spent, **place), (*unfit, *missed))


def _limit(budget: Budget | float | None) -> Budget:
    if budget is None:
        return Budget()
    limit = budget if isinstance(budget, Budget) else Budget(budget)
    if any(isinstance(v, bool) or not isinstance(v, int | float) or math.isnan(v) for v in limit):
        raise TypeError(f"expected seconds or Budget(seconds, calls) as budget, found {budget!r}")
    return limit


def _checked(model: Any, calls: Any, size: tuple[Any, ...], data: Tensor | None) -> list[int]:
    """The numbers of calls, ascending."""
    if not isinstance(model, BaseDenoiser):
        raise TypeError(f"expected a denoiser as model, such as Denoiser(network, sde), found {model!r}")
    n, least = size[0], 2 if data is None else 2 * GROUPS
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise ValueError(f"expected n of at least {least} samples, found {n!r}")
    if data is not None and not isinstance(data, Tensor):
        raise TypeError(f"expected a tensor (m, ...) as data, found {type(data).__name__}")
    if data is not None and data.shape[1:] != size[1:]:
        raise ValueError(f"expected data of samples of shape {size[1:]}, found {tuple(data.shape[1:])}")
    numbers = sorted(set(calls)) if isinstance(calls, Iterable) else []
    if not numbers or any(isinstance(c, bool) or not isinstance(c, int) or c < 1 for c in numbers):
        raise ValueError(f"expected numbers of network calls, such as (5, 10, 20), found {calls!r}")
    return numbers


def _run_all(
    jobs: Sequence[Job],
    run: Runner,
    measure: Paired | Laws,
    store: Store | None,
    key: str,
    limit: Budget,
    started: float,
    tick: Callable[[int], Any],
) -> tuple[list[tuple[Label, Record]], list[LeftOut], bool]:
    """What every run gave, what was left out, and whether Ctrl-C came."""
    found: list[tuple[Label, Record]] = []
    missed: list[LeftOut] = []
    interrupted = False
    for job in jobs:
        own = digest(key, job.how.key)
        record, why = store and store.get(own), None
        if record is None:
            why = "interrupted" if interrupted else _too_dear(job, run, limit, started)
        if record is None and why is None:
            try:
                x, cost = run.measured(job.how, job.kept)
                record = {**cost._asdict(), **measure(x)}
                if store:
                    store.put(own, record)
            except FloatingPointError as error:
                why = f"failed: {error}"
            except KeyboardInterrupt:
                interrupted, why = True, "interrupted"
        if record is not None:
            found.append((job.label, record))
        else:
            missed.append(LeftOut(job.label.solver, job.label.grid, job.label.budget or job.calls, str(why)))
        tick(job.calls)
    return found, missed, interrupted


def _too_dear(job: Job, run: Runner, limit: Budget, started: float) -> str | None:
    calls, spent = job.calls * run.parts, time.perf_counter() - started
    if run.calls + calls > limit.calls:
        return f"beyond {limit.calls:g} network calls"
    if spent + calls * (run.seconds / max(run.calls, 1)) > limit.seconds:
        return f"beyond {limit.seconds:g} seconds"
    return None


def _paired(
    known: Solution, name: str, metric: Distance | None, flip: float | None
) -> tuple[Paired, dict[str, Any]]:
    """The distance to the reference, and what is known of it."""
    if flip is None and metric is None:
        x = known.x.double()
        flip = FLIP * float((x - x.mean(0)).square().mean().sqrt())
    measure = Paired(known.x, metric or rms_distance, flip)
    text = f"{_words(metric or rms_distance)} to the reference"
    about = {"reference": name, "reference_error": measure.error(known.check), "measure": text}
    return measure, {**about, "floor": None, "floor_std": None}


def _laws(data: Tensor, metric: Distance, n: int) -> tuple[Laws, dict[str, Any]]:
    """The distance to the data, and its floor."""
    measure = Laws(data, metric)
    lowest = measure.floor(n)
    about = {"reference": f"{len(data)} samples", "reference_error": None, "measure": _words(metric)}
    return measure, {**about, "floor": lowest.mean, "floor_std": lowest.std}


def _words(metric: Distance) -> str:
    return str(getattr(metric, "__name__", metric)).replace("_", " ")


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[int], Any]]:
    """A bar on the terminal, gone afterwards, or nothing."""
    if not wanted:
        yield lambda calls: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="call", desc="comparing", leave=False, dynamic_ncols=True) as bar:
        yield bar.update
