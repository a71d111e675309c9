"""Error against network calls: all our solvers and the public ones, on laws whose denoiser is exact.

    python -m benchmarks.accuracy [--problems ring anisotropic subspace] [--calls 5 6 8 ...] [--quick]

Error is the distance to the probability-flow solution from the same noise, VP(0.1, 20), t from 1 to 1e-3, float64: the root mean square per coordinate over the samples
that do not end in another mode (a "flip": a sample further than 0.3 off), the share of flips, and the median. For every number of calls a configuration (solver and grid)
is chosen by that score on one set of noises and reported on another, by the same rule for ours and for theirs. Public samplers need the environment of
benchmarks/peers.txt; without it their columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import VPSDE, grids, solvers
from scoresde.laws import ExactDenoiser

from . import peers
from .problems import problem

CALLS = (5, 6, 8, 10, 15, 20, 30, 50)
NOISES = {"gaussian": (512, 2048), "ring": (512, 2048), "anisotropic": (512, 2048), "subspace": (64, 512)}
FLIP = 0.3
DEFAULT = "exponential(order=3, corrector=4, stored='flow', variable='sigma', tau=0.0, rule='exact')", "power 2.5"
GOAL = {5: 1.0, 6: 1.0, 8: 0.9, 10: 0.9, 15: 0.8, 20: 0.8, 30: 0.5, 50: 0.5}
RESULTS = Path(__file__).parent / "results"

GRIDS: dict[str, Callable[..., grids.Grid]] = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "log-SNR": grids.log_snr,
    **{f"Karras {rho}": partial(grids.karras, rho=rho) for rho in (3, 5, 7, 10)},
}
MORE_GRIDS = {f"power {p}": partial(grids.power, exponent=p) for p in (1.5, 2.5, 3)}


class Score(NamedTuple):
    """Root mean square without flips, share of flips, median."""

    rms: float
    flips: float
    median: float


class Run(NamedTuple):
    """A configuration: who, which solver, which grid, and how to run it with a number of calls (None: it does not fit)."""

    side: str
    solver: str
    grid: str
    solve: Callable[[ExactDenoiser, Tensor, int], Tensor | None]


def score(found: Tensor, reference: Tensor) -> Score:
    """How far `found` (B, D) is from the reference."""
    each = (found - reference).square().mean(1).sqrt()
    each = torch.where(each.isfinite(), each, math.inf)
    near = each[each <= FLIP]
    rms = near.square().mean().sqrt().item() if len(near) else math.inf
    return Score(rms, (each > FLIP).double().mean().item(), each.median().item())


def candidates() -> list[Any]:
    """Our deterministic solvers."""
    order = [solver for solver in solvers.examples().values() if not solver.card.stochastic]
    tables = [solver for solver in order if isinstance(solver, solvers.TableSolver)]
    more = [
        solvers.exponential(p, corrector=c, stored=stored, variable=variable)
        for p, c in ((2, 3), (3, 4), (4, 5), (5, 6), (6, 7))
        for stored in ("data", "noise", "flow")
        for variable in ("sigma", "t", "lam")
    ]
    return [*tables, *more]


def ours() -> Iterator[Run]:
    """Every solver on every grid."""
    for solver in candidates():
        for name, make in {**GRIDS, **MORE_GRIDS}.items():
            yield Run("ours", repr(solver), name, partial(_ours, solver, make))


def _ours(solver: Any, make: Callable[..., grids.Grid], model: ExactDenoiser, x: Tensor, calls: int) -> Tensor | None:
    if calls < solver.calls(1):
        return None
    return solver.solve(model, x, make(model.sde, solver.steps_for(calls))).x


def theirs() -> Iterator[Run]:
    """Every deterministic public sampler that can be imported here, on every grid that public code offers."""
    for name, (peer, each) in peers.PEERS.items():
        if peers.missing(name.split()[0]) is None and not any(word in name for word in ("ancestral", "sde", "DDPM")):
            for grid, make in GRIDS.items():
                yield Run("theirs", name, grid, partial(_theirs, peer, each, make))


def _theirs(
    peer: peers.Peer, each: int, make: Callable[..., grids.Grid], model: ExactDenoiser, x: Tensor, calls: int
) -> Tensor | None:
    if calls < each:
        return None
    with torch.no_grad():
        return peer(peers.Task(model.sde, make(model.sde, calls // each).t, model), x)


def noises(name: str, quick: bool) -> tuple[Tensor, Tensor]:
    """The noises that configurations are chosen on, and those they are scored on."""
    choose, report = (n // 8 if quick else n for n in NOISES[name])
    generator = torch.Generator().manual_seed(20)
    dim = problem(name).dim
    return tuple(torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (choose, report))  # type: ignore[return-value]


def reference(model: ExactDenoiser, x: Tensor) -> Tensor:
    """The probability-flow solution."""
    solver = solvers.exponential(5, corrector=6, stored="flow", variable="sigma")
    steps = 300 if x.shape[1] > 1000 else 600
    parts = [solver.solve(model, part, grids.quadratic(model.sde, steps)).x for part in x.split(256)]
    return torch.cat(parts)


def board(name: str, calls: tuple[int, ...], quick: bool) -> dict[str, Any]:
    """One problem: the score of every configuration on the first noises, and on fresh ones that of the chosen configurations of both sides and of the default."""
    model = problem(name).denoiser(VPSDE())
    choose, report = noises(name, quick)
    exact_choose, exact_report = reference(model, choose), reference(model, report)
    runs = [*ours(), *theirs()]
    tried: dict[Run, dict[int, Score]] = {run: {} for run in runs}
    rows = []
    for n in calls:
        for run in runs:
            found = _try(run, model, choose, n)
            if found is not None:
                tried[run][n] = score(found, exact_choose)
        sides = {side: [run for run in runs if run.side == side and n in tried[run]] for side in ("ours", "theirs")}
        chosen = {side: min(group, key=lambda run: _selection(tried[run][n])) for side, group in sides.items() if group}
        chosen |= {"default": run for run in sides["ours"] if (run.solver, run.grid) == DEFAULT}
        row: dict[str, Any] = {"calls": n}
        for side, run in chosen.items():
            found = _try(run, model, report, n)
            assert found is not None
            row[side] = {"solver": run.solver, "grid": run.grid, **score(found, exact_report)._asdict()}
        rows.append(row)
        print(_line(name, row), flush=True)
    everything = [
        {"side": run.side, "solver": run.solver, "grid": run.grid, "rms": {n: s.rms for n, s in scores.items()}, "flips": {n: s.flips for n, s in scores.items()}}
        for run, scores in tried.items()
    ]
    return {"problem": name, "noises": [len(choose), len(report)], "rows": rows, "all": everything}


def _selection(s: Score) -> float:
    """Flips count: a configuration that loses more than one sample in a hundred to other modes is not chosen for its remaining ones."""
    return s.rms if s.flips <= 0.01 else s.rms + s.flips


def _try(run: Run, model: ExactDenoiser, x: Tensor, calls: int) -> Tensor | None:
    try:
        return run.solve(model, x, calls)
    except (IndexError, AssertionError, ValueError, ZeroDivisionError):
        if run.side == "ours":
            raise
        return None  # public code that cannot do so few steps


def _line(name: str, row: dict[str, Any]) -> str:
    cells = [f"{name:12s} {row['calls']:3d}"]
    for side in ("ours", "theirs", "default"):
        if side in row:
            r = row[side]
            cells.append(f"{side} {r['rms']:.2e} (flips {100 * r['flips']:.2f} %, median {r['median']:.1e}) {r['solver']} on {r['grid']}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["ring", "anisotropic", "subspace"], choices=sorted(NOISES))
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--quick", action="store_true", help="an eighth of the noises")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.problems:
        result = board(name, tuple(args.calls), args.quick)
        (args.out / f"accuracy_{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
