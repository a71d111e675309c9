"""Adaptive ODE solvers: error against network calls, ours, scipy's and torchdiffeq's, on laws whose denoiser
is exact.

    python -m benchmarks.adaptive [--problems ring anisotropic subspace] [--quick]

The probability flow of VP(0.1, 20) from t = 1 to 1e-3 in float64, all solvers from the same noises. The
error is the root mean square over samples and coordinates, against `adaptive_ode` of order 6 at 1e-10, which
is itself checked against scipy's DOP853 at 1e-12. Every solver runs at a range of tolerances; its calls
where the error is 1e-4 are interpolated in the logarithm of the error. scipy and torchdiffeq take the batch
as one state, so all of its samples have the calls of the batch; ours are given as the mean over samples and
as the largest number (the batch's calls).

torchdiffeq is optional (see benchmarks/peers.txt): without it its rows are missing. Writes
results/adaptive.json and results/adaptive.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.denoiser import BaseDenoiser
from scoresde.sde import VPSDE
from scoresde.solvers import adaptive_ode, scipy_ode

from .problems import problem

SDE, ENDS = VPSDE(), torch.tensor([1.0, 1e-3], dtype=torch.float64)
NOISES = {"ring": 512, "anisotropic": 128, "subspace": 16}
TARGET, GOAL = 1e-4, 0.5
RESULTS = Path(__file__).parent / "results"


class Run(NamedTuple):
    """What one solver did at one tolerance; `mean` and `largest` are calls a sample."""

    tolerance: float
    error: float
    mean: float
    largest: int


Solve = Callable[[BaseDenoiser, Tensor, float], tuple[Tensor, float, int]]


def ours(order: int) -> Solve:
    def solve(model: BaseDenoiser, x: Tensor, tolerance: float) -> tuple[Tensor, float, int]:
        drawn = adaptive_ode(tolerance, tolerance, order=order).solve(model, x, ENDS)
        assert drawn.status == "ok" and drawn.evaluations is not None
        return drawn.x, float(drawn.evaluations.double().mean()), drawn.network_calls

    return solve


def scipy(method: str) -> Solve:
    def solve(model: BaseDenoiser, x: Tensor, tolerance: float) -> tuple[Tensor, float, int]:
        drawn = scipy_ode(method, tolerance, tolerance).solve(model, x, ENDS)
        return drawn.x, drawn.network_calls, drawn.network_calls

    return solve


def torchdiffeq(method: str) -> Solve:
    def solve(model: BaseDenoiser, x: Tensor, tolerance: float) -> tuple[Tensor, float, int]:
        from torchdiffeq import odeint  # pyright: ignore[reportMissingImports]

        velocity, calls = SDE.probability_flow(model), 0

        def field(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return velocity(y, t.clamp(ENDS[1], ENDS[0]))  # its trial of a first step may lie beyond

        with torch.no_grad():
            path = odeint(field, x, ENDS, rtol=tolerance, atol=tolerance, method=method)
        return path[-1], calls, calls

    return solve


def solvers() -> dict[str, Solve]:
    """The competitors that are installed."""
    found = {f"adaptive_ode(order={order})": ours(order) for order in (4, 5, 6)}
    found |= {f"scipy {method}": scipy(method) for method in ("RK45", "DOP853")}
    if importlib.util.find_spec("torchdiffeq"):
        found |= {f"torchdiffeq {method}": torchdiffeq(method) for method in ("dopri5", "dopri8")}
    return found


def calls_at(runs: list[Run], error: float = TARGET) -> tuple[float, float]:
    """(mean, largest) calls where the error is `error`, interpolated between the best runs around it (those
    that no run with a smaller error undercuts); NaN beyond them."""
    best: list[Run] = []
    for run in sorted(runs, key=lambda run: run.error):
        if not best or run.mean < best[-1].mean:
            best.append(run)
    logs, wanted = [math.log(run.error) for run in best], math.log(error)
    if not logs[0] <= wanted <= logs[-1]:
        return math.nan, math.nan
    mean, largest = ([float(run[i]) for run in best] for i in (2, 3))
    return float(np.interp(wanted, logs, mean)), float(np.interp(wanted, logs, largest))


def samples(name: str, quick: bool) -> int:
    """How many a problem is measured on."""
    return max(4, NOISES[name] // (8 if quick else 1))


def measure(name: str, quick: bool) -> dict[str, list[Run]]:
    """All solvers on one problem."""
    law = problem(name)
    model = law.denoiser(SDE)
    x = torch.randn(
        samples(name, quick), law.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    reference = adaptive_ode(1e-10, 1e-10, order=6, max_calls=10_000).solve(model, x, ENDS).x
    few = x[:4]
    check = scipy_ode("DOP853", 1e-12, 1e-12).solve(model, few, ENDS).x
    assert float((check - reference[:4]).abs().max()) < 1e-7, "the reference is not converged"
    tolerances = np.logspace(-2, -7, 8 if quick else 21).tolist()
    table: dict[str, list[Run]] = {}
    for label, solve in solvers().items():
        table[label] = []
        for tolerance in tolerances:
            out, mean, largest = solve(model, x, tolerance)
            error = float((out - reference).square().mean().sqrt())
            table[label].append(Run(tolerance, error, mean, largest))
            if error < TARGET / 10:
                break
    return table


def summary(name: str, table: dict[str, list[Run]]) -> list[str]:
    """Markdown: calls at the target, and their ratio to those of adaptive_ode's default order."""
    mean, largest = calls_at(table["adaptive_ode(order=6)"])
    lines = [
        f"### {name}",
        "",
        f"| solver | calls at RMS {TARGET:g}: mean | largest | ours/this: mean | largest |",
        "|---|---|---|---|---|",
    ]
    for label, runs in table.items():
        a, b = calls_at(runs)
        lines.append(f"| {label} | {a:.1f} | {b:.1f} | {mean / a:.2f} | {largest / b:.2f} |")
    lines += ["", "| solver | " + "RMS error (mean/largest calls), tolerance by tolerance |", "|---|---|"]
    for label, runs in table.items():
        cells = ", ".join(f"{run.error:.1e} ({run.mean:.0f}/{run.largest})" for run in runs)
        lines.append(f"| {label} | {cells} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=list(NOISES), choices=list(NOISES))
    parser.add_argument("--quick", action="store_true", help="few samples and tolerances; writes nothing")
    options = parser.parse_args()
    tables = {name: measure(name, options.quick) for name in options.problems}
    lines = [
        "# Adaptive ODE solvers: network calls where the RMS error is 1e-4",
        "",
        "VP(0.1, 20), t from 1 to 1e-3, float64;",
        ", ".join(f"{samples(name, options.quick)} samples of {name}" for name in tables) + ".",
        f"Python {platform.python_version()}, torch {torch.__version__}.",
        f"Made by `python -m benchmarks.adaptive{' --quick' if options.quick else ''}`.",
        f"Goal: adaptive_ode (order 6, its default) takes at most {GOAL} of the calls of RK45 and dopri5.",
        "",
    ]
    for name, table in tables.items():
        lines += summary(name, table)
    print("\n".join(lines))
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "adaptive.md").write_text("\n".join(lines))
        record = {
            name: {label: [run._asdict() for run in runs] for label, runs in table.items()}
            for name, table in tables.items()
        }
        (RESULTS / "adaptive.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
