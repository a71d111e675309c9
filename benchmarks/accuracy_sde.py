"""Error in law against network calls: our stochastic samplers and the public ones, where the denoiser is
exact.

    python -m benchmarks.accuracy_sde [--problems gaussian ring ...] [--calls 5 6 8 ...] [--quick]

VP(0.1, 20), t from 1 to 1e-3, float64, started from the exact law of x_1, so that the law of the output
should be that of x_t at 1e-3. Configurations (solver and grid) are chosen and scored by one rule for ours and
theirs.

gaussian   The error is the 2-Wasserstein distance of the exact law of the output, divided by the square root
           of the dimension. Every sampler here is affine on Gaussian data, so one run on unit vectors of
           noise gives its law; there is no floor. Chosen on one Gaussian, scored on another.
others     The error is the sliced 2-Wasserstein distance over random directions, of a sample against the
           expected order statistics of the law, whose floor is that of true samples of the same number. The
           best of either side and on every grid on the Gaussian with the law's mean and covariance (24 with
           5 calls, 3 with 50) are run on a few noises, the 16 best of these on more, the 4 best of these on
           as many as are reported, and the best of these once on another set. Ratios are of what exceeds the
           floor in the square. On the ring samples count together with their images under its rotations,
           with which the law and all samplers commute: no mode is found more often than another by chance.
           All samplers get the same noises. The subspace runs in 61 coordinates, as in
           `benchmarks.accuracy`, and with 8 times the samples, because its errors are small. With 20 and
           30 calls errors are about the floor of so many: there the best on the ring are chosen and reported
           by 8 times the samples, those on the subspace reported by 4 times, and with 30 chosen so too.

The public libraries need the environment of benchmarks/peers.txt.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import grids, solvers
from scoresde.laws import Gaussian, Law
from scoresde.solvers.exponential import er_noise_level

from . import peers, problems
from .accuracy import (
    MORE_GRIDS,
    SDE,
    STAGES,
    Configuration,
    InBlocks,
    Measure,
    Ranks,
    Run,
    Stage,
    arguments,
    best_of_all,
    board,
    distinct,
    name_of,
    ours,
    report,
    save,
    theirs,
)
from .peers import ETAS

END = 1e-3
SAMPLES = {"narrow": 512, "shortlist": 4096, "choose": 32768, "report": 32768}
TIMES = {"subspace": 8}
# How many times the samples, on problems and in stages with calls whose floor is in the way.
FINER = {
    ("ring", "choose"): {20: 8, 30: 8},
    ("ring", "report"): {20: 8, 30: 8},
    ("subspace", "choose"): {30: 4},
    ("subspace", "report"): {20: 4, 30: 4},
}
DIRECTIONS, REPEATS, FLOOR = 64, 32, 1e-12

QUARTIC = partial(grids.power, exponent=4)
MORE = {
    **MORE_GRIDS,
    "power 4": QUARTIC,
    "power 5": partial(grids.power, exponent=5),
    **{
        f"0.5 power {p} + 0.5 Karras 20": partial(
            grids.blend,
            one=partial(grids.power, exponent=p),
            other=partial(grids.karras, rho=20),
            weight=0.5,
        )
        for p in (1, 5)
    },
    **{
        f"{w} power 4 + {1 - w:.2g} log-SNR": partial(grids.blend, one=QUARTIC, other=grids.log_snr, weight=w)
        for w in (0.5, 0.7, 0.85)
    },
}
# What `benchmarks.sde_default` chooses.
OURS = solvers.exponential(5, corrector=7, stored="flow", variable="t", tau=math.sqrt(0.02))
DEFAULT: Configuration = name_of(OURS), "power 3"


class Distance(NamedTuple):
    """Between the law of the output and the true one; and what true samples would have."""

    error: float
    floor: float = 0.0

    def rank(self) -> float:
        return self.error


def candidates() -> list[solvers.TableSolver]:
    """Our stochastic solvers."""
    listed = [s for s in solvers.examples().values() if isinstance(s, solvers.TableSolver)]
    presets = [
        *(solvers.ddim(eta) for eta in ETAS),
        *(solvers.sde_dpmpp(2, eta, True) for eta in ETAS),
        *(solvers.sde_dpmpp(p, eta, rule=rule) for p, rule in ((2, "bh2"), (3, "half3")) for eta in ETAS),
    ]
    family = [
        solvers.exponential(p, corrector=c, stored=stored, variable=variable, tau=tau)
        for p, c in ((2, 0), (2, 3), (3, 4), (4, 5), (5, 6), (5, 7), (6, 7))
        for stored in ("data", "flow")
        for variable in ("lam", "sigma", "t")
        for tau in (*(math.sqrt(eta) for eta in ETAS), er_noise_level)
    ]
    return [*(s for s in listed if s.card.stochastic), *presets, *family]


def exact(run: Run, law: Gaussian, calls: int) -> Distance | None:
    """The distance of the output's exact law for a law with diagonal covariance. Rows of the state: constant,
    initial state, then the noises."""
    start, target = law.marginal(SDE, 1.0), law.marginal(SDE, END)
    x = torch.zeros(calls + 2, law.dim, dtype=torch.float64)
    x[1] = 1

    def unit(k: int) -> Tensor:
        if k >= calls:
            raise RuntimeError(f"expected at most one noise for each of {calls} calls, found number {k}")
        z = torch.zeros_like(x)
        z[2 + k] = 1
        return z

    form = run.solve(law.denoiser(SDE), x, calls, unit)
    if form is None:
        return None
    constant, slope, noise = form[0], form[1] - form[0], form[2:] - form[0]
    mean = constant + slope * start.mean
    std = (slope**2 * start.variance + noise.square().sum(0)).sqrt()
    squares = (mean - target.mean).square() + (std - target.variance.sqrt()).square()
    error = squares.mean().sqrt().item()
    return Distance(max(error, FLOOR) if math.isfinite(error) else math.inf)


def in_eigenbasis(law: Gaussian) -> Gaussian:
    """Samplers do not see rotations."""
    basis, values = law.eigen()
    return Gaussian(law.mean if basis is None else basis.T @ law.mean, values)


def on_gaussian(choose: Gaussian, report: Gaussian) -> Measure:
    """How a configuration is scored on Gaussian data."""
    laws = {"screen": in_eigenbasis(choose), "report": in_eigenbasis(report)}
    known: dict[tuple[Run, int, str], Distance | None] = {}

    def measure(run: Run, calls: int, stage: str) -> Distance | None:
        key = run, calls, "report" if stage == "report" else "screen"
        if key not in known:
            known[key] = exact(run, laws[key[2]], calls)
        return known[key]

    return measure


class Sliced:
    """The sliced 2-Wasserstein distance to a law, of n samples: along directions (M, D), against the expected
    order statistics of n samples; with `turns` (R, D, D) all of them together with their images."""

    def __init__(
        self,
        law: Law,
        directions: Tensor,
        n: int,
        generator: torch.Generator,
        turns: Tensor | None = None,
        repeats: int = REPEATS,
    ) -> None:
        units = directions / directions.norm(dim=1, keepdim=True)
        self.turned = units.T[None] if turns is None else (units @ turns).mT  # <u, R x> = <R^T u, x>
        self.expected = torch.zeros(n * len(self.turned), len(directions), dtype=torch.float64)
        for _ in range(repeats):
            self.expected += self._ordered(law.sample(n, generator=generator)) / repeats
        fresh = [self(law.sample(n, generator=generator)) ** 2 for _ in range(4)]
        self.floor = math.sqrt(sum(fresh) / len(fresh))

    def _ordered(self, x: Tensor) -> Tensor:
        return torch.cat([x @ directions for directions in self.turned]).sort(0).values

    def __call__(self, x: Tensor) -> float:
        error = (self._ordered(x) - self.expected).square().mean().sqrt().item()
        return error if math.isfinite(error) else math.inf


def on_samples(name: str, quick: bool) -> Measure:
    """How a configuration is scored on a mixture."""
    law, generator = problems.problem(name), torch.Generator().manual_seed(2)
    directions = torch.randn(DIRECTIONS, law.dim, generator=generator, dtype=torch.float64)
    if name == "subspace":
        law, directions = problems.inside(), problems.to_inside(directions)
    turns = problems.rotations() if name == "ring" else None
    model = InBlocks(problems.Inside(SDE) if name == "subspace" else law.denoiser(SDE), 512)
    initial, target = law.marginal(SDE, 1.0), law.marginal(SDE, END)
    alike = Gaussian(law.mean, law.cov)
    screen = on_gaussian(alike, alike)

    @cache
    def samples(stage: str, finer: int) -> tuple[list[Tensor], Sliced]:
        """Initial states, in parts that run one after the other, and the distance of all ends."""
        count = SAMPLES[stage] * TIMES.get(name, 1) // (8 if quick else 1)
        generator = torch.Generator().manual_seed(list(SAMPLES).index(stage))
        parts = [initial.sample(count, generator=generator) for _ in range(finer)]
        repeats = max(4, REPEATS // finer)
        return parts, Sliced(target, directions, count * finer, generator, turns, repeats)

    @lru_cache(maxsize=50)  # from run to run: to make them takes as long as the denoiser
    def normals(stage: str, part: int, k: int, shape: torch.Size) -> Tensor:
        seed = 1000 + len(SAMPLES) * (k + 1000 * part) + list(SAMPLES).index(stage)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def measure(run: Run, calls: int, stage: str) -> Distance | None:
        if stage == "screen":
            return screen(run, calls, stage)
        finer = FINER.get((name, stage), {}).get(calls, 1)
        parts, distance = samples(stage, finer)
        ends = []
        for part, x in enumerate(parts):
            found = run.solve(
                model, x, calls, lambda k, part=part, x=x: normals(stage, part, k, x.shape).clone()
            )
            if found is None:
                return None
            ends.append(found)
        return Distance(distance(torch.cat(ends)), distance.floor)

    return measure


LEGEND = (
    "Cells: 2-Wasserstein distance of the output's exact law, over the root of the dimension (gaussian), or "
    "sliced 2-Wasserstein distance of samples (others). Ratios are of what exceeds the floor in the square; "
    "each at least half of it; '<=': what is divided is less, and the samples tell no more; 'at the floor': "
    "both are less."
)


def best_on_every_grid(ranks: Ranks, calls: int) -> list[Run]:
    """A shortlist: the Gaussian tells good solvers from bad ones better than good grids from bad ones, and
    the better the more calls there are."""
    order = sorted(ranks, key=ranks.__getitem__)
    names, each = dict.fromkeys(run.grid for run in order), max(3, 120 // calls)
    return [run for name in names for run in [run for run in order if run.grid == name][:each]]


ON_SAMPLES: tuple[Stage, ...] = (
    ("screen", best_on_every_grid),
    ("narrow", best_of_all),
    ("shortlist", partial(best_of_all, kept=4)),
)


def main() -> None:
    args = arguments(__doc__)
    runs = [*ours(distinct(candidates()), MORE), *theirs(peers.SDE)]
    for name in args.problems:
        if name == "gaussian":
            measure = on_gaussian(problems.gaussian(seed=0), problems.gaussian(seed=1))
            stages = STAGES
        else:
            measure = on_samples(name, args.quick)
            stages = ON_SAMPLES
        result = board(name, runs, args.calls, measure, DEFAULT, stages)
        save(result, args.out, "accuracy_sde")
    report(args.out, "accuracy_sde", DEFAULT, LEGEND, "2-Wasserstein distance of the output's law")


if __name__ == "__main__":
    main()
