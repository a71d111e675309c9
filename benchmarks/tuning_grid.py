"""What a tuned grid is worth: a solver on the best of all fixed grids and on the one that `tune` made.

    python -m benchmarks.tuning_grid [--problems ring ...] [--calls 5 6 8 10] [--out DIR]

Problems, errors and noises held out are those of `benchmarks.tuning`, of the noises the first 4096. The fixed
grid is the best of `select.GRIDS` on the noises held out, so the comparison favors it;
`select.tune(what="grid")` has not seen them. It falls back to a fixed grid where it finds nothing better on
noises of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from scoresde import solvers
from scoresde.select import GRIDS, Candidate
from scoresde.solvers.base import TableSolver

from . import options
from .accuracy import RESULTS, SDE
from .tuning import CALLS, Board, board, ends_of, fit, held_out, scored

GOAL = 1.05  # of the error on the best fixed grid, at most
HELD_OUT = 4096  # noises
SOLVERS = [solvers.dpmpp(2), solvers.unipc(3), solvers.exponential(3, corrector=4, variable="t")]


def measure(name: str, here: Board, solver: TableSolver, calls: int, seconds: float) -> dict[str, Any]:
    """A row of results."""
    x, wanted = held_out(here, False)
    tables = {
        grid: table
        for grid, make in GRIDS.items()
        if (table := Candidate(solver, make, grid).table(SDE, calls)) is not None
    }
    fixed = {grid: scored(here, ends_of(here, table, x), wanted) for grid, table in tables.items()}
    found = fit(here, solver, calls, seconds, "grid", here.n, starts=3)
    tuned = scored(here, ends_of(here, found.table, x), wanted)
    best = min(fixed, key=lambda grid: fixed[grid].rank())
    row = {
        "problem": name,
        "solver": repr(solver),
        "calls": calls,
        "grid": best,
        "fixed": fixed[best]._asdict(),
        "tuned": tuned._asdict(),
        "ratio": tuned.error / fixed[best].error,
        "fell_back": found.report.start is None,
    }
    print(line(row), flush=True)
    return row


HEAD = "| problem | solver | calls | best fixed grid | its error | tuned grid | ratio |\n" + "|---" * 7 + "|"


def line(row: dict[str, Any]) -> str:
    """A row of Markdown."""
    before, after = (f"{row[k]['error']:.2e} ({row[k]['flips']:.2%})" for k in ("fixed", "tuned"))
    note = " (fixed)" if row["fell_back"] else ""
    missed = "" if row["ratio"] <= GOAL else " (missed)"
    cells = [row["problem"], row["solver"], row["calls"], row["grid"], before, after + note]
    return "| " + " | ".join(map(str, [*cells, f"{row['ratio']:.2f}{missed}"])) + " |"


def report(rows: list[dict[str, Any]], seconds: float) -> str:
    ratios = torch.tensor([row["ratio"] for row in rows], dtype=torch.float64)
    return "\n".join(
        [
            "# The same solver on the best fixed grid and on a tuned one",
            "",
            f"Made by `python -m benchmarks.tuning_grid`, at most {seconds:g} s a grid. Errors: root mean "
            "square without flips (share of flips) on noises held out; the fixed grid is the best on these.",
            "",
            HEAD,
            *map(line, rows),
            "",
            f"Ratio: median {ratios.median():.2f}, largest {ratios.max():.2f}; goal at most {GOAL:g}.",
            "",
        ]
    )


def main() -> None:
    parser = options.parser(__doc__)
    names = ["ring", "anisotropic", "subspace", "digits"]
    parser.add_argument("--problems", nargs="+", default=names, choices=names)
    parser.add_argument("--calls", nargs="+", type=options.count, default=list(CALLS))
    parser.add_argument("--seconds", type=float, default=30.0, help="for a grid")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        measure(name, here, solver, calls, args.seconds)
        for name in args.problems
        for here in [board(name)._replace(held_out=HELD_OUT)]
        for solver in SOLVERS
        for calls in args.calls
    ]
    (args.out / "tuning_grid.json").write_text(json.dumps(rows).replace('{"problem"', '\n{"problem"') + "\n")
    (args.out / "tuning_grid.md").write_text(report(rows, args.seconds))
    print(report(rows, args.seconds))


if __name__ == "__main__":
    main()
