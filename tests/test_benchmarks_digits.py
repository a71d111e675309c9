"""The benchmark on the trained digits network: its wrapper of public samplers, and its committed results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
bench = pytest.importorskip(
    "benchmarks.digits", reason="run from the root of the repository, with `python -m pytest`"
)

from benchmarks import peers, recommend_digits  # noqa: E402
from scoresde import VPSDE, checkpoint, digits, grids, solvers  # noqa: E402
from scoresde.laws import Gaussian  # noqa: E402
from scoresde.select import Candidate, Comparison, compare  # noqa: E402
from scoresde.select.comparison import About, Row  # noqa: E402

SDE = VPSDE()
RESULTS = Path(bench.RESULTS) / "digits.json"


def wrapped(name: str) -> bench.PublicSolver:
    return bench.PublicSolver(name, peers.SDE[name], solvers.Card(None, None, 1, True, "public"))


def test_public_samplers_are_solvers():
    """torchsde's Euler method is Euler-Maruyama, also through `compare`'s door, and its calls are counted."""
    model, solver = Gaussian([0.5, -0.5], 0.25).denoiser(SDE), wrapped("torchsde euler")
    data = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entries = {"theirs": solver, "ours": solvers.euler_maruyama()}
    found = compare(model, entries, {"u": grids.uniform}, (7,), shape=(2,), n=20, data=data)
    theirs, ours = (next(row for row in found.rows if row.solver == name) for name in entries)
    assert theirs.calls == 7 and theirs.error == pytest.approx(ours.error, rel=1e-9)


def test_public_samplers_that_fail_are_left_out():
    def short(task: peers.Task, x: torch.Tensor) -> torch.Tensor:
        if len(task.t) < 4:
            raise IndexError("too few")
        return x * (math.nan if len(task.t) > 6 else 1.0)

    solver = bench.PublicSolver("short", peers.Public(short, 2), solvers.Card(None, None, 1, False, "public"))
    model = Gaussian([0.5, -0.5], 0.25).denoiser(SDE)
    found = compare(model, solver, {"u": grids.uniform}, (1, 4, 8, 14), shape=(2,), n=8)
    assert [row.budget for row in found.rows] == [8]
    assert [(item.budget, item.why) for item in found.left_out] == [
        (1, "the calls do not pay for one step"),
        (4, "failed: short: too few"),
        (14, "failed: short returned NaN or Inf"),
    ]


def test_the_report_says_who_is_better():
    about = About(9, (2,), 0, 1e-3, "distance", 0.1, "r", 1e-6, None, None, 9, 1.0, "cpu")
    errors = {"ddim()": (0.1, 0.02), "yours": (0.2, 0.08)}
    rows = [
        Row(name, "g", 5 * i, 5 * i, 1.0, None, 2 * e, e, e, 0.01, e, 1.0)
        for name, listed in errors.items()
        for i, e in enumerate(listed, 1)
    ]
    quality = {"budget": 10, "calls": 10, "accuracy": 0.9, "energy_distance": 0.25}
    judged = {"rows": {"a": [quality]}, "floor": quality}
    text = bench.report(Comparison(tuple(rows), about), {5: 0.97}, judged)
    theirs = "yours on g | 8.00e-02 (1.60e-01, 1.0 %)"
    assert f"| 10 | ddim() on g | 2.00e-02 (4.00e-02, 1.0 %) | {theirs} | 0.25 |" in text
    assert "0.970 with 5 calls" in text and "| a | - | 0.900, 0.250 | - | - |" in text
    alone = bench.report(Comparison(tuple(rows[:1]), about), {}, judged)
    assert "| 5 | ddim() on g | 1.00e-01 (2.00e-01, 1.0 %) | - | - | - |" in alone


@pytest.mark.slow
def test_committed_results_hold(unchecked: None):
    """The best of ours at every number of calls, run again, on the same noises."""
    committed = Comparison.from_json(RESULTS.read_text())
    ours = bench.ours()
    model, n = checkpoint.load(bench.PATH), committed.about.n
    for budget in committed.budgets():
        row = next(row for row in committed.ranking(budget) if row.solver in ours)
        candidate = Candidate(ours[row.solver], bench.GRIDS[row.grid], row.grid)
        found = compare(
            model,
            candidate,
            calls=(budget,),
            shape=digits.SHAPE,
            n=n,
            condition={"label": digits.labels(n)},
            dtype=torch.float64,
        )
        assert found.rows[0].median <= row.median * 1.02, row
        assert abs(found.rows[0].flips - row.flips) <= 1 / n + 1e-12


def test_committed_ranks_are_stable():
    summary = json.loads(RESULTS.read_text())["summary"]
    assert min(summary["agreement"].values()) >= 0.9


def test_true_errors_of_what_is_recommended_are_in_its_order():
    """Medians of `compare` on the network, infinite where a candidate cannot be run."""
    model = checkpoint.load(recommend_digits.PATH)
    listed = [
        Candidate(solvers.ddim(), grids.quadratic, "quadratic"),
        Candidate(solvers.heun(), grids.quadratic, "quadratic"),
        Candidate(solvers.dpmpp(2), grids.uniform, "uniform"),
    ]
    one, other = (recommend_digits.true_errors(model, order, 1, 4) for order in (listed, listed[::-1]))
    assert one == other[::-1] and one[1] == math.inf and 0 < one[0] < math.inf
    few = recommend_digits.true_errors(model, listed, 6, 4)
    assert 0 < few[0] < one[0] and len(set(few)) == 3


def test_what_the_readme_says_of_recommending_for_the_digits():
    rows = json.loads((Path(bench.RESULTS) / "recommend_digits.json").read_text())["rows"]
    text = " ".join((Path(bench.RESULTS).parents[1] / "README.md").read_text().split())
    said = {
        name: ", ".join(f"{row[name]['ratio']:.3g}" for row in rows) for name in recommend_digits.SURROGATES
    }
    assert [row["calls"] for row in rows] == [5, 10, 20]
    for name in ("kernels", "mixture"):
        numbers = said[name].rpartition(", ")
        assert f"{numbers[0]} and {numbers[2]} times" in text, said[name]
