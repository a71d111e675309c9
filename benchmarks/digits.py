"""A trained network: how far solvers are from the exact solution, and how good their samples are, against
network calls.

    python -m benchmarks.digits [--n 64] [--calls 5 10 20] [--out FOLDER] [--quick]

The network is benchmarks/digits.safetensors (class-conditional, 8x8 digits). Three questions:

distance   `scoresde.select.compare`: all usual solvers of ours on the usual grids, and the deterministic
           public ones on the grids that public code offers, from the same noise: the distance to an accurate
           solution, without flips. State in float64, network in float32, for both.
ranks      ours with other noises: Spearman's correlation of the order of all configurations.
quality    what the samples look like to a classifier that has not seen the training digits: accuracy, and
           the energy distance between its log-probabilities of samples and of held-out digits. Of the best
           configuration of either side for each number of calls, and of some that people use, with and
           without noise, each on one grid.

The public libraries need the environment of benchmarks/peers.txt; without it their rows are missing. Runs are
kept in outputs/digits, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from scoresde import checkpoint, digits, sample, solvers
from scoresde.denoiser import BaseDenoiser, Denoiser
from scoresde.grids import Grid
from scoresde.select import GRIDS, Candidate, Comparison, compare, rank_agreement
from scoresde.select.candidates import solver_name
from scoresde.select.compare import USUAL_GRIDS, usual
from scoresde.select.comparison import Row
from scoresde.solvers import Card, Samples, Solver
from scoresde.solvers.exponential import er_noise_level

from . import options, peers
from .digits_checkpoint import PATH

RESULTS = Path(__file__).parent / "results"
CALLS = (5, 10, 20)
QUALITY_CALLS = (5, 10, 20, 50)
PUBLIC_GRIDS = ("uniform", "quadratic", "log_snr", "karras(rho=7)")
FLOAT64 = torch.float64


@dataclass(frozen=True)
class PublicSolver:
    """A public sampler as a solver of ours."""

    name: str
    public: peers.Public = field(repr=False)
    card: Card = field(repr=False)

    def __repr__(self) -> str:
        return self.name

    def steps_for(self, calls: int) -> int:
        """Raises ValueError where the calls do not pay for a step."""
        steps = self.public.steps_for(calls)
        if steps < 1:
            raise ValueError("the calls do not pay for one step")
        return steps

    @torch.no_grad()
    def solve(
        self, model: BaseDenoiser, x: Tensor, times: Grid | Tensor, *, noise: Any = None, callback: Any = None
    ) -> Samples:
        """FloatingPointError where public code cannot do so few steps, or returns something not finite."""
        started, made = time.perf_counter(), 0
        grid = Grid.of(model.sde, times)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            nonlocal made
            made += 1
            return model(x, t)

        source = None if noise is None else lambda k: noise(k, x.shape)
        try:
            found = self.public.run(peers.Task(model.sde, grid.t, denoise, source), x)
        except (IndexError, AssertionError, ValueError, ZeroDivisionError) as error:
            raise FloatingPointError(f"{self}: {error}") from error
        if not bool(found.isfinite().all()):
            raise FloatingPointError(f"{self} returned NaN or Inf")
        return Samples(found, made, time.perf_counter() - started, end=float(grid.t[-1]))


def public(listed: dict[str, peers.Public], stochastic: bool) -> dict[str, PublicSolver]:
    """Those that can be imported here."""
    card = Card(None, None, 1, stochastic, "public code")
    return {
        name: PublicSolver(name, sampler, card)
        for name, sampler in listed.items()
        if peers.missing(name.split()[0]) is None
    }


def ours() -> dict[str, Solver]:
    """What `compare` runs by default, by name."""
    return {solver_name(solver): solver for solver in usual()}


def distances(
    model: Denoiser, n: int, calls: tuple[int, ...], seed: int, folder: Path, others: dict[str, PublicSolver]
) -> Comparison:
    """Ours on the usual grids and others on those of public code, in one table."""
    sides = (ours(), USUAL_GRIDS), (others, PUBLIC_GRIDS)
    entries = {
        f"{name} on {grid}": Candidate(cast(Any, solver), GRIDS[grid], grid)
        for listed, on in sides
        for name, solver in listed.items()
        for grid in on
    }
    return compare(
        model,
        entries,
        calls=calls,
        shape=digits.SHAPE,
        n=n,
        seed=seed,
        condition={"label": digits.labels(n)},
        cache=folder / "runs",
        progress=sys.stderr.isatty(),
        dtype=FLOAT64,
    )


def sides(found: Comparison) -> list[Comparison]:
    """Ours, and theirs if there are any, of one table."""
    mine = ours()
    parts = [tuple(row for row in found.rows if (row.solver in mine) == own) for own in (True, False)]
    return [replace(found, rows=rows) for rows in parts if rows]


# ---- quality

KNOWN: dict[str, tuple[Solver, str]] = {
    "ddpm()": (solvers.ddpm(), "quadratic"),
    "euler_maruyama()": (solvers.euler_maruyama(), "quadratic"),
    "sde_dpmpp(2)": (solvers.sde_dpmpp(2), "quadratic"),
    "er_sde(3)": (solvers.er_sde(3), "quadratic"),
    "sa(2, 3)": (solvers.sa(2, 3), "quadratic"),
    "exponential(4, corrector=5, variable='t', tau=er_noise_level)": (
        solvers.exponential(4, corrector=5, stored="data", variable="t", tau=er_noise_level),
        "power(exponent=3)",
    ),
    "ddim()": (solvers.ddim(), "quadratic"),
    "dpmpp(2)": (solvers.dpmpp(2), "quadratic"),
    "unipc(3)": (solvers.unipc(3), "quadratic"),
}
POPULAR = ("diffusers UniPC-3 bh2", "k-diffusion dpmpp_2m", "k-diffusion dpmpp_2m_sde midpoint eta=1.0")
PUBLIC_GRID = "karras(rho=7)"


def quality(
    model: Denoiser, examiner: digits.Examiner, solver: Solver, grid: str, calls: int, n: int, seed: int
) -> dict[str, Any] | None:
    """What the examiner says of n samples; None where the solver fails or the calls do not pay for a step."""
    label = digits.labels(n)
    try:
        drawn = sample(
            model,
            (n, *digits.SHAPE),
            solver,
            steps=solver.steps_for(calls),
            grid=GRIDS[grid],
            seed=seed,
            condition={"label": label},
            dtype=FLOAT64,
        )
    except (ValueError, FloatingPointError):
        return None
    return {"budget": calls, "calls": drawn.network_calls, **asdict(examiner(drawn.x, label))}


def qualities(model: Denoiser, found: Comparison, n: int, seed: int) -> dict[str, Any]:
    """Rows by configuration, and the floor: what held-out digits reach."""
    examiner = digits.Examiner(digits.load())
    listed = {f"{name} on {grid}": (solver, grid) for name, (solver, grid) in KNOWN.items()}
    for name in POPULAR:
        for known, stochastic in ((peers.ODE, False), (peers.SDE, True)):
            if name in (others := public(known, stochastic)):
                listed[f"{name} on {PUBLIC_GRID}"] = others[name], PUBLIC_GRID
    rows = {
        name: [q for calls in QUALITY_CALLS if (q := quality(model, examiner, solver, grid, calls, n, seed))]
        for name, (solver, grid) in listed.items()
    }
    named = {
        "best distance of scoresde": ours(),
        "best distance of public code": public(peers.ODE, False),
    }
    for (title, known), part in zip(named.items(), sides(found), strict=False):
        best = [part.ranking(budget)[0] for budget in part.budgets()]
        rows[title] = [
            {**q, "configuration": row.name}
            for row in best
            if (q := quality(model, examiner, known[row.solver], row.grid, row.budget, n, seed))
        ]
    return {"rows": rows, "floor": asdict(examiner.floor())}


# ---- report


def best_rows(part: Comparison) -> list[Row]:
    return [part.ranking(budget)[0] for budget in part.budgets()]


def report(found: Comparison, agreement: dict[int, float], judged: dict[str, Any]) -> str:
    """The whole in Markdown."""
    lines = [
        "# Digits: a trained network",
        "",
        "## Distance to the exact solution",
        "",
        str(found),
        "",
        "| calls | best of scoresde | distance | best of public code | distance | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for rows in zip(*(best_rows(part) for part in sides(found)), strict=True):
        cells = [
            f"{row.name} | {row.typical:.2e} ({row.error:.2e}, {100 * (row.flips or 0):.1f} %)"
            for row in rows
        ]
        cells += [f"{rows[0].typical / rows[1].typical:.2f}"] if len(rows) > 1 else ["-", "-", "-"]
        lines.append(f"| {rows[0].budget} | {' | '.join(cells)} |")
    lines += [
        "",
        "Distances: median (root mean square without flips, share of flips); the ratio is of the medians. "
        "Seconds are wall time, comparable only if nothing else ran on the machine.",
        "",
        "## Ranks",
        "",
        "Spearman's correlation between the errors of our configurations from two sets of noises: "
        + ", ".join(f"{rho:.3f} with {calls} calls" for calls, rho in agreement.items())
        + ".",
        "",
        "## Quality of the samples",
        "",
        "| configuration | " + " | ".join(f"{calls} calls" for calls in QUALITY_CALLS) + " |",
        "|---" * (1 + len(QUALITY_CALLS)) + "|",
    ]
    for name, rows in judged["rows"].items():
        cells = {row["budget"]: f"{row['accuracy']:.3f}, {row['energy_distance']:.3f}" for row in rows}
        lines.append(f"| {name} | " + " | ".join(cells.get(calls, "-") for calls in QUALITY_CALLS) + " |")
    floor = judged["floor"]
    lines += [
        "",
        f"Cells: judge's accuracy, energy distance. Held-out digits: {floor['accuracy']:.3f}, "
        f"{floor['energy_distance']:.3f} (one half against the other). Differences of 0.03 in accuracy are "
        "within the noise of so few samples.",
        "",
    ]
    return "\n".join(lines)


def picture(found: Comparison, judged: dict[str, Any], path: Path) -> None:
    """Left: distance against calls, every configuration a point, the best of either side a line. Right: the
    energy distance of the samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.2))
    styles = (("scoresde", "#1f77b4", 0.97), ("public code", "#d95f02", 1.03))
    for (name, color, aside), part in zip(styles, sides(found), strict=False):
        rows = [row for row in part.rows if row.error < float("inf")]
        left.scatter(
            [row.calls * aside for row in rows], [row.typical for row in rows], s=7, c=color, alpha=0.35, lw=0
        )
        best = best_rows(part)
        left.plot(
            [row.calls for row in best],
            [row.typical for row in best],
            "o-",
            c=color,
            label=f"best of {name}",
        )
    left.set(
        xscale="log", yscale="log", xlabel="network calls", ylabel="median distance to the exact solution"
    )
    left.set_xticks(found.budgets(), [str(budget) for budget in found.budgets()])
    left.set_title("Every solver and grid, from the same noise", fontsize=10)
    colors = plt.get_cmap("tab20").colors
    for i, (name, rows) in enumerate(judged["rows"].items()):
        style = {"lw": 2.5} if name.startswith("best") else {"lw": 1, "marker": "."}
        right.plot(
            [row["calls"] for row in rows],
            [row["energy_distance"] for row in rows],
            color=colors[i % 20],
            label=name,
            **style,
        )
    right.axhline(judged["floor"]["energy_distance"], color="0.4", ls=":", label="held-out digits")
    right.set(xscale="log", xlabel="network calls", ylabel="energy distance to held-out digits")
    right.set_yscale("symlog", linthresh=0.1)
    right.set_xticks(QUALITY_CALLS, [str(calls) for calls in QUALITY_CALLS])
    right.set_title("Quality of the samples", fontsize=10)
    for axis in (left, right):
        axis.minorticks_off()
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--n", type=options.several, default=64, help="samples of a run")
    parser.add_argument("--calls", nargs="+", type=options.count, default=list(CALLS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=Path("outputs/digits"), help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="a third of the samples, 5 and 10 calls")
    args = parser.parse_args()
    if args.quick:
        args.n, args.calls = 20, [5, 10]
    model = checkpoint.load(PATH)
    calls = tuple(args.calls)
    found = distances(model, args.n, calls, 0, args.runs, public(peers.ODE, False))
    agreement = rank_agreement(sides(found)[0], distances(model, args.n, calls, 1, args.runs, {}))
    judged = qualities(model, found, 2 * args.n, 0)
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(found, agreement, judged)
    (args.out / "digits.md").write_text(text)
    summary = {"agreement": agreement, "quality": judged}
    content = found.to_json().rstrip()[:-1] + f',\n"summary": {json.dumps(summary)}}}\n'
    (args.out / "digits.json").write_text(content)
    picture(found, judged, args.out / "digits.png")
    print(text)


if __name__ == "__main__":
    main()
