"""`scoresde compare`, `recommend` and `tune`: which solver, on which grid, with how many calls."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Literal

import tyro

from .. import checkpoint, digits, plots
from ..checkpoint.files import check_place
from ..sde import VPSDE
from ..select import Budget, Comparison
from ..select import compare as measured
from ..select import recommend as ranked
from ..select import tune as tuned
from ..solvers import TableSolver
from ..tableau import Tableau
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
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"expected seconds >= 0, found {seconds}")
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


def recommend(
    model: tyro.conf.Positional[Path | None] = None,
    data: Path | None = None,
    calls: str = "10",
    need: Literal["samples", "encode", "likelihood", "diversity"] = "samples",
    guidance: float | None = None,
    end: float | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Rank solvers and grids by their error on a surrogate of the data, without calling the network.

    Args:
        model: the checkpoint, for its process (default: the linear VP-SDE).
        data: an .npy array of data (default: what the checkpoint was trained on, if it says digits).
        calls: numbers of network calls.
        need: what the solver is for.
        guidance: scale of the classifier-free guidance that will be used.
        end: last time of the grids (default: that of the process).
        seed: of the noises.
        out: a .json file for the table of the best one, for scoresde sample --solver.
    """
    description = None if model is None else checkpoint.describe(model)
    sde = VPSDE() if model is None else checkpoint.load(model).sde
    if data is not None:
        batch = read_array(data)
    elif description is not None and description["metadata"].get("data") == "digits":
        batch = digits.load().train.x
    else:
        raise ValueError("expected data to recommend for: give an .npy array, as in --data data.npy")
    wanted = numbers(calls)
    if out is not None and (out.suffix != ".json" or len(wanted) > 1 or need == "likelihood"):
        raise ValueError(
            "expected a .json file, one number of calls, and a need that has solvers, for a table; found "
            f"{out}, {calls} and {need}"
        )
    if out is not None:
        check_place(out)
    for number in wanted:
        found = ranked(sde, batch, number, need, guidance, end=end, seed=seed)
        print(f"{found}\n")
        if out is not None:
            write_table(out, found.table, model)


def tune(
    model: tyro.conf.Positional[Path],
    solver: str = "unipc",
    calls: int = 8,
    seconds: float = 60.0,
    what: Literal["grid", "coefficients", "all"] = "grid",
    n: int = 256,
    seed: int = 0,
    label: int | None = None,
    shape: tuple[int, ...] | None = None,
    end: float | None = None,
    batch: int | None = None,
    out: Path = Path("outputs/table.json"),
    device: str = "auto",
) -> None:
    """Fit the grid, or all coefficients, of a solver to the network: a table for scoresde sample --solver.

    Args:
        model: the checkpoint.
        solver: a name from `scoresde solvers`, with options as in "unipc(order=3)".
        calls: network calls of the table.
        seconds: time spent at most.
        what: the times of the grid, the coefficients of the table, or first the one and then both.
        n: samples that it is fitted on; as many again choose, and as many again are reported on.
        seed: of the noises.
        label: the class of all samples (default: all classes in turn).
        shape: of one sample, where the checkpoint does not say.
        end: last time of the grid (default: that of the process).
        batch: samples at a time (default: all).
        out: the .json file for the table.
        device: cpu, cuda, or auto: cuda if there is one.
    """
    if out.suffix != ".json":
        raise ValueError(f"expected a .json file for the table, found {out}")
    check_place(out)
    description = checkpoint.describe(model)
    denoiser = checkpoint.load(model, device=device_named(device))
    found = tuned(
        denoiser,
        _table_solver(solver),
        calls,
        seconds,
        what,
        shape=shape_of(description, shape),
        n=n,
        seed=seed,
        condition=condition_of(description, n, label, denoiser.device),
        end=end,
        batch=batch,
        progress=sys.stderr.isatty(),
    )
    print(found.report)
    write_table(out, found.table, model)


def _table_solver(text: str) -> TableSolver:
    solver = parse_entry(text)
    if not isinstance(solver, TableSolver):
        raise ValueError(f"expected a solver that is a table, such as unipc(order=3), found {text}")
    return solver


def write_table(out: Path, table: Tableau, model: Path | None) -> None:
    """The table as JSON, for `scoresde sample --solver`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table.to_json() + "\n", encoding="utf-8")
    print(f"A table of {len(table)} network calls, written to {out}")
    print(f"Sample with: scoresde sample {model or 'CHECKPOINT'} --solver {out}")
