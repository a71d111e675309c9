"""Which single stochastic configuration is best over all problems and numbers of calls: how the default of
`benchmarks.accuracy_sde` was chosen.

    python -m benchmarks.sde_default

By the geometric mean of its errors over problems and calls, each at least what its samples tell, on what
`benchmarks.accuracy_sde` chooses configurations on and never on what it reports: all our configurations on
the first Gaussian and on those with the mean and covariance of the mixtures, with more and more calls, of
which the best 400 go on; the best 60 of all on few samples of the mixtures, and the best 12 of these on more.
Of those at most a tenth above the best mean the one is chosen whose largest error is the least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import accuracy_sde, options, problems
from .accuracy import BOARDS, CALLS, Measure, Run, distinct, ours

# Where configurations are measured, how many of the best so far, and how many of them stay.
STAGES = ("screen", None, 400), ("narrow", 60, 60), ("shortlist", 12, 12)
SHOWN, ALIKE = 12, math.log(1.1)


class Rank(NamedTuple):
    """Of the logarithms of a run's errors: their mean, and the largest."""

    mean: float
    largest: float


Ranks = dict[Run, Rank]


def error(measure: Measure, run: Run, calls: int, stage: str) -> float:
    """Its logarithm, at least that of the floor; a run that does not fit is no default."""
    found = measure(run, calls, stage)
    if found is None or not math.isfinite(found.error):
        return math.inf
    return math.log(max(found.error, found.floor))


def best(ranks: Ranks, kept: int) -> list[Run]:
    """The first of all, in order."""
    return sorted(ranks, key=ranks.__getitem__)[:kept]


def ranked(measures: Sequence[Measure], runs: Sequence[Run], stage: str, kept: int) -> Ranks:
    """Of those that stay among the best as calls grow."""
    errors: dict[Run, list[float]] = {run: [] for run in runs}
    for calls in CALLS:
        for run, known in errors.items():
            known += [error(measure, run, calls, stage) for measure in measures]
        ranks = {run: Rank(sum(known) / len(known), max(known)) for run, known in errors.items()}
        errors = {run: errors[run] for run in best(ranks, kept)}
    return {run: ranks[run] for run in errors}


def chosen(ranks: Ranks) -> Run:
    """Of those whose means are hardly different the one that is never far off."""
    limit = min(ranks.values()).mean + ALIKE
    return min((run for run in ranks if ranks[run].mean <= limit), key=lambda run: ranks[run].largest)


def main() -> None:
    options.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    first = accuracy_sde.on_gaussian(problems.gaussian(seed=0), problems.gaussian(seed=1))
    measures = [first, *(accuracy_sde.on_samples(name, quick=False) for name in BOARDS[1:])]
    runs = list(ours(distinct(accuracy_sde.candidates()), accuracy_sde.MORE))
    for stage, tried, kept in STAGES:
        ranks = ranked(measures, runs[:tried], stage, kept)
        runs = best(ranks, kept)
        print(f"{stage}: mean and largest error")
        for run in runs[:SHOWN]:
            mean, largest = map(math.exp, ranks[run])
            print(f"  {mean:.3e}  {largest:.1e}  {run.solver} on {run.grid}", flush=True)
    found = chosen(ranks)
    print(f"chosen: {found.solver} on {found.grid}")


if __name__ == "__main__":
    main()
