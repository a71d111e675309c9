"""Error in law against network calls: our stochastic samplers and the public ones, where the denoiser is
exact.

    python -m benchmarks.accuracy_sde [--problems gaussian ring ...] [--calls 5 6 8 ...] [--quick]

VP(0.1, 20), t from 1 to 1e-3, float64, started from the exact law of x_1, so that the law of the output
should be that of x_t at 1e-3. Configurations (solver and grid) are chosen and scored by one rule for ours and
theirs.

gaussian   The error is the 2-Wasserstein distance of the exact law of the output, divided by the square root
           of the dimension. Every sampler here is affine on Gaussian data, so one run on unit vectors of
           noise gives its law; there is no floor. Chosen on one Gaussian, scored on another.
others     The error is the sliced 2-Wasserstein distance over random directions, between the law of the
           output and that of an exact solution which follows the sampler along its noise (see
           `benchmarks.coupled`): the mean square difference of order statistics, in which what chance does is
           nearly the same for both. Without bias: samples are in parts, and parts are multiplied with each
           other only. The floor is what samples can tell, an error whose square is three standard errors of
           the square. The best of either side and on every grid on the Gaussian with the law's mean and
           covariance (24 with 5 calls, 3 with 50) are run on a few noises, the 16 best of these on more, the
           4 best of these on still more, and the best of these once on another set. On the ring samples count
           together with their images under its rotations, with which the law and all samplers commute: no
           mode is found more often than another by chance. All samplers get the same noises. The subspace
           runs in 61 coordinates, as in `benchmarks.accuracy`.

Of the committed rows of mixtures those of 50 calls (on the ring of 8 times as many samples in every stage)
and, but on the ring, of 30 calls are measured so. The others are from before: the distance of samples from
the expected order statistics of the law, in the square less what true samples have, of 32768 samples (64
dimensions; on the ring with all images, with 20 and 30 calls 8 times as many; on the subspace 8 times, with
20 calls 32 times as many); the floor is half of what true samples have.

The public libraries need the environment of benchmarks/peers.txt; without it torchsde alone is theirs, and
ratios tell little.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import grids, solvers
from scoresde.laws import Gaussian
from scoresde.select.coupling import between_groups
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
from .coupled import Way, follow, way_of
from .peers import ETAS

END = 1e-3
SAMPLES = {"narrow": 1024, "shortlist": 4096, "choose": 16384, "report": 32768}
PARTS = 8
KEPT = 60  # exact solutions
DIRECTIONS, FLOOR = 64, 1e-12

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
    """Between the law of the output and the true one, what the samples can tell, and by what configurations
    are chosen: an error that luck alone does not make small."""

    error: float
    floor: float = 0.0
    likely: float = 0.0

    def rank(self) -> float:
        return max(self.error, self.likely)


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
    """The sliced 2-Wasserstein distance of laws, along directions (M, D), from samples of both with nearly
    the same chance in them; with `turns` (R, D, D) each counts together with its images."""

    def __init__(self, directions: Tensor, turns: Tensor | None = None) -> None:
        units = directions / directions.norm(dim=1, keepdim=True)
        self.turned = units.T[None] if turns is None else (units @ turns).mT  # <u, R x> = <R^T u, x>

    def ordered(self, x: Tensor) -> Tensor:
        """Order statistics along all directions, of each part of x: (PARTS, ...)."""
        parts = torch.cat(
            [(x @ directions).view(PARTS, -1, len(directions.T)) for directions in self.turned], 1
        )
        return parts.sort(1).values.flatten(1)

    def __call__(self, ordered: Tensor, exact: Tensor) -> Distance:
        """As in `select`'s coupling, of groups that are the parts."""
        off = ordered - exact
        if not bool(off.isfinite().all()):
            return Distance(math.inf)
        square, noise = between_groups(off[:, None, None])
        root = lambda value: max(value.item(), FLOOR**2) ** 0.5  # noqa: E731
        return Distance(root(square), root(3 * noise), root(square + noise))


def on_samples(name: str, quick: bool) -> Measure:
    """How a configuration is scored on a mixture."""
    law, generator = problems.problem(name), torch.Generator().manual_seed(2)
    directions = torch.randn(DIRECTIONS, law.dim, generator=generator, dtype=torch.float64)
    if name == "subspace":
        law, directions = problems.inside(), problems.to_inside(directions)
    model = InBlocks(problems.Inside(SDE) if name == "subspace" else law.denoiser(SDE), 512)
    distance = Sliced(directions, problems.rotations() if name == "ring" else None)
    initial, alike = law.marginal(SDE, 1.0), Gaussian(law.mean, law.cov)
    screen = on_gaussian(alike, alike)

    @cache
    def start(stage: str) -> Tensor:
        generator = torch.Generator().manual_seed(list(SAMPLES).index(stage))
        return initial.sample(SAMPLES[stage] // (8 if quick else 1), generator=generator)

    @lru_cache(maxsize=50)  # from run to run: to make them takes as long as the denoiser
    def normals(stage: str, k: int) -> Tensor:
        """The k-th of a sampler; from 1000 on those that are fresh in the solution."""
        seed = 1000 + len(SAMPLES) * k + list(SAMPLES).index(stage)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(start(stage).shape, generator=generator, dtype=torch.float64)

    solutions: dict[tuple[Any, ...], Tensor] = {}

    def solution(way: Way, stage: str) -> Tensor:
        """Its order statistics; samplers with the same nodes and noise share it."""
        key = stage, *way.key()
        if key not in solutions:
            while len(solutions) >= KEPT:
                del solutions[next(iter(solutions))]
            fresh = lambda k, j: normals(stage, 1000 * (k + 1) + j)  # noqa: E731
            ends = follow(way, model, start(stage), partial(normals, stage), fresh)
            solutions[key] = distance.ordered(ends)
        return solutions[key]

    def measure(run: Run, calls: int, stage: str) -> Distance | None:
        if stage == "screen":
            return screen(run, calls, stage)
        found = run.solve(model, start(stage), calls, lambda k: normals(stage, k).clone())
        if found is None:
            return None
        way = way_of(run.solve, SDE, run.nodes(SDE, calls), calls)
        return distance(distance.ordered(found), solution(way, stage))

    return measure


LEGEND = (
    "Cells: 2-Wasserstein distance of the output's exact law, over the root of the dimension (gaussian), or "
    "sliced 2-Wasserstein distance (others), and the least that its samples tell (the floor: three "
    "standard errors of the square, or half of what true samples have in rows from before, which the head "
    "of benchmarks/accuracy_sde.py names). Ratios: of errors, each at least its floor; '<=': what is divided "
    "is less; 'at the floor': both are."
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
