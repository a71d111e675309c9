"""Error against network calls: all our deterministic solvers and the public ones, where the denoiser is
exact.

    python -m benchmarks.accuracy [--problems ring anisotropic subspace] [--calls 5 6 8 ...] [--quick]

Error is the distance to the probability-flow solution from the same noise, VP(0.1, 20), t from 1 to 1e-3,
float64: the root mean square per coordinate over the samples that do not end in another mode (a "flip": a
sample further than 0.3 off), the share of flips, and the median. For every number of calls a configuration
(solver and grid) is chosen by that score on one set of noises and reported on another, by the same rule for
ours and for theirs. Public samplers run on the grids that public code offers, ours also on other powers of t.
They need the environment of benchmarks/peers.txt; without it their columns stay empty.
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
DEFAULT = repr(solvers.exponential(3, corrector=4, stored="flow", variable="sigma")), "power 2.5"
GOAL = {5: 1.0, 6: 1.0, 8: 0.9, 10: 0.9, 15: 0.8, 20: 0.8, 30: 0.5, 50: 0.5}
RESULTS = Path(__file__).parent / "results"

GRIDS: dict[str, Callable[..., grids.Grid]] = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "log-SNR": grids.log_snr,
    **{f"Karras {rho}": partial(grids.karras, rho=rho) for rho in (3, 5, 7, 10)},
}
MORE_GRIDS = {f"power {p}": partial(grids.power, exponent=p) for p in (1.5, 2.5, 3)}


Make = Callable[..., grids.Grid]


class Score(NamedTuple):
    """Root mean square without flips, share of flips, median."""

    rms: float
    flips: float
    median: float


class Run(NamedTuple):
    """A configuration: who, which solver, which grid, and how to run it with a number of calls (None: it does
    not fit)."""

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


def _ours(solver: Any, make: Make, model: ExactDenoiser, x: Tensor, calls: int) -> Tensor | None:
    if calls < solver.calls(1):
        return None
    return solver.solve(model, x, make(model.sde, solver.steps_for(calls))).x


def theirs() -> Iterator[Run]:
    """Every deterministic public sampler that can be imported here, on every grid that public code offers."""
    for name, (peer, each) in peers.PEERS.items():
        if peers.missing(name.split()[0]) is None and not any(
            word in name for word in ("ancestral", "sde", "DDPM")
        ):
            for grid, make in GRIDS.items():
                yield Run("theirs", name, grid, partial(_theirs, peer, each, make))


def _theirs(
    peer: peers.Peer, each: int, make: Make, model: ExactDenoiser, x: Tensor, calls: int
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
    """One problem: the score of every configuration on the first noises, and on fresh ones that of the chosen
    configurations of both sides and of the default."""
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
        fits = [run for run in runs if n in tried[run]]
        chosen = dict([("default", run) for run in fits if (run.solver, run.grid) == DEFAULT])
        for side in ("ours", "theirs"):
            group = [(_selection(tried[run][n]), k) for k, run in enumerate(fits) if run.side == side]
            if group:
                chosen[side] = fits[min(group)[1]]
        row: dict[str, Any] = {"calls": n}
        for side, run in chosen.items():
            found = _try(run, model, report, n)
            assert found is not None
            row[side] = {"solver": run.solver, "grid": run.grid, **score(found, exact_report)._asdict()}
        rows.append(row)
        print(_line(name, row), flush=True)
    everything = [
        {
            "side": run.side,
            "solver": run.solver,
            "grid": run.grid,
            "rms": {n: float(f"{s.rms:.3g}") for n, s in scores.items()},
        }
        for run, scores in tried.items()
    ]
    return {"problem": name, "noises": [len(choose), len(report)], "rows": rows, "all": everything}


def _selection(s: Score) -> float:
    """Flips count: a configuration that loses more than one sample in a hundred to other modes is not chosen
    for its remaining ones."""
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
            cells.append(f"{side} {_cell(r)} {r['solver']} on {r['grid']}")
    return " | ".join(cells)


def summary(boards: list[dict[str, Any]]) -> str:
    """A Markdown table: the chosen configurations, and ours over theirs beside the goal."""
    titles = [
        "problem",
        "calls",
        "ours",
        "theirs",
        "ratio",
        "goal",
        "default",
        "default/theirs",
        "ours_is",
        "theirs_is",
    ]
    lines = ["| " + " | ".join(title.replace("_", " ") for title in titles) + " |", "|---" * 10 + "|"]
    ratios = []
    for result in boards:
        for row in result["rows"]:
            mine, other, fixed = (row.get(side) for side in ("ours", "theirs", "default"))
            ratio = mine["rms"] / other["rms"] if other else math.nan
            behind = fixed["rms"] / other["rms"] if other and fixed else math.nan
            ratios.append(behind)
            cells = [
                result["problem"],
                row["calls"],
                _cell(mine),
                _cell(other),
                f"{ratio:.2f}",
                GOAL.get(row["calls"], "-"),
                _cell(fixed),
                f"{behind:.2f}",
                f"{mine['solver']}, {mine['grid']}",
                f"{other['solver']}, {other['grid']}" if other else "-",
            ]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    known = [math.log(r) for r in ratios if r == r]
    mean = math.exp(sum(known) / len(known)) if known else math.nan
    legend = "Cells: root mean square without flips (share of flips, median)."
    text = f"Default: {DEFAULT[0]} on {DEFAULT[1]}; over the best of theirs, geometric mean: {mean:.2f}"
    return "\n".join([*lines, "", legend, "", f"{text} (goal 1.2)", ""])


def _cell(side: dict[str, Any] | None) -> str:
    return f"{side['rms']:.2e} ({100 * side['flips']:.1f} %, {side['median']:.1e})" if side else "-"


def picture(boards: list[dict[str, Any]], path: Path) -> None:
    """Error against calls, every configuration thin, the best of each side thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(boards), figsize=(4.6 * len(boards), 4.2), squeeze=False, sharey=True)
    for axis, result in zip(axes[0], boards, strict=True):
        for side, color in (("theirs", "tab:orange"), ("ours", "tab:blue")):
            group = [entry["rms"] for entry in result["all"] if entry["side"] == side]
            for rms in group:
                axis.loglog([int(n) for n in rms], list(rms.values()), color=color, alpha=0.07, linewidth=0.8)
            rows = [row for row in result["rows"] if side in row]
            axis.loglog(
                [r["calls"] for r in rows],
                [r[side]["rms"] for r in rows],
                color=color,
                linewidth=2.5,
                label=f"best of {side}",
            )
        rows = [row for row in result["rows"] if "default" in row]
        axis.loglog(
            [r["calls"] for r in rows],
            [r["default"]["rms"] for r in rows],
            "k--",
            linewidth=1.5,
            label="our default",
        )
        axis.set_title(result["problem"])
        axis.set_xlabel("network calls")
        axis.set_ylim(3e-6, 1)
        ticks = [row["calls"] for row in result["rows"]]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("RMS distance to the exact solution, without flips")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", nargs="+", default=["ring", "anisotropic", "subspace"])
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--quick", action="store_true", help="an eighth of the noises")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    boards = []
    for name in args.problems:
        boards.append(board(name, tuple(args.calls), args.quick))
        compact = json.dumps(boards[-1], default=lambda value: value)
        (args.out / f"accuracy_{name}.json").write_text(compact.replace('{"side"', '\n{"side"') + "\n")
    (args.out / "accuracy.md").write_text(summary(boards))
    picture(boards, args.out / "accuracy.png")
    print(summary(boards))


if __name__ == "__main__":
    main()
