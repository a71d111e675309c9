"""How well `select.recommend` predicts, from the digits alone, which solver and grid are best on a network
that has learnt them.

    python -m benchmarks.recommend_digits [--n 64] [--calls 5 10 20] [--stride 1] [--out FOLDER]

The network is benchmarks/digits.safetensors (class-conditional, 8x8 digits); `recommend` sees the digits
that it was trained on, and calls no network. Every candidate of `pool()` (one in `stride`) is then run on the
network by `select.compare`, from noises that no choice has seen; its true error is the median distance from
an accurate solution. For each surrogate of the data and number of calls: Spearman's correlation of predicted
and true errors, and the true error of the recommended candidate over the least one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scoresde import checkpoint, digits
from scoresde.select import (
    Candidate,
    compare,
    gaussian_surrogate,
    kernel_surrogate,
    mixture_surrogate,
    pool,
    recommend,
)

from .digits_checkpoint import PATH
from .recommend import FIXED, RESULTS, outcome, predictions

CALLS, NOISES, SEED = (5, 10, 20), 64, 20261128
SURROGATES = {"kernels": kernel_surrogate, "mixture": mixture_surrogate, "gaussian": gaussian_surrogate}


def true_errors(
    model: Any, candidates: Sequence[Candidate], calls: int, n: int, progress: bool = False
) -> list[float]:
    """Median distances, in the order of the candidates; infinite for what does not end."""
    condition = {"label": digits.labels(n)}
    found = compare(
        model,
        candidates,
        calls=[calls],
        shape=(1, 8, 8),
        n=n,
        seed=SEED,
        condition=condition,
        dtype=torch.float64,
        progress=progress,
    )
    medians = {row.name: row.typical for row in found.rows}
    return [medians.get(candidate.name, float("inf")) for candidate in candidates]


def row(calls: int, stride: int, n: int, progress: bool = False) -> dict[str, Any]:
    """What each surrogate says, and what is true."""
    model, data = checkpoint.load(PATH), digits.load().train.x
    fitted = {name: fit(data) for name, fit in SURROGATES.items()}
    found = {
        name: recommend(model.sde, surrogate, calls, candidates=pool()[::stride])
        for name, surrogate in fitted.items()
    }
    listed = [ranked.candidate for ranked in found["kernels"].ranking]
    true = true_errors(model, listed, calls, n, progress)
    least = min(true)
    return {
        "calls": calls,
        "candidates": len(listed),
        "least": least,
        "best": listed[true.index(least)].name,
        "chosen": {name: advice.best.candidate.name for name, advice in found.items()},
        **{name: outcome(predictions(advice, listed), true)._asdict() for name, advice in found.items()},
        "fixed": {c.name: e / least for c, e in zip(listed, true, strict=True) if c.name in FIXED},
    }


def report(rows: list[dict[str, Any]], n: int) -> str:
    lines = [
        "# Recommended from the digits, measured on their network",
        "",
        f"Median distances over {n} noises; all candidates of one number of calls from the same noises. In "
        "each cell: Spearman's correlation of predicted and true errors, and how many times the least error "
        "the choice has.",
        "",
        "| calls | candidates | least error | " + " | ".join(SURROGATES) + " |",
        "|---" * (3 + len(SURROGATES)) + "|",
    ]
    for found in rows:
        cells = [f"{found[name]['spearman']:.3f}, {found[name]['ratio']:.2f}" for name in SURROGATES]
        shown = [str(found["calls"]), str(found["candidates"]), f"{found['least']:.2e}", *cells]
        lines.append("| " + " | ".join(shown) + " |")
    lines += ["", "| calls | | candidate |", "|---|---|---|"]
    for found in rows:
        named = {"best": found["best"], **found["chosen"]}
        lines += [f"| {found['calls']} | {who} | {name} |" for who, name in named.items()]
    lines += ["", "| always | " + " | ".join(f"{found['calls']} calls" for found in rows) + " |"]
    lines += ["|---" * (1 + len(rows)) + "|"]
    for name in FIXED:
        known = [f"{found['fixed'][name]:.2f}" if name in found["fixed"] else "" for found in rows]
        if any(known):
            lines.append(f"| {name} | " + " | ".join(known) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=NOISES, help="noises")
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--stride", type=int, default=1, help="one candidate in so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row(calls, options.stride, options.n, progress=True) for calls in options.calls]
    text = report(rows, options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"n": options.n, "seed": SEED, "rows": rows}
    (options.out / "recommend_digits.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "recommend_digits.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
