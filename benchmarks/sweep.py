"""Every solver on every process, grid and number of steps, with every kind of network: does it run, or say
why not?

    python -m benchmarks.sweep [--quick] [--seed 0]

A setting is (solver, process, grid, end, steps, prediction, dtype). It counts as `run` if the grid has
`steps + 1` strictly monotone times, the state at the end is finite, and the network was called as often as
the result says; as `refused` if a ValueError or TypeError came before the first network call; as `at limit`
if an adaptive solver says that it gave up at its number of calls, with a finite state, on a network in
bfloat16, whose rounding (0.4 %) is far above the tolerance. Anything else has `failed`: another exception, an
error after the first call, NaN or Inf, a wrong length, count or status.

The whole product has two million settings, so three parts of it are taken:

1. every solver x process x grid x steps up to 50, with data predicted in float64 and the end drawn;
2. every solver x prediction x dtype of the network, with two draws of the rest (steps up to 50);
3. every solver on three processes with 999 or 1000 steps, the rest drawn.

Solvers that look only at the ends of a grid (adaptive ones) are run once for each pair of ends; their other
settings are counted apart, as `same run`. The network is the exact one for independent N(0.3, 0.4), rounded
to its dtype. Draws come from the seed that is printed. Writes results/sweep.json and results/sweep.md, but
with --quick nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scoresde import grids, sample, solvers
from scoresde.denoiser import PREDICTIONS, Denoiser, Karras, Prediction
from scoresde.grids import Grid
from scoresde.schedules import Cosine, Learned, Sigmoid
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE, like

PROCESSES: dict[str, LinearSDE] = {
    "linear": VPSDE(),
    "cosine": VPSDE(schedule=Cosine()),
    "sigmoid": VPSDE(schedule=Sigmoid()),
    "table": VPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
    "learned": VPSDE(schedule=Learned()),
    "sub-VP": SubVPSDE(),
    "VE": VESDE(),
    "EDM": EDM(),
    "rectified": Rectified(),
}
GRIDS: dict[str, Callable[..., Grid]] = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "power": grids.power,
    "log-SNR": grids.log_snr,
    "Karras": grids.karras,
    "blend": partial(grids.blend, one=grids.quadratic, other=grids.karras),
    **{f"ddpm {s}": partial(grids.ddpm, spacing=s) for s in ("trailing", "leading", "linspace")},
}
ENDS = (None, 0.0)
SHORT, LONG = (1, 2, 3, 4, 5, 7, 10, 20, 50), (999, 1000)
KINDS: dict[str, Prediction] = {**PREDICTIONS, "Karras": Karras()}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
MEAN, VARIANCE = 0.3, 0.4
SHAPE = (2, 3)
RESULTS = Path(__file__).parent / "results"
GOAL = 10_000
LIMIT = "call limit reached"
OUTCOMES = ("run", "same run", "refused", "at limit", "failed")


class Setting(NamedTuple):
    """One point of the product, by names."""

    solver: str
    process: str
    grid: str
    end: float | None
    steps: int
    predicts: str = "data"
    dtype: str = "float64"


class Affine(nn.Module):
    """The exact network for N(0.3, 0.4) in every coordinate, `F = p E[x_0 | x] + q E[eps | x]`, in its own
    dtype; counts its calls."""

    def __init__(self, sde: LinearSDE, predicts: Prediction) -> None:
        super().__init__()
        self.sde, self.predicts, self.calls = sde, predicts, 0
        self.zero = nn.Parameter(torch.zeros(()))  # what has the network's dtype
        self.lines: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.calls += 1
        key = tuple(time.tolist())
        if key not in self.lines:  # the same times come again and again
            self.lines[key] = self.line(time)
        level, slope = self.lines[key]
        return (like(level, x) + like(slope, x) * x).to(x.dtype)

    def line(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(level, slope) of F at c_in x, (B,)."""
        alpha, sigma = self.sde.alpha(time).detach(), self.sde.sigma(time).detach()
        p, q = self.predicts.pq(alpha, sigma)
        # E[x_0 | x] = mean + alpha v/S (x - alpha mean) and E[eps | x] = sigma/S (x - alpha mean)
        slope = (p * alpha * VARIANCE + q * sigma) / (alpha**2 * VARIANCE + sigma**2)
        return (p - slope * alpha) * MEAN, slope / self.predicts.c_in(alpha, sigma)


@cache
def model_of(process: str, predicts: str, dtype: str) -> tuple[Denoiser, Affine]:
    """The model, and its network, which counts."""
    sde, kind = PROCESSES[process], KINDS[predicts]
    network = Affine(sde, kind)
    return Denoiser(network, sde, kind).to(DTYPES[dtype]), network


@dataclass
class Report:
    """What came of the settings: numbers by outcome, reasons of refusals with an example each, failures."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def refuse(self, setting: Setting, error: Exception) -> None:
        reason = reason_of(error)
        self.counts["refused"] += 1
        self.reasons[reason] += 1
        self.examples.setdefault(reason, f"{setting.solver} on {setting.process}: {error}")

    def fail(self, setting: Setting, what: str) -> None:
        self.counts["failed"] += 1
        self.failures.append(f"{what}: {setting}")


def reason_of(error: Exception) -> str:
    """What was expected, without numbers: refusals for one reason differ in what was found."""
    expected = str(error).split(", found")[0].split("; found")[0]
    return re.sub(r"\d[\d.e+-]*", "#", expected)


@cache
def grid_of(process: str, grid: str, end: float | None, steps: int) -> Grid | Exception:
    try:
        return GRIDS[grid](PROCESSES[process], steps, end)
    except (ValueError, TypeError) as error:
        return error


def sweep(settings: Iterable[Setting], known: dict[str, Any]) -> Report:
    """Try the settings, whose solvers are named in `known`."""
    report, started, seen = Report(), time.perf_counter(), set()
    for setting in settings:
        solver = known[setting.solver]
        grid = grid_of(*setting[1:5])
        if isinstance(grid, Exception):
            report.refuse(setting, grid)
            continue
        if fault := fault_of(grid, setting.steps):
            report.fail(setting, fault)
            continue
        if only_ends(solver):
            key = (setting.solver, setting.process, *grid.t[[0, -1]].tolist(), *setting[5:])
            if key in seen:
                report.counts["same run"] += 1
                continue
            seen.add(key)
        attempt(report, setting, solver, grid)
    report.seconds = time.perf_counter() - started
    return report


def fault_of(grid: Grid, steps: int) -> str:
    """What is wrong with a grid, if anything."""
    if not len(grid.t) == len(grid.lam) == len(grid.label) == steps + 1:
        return f"{len(grid)} steps in the grid"
    falling = bool((grid.t.diff() < 0).all() and (grid.label.diff() < 0).all())
    return "" if falling and bool((grid.lam.diff() > 0).all()) else "times not strictly monotone"


@cache
def only_ends(solver: Any) -> bool:
    """Whether more calls never mean more steps: the steps follow a tolerance."""
    return solver.steps_for(1000) == 1


def attempt(report: Report, setting: Setting, solver: Any, grid: Grid) -> None:
    model, counter = model_of(setting.process, setting.predicts, setting.dtype)
    before = counter.calls
    try:
        drawn = sample(model, SHAPE, solver, grid=grid, seed=setting.steps)
    except (ValueError, TypeError) as error:
        if counter.calls == before:
            report.refuse(setting, error)
        else:
            report.fail(setting, f"{error!r} after {counter.calls - before} calls")
    except Exception as error:
        report.fail(setting, f"{error!r}")
    else:
        calls = counter.calls - before
        if drawn.x.shape != SHAPE or drawn.end != float(grid.t[-1]):
            report.fail(setting, f"state of shape {tuple(drawn.x.shape)} at {drawn.end}")
        elif not drawn.x.isfinite().all():
            report.fail(setting, "not finite")
        elif drawn.status == LIMIT and setting.dtype == "bfloat16" and drawn.network_calls == calls:
            report.counts["at limit"] += 1
        elif drawn.status != "ok" or drawn.network_calls != calls:
            report.fail(setting, f"{drawn.status}, {drawn.network_calls} calls reported, {calls} made")
        else:
            report.counts["run"] += 1


def whole_product(rng: random.Random, known: dict[str, Any]) -> Iterator[Setting]:
    """Part 1."""
    for name, process, grid, steps in itertools.product(known, PROCESSES, GRIDS, SHORT):
        yield Setting(name, process, grid, rng.choice(ENDS), steps)


def drawn_grid(rng: random.Random, process: str) -> str:
    """Any grid, but one that is made for a table only where there is one: refusals are part 1's."""
    return rng.choice([grid for grid in GRIDS if process == "table" or not grid.startswith("ddpm")])


def networks(rng: random.Random, known: dict[str, Any]) -> Iterator[Setting]:
    """Part 2."""
    for name, predicts, dtype in itertools.product(known, KINDS, DTYPES):
        for _ in range(2):
            process, steps = rng.choice(list(PROCESSES)), rng.choice(SHORT)
            yield Setting(name, process, drawn_grid(rng, process), rng.choice(ENDS), steps, predicts, dtype)


def long_runs(rng: random.Random, known: dict[str, Any]) -> Iterator[Setting]:
    """Part 3."""
    for name in known:
        for process in rng.sample(list(PROCESSES), 3):
            rest = rng.choice(ENDS), rng.choice(LONG), rng.choice(list(KINDS)), rng.choice(list(DTYPES))
            yield Setting(name, process, drawn_grid(rng, process), *rest)


PARTS = {
    "every solver x process x grid x steps up to 50, the end drawn": whole_product,
    "every solver x prediction x dtype, the rest drawn twice": networks,
    "every solver on three processes with 999 or 1000 steps, the rest drawn": long_runs,
}
QUICK = (12_500, 2_400, 60)


def parts(rng: random.Random, known: dict[str, Any]) -> dict[str, list[Setting]]:
    """The settings of every part."""
    return {label: list(part(rng, known)) for label, part in PARTS.items()}


def summary(reports: dict[str, Report], seed: int) -> list[str]:
    """Markdown: counts, reasons, failures."""
    total = sum((report.counts for report in reports.values()), Counter())
    reasons = sum((report.reasons for report in reports.values()), Counter())
    examples = {reason: text for report in reports.values() for reason, text in report.examples.items()}
    lines = ["| settings | " + " | ".join(OUTCOMES) + " | seconds |", "|---|" + "---|" * (len(OUTCOMES) + 1)]
    for label, report in reports.items():
        numbers = " | ".join(str(report.counts[kind]) for kind in OUTCOMES)
        lines.append(f"| {label} | {numbers} | {report.seconds:.0f} |")
    lines += ["| all | " + " | ".join(str(total[kind]) for kind in OUTCOMES) + " | |", ""]
    lines += [f"Seed of the draws: {seed}. Goal: at least {GOAL} runs, no failure.", ""]
    lines += ["| refused before the first call because | settings | for example |", "|---|---|---|"]
    for reason, number in reasons.most_common():
        lines.append(f"| {reason} | {number} | {examples[reason]} |".replace("\n", " "))
    failures = [line for report in reports.values() for line in report.failures]
    lines += ["", f"Failures: {len(failures)}", *(f"- {line}" for line in failures[:100])]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="settings drawn from each part, in minutes; writes nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    options = parser.parse_args()
    known, rng, reports = solvers.examples(), random.Random(options.seed), {}
    for (label, settings), few in zip(parts(rng, known).items(), QUICK, strict=True):
        settings = rng.sample(settings, few) if options.quick else settings
        label = f"{len(settings)} of: {label}" if options.quick else label
        reports[label] = sweep(settings, known)
        print(f"{label}: {dict(reports[label].counts)}, {reports[label].seconds:.0f} s", flush=True)
    lines = [
        "# Sweep: every solver x process x grid x steps x prediction x dtype",
        "",
        f"{len(known)} solvers, {len(PROCESSES)} processes, {len(GRIDS)} grids to {len(ENDS)} ends, steps "
        f"{', '.join(map(str, SHORT + LONG))}, {len(KINDS)} predictions, networks in {', '.join(DTYPES)}.",
        f"Python {platform.python_version()}, torch {torch.__version__}.",
        f"Made by `python -m benchmarks.sweep{' --quick' if options.quick else ''}`.",
        "",
        *summary(reports, options.seed),
        "",
    ]
    print("\n".join(lines))
    if not options.quick:
        write(reports, options.seed, lines)


def write(reports: dict[str, Report], seed: int, lines: list[str]) -> None:
    """The committed results, which `benchmarks.reliability` cites."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sweep.md").write_text("\n".join(lines))
    record = {
        label: {
            "counts": {kind: report.counts[kind] for kind in OUTCOMES},
            "reasons": dict(report.reasons.most_common()),
            "failures": report.failures,
            "seconds": round(report.seconds, 1),
        }
        for label, report in reports.items()
    }
    (RESULTS / "sweep.json").write_text(json.dumps({"seed": seed, **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
