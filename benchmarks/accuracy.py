"""Error against network calls: all our deterministic solvers and the public ones, where the denoiser is
exact.

    python -m benchmarks.accuracy [--problems gaussian ring ...] [--calls 5 6 8 ...] [--quick]

Error is the distance to the probability-flow solution from the same noise, VP(0.1, 20), t from 1 to 1e-3,
float64: the root mean square per coordinate over the samples that do not end in another mode (a "flip": a
sample further than 0.3 off), the share of flips, and the median. For every number of calls a configuration
(solver and grid) is chosen by that score on one set of noises and reported on another, by the same rule for
ours and for theirs: all configurations run on the first 64 noises of the first set, the 16 best of either
side on all of it, and the best of these once on the second set. One that with 10 calls or
more is more than 15 times off the best of its side is not tried with more. Public samplers run on the grids
that public code offers, ours also on other powers of t, and between grids. Solvers of ours whose tables are
equal count once.

The subspace problem of 3072 dimensions runs in the 61 coordinates of an orthogonal map that its law and all
samplers commute with (`problems.to_inside`). The public libraries need the environment of
benchmarks/peers.txt; without it their columns stay empty.
`python -m benchmarks.accuracy_sde` is the same for stochastic samplers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import VPSDE, grids, solvers
from scoresde.denoiser import BaseDenoiser
from scoresde.schedules import Time
from scoresde.sde import LinearSDE
from scoresde.tableau import Tableau

from . import options, peers
from .problems import inside, problem, to_inside

CALLS = (5, 6, 8, 10, 15, 20, 30, 50)
NOISES = (512, 2048)
SCREEN = 64
HOPELESS, PATIENCE = 15.0, 10
SDE = VPSDE()
FLIP, FLOOR = 0.3, 1e-12
Configuration = tuple[str, str]
GOAL = {5: 1.0, 6: 1.0, 8: 0.9, 10: 0.9, 15: 0.8, 20: 0.8, 30: 0.5, 50: 0.5}
DEFAULT_GOAL = 1.2
RESULTS = Path(__file__).parent / "results"
SIDES = ("ours", "theirs")
BOARDS = ["gaussian", "ring", "anisotropic", "subspace"]

GRIDS: dict[str, Callable[..., grids.Grid]] = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "log-SNR": grids.log_snr,
    **{f"Karras {rho}": partial(grids.karras, rho=rho) for rho in (3, 5, 7, 10)},
}
CUBIC, FIFTH = partial(grids.power, exponent=3), partial(grids.karras, rho=5)
MORE_GRIDS = {
    **{f"power {p}": partial(grids.power, exponent=p) for p in (1.25, 1.5, 2.5, 3)},
    **{
        f"{w} power 3 + {1 - w:.2g} Karras 5": partial(grids.blend, one=CUBIC, other=FIFTH, weight=w)
        for w in (0.3, 0.5, 0.7, 0.85)
    },
}


def name_of(solver: Any) -> str:
    """How it prints, in short: without defaults, digits that do not matter, addresses of functions."""
    text = re.sub(r", (tau=0\.0|rule='exact'|corrector=0|singlestep=False)(?=[,)])", "", repr(solver))
    return re.sub(r"<function (\w+) at \w+>", r"\1", re.sub(r"(\.\d{3})\d+", r"\1", text))


# The best single choice on the noises that configurations are chosen on.
OURS = solvers.exponential(6, corrector=7, stored="data", variable="t")
DEFAULT: Configuration = name_of(OURS), "power 3"

Make = Callable[..., grids.Grid]


Noise = Callable[[int], Tensor]


class Score(NamedTuple):
    """Root mean square without flips, share of flips, median."""

    error: float
    flips: float
    median: float

    def rank(self) -> float:
        """What configurations are chosen by. One that loses more than one sample in ten to other modes is not
        chosen for its remaining ones."""
        return self.error if self.flips <= 0.1 else self.error + self.flips


class Run(NamedTuple):
    """A configuration: whose, which solver, which grid, how to run it from x with a number of calls and noise
    (None: it does not fit), and the nodes that it has with a number of calls."""

    side: str
    solver: str
    grid: str
    solve: Callable[[BaseDenoiser, Tensor, int, Noise | None], Tensor | None]
    nodes: Callable[[LinearSDE, int], grids.Grid]


class InBlocks(BaseDenoiser):
    """A denoiser whose temporaries stay in the processor's cache: `size` samples at a time."""

    def __init__(self, model: BaseDenoiser, size: int = 64) -> None:
        super().__init__()
        self.model, self.sde, self.size = model, model.sde, size

    def forward(self, x: Tensor, t: Time) -> Tensor:
        return torch.cat([self.model(part, t) for part in x.split(self.size)])


def score(found: Tensor, reference: Tensor, dim: int) -> Score:
    """How far `found` (B, ...) is from the reference, per each of `dim` coordinates."""
    each = ((found - reference).square().sum(1) / dim).sqrt()
    each = torch.where(each.isfinite(), each, math.inf)
    near = each[each <= FLIP]
    rms = near.square().mean().sqrt().item() if len(near) else math.inf
    return Score(max(rms, FLOOR), (each > FLIP).double().mean().item(), max(each.median().item(), FLOOR))


def candidates() -> list[solvers.TableSolver]:
    """Our deterministic solvers."""
    listed = [s for s in solvers.examples().values() if isinstance(s, solvers.TableSolver)]
    family = [
        solvers.exponential(p, corrector=c, stored=stored, variable=variable)
        for p, c in ((1, 2), *((p, c) for p in range(2, 8) for c in (0, p + 1)))
        for stored in ("data", "flow")
        for variable in ("sigma", "t", "lam")
    ]
    family += [
        solvers.exponential(p, corrector=p + 1, stored="velocity", variable="sigma") for p in range(1, 8)
    ]
    return [OURS, *(s for s in listed if not s.card.stochastic), *family]


def distinct(listed: Iterable[solvers.TableSolver]) -> list[solvers.TableSolver]:
    """The first of those whose tables have one canonical form to 1e-10."""
    grid = grids.power(SDE, 9, exponent=2.3)
    kept: list[tuple[solvers.TableSolver, Tensor]] = []
    for solver in listed:
        form = solver.tableau(SDE, grid).canonical()
        numbers = torch.cat([form.times, form.a, form.B.flatten(), form.C.abs().flatten()])
        if not any(len(n) == len(numbers) and torch.allclose(n, numbers, 0, 1e-10) for _, n in kept):
            kept.append((solver, numbers))
    return [solver for solver, _ in kept]


def ours(listed: Iterable[solvers.TableSolver], more: dict[str, Make] = MORE_GRIDS) -> Iterator[Run]:
    """Every solver on every grid."""
    for solver in listed:
        for name, make in {**GRIDS, **more}.items():
            nodes = partial(_nodes, make, solver.steps_for)
            yield Run("ours", name_of(solver), name, partial(_ours, solver, make), nodes)


def _ours(
    solver: solvers.TableSolver, make: Make, model: BaseDenoiser, x: Tensor, calls: int, noise: Noise | None
) -> Tensor | None:
    if calls < solver.calls(1):
        return None
    table = _table(solver, make, model.sde, calls)
    source = None if noise is None else lambda k, shape: noise(k)
    return solvers.from_tableau(table).solve(model, x, table.ends, noise=source).x


def _nodes(make: Make, steps_for: Callable[[int], int], sde: LinearSDE, calls: int) -> grids.Grid:
    return make(sde, steps_for(calls))


@cache
def _table(solver: solvers.TableSolver, make: Make, sde: LinearSDE, calls: int) -> Tableau:
    """Made once for all problems: for few samples it costs more than to run it."""
    return solver.tableau(sde, make(sde, solver.steps_for(calls)))


def theirs(listed: dict[str, peers.Public]) -> Iterator[Run]:
    """Every public sampler that can be imported here, on every grid that public code offers."""
    for name, public in listed.items():
        if peers.missing(name.split()[0]) is None:
            for grid, make in GRIDS.items():
                nodes = partial(_nodes, make, public.steps_for)
                yield Run("theirs", name, grid, partial(_theirs, public, make), nodes)


def _theirs(
    public: peers.Public, make: Make, model: BaseDenoiser, x: Tensor, calls: int, noise: Noise | None
) -> Tensor | None:
    steps = public.steps_for(calls)
    if steps < 1:
        return None
    made = 0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return model(x, t)

    try:
        with torch.no_grad():
            found = public.run(peers.Task(model.sde, make(model.sde, steps).t, denoise, noise), x)
    except (IndexError, AssertionError, ValueError, ZeroDivisionError):
        return None  # public code that cannot do so few steps
    if made > calls:
        raise RuntimeError(f"expected at most {calls} calls of a public sampler, found {made}")
    return found


def noises(name: str, quick: bool) -> tuple[Tensor, Tensor]:
    """The noises that configurations are chosen on, and those they are scored on."""
    choose, report = (n // 8 if quick else n for n in NOISES)
    generator = torch.Generator().manual_seed(20)
    dim = problem(name).dim
    return tuple(torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (choose, report))  # type: ignore[return-value]


def reference(model: BaseDenoiser, x: Tensor) -> Tensor:
    """The probability-flow solution."""
    solver = solvers.exponential(5, corrector=6, stored="flow", variable="sigma")
    return solver.solve(model, x, grids.quadratic(model.sde, 600)).x


def deterministic(name: str, quick: bool) -> Measure:
    """How a configuration is scored: the distance to the reference, on the noises of each stage."""
    law, dim = problem(name), problem(name).dim
    choose, report = noises(name, quick)
    if name == "subspace":
        law, choose, report = inside(), to_inside(choose), to_inside(report)
    model = InBlocks(law.denoiser(SDE))
    sets = {"screen": choose[:SCREEN], "choose": choose, "report": report}

    @cache
    def wanted(stage: str) -> Tensor:
        return reference(model, sets[stage])

    def measure(run: Run, calls: int, stage: str) -> Score | None:
        found = run.solve(model, sets[stage], calls, None)
        return None if found is None else score(found, wanted(stage), dim)

    return measure


Measure = Callable[[Run, int, str], Any]  # of a run, a number of calls, a stage: its score, None if none
Ranks = dict[Run, float]
# Where configurations are tried with a number of calls, and which of them stay.
Stage = tuple[str, Callable[[Ranks, int], list[Run]]]


def best_of_all(ranks: Ranks, calls: int, kept: int = 16) -> list[Run]:
    """A shortlist: the best ones."""
    return sorted(ranks, key=ranks.__getitem__)[:kept]


STAGES: tuple[Stage, ...] = (("screen", best_of_all),)


def board(
    name: str,
    runs: list[Run],
    calls: Iterable[int],
    measure: Measure,
    default: Configuration,
    stages: tuple[Stage, ...] = STAGES,
) -> dict[str, Any]:
    """One problem: the score of every configuration where they are chosen, and where they are reported that
    of the chosen ones of both sides and of the default ("first": their error where they are screened).

    stages: how those to choose from are found, from all of a side, stage by stage. What the last of them
    finds is kept too."""
    tried: dict[Run, dict[int, Any]] = {run: {} for run in runs}
    fixed = [run for run in runs if (run.solver, run.grid) == default]
    alive, rows = {side: [run for run in runs if run.side == side] for side in SIDES}, []
    for n in sorted(calls):  # what is hopeless with few is not tried with more
        chosen = dict(zip(["default"], fixed, strict=False))
        for side, group in alive.items():
            first = last = _measured(measure, group, n, stages[0][0])
            kept = stages[0][1](_ranks(first), n)
            for stage, shortlist in stages[1:]:
                last = _measured(measure, kept, n, stage)
                kept = shortlist(_ranks(last), n)
            final = _measured(measure, kept, n, "choose")
            for run, found in {**last, **final}.items():
                tried[run][n] = found
            if final:
                chosen[side] = min(final, key=lambda run: final[run].rank())
                ranks = _ranks(first)
                limit = math.inf if n < PATIENCE else HOPELESS * min(ranks.values())
                alive[side] = [run for run in group if ranks.get(run, 0.0) <= limit]
        row: dict[str, Any] = {"calls": n}
        for side, run in chosen.items():
            if (found := measure(run, n, "report")) is not None:
                first = measure(run, n, "screen").error
                row[side] = {"solver": run.solver, "grid": run.grid, **found._asdict(), "first": first}
        rows.append(row)
        print(_line(name, row), flush=True)
    return {"problem": name, "rows": rows, "all": _everything(tried, sorted(calls))}


def _measured(measure: Measure, group: list[Run], calls: int, stage: str) -> dict[Run, Any]:
    """The scores of those that can do so few calls."""
    return {run: found for run in group if (found := measure(run, calls, stage)) is not None}


def _ranks(scores: dict[Run, Any]) -> Ranks:
    return {run: found.rank() for run, found in scores.items()}


def _everything(tried: dict[Run, dict[int, Any]], calls: list[int]) -> dict[str, Any]:
    """{side: {solver: {grid: errors}}}, with null where the number of calls does not fit."""
    table: dict[str, Any] = {side: {} for side in SIDES}
    for run, scores in tried.items():
        if not scores:
            continue
        errors = [_rounded(scores[n].error) if n in scores else None for n in calls]
        table[run.side].setdefault(run.solver, {})[run.grid] = errors
    return table


def _rounded(error: float) -> float | None:
    return float(f"{error:.2g}") if math.isfinite(error) else None


def _line(name: str, row: dict[str, Any]) -> str:
    cells = [f"{name:12s} {row['calls']:3d}"]
    for side in (*SIDES, "default"):
        if side in row:
            r = row[side]
            cells.append(f"{side} {_cell(r)} {r['solver']} on {r['grid']}")
    return " | ".join(cells)


def at_floor(side: dict[str, Any]) -> bool:
    """Whether samples of this number hardly tell the law from the true one."""
    return side["error"] < side.get("floor", 0.0)


def ratio(side: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
    """The error of one over that of the other, each at least its floor; None where both are at the floor, or
    there is none."""
    if side is None or other is None or (at_floor(side) and at_floor(other)):
        return None
    return told(side) / told(other)


def told(side: dict[str, Any]) -> float:
    """The error, at least its floor."""
    return max(side["error"], side.get("floor", 0.0))


def mean_ratio(boards: list[dict[str, Any]], side: str = "default") -> float:
    """Over the best of theirs, geometric mean over all boards and numbers of calls."""
    known = [r for b in boards for row in b["rows"] if (r := ratio(row.get(side), row.get("theirs")))]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else math.nan


def summary(boards: list[dict[str, Any]], default: Configuration, legend: str) -> str:
    """A Markdown table: the chosen configurations, and ours over theirs beside the goal."""
    titles = [
        "problem",
        "calls",
        "ours",
        "theirs",
        "ratio",
        "goal",
        "default",
        "ratio",
        "ours is",
        "theirs is",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for result in boards:
        for row in result["rows"]:
            mine, other, fixed = (row.get(side) for side in (*SIDES, "default"))
            cells = [
                result["problem"],
                row["calls"],
                _cell(mine),
                _cell(other),
                _ratio(mine, other),
                GOAL.get(row["calls"], "-"),
                _cell(fixed),
                _ratio(fixed, other),
                *(f"{side['solver']}, {side['grid']}" if side else "-" for side in (mine, other)),
            ]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    text = (
        f"Default: {default[0]} on {default[1]}; over the best of theirs in the geometric mean: "
        f"{mean_ratio(boards):.2f} (goal {DEFAULT_GOAL})"
    )
    return "\n".join([*lines, "", legend, "", text, ""])


def _ratio(side: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    found = ratio(side, other)
    if found is not None and side is not None:
        return f"{'<= ' if at_floor(side) else ''}{found:.2f}"
    return "at the floor" if side and other else "-"


def _cell(side: dict[str, Any] | None) -> str:
    if side is None:
        return "-"
    if "flips" in side:
        return f"{side['error']:.2e} ({100 * side['flips']:.1f} %, {side['median']:.1e})"
    if at_floor(side):
        return f"< {side['floor']:.1e}"
    return f"{side['error']:.2e}" + (f" (floor {side['floor']:.1e})" if side["floor"] else "")


def picture(boards: list[dict[str, Any]], path: Path, label: str) -> None:
    """Error against calls, every configuration thin, the best of each side thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"theirs": "#d95f02", "ours": "#1f77b4", "default": "black"}
    names = {
        "theirs": "best public solver and grid",
        "ours": "best of scoresde",
        "default": "scoresde, one configuration",
    }
    figure, axes = plt.subplots(1, len(boards), figsize=(4.1 * len(boards), 4.6), squeeze=False)
    for axis, result in zip(axes[0], boards, strict=True):
        rows = result["rows"]
        calls = [row["calls"] for row in rows]
        floors = [row["ours"].get("floor", 0.0) for row in rows]
        for side in ("theirs", "ours"):
            for on_grids in result["all"][side].values():
                for errors in on_grids.values():
                    known = [
                        math.nan if e is None else max(e, f) for e, f in zip(errors, floors, strict=True)
                    ]
                    axis.plot(calls, known, color=colors[side], lw=0.5, alpha=0.06)
        for side, style in (("theirs", "o-"), ("ours", "o-"), ("default", "--")):
            known = [row for row in rows if side in row]
            axis.plot(
                [row["calls"] for row in known],
                [told(row[side]) for row in known],
                style,
                color=colors[side],
                lw=1.5 if side == "default" else 2.4,
                ms=5,
                label=names[side],
            )
        best = [told(row[side]) for row in rows for side in names if side in row]
        if any(floors):
            axis.plot(calls, floors, ":", color="gray", lw=1.5, label="what samples can tell")
        axis.set(xscale="log", yscale="log", ylim=(0.5 * min([*best, *filter(None, floors)]), 6 * max(best)))
        axis.set_xticks(calls, [str(n) for n in calls])
        axis.minorticks_off()
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{result['problem']}, {problem(result['problem']).dim} dimensions", fontsize=11)
        axis.set_xlabel("network calls")
    axes[0][0].set_ylabel(label)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(result: dict[str, Any], folder: Path, stem: str) -> None:
    """A board as JSON, one solver a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(result).replace('"all": ', '"all":\n').replace("}, ", "},\n")
    (folder / f"{stem}_{result['problem']}.json").write_text(lines + "\n")


def report(folder: Path, stem: str, default: Configuration, legend: str, label: str) -> None:
    """The table and the picture of all boards that the folder has."""
    files = [folder / f"{stem}_{name}.json" for name in BOARDS]
    boards = [json.loads(file.read_text()) for file in files if file.exists()]
    if not boards:
        raise FileNotFoundError(f"expected results {stem}_NAME.json in {folder}, found none")
    text = summary(boards, default, legend)
    (folder / f"{stem}.md").write_text(text)
    picture(boards, folder / f"{stem}.png", label)
    print(text)


def arguments(text: str | None) -> argparse.Namespace:
    """The command line of both halves."""
    parser = options.parser(text)
    parser.add_argument("--problems", nargs="*", default=BOARDS, choices=BOARDS)
    parser.add_argument("--calls", nargs="+", type=options.count, default=list(CALLS))
    parser.add_argument("--quick", action="store_true", help="an eighth of the samples")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


LEGEND = "Cells: root mean square distance to the exact solution, without flips (share of flips, median)."


def main() -> None:
    args = arguments(__doc__)
    runs = [*ours(distinct(candidates())), *theirs(peers.ODE)]
    for name in args.problems:
        measure = deterministic(name, args.quick)
        save(board(name, runs, args.calls, measure, DEFAULT), args.out, "accuracy")
    report(args.out, "accuracy", DEFAULT, LEGEND, "RMS distance to the exact solution, without flips")


if __name__ == "__main__":
    main()
