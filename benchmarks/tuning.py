"""What tuning gains on noises that it has never seen: one tuned table against the best untuned solver and
grid, of any library on three laws with exact denoisers, of ours on a trained network.

    python -m benchmarks.tuning [--problems ring ...] [--calls 5 6 8 10] [--quick] [--out DIR]

VP(0.1, 20), t from 1 to 1e-3. Scoring is that of `benchmarks.accuracy`: the root mean square distance to the
probability-flow solution from the same noise, over the samples that are no flips (0.3 off), the share of
flips, and the median. A few that nearly flip are much of a mean square (two or three of 8192 digits decide),
so 4096 to 16384 noises are held out. Untuned is the better of what `benchmarks.accuracy` chose of ours and of
public solvers for the problem and number of calls, run again on the noises held out here; on digits what is
best of `select.pool()` on noises of its own. Tuned is `select.tune(what="all")` from one list of solvers and
a seed of its own, which has seen neither these noises nor what is best untuned. Flips are compared by the
exact paired binomial test. Seconds are of the processor, one thread: what else runs here does not count.

The subspace runs in 61 coordinates (see `benchmarks.accuracy`). Public solvers need the environment of
benchmarks/peers.txt; without it the best of ours stands for both.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import checkpoint, digits, grids, solvers
from scoresde.denoiser import BaseDenoiser
from scoresde.select import pool, tune
from scoresde.select.tune import Tuned
from scoresde.select.tuning_search import more_flips
from scoresde.tableau import Tableau

from . import accuracy, options, peers, problems
from .accuracy import FLIP, RESULTS, SDE
from .digits_checkpoint import PATH

CALLS = (5, 6, 8, 10)
GOAL = {"ring": 5.0, "anisotropic": 3.0, "subspace": 2.0, "digits": 2.0}
STARTS = [
    solvers.unipc(3),
    solvers.adams(3, "adams"),
    solvers.exponential(2, stored="flow", variable="lam"),
    solvers.exponential(2, corrector=3, stored="flow", variable="t"),
    solvers.exponential(3, corrector=4, stored="data", variable="t"),
    solvers.exponential(4, stored="flow", variable="sigma"),
]
PICTURED = 6  # calls
FIRST = 64  # noises held out, that a test runs committed tables on
HELD_OUT = 20  # seed
WIDE = 4


class Board(NamedTuple):
    """A problem: its model, the shape of a sample, how many noises to tune with and to hold out, how many
    samples its model takes at once, time and starts for tuning, the dimension that errors are counted by, and
    noises."""

    model: BaseDenoiser
    shape: tuple[int, ...]
    n: int
    held_out: int
    batch: int
    seconds: float
    starts: int
    dim: int
    noise: Callable[[int, int], Tensor]  # (n, seed)
    condition: Callable[[int], dict[str, Tensor]] = lambda n: {}

    @property
    def scale(self) -> float:
        """Of an error per coordinate of the shape, to get it per coordinate of the problem."""
        return math.sqrt(math.prod(self.shape) / self.dim)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, n: int, seed: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def board(name: str) -> Board:
    """ "ring" | "anisotropic" | "subspace" | "digits"."""
    if name == "digits":
        model, shape = checkpoint.load(PATH).eval(), digits.SHAPE
        model.to(memory_format=torch.channels_last)  # a fifth faster here
        noise = partial(_normal, shape, torch.float32)
        label = lambda n: {"label": digits.labels(n)}  # noqa: E731
        return Board(model, shape, 1280, 16384, 512, 590.0, 3, 64, noise, label)
    law = problems.problem(name)
    noise = partial(_normal, (law.dim,), torch.float64)
    if name == "subspace":
        inside = problems.inside()
        turned = lambda n, seed: problems.to_inside(noise(n, seed))  # noqa: E731
        shape, denoiser = (inside.dim,), inside.denoiser(SDE)
        return Board(denoiser, shape, 2048, 4096, 256, 115.0, 6, law.dim, turned)
    batch = 2**14 if name == "ring" else 256
    return Board(law.denoiser(SDE), (law.dim,), 4096, 16384, batch, 115.0, 6, law.dim, noise)


class Run(NamedTuple):
    """A configuration, its ends on the noises held out, and its table if it is one of ours."""

    name: str
    ends: Tensor
    table: Tableau | None


def in_blocks(board: Board, x: Tensor, run: Callable[[BaseDenoiser, Tensor], Tensor]) -> Tensor:
    """A deterministic run, a few samples at a time."""
    model = board.model.given(**board.condition(len(x)))
    rows = torch.arange(len(x)).split(64)
    return torch.cat([run(model.narrowed(some, len(x)), x[some]) for some in rows])


def reference(board: Board, x: Tensor) -> Tensor:
    """The probability-flow solution; 120 steps of order 6 are within 1e-5 of 600 on all problems here."""
    solver = solvers.exponential(5, corrector=6, stored="flow", variable="sigma")
    times = grids.quadratic(SDE, 120)
    return in_blocks(board, x, lambda model, part: solver.solve(model, part, times).x)


def chosen_before(name: str, calls: int) -> dict[str, Any]:
    """The row of benchmarks.accuracy's results."""
    rows = json.loads((RESULTS / f"accuracy_{name}.json").read_text())["rows"]
    known = {row["calls"]: row for row in rows}
    if calls not in known:
        raise ValueError(f"expected a number of calls in accuracy_{name}.json ({list(known)}), found {calls}")
    return known[calls]


def boards_choices(name: str, board: Board, calls: int, x: Tensor) -> Iterator[Run]:
    """What benchmarks.accuracy chose for a problem and a number of calls, of ours and of public solvers."""
    row = chosen_before(name, calls)
    runs = [*accuracy.ours(accuracy.distinct(accuracy.candidates())), *accuracy.theirs(peers.ODE)]
    for run in runs:
        chosen = row[run.side]
        if (run.solver, run.grid) == (chosen["solver"], chosen["grid"]):
            ends = in_blocks(board, x, lambda model, part, run=run: run.solve(model, part, calls, None))
            table = _table_of(run, calls) if run.side == "ours" else None
            yield Run(f"{run.solver} on {run.grid}", ends, table)


def _table_of(run: accuracy.Run, calls: int) -> Tableau:
    solver, make = run.solve.args  # type: ignore[attr-defined]
    return solver.tableau(SDE, make(SDE, solver.steps_for(calls)))


def chosen_here(board: Board, calls: int, x: Tensor, few: int, more: int) -> Iterator[Run]:
    """The best of `select.pool()`: all on a few noises, the 16 best of these on more."""
    choose = board.noise(more, 30)
    wanted, ranks = reference(board, choose), {}
    listed = [(c, table) for c in pool() if (table := c.table(SDE, calls)) is not None]

    def rank(table: Any, n: int) -> float:
        return accuracy.score(
            ends_of(board, table, choose[:n]).flatten(1), wanted[:n].flatten(1), board.dim
        ).rank()

    for candidate, table in listed:
        ranks[candidate] = rank(table, few), table
    short = sorted(ranks, key=lambda c: ranks[c][0])[:16]
    best = min(short, key=lambda c: rank(ranks[c][1], more))
    yield Run(best.name, ends_of(board, ranks[best][1], x), ranks[best][1])


def ends_of(board: Board, table: Any, x: Tensor) -> Tensor:
    solver = solvers.from_tableau(table)
    return in_blocks(board, x, lambda model, part: solver.solve(model, part, table.ends).x)


def fit(board: Board, solver: Any, calls: int, seconds: float, what: str, n: int, starts: int) -> Tuned:
    """`select.tune` on noises that are not those held out, n in each of its sets."""
    return tune(
        board.model,
        solver,
        calls,
        seconds,
        what,
        shape=board.shape,
        n=n,
        start=board.noise((2 * WIDE + 1) * n, 10),
        wide=WIDE,
        condition=board.condition(n),
        starts=starts,
        batch=board.batch,
        flip=FLIP / board.scale,
        reference=50,
    )


def tuned(board: Board, calls: int, quick: bool, slack: float) -> tuple[Tuned, float]:
    """The tuned table, and the seconds of the processor that it took."""
    n = board.n // (4 if quick else 1)
    seconds = (0.1 if quick else 1.0) * board.seconds * slack
    before = time.process_time()
    found = fit(board, STARTS, calls, seconds, "all", n, board.starts)
    return found, time.process_time() - before


@cache
def held_out(board: Board, quick: bool) -> tuple[Tensor, Tensor]:
    """Noises that no choice has seen, and the solution from them."""
    x = board.noise(board.held_out // 8 if quick else board.held_out, HELD_OUT)
    return x, reference(board, x)


def measure(name: str, board: Board, calls: int, quick: bool, slack: float) -> dict[str, Any]:
    """A row of results."""
    x, wanted = held_out(board, quick)
    if name == "digits":
        fixed = list(chosen_here(board, calls, x, 8, 16 if quick else 128))
    else:
        fixed = list(boards_choices(name, board, calls, x))
    found, seconds = tuned(board, calls, quick, slack)
    runs = [*fixed, Run("tuned", ends_of(board, found.table, x), found.table)]
    scores = [scored(board, run.ends, wanted) for run in runs]
    best = min(range(len(fixed)), key=lambda k: scores[k].rank())
    distances = [((run.ends - wanted).flatten(1).square().sum(1) / board.dim).sqrt() for run in runs]
    row = {
        "problem": name,
        "calls": calls,
        "untuned": {"name": runs[best].name, **scores[best]._asdict(), "table": _json(runs[best].table)},
        "tuned": {"from": found.report.start, **scores[-1]._asdict(), "table": _json(found.table)},
        "first": scored(board, runs[-1].ends[:FIRST], wanted[:FIRST]).error,
        "ratio": scores[best].error / scores[-1].error,
        "goal": GOAL[name],
        "more_flips": more_flips(distances[best], distances[-1], FLIP),
        "starts": board.starts,
        "seconds": seconds,
        "wall": found.report.seconds,
        "calls_spent": found.report.batches,
        "samples_spent": found.report.samples,
        "status": found.report.status,
        "defect": defect(found.table),
        "held_out": len(x),
    }
    print(line(row), flush=True)
    return row


def defect(table: Tableau) -> float:
    """By how much the end misses the law of a point mass."""
    alpha, sigma = SDE.alpha(table.ends), SDE.sigma(table.ends)
    form = table.canonical()
    mean, deviation = form.a[-1] * alpha[0] + form.B[-1].sum(), form.a[-1] * sigma[0]
    return max(abs(mean - alpha[1]).item(), abs(deviation - sigma[1]).item())


def scored(board: Board, ends: Tensor, wanted: Tensor) -> accuracy.Score:
    return accuracy.score(ends.flatten(1), wanted.flatten(1), board.dim)


def _json(table: Tableau | None) -> Any:
    return None if table is None else json.loads(table.to_json())


HEAD = (
    "| problem | calls | untuned | tuned | times better | goal | more flips: p | starts | s | samples "
    "evaluated | untuned is | tuned from |\n" + "|---" * 12 + "|"
)


def line(row: dict[str, Any]) -> str:
    """A row of Markdown."""
    before, after = row["untuned"], row["tuned"]
    cells = [
        row["problem"],
        row["calls"],
        _cell(before),
        _cell(after),
        f"{row['ratio']:.3g}{'' if row['ratio'] >= row['goal'] else ' (missed)'}",
        f"{row['goal']:g}",
        f"{row['more_flips']:.2g}",
        row["starts"],
        f"{row['seconds']:.0f}",
        f"{row['samples_spent']:.1e}",
        before["name"],
        after["from"] or "-",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _cell(score: dict[str, Any]) -> str:
    return f"{score['error']:.2e} ({score['flips']:.2%}, {score['median']:.1e})"


LEGEND = """Cells: root mean square distance to the probability-flow solution from the same noise, without
flips (share of flips, median). Times better: of the root mean squares. More flips: p-value of the exact
paired binomial test. Starts: places that fits began from. s: seconds of one processor thread for all of the
tuning, references included; samples evaluated: by the model, in it."""


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """The table and the picture of all rows."""
    text = "\n".join([HEAD, *map(line, rows), "", LEGEND, ""])
    (out / "tuning.md").write_text(text)
    pictured = [row for row in rows if row["calls"] == PICTURED and row["problem"] in ("ring", "digits")]
    if pictured:
        picture({row["problem"]: sampled(row) for row in pictured}, out / "tuning.png")
    print(text)


def sampled(row: dict[str, Any]) -> list[Tensor]:
    """From the same noises: the solution, and the ends of the untuned and of the tuned table."""
    here = board(row["problem"])
    x = here.noise(2000 if row["problem"] == "ring" else 40, HELD_OUT)
    kept = [row[which]["table"] for which in ("untuned", "tuned")]
    tables = [Tableau.from_json(json.dumps(table)) for table in kept if table is not None]
    return [reference(here, x), *(ends_of(here, table, x) for table in tables)]


def picture(samples: dict[str, list[Tensor]], path: Path) -> None:
    """The ring as points, colored by how far off they are; digits, and below them ten times what is wrong."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = ["exact solution", f"best untuned, {PICTURED} calls", f"tuned, {PICTURED} calls"]
    heights = [{"ring": 4.4, "digits": 2.4}[name] for name in samples]
    figure = plt.figure(figsize=(13, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(samples), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (name, sets) in zip(rows, samples.items(), strict=True):
        axes = part.subplots(1, 3)
        for axis, title, x in zip(axes, titles, sets, strict=False):
            off = (x - sets[0]).flatten(1).square().mean(1).sqrt().clamp_min(1e-6)
            if name == "digits":
                both = torch.cat([x[:20], 10 * (x - sets[0])[:20]])
                tiles = both.view(4, 10, 8, 8).permute(0, 2, 1, 3).reshape(32, 80)
                axis.imshow(tiles, cmap="gray_r", vmin=-1, vmax=1)
                axis.set_axis_off()
            else:
                shown = axis.scatter(*x.T, c=off.log10(), s=3, vmin=-4, vmax=-1, cmap="viridis_r")
                axis.set(aspect="equal", xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), xticks=[], yticks=[])
            where = "\n" if x is sets[0] else f"\n{off.median():.1e} off in the median"
            axis.set_title(title + where, fontsize=11)
        if name == "ring":
            part.colorbar(shown, ax=axes, shrink=0.8, label="log10 of the distance to the exact solution")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--problems", nargs="+", default=list(GOAL), choices=list(GOAL))
    parser.add_argument("--calls", nargs="+", type=options.count, default=list(CALLS))
    parser.add_argument("--quick", action="store_true", help="an eighth of the noises, a tenth of the time")
    parser.add_argument("--slack", type=float, default=1.0, help="seconds of the wall for one of the budget")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in set(args.problems) - {"digits"}:
        for calls in args.calls:
            chosen_before(name, calls)  # or an error before anything is measured
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "tuning.json"
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for name in args.problems:
        here = board(name)
        for calls in args.calls:
            row = measure(name, here, calls, args.quick, args.slack)
            rows = [old for old in rows if (old["problem"], old["calls"]) != (name, calls)] + [row]
            rows.sort(key=lambda r: (list(GOAL).index(r["problem"]), r["calls"]))
            kept.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    report(rows, args.out)


if __name__ == "__main__":
    main()
