"""`scoresde compare`: which solver, on which grid, with how many calls."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import tyro

from .. import checkpoint, plots
from ..select import Budget, Comparison
from ..select import compare as measured
from .common import (
    condition_of,
    device_named,
    numbers,
    parse_entry,
    parse_grid,
    read_array,
    shape_of,
)


def compare(
    model: tyro.conf.Positional[Path],
    calls: str = "5,10,20",
    solvers: tuple[str, ...] = (),
    grids: tuple[str, ...] = (),
    data: Path | None = None,
    n: int = 128,
    seed: int = 0,
    label: int | None = None,
    shape: tuple[int, ...] | None = None,
    end: float | None = None,
    seconds: float | None = None,
    batch: int | None = None,
    out: Path = Path("outputs/comparison"),
    device: str = "auto",
) -> None:
    """Run solvers on grids with numbers of network calls, from the same noise, and measure their errors.

    Args:
        model: the checkpoint.
        calls: numbers of network calls.
        solvers: names from `scoresde solvers` with options, or .json files of tables (default: a choice).
        grids: spacings, such as quadratic or "karras(rho=5)" (default: a choice).
        data: an .npy array of true samples: errors are then distances between laws, and solvers with noise
            are compared too. Without it they are distances to an accurate solution from the same noise.
        n: samples from each.
        seed: of the noises.
        label: the class of all samples (default: all classes in turn).
        shape: of one sample, where the checkpoint does not say.
        end: last time of the grids (default: that of the process).
        seconds: time spent at most; what does not fit is left out.
        batch: samples at a time (default: all).
        out: folder for comparison.md, .json, .csv, .png; and for the runs, with which the same command goes
            on where it was interrupted.
        device: cpu, cuda, or auto: cuda if there is one.
    """
    description = checkpoint.describe(model)
    denoiser = checkpoint.load(model, device=device_named(device))
    found = measured(
        denoiser,
        {text: parse_entry(text) for text in solvers} or None,
        {text: parse_grid(text) for text in grids} or None,
        numbers(calls),
        shape=shape_of(description, shape),
        n=n,
        seed=seed,
        condition=condition_of(description, n, label, denoiser.device),
        data=None if data is None else read_array(data),
        end=end,
        budget=None if seconds is None else Budget(seconds=seconds),
        batch=batch,
        cache=out / "runs",
        progress=sys.stderr.isatty(),
    )
    print(f"{found}\n\nWritten to {out}: {', '.join(write_comparison(out, found, model.name))}")
    if found.about.interrupted:
        raise KeyboardInterrupt("The same command goes on.")


def write_comparison(out: Path, found: Comparison, title: str) -> list[str]:
    """The comparison as Markdown, JSON and CSV, and a picture where there is matplotlib; the files' names."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.md": f"# {title}\n\n{found}\n\n## All runs\n\n{found.table()}\n",
        "comparison.json": found.to_json(),
        "comparison.csv": found.to_csv(),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None or not found.front():
        return list(texts)
    plots.save(plots.fronts(found, title=title), out / "comparison.png")
    return [*texts, "comparison.png"]
