"""The sweep's report can fail, and a part of the sweep; the whole is `python -m benchmarks.sweep`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sweep
from benchmarks.sweep import DTYPES, GRIDS, KINDS, PROCESSES, SHORT, Setting
from scoresde import grids, schedules, sde, solvers
from scoresde.grids import Grid
from scoresde.solvers.base import Samples, TableSolver

pytestmark = pytest.mark.usefixtures("unchecked")
KNOWN = solvers.examples()


@pytest.mark.parametrize("seed", [0, 2])
def test_every_solver_runs_or_says_why_not(seed: int) -> None:
    """One setting of every solver: process, grid, end, steps, prediction and dtype drawn."""
    rng, settings = random.Random(seed), []
    for name in KNOWN:
        process = rng.choice(list(PROCESSES))
        grid, end = sweep.drawn_grid(rng, process), rng.choice(sweep.ENDS)
        rest = rng.choice(SHORT[:-2]), rng.choice(list(KINDS)), rng.choice(list(DTYPES))
        settings.append(Setting(name, process, grid, end, *rest))
    report = sweep.sweep(settings, KNOWN)
    assert report.failures == [] and report.counts["run"] > 0.75 * len(KNOWN)
    assert report.counts.total() == len(KNOWN)


@pytest.mark.parametrize("quick", [True, False])
def test_only_the_whole_sweep_is_kept(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks.reliability` cites what is kept as the whole."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "sweep", lambda settings, known: sweep.Report())
    monkeypatch.setattr("sys.argv", ["sweep", *["--quick"] * quick])
    sweep.main()
    assert {file.name for file in tmp_path.iterdir()} == (set() if quick else {"sweep.json", "sweep.md"})


def test_the_parts_reach_everything() -> None:
    parts = [*sweep.parts(random.Random(0), KNOWN).values()]
    for part in parts:
        assert {setting.solver for setting in part} == set(KNOWN)
        assert {setting.process for setting in part} == set(PROCESSES)
        assert {setting.end for setting in part} == {None, 0.0}
    first, second, third = parts
    assert {s[1:3] for s in first} == {(process, grid) for process in PROCESSES for grid in GRIDS}
    assert {s.steps for s in [*first, *second, *third]} == {1, 2, 3, 4, 5, 7, 10, 20, 50, 999, 1000}
    assert {(s.solver, s.predicts, s.dtype) for s in second} == {
        (name, kind, dtype) for name in KNOWN for kind in KINDS for dtype in DTYPES
    }
    functions = {f for f in vars(grids).values() if getattr(f, "__module__", "") == grids.__name__}
    public = {f.__name__ for f in functions if callable(f) and not f.__name__.startswith("_")}
    named = public - {"Grid", "parse"}
    assert named == {getattr(grid, "func", grid).__name__ for grid in GRIDS.values()}
    kinds = {type(process) for process in PROCESSES.values()}
    every = {c for c in vars(sde).values() if isinstance(c, type) and issubclass(c, sde.LinearSDE)}
    assert kinds == every - {sde.LinearSDE}
    used = {type(p.schedule) for p in PROCESSES.values() if isinstance(p, sde.VPSDE)}
    ours = {c for c in vars(schedules).values() if isinstance(c, type) and c.__module__ == schedules.__name__}
    assert used == {c for c in ours if hasattr(c, "B")} - {schedules.Schedule}


def exploding(sde: Any, grid: Grid) -> Any:
    table = solvers.ddim().tableau(sde, grid)
    return replace(table, keep=torch.full_like(table.keep, 1e300))


class Planted:
    """A solver that does what a function says."""

    def __init__(self, solve: Callable) -> None:
        self.run, self.inner = solve, solvers.ddim()

    def steps_for(self, calls: int) -> int:
        return calls

    def solve(self, model: Any, x: Any, times: Any, **options: Any) -> Samples:
        return self.run(self.inner.solve(model, x, times), model, x, times)


def late(drawn: Samples, *rest: Any) -> Samples:
    raise ValueError("too late")


def crash(drawn: Samples, *rest: Any) -> Samples:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("solver", "what"),
    [
        (TableSolver("explodes", exploding, solvers.ddim().card), "NaN or Inf at call 3 of 4"),
        (Planted(lambda drawn, *rest: replace(drawn, x=drawn.x * torch.nan)), "not finite"),
        (Planted(lambda drawn, *rest: replace(drawn, x=drawn.x[:1])), "state of shape"),
        (Planted(lambda drawn, *rest: replace(drawn, end=0.5)), "at 0.5"),
        (Planted(lambda drawn, *rest: replace(drawn, network_calls=3)), "3 calls reported, 4 made"),
        (Planted(lambda drawn, *rest: replace(drawn, status="call limit reached")), "call limit"),
        (Planted(late), "too late.* after 4 calls"),
        (Planted(crash), "ZeroDivisionError"),
    ],
)
def test_failures_are_seen(solver: Any, what: str) -> None:
    report = sweep.sweep([Setting("planted", "linear", "Karras", None, 4, "noise")], {"planted": solver})
    assert report.counts == {"failed": 1}
    with pytest.raises(AssertionError, match=what):
        assert report.failures == [], report.failures[0]


def test_a_limit_counts_by_itself_in_bfloat16_only() -> None:
    """A tolerance below the network's rounding cannot be met; the result says so."""
    limited = Planted(lambda drawn, *rest: replace(drawn, status=sweep.LIMIT))
    wrong = Planted(lambda drawn, *rest: replace(drawn, status=sweep.LIMIT, network_calls=3))
    for solver, dtype, outcome in (
        (limited, "bfloat16", "at limit"),
        (limited, "float32", "failed"),
        (wrong, "bfloat16", "failed"),
    ):
        setting = Setting("planted", "linear", "Karras", None, 4, "noise", dtype)
        assert sweep.sweep([setting], {"planted": solver}).counts == {outcome: 1}


def test_refusals_and_runs_are_told_apart() -> None:
    settings = [
        Setting("ddim", "linear", "ddpm trailing", None, 4),
        Setting("ddim", "table", "ddpm trailing", None, 4),
        Setting("ddim", "rectified", "uniform", None, 4, "noise"),
        Setting("adaptive", "linear", "uniform", None, 4),
        Setting("adaptive", "linear", "Karras", None, 7),
        Setting("adaptive", "linear", "Karras", 0.0, 7),
    ]
    report = sweep.sweep(settings, {"ddim": solvers.ddim(), "adaptive": solvers.adaptive_ode(0.1, 0.1)})
    assert report.counts == {"run": 3, "refused": 2, "same run": 1} and report.failures == []
    assert set(report.reasons) == {
        "expected a VP-SDE made by VPSDE.from_betas",
        "expected times at which data from predicted noise is determined",
    }


def test_bad_grids_are_seen() -> None:
    grid = grids.uniform(PROCESSES["linear"], 4)
    assert sweep.fault_of(grid, 4) == "" and "4 steps" in sweep.fault_of(grid, 5)
    for key in ("t", "lam", "label"):
        values = getattr(grid, key).clone()
        values[2] = values[1]
        assert "monotone" in sweep.fault_of(replace(grid, **{key: values}), 4)
