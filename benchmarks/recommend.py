"""How well `select.recommend` predicts, from a batch of data, which solver and grid are best.

    python -m benchmarks.recommend [--need samples|diversity] [--seed S] [--mixtures N] [--calls 5 10 ...]
                                   [--device cuda] [--more-samples K]

VP(0.1, 20), t from 1 to 1e-3. Mixtures of 2 to 64 dimensions are drawn at random: 2 to 16 modes of unequal
weight, each with its own rotated covariance; spreads and widths vary. `recommend` sees 2048 samples of one,
not the law. Then every candidate is run on the mixture itself from other noises, and has as its true error

samples    the median distance from the exact solution over 32 noises: one in 5 of `pool()`, with all
           solvers and all grids
diversity  the sliced 2-Wasserstein distance of the output's law from that of x_end, twice from 1024 to 8192
           samples (K times as many with --more-samples K, on --device) that share their noise with true ones
           (`select.coupling`): one in 31 of `pool(stochastic=True)`, others for every mixture. Small
           distances are chance both times: the correlation of the two is about what a perfect prediction
           would be found to have

For every mixture and number of calls: Spearman's correlation of predicted and true errors over all
candidates, and the true error of the recommended one over the least. Squared distances of laws that are less
than their standard error (the median over the candidates) count as equal to it, and so do predicted ones
below it when they are ranked, for nobody can tell those apart; the recommended one is still that of the least
prediction. Beside them those of the plain Gaussian surrogate, and of the fixed choices FIXED, which for
samples are candidates too. The seed of the scored mixtures was not used in development.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import VPSDE
from scoresde.laws import Law, Mixture
from scoresde.select import Candidate, Recommendation, gaussian_surrogate, mixture_surrogate, pool, recommend
from scoresde.select.coupling import Distances, law_distances
from scoresde.select.tables import run_stack, stack
from scoresde.tableau import Tableau

from . import options
from .accuracy import reference

SDE = VPSDE()
SEED, MIXTURES, CALLS = 20261125, 30, (5, 10, 20, 50)
DATA, NOISES = 2048, 32
SAMPLES, NUMBERS = range(1024, 8193), 2**15  # for a law: so many numbers' worth, within these bounds
STRIDES = {"samples": 5, "diversity": 31}  # one candidate in so many
PART = 2**19  # numbers of a batch of states
RESULTS = Path(__file__).parent / "results"
FILES = {"samples": "recommend", "diversity": "recommend_diversity"}
FIXED = (  # what else one might do: popular choices, and the best single one of benchmarks.accuracy
    "dpmpp(2) on log_snr",
    "unipc(3) on log_snr",
    "heun() on karras(rho=7)",
    "exponential(6, corrector=7, variable='t') on power(exponent=3)",
)


def random_mixture(generator: torch.Generator, dim: int) -> Mixture:
    """Of unit scale: modes within a distance of about 1 a coordinate, of standard deviations between 0.02 and
    0.8."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    modes = int(uniform(2, 17))
    low, high, spread = uniform(0.02, 0.12), uniform(0.2, 0.8), uniform(0.3, 1.2)
    weights = torch.rand(modes, generator=generator, dtype=torch.float64) + 0.3
    spectrum = torch.logspace(math.log10(low), math.log10(high), dim, dtype=torch.float64) ** 2
    bases = torch.linalg.qr(torch.randn(modes, dim, dim, generator=generator, dtype=torch.float64)).Q
    means = spread * torch.randn(modes, dim, generator=generator, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, bases * spectrum @ bases.mT)


def dimensions(count: int) -> list[int]:
    """From 2 to 64, evenly in the logarithm."""
    return [round(2 * 32 ** (i / max(count - 1, 1))) for i in range(count)]


def candidates_of(need: str, number: int) -> list[Candidate]:
    """Those that are tried on a mixture: one in so many of the pool, and for samples the fixed choices."""
    if need == "diversity":
        return pool(stochastic=True)[number % STRIDES[need] :: STRIDES[need]]
    listed = pool()[:: STRIDES[need]]
    return [*listed, *(c for c in pool() if c.name in FIXED and c not in listed)]


class Outcome(NamedTuple):
    """Spearman's correlation with the true errors, and how many times the least true error was chosen."""

    spearman: float
    ratio: float


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; equal values share their mean rank. 0 if all are equal, which orders nothing."""
    one, two = (ranks(torch.tensor(v, dtype=torch.float64)) for v in (a, b))
    return float(torch.corrcoef(torch.stack([one, two]))[0, 1].nan_to_num(0.0))


def ranks(values: Tensor) -> Tensor:
    """0..n - 1, equal values sharing the mean of theirs."""
    _, kind, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - 0.5 * (counts + 1)).double()[kind]


def parts(tables: list[Tableau], states: int) -> Iterator[list[Tableau]]:
    """So many at a time that their states together are not too many."""
    size = max(1, PART // states)
    return (tables[i : i + size] for i in range(0, len(tables), size))


def true_distances(law: Law, tables: list[Tableau], generator: torch.Generator) -> list[float]:
    """Median distances from the exact solution."""
    model = law.denoiser(SDE)
    x = torch.randn(NOISES, law.dim, generator=generator, dtype=torch.float64)
    wanted = reference(model, x)
    errors = [(run_stack(stack(part), model, x) - wanted) for part in parts(tables, x.numel())]
    return (
        torch.cat([e.square().mean(2).sqrt().median(1).values for e in errors]).nan_to_num(math.inf).tolist()
    )


class Truth(NamedTuple):
    """Squared distances of laws, measured twice."""

    one: Distances
    two: Distances

    def both(self) -> Distances:
        """Their mean."""
        squares = 0.5 * (self.one.squares + self.two.squares)
        return Distances(squares, 0.5 * (self.one.errors.square() + self.two.errors.square()).sqrt())

    def distances(self) -> list[float]:
        """By both. What is less than the standard error that half of the candidates have is as much: chance
        alone would tell it apart."""
        return _above_chance(*self.both())

    def floor(self) -> float:
        """The least distance that there is."""
        return float(_chance(self.both().errors).sqrt())

    def ceiling(self) -> float:
        return spearman(*(_above_chance(*d) for d in self))


def _chance(errors: Tensor) -> Tensor:
    return errors.nan_to_num(math.inf).median()


def _above_chance(squares: Tensor, errors: Tensor) -> list[float]:
    return squares.nan_to_num(math.inf).clamp_min(_chance(errors)).sqrt().tolist()


def true_laws(
    law: Law, tables: list[Tableau], generator: torch.Generator, device: str = "cpu", more: int = 1
) -> Truth:
    """Of the outputs of the tables from that of x_end, by `more` times the samples, on a device."""
    samples = more * min(max(NUMBERS // law.dim, SAMPLES.start), SAMPLES.stop - 1)
    law, generator = law.to(device), generator_on(device, generator)
    return Truth(*(law_distances(SDE, law, tables, samples, generator) for _ in range(2)))


def generator_on(device: str, generator: torch.Generator) -> torch.Generator:
    """The generator itself where it is; elsewhere one that it seeds."""
    if torch.device(device) == generator.device:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def predictions(found: Recommendation, candidates: Sequence[Candidate]) -> list[float]:
    """The expected errors in the order of the candidates."""
    by_candidate = {r.candidate: r.error for r in found.ranking}
    return [by_candidate[c] for c in candidates]


def outcome(predicted: list[float], true: list[float], floor: float = 0.0) -> Outcome:
    """Of predicted errors; below the floor all rank the same."""
    chosen = min(range(len(true)), key=predicted.__getitem__)
    return Outcome(spearman([max(p, floor) for p in predicted], true), true[chosen] / min(true))


SURROGATES = {"mixture": mixture_surrogate, "gaussian": gaussian_surrogate}


def one(
    seed: int, number: int, dim: int, calls: Sequence[int], need: str, device: str = "cpu", more: int = 1
) -> Iterator[dict[str, Any]]:
    """A row for every number of calls. The truth about laws: as `true_laws` on the device."""
    generator = torch.Generator().manual_seed(seed + number)
    law = random_mixture(generator, dim)
    data = law.sample(DATA, generator=generator)
    started = time.process_time()
    fitted = {name: fit(data) for name, fit in SURROGATES.items()}
    fit_seconds = time.process_time() - started
    about = {
        "number": number,
        "dim": dim,
        "modes": len(law.means),
        "fitted": len(fitted["mixture"].law.means),
    }
    offered = candidates_of(need, number)
    for n in calls:
        found = {name: recommend(SDE, s, n, need, candidates=offered) for name, s in fitted.items()}
        listed = [r.candidate for r in found["mixture"].ranking]
        tables = [c.table(SDE, n) for c in listed]
        row = {**about, "need": need, "calls": n, "candidates": len(listed)}
        if need == "samples":
            true, floor = true_distances(law, tables, generator), 0.0
        else:
            truth = true_laws(law, tables, generator, device, more)
            true, floor = truth.distances(), truth.floor()
            row["ceiling"] = truth.ceiling()
        for name in SURROGATES:
            row[name] = outcome(predictions(found[name], listed), true, floor)._asdict()
        row["fixed"] = {c.name: e / min(true) for c, e in zip(listed, true, strict=True) if c.name in FIXED}
        row["seconds"] = {name: r.seconds for name, r in found.items()} | {"fit": fit_seconds}
        row["best"], row["chosen"] = listed[true.index(min(true))].name, found["mixture"].best.candidate.name
        yield row


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def cells(rows: list[dict[str, Any]], name: str) -> list[str]:
    """Mean correlation, median and 90th percentile of the ratio."""
    ratios = [row[name]["ratio"] for row in rows]
    mean = sum(row[name]["spearman"] for row in rows) / len(rows)
    return [f"{mean:.3f}", f"{quantile(ratios, 0.5):.2f}", f"{quantile(ratios, 0.9):.2f}"]


def report(result: dict[str, Any]) -> str:
    """The tables of the result in Markdown."""
    rows = result["rows"]
    lines = [
        f"## {rows[0]['need']}",
        "",
        "| calls | mixtures | Spearman | error over the least: median | 90 % "
        "| Gaussian: Spearman | median | 90 % | ceiling |",
        "|---" * 9 + "|",
    ]
    for calls in [*dict.fromkeys(row["calls"] for row in rows), "all"]:
        part = [row for row in rows if calls in (row["calls"], "all")]
        ceiling = [row["ceiling"] for row in part if "ceiling" in row]
        top = f"{sum(ceiling) / len(ceiling):.3f}" if ceiling else "-"
        shown = [calls, len(part), *cells(part, "mixture"), *cells(part, "gaussian"), top]
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    lines += [""]
    for name in FIXED:
        known = [row["fixed"][name] for row in rows if name in row["fixed"]]
        if known:
            lines.append(
                f"Always {name}: {quantile(known, 0.5):.2f} times the least error in the median, "
                f"{quantile(known, 0.9):.2f} at 90 %."
            )
    worst = sorted(rows, key=lambda row: -row["mixture"]["ratio"])[:5]
    lines += ["", "Worst choices:", ""]
    lines += [
        f"- {row['dim']} dimensions, {row['modes']} modes, {row['calls']} calls: "
        f"{row['mixture']['ratio']:.2f} times; {row['chosen']} for {row['best']}"
        for row in worst
    ]
    fit, run = (quantile([row["seconds"][k] for row in rows], 0.5) for k in ("fit", "mixture"))
    lines += [
        "",
        f"Seconds in the median: {fit:.2f} to fit both surrogates, {run:.2f} to rank "
        f"{rows[0]['candidates']} candidates. {_truth(result)}Seed {result['seed']}; "
        f"{result['cpu_seconds']:.0f} CPU seconds.",
        "",
    ]
    return "\n".join(lines)


def _truth(result: dict[str, Any]) -> str:
    more, device = result.get("more_samples", 1), result.get("device", "cpu")
    return "" if (more, device) == (1, "cpu") else f"The truth from {more} times the samples, on {device}. "


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Correlation and ratio of every mixture against its dimension."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(5.2, 7))
    dims = [row["dim"] for row in rows]
    for name, color, marker in (("gaussian", "#d95f02", "x"), ("mixture", "#1f77b4", "o")):
        for axis, key in zip(axes, ("spearman", "ratio"), strict=True):
            axis.scatter(dims, [row[name][key] for row in rows], s=14, c=color, marker=marker, label=name)
    axes[0].set(
        title=rows[0]["need"],
        xscale="log",
        ylim=(None, 1.02),
        ylabel="Spearman's correlation, all candidates",
    )
    axes[1].set(xscale="log", yscale="log", xlabel="dimensions", ylabel="error of the choice / least error")
    axes[1].axhline(1.25, color="gray", lw=0.8, ls=":")
    for axis in axes:
        ticks = [2**k for k in range(1, 7) if 2**k <= max(dims)]
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, title="surrogate")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save(result: dict[str, Any], out: Path) -> None:
    """Numbers, tables and picture."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / FILES[result["rows"][0]["need"]]
    stem.with_suffix(".json").write_text(json.dumps(result).replace('{"number": ', '\n{"number": ') + "\n")
    stem.with_suffix(".md").write_text(report(result))
    picture(result["rows"], stem.with_suffix(".png"))


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--need", default="samples", choices=list(STRIDES))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--mixtures", type=options.count, default=MIXTURES)
    parser.add_argument("--calls", nargs="+", type=options.count, default=list(CALLS))
    parser.add_argument("--device", default="cpu", help="where laws are measured; all else is on the CPU")
    parser.add_argument(
        "--more-samples", type=options.count, default=1, help="so many times, to measure laws by"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    started, rows = time.process_time(), []
    for number, dim in enumerate(dimensions(args.mixtures)):
        for row in one(args.seed, number, dim, args.calls, args.need, args.device, args.more_samples):
            rows.append(row)
            told = [f"{name} {row[name]['spearman']:.3f} {row[name]['ratio']:.2f}" for name in SURROGATES]
            print(number, dim, row["modes"], row["fitted"], row["need"], row["calls"], *told, flush=True)
    how = {"seed": args.seed, "device": args.device, "more_samples": args.more_samples}
    result = {**how, "cpu_seconds": time.process_time() - started, "rows": rows}
    save(result, args.out)
    print(report(result))


if __name__ == "__main__":
    main()
