"""The command `scoresde`: train, sample, and the main job on real digits, `scoresde quickstart`.

What a user gets wrong ends with one line on the terminal and exit code 2.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from . import checkpoint, digits, grids, plots, solvers
from .sampling import GridFunction
from .sampling import sample as draw
from .solvers import Solver
from .tableau import Step, Tableau
from .train import Run

GRIDS: dict[str, GridFunction] = {
    f.__name__: f for f in (grids.uniform, grids.quadratic, grids.log_snr, grids.karras, grids.ddpm)
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (default: those of the process); the exit code."""
    commands = {f.__name__: f for f in (quickstart, train, sample, list_solvers)}
    commands["solvers"] = commands.pop("list_solvers")
    description = "Score-based generative models around one VP-SDE. Begin with: scoresde quickstart"
    try:
        with _best_threads():
            tyro.extras.subcommand_cli_from_dict(
                commands, prog="scoresde", description=description, args=args
            )
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"scoresde: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nscoresde: interrupted. {interrupt}", file=sys.stderr)
        return 130
    return 0


# ---- commands


def quickstart(
    out: Path = Path("quickstart"),
    seconds: float = 120.0,
    steps: int = 2000,
    n: int = 256,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
) -> None:
    """Train on real handwritten digits, sample with four solvers, measure, and write pictures and a report.

    Args:
        out: folder for checkpoint.safetensors, samples.png, trajectory.png, report.md and report.json.
        seconds: time spent training.
        steps: training steps at most; a GPU needs less time for them.
        n: samples from each solver.
        seed: of weights, batches and samples.
        device: cpu, cuda, or auto: cuda if there is one.
        resume: go on from the checkpoint in the folder.
    """
    if n < 2:
        raise ValueError(f"expected n of at least 2 samples, found {n}")
    started = time.perf_counter()
    where = _device(device)
    data = digits.load()
    path = out / "checkpoint.safetensors"
    hint = f"Go on with: scoresde quickstart --out {out} --resume"
    if resume and not path.exists():
        raise ValueError(f"expected a checkpoint to resume from, found no {path}; leave out --resume")
    run = digits.training(
        digits.denoiser(seed).to(where), data.train, steps=steps, seed=seed, resume=path if resume else None
    )
    _train(run, path, seconds, hint)
    with _interrupt_says(lambda: f"The model is in {path}. {hint}"):
        rows, frames = digits.compare(run.ema, data, n, seed, progress=sys.stderr.isatty())
    report = {
        "digits": {part: len(images.x) for part, images in data._asdict().items()},
        "training": {
            "seconds": round(run.seconds, 1),
            "steps": run.step,
            "parameters": sum(p.numel() for p in run.model.parameters()),
        },
        "machine": _machine(where),
        "seconds": round(time.perf_counter() - started, 1),
        "targets": digits.TARGETS,
        "rows": [row.as_dict() for row in rows],
    }
    _draw_rows(out / "samples.png", rows)
    _draw_frames(out / "trajectory.png", frames)
    _write_report(out, report, rows)
    files = f"samples.png, trajectory.png, report.md, report.json, {path.name}"
    print(f"\n{digits.table(rows)}\n\n{digits.verdict(rows)}\n\nWritten to {out}: {files}")


def train(
    out: Path = Path("outputs/digits.safetensors"),
    data: Literal["digits"] = "digits",
    seconds: float | None = None,
    steps: int = 2000,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
) -> None:
    """Train a class-conditional U-Net, until the steps are done or the time is up.

    Args:
        out: the checkpoint to write.
        data: what to train on: scikit-learn's handwritten digits.
        seconds: time spent training at most.
        steps: training steps at most.
        seed: of weights and batches.
        device: cpu, cuda, or auto: cuda if there is one.
        resume: go on from the checkpoint `out`.
    """
    model = digits.denoiser(seed).to(_device(device))
    run = digits.training(model, digits.load().train, steps=steps, seed=seed, resume=out if resume else None)
    _train(run, out, seconds, f"Go on with: scoresde train --out {out} --resume")
    print(f"{run.step} steps in {run.seconds:.0f} s, written to {out}\nSample with: scoresde sample {out}")


def sample(
    model: tyro.conf.Positional[Path],
    solver: str = "dpmpp",
    steps: int = 20,
    grid: Literal["uniform", "quadratic", "log_snr", "karras", "ddpm"] | None = None,
    end: float | None = None,
    n: int = 64,
    label: int | None = None,
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    out: Path = Path("samples.png"),
    device: str = "auto",
) -> None:
    """Draw samples from a checkpoint.

    Args:
        model: the checkpoint.
        solver: a name from `scoresde solvers`, with options as in "dpmpp(order=3)", or a .json file from
            Tableau.to_json.
        steps: steps of the grid.
        grid: spacing of the grid (default: that of the process).
        end: last time of the grid (default: that of the process; 0 ends with the denoised data).
        n: how many samples.
        label: the class of all samples (default: all classes in turn).
        shape: of one sample, where the checkpoint does not say.
        seed: sample i is a function of seed and i.
        out: a .png picture or an .npy array.
        device: cpu, cuda, or auto: cuda if there is one.
    """
    if out.suffix not in (".png", ".npy"):
        raise ValueError(f"expected an output that ends in .png or .npy, found {out}")
    if n < 1:
        raise ValueError(f"expected n of at least 1 sample, found {n}")
    chosen, table_grid = parse_solver(solver)
    description = checkpoint.describe(model)
    denoiser = checkpoint.load(model, device=_device(device))
    condition = _condition(description, n, label, denoiser.device)
    spacing = GRIDS[grid] if grid is not None else table_grid
    result = draw(
        denoiser,
        (n, *_shape(description, shape)),
        chosen,
        steps=steps,
        grid=spacing,
        end=end,
        seed=seed,
        condition=condition,
        progress=sys.stderr.isatty(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_samples(out, result.x)
    spent = f"{result.network_calls} network calls, {result.seconds:.1f} s, end t = {result.end:g}"
    print(f"{n} samples by {chosen}: {spent}, written to {out}")


def list_solvers() -> None:
    """List the solvers and what is known of them."""
    print(solvers.card())


# ---- solvers by name


def parse_solver(text: str) -> tuple[Solver, Tensor | None]:
    """The solver that `name`, `name(value, option=value, ...)` or `table.json` is; a table has its grid.

    Values are Python literals, or solvers in the same form, so that every solver can be given as it prints;
    nothing is evaluated. Raises ValueError for anything else.
    """
    if text.endswith(".json"):
        table = Tableau.from_json(Path(text).read_text(encoding="utf-8"))
        return solvers.from_tableau(table), table.times[[0, -1]]
    return solvers.parse(text), None


# ---- training


def _train(run: Run, path: Path, seconds: float | None, hint: str) -> None:
    """Train until the run's steps or `seconds` are over, with a bar; save, also on Ctrl-C, with the hint."""
    from tqdm.auto import tqdm

    if seconds is not None and not seconds > 0:
        raise ValueError(f"expected a positive number of seconds, found {seconds}")
    steps, metadata = run.settings.steps, {"data": "digits", "shape": list(digits.SHAPE)}
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=seconds or steps,
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}" if seconds else None,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
    )
    with _interrupt_says(lambda: f"Saved after step {run.step} to {path}. {hint}"), bar:
        try:
            while run.step < steps and run.seconds < (seconds or float("inf")):
                progress = next(run)
                bar.set_postfix(step=progress.step, loss=f"{progress.loss:.3f}", refresh=False)
                bar.update((min(run.seconds, seconds) if seconds else run.step) - bar.n)
        finally:
            run.save(path, metadata)


@contextmanager
def _interrupt_says(text: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(text()) from None


# ---- output


def _draw_rows(path: Path, rows: Sequence[digits.Row]) -> None:
    """Two samples of each class from every row, in the same columns."""
    label = digits.labels(min(2 * digits.CLASSES, len(rows[-1].x)))
    order = label.argsort(stable=True)
    heads = [str(c) for c in label[order].tolist()]
    images = {f"{row.name}\n{row.calls} calls" if row.calls else row.name: row.x[order] for row in rows}
    title = "Real handwritten digits, and samples from one network and one seed"
    plots.save(plots.image_rows(images, heads=heads, title=title), path)


def _draw_frames(path: Path, frames: Sequence[Step]) -> None:
    times = [frame.t for frame in frames]
    states, denoised = (torch.stack([getattr(frame, name) for frame in frames]) for name in ("x", "denoised"))
    title = f"From noise to digit: {digits.SAMPLERS[0].name}, {digits.SAMPLERS[0].steps} steps"
    plots.save(plots.trajectory(times, states, denoised, title=title), path)


def _write_report(out: Path, report: Mapping[str, Any], rows: Sequence[digits.Row]) -> None:
    training, machine = report["training"], report["machine"]
    text = f"""# Handwritten digits

A class-conditional U-Net of {training["parameters"]} parameters, trained for {training["steps"]} steps in
{training["seconds"]:.0f} s ({machine["device"]}, {machine["threads"]} threads) on
{report["digits"]["train"]} real digits, and sampled from the same seed by four solvers.

{digits.table(rows)}

{digits.LEGEND}

{digits.verdict(rows)}

![samples](samples.png)

One network, one seed: the last two solvers follow the same probability-flow ODE and draw the same digits.

![trajectory](trajectory.png)
"""
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _write_samples(out: Path, x: Tensor) -> None:
    if out.suffix == ".npy":
        import numpy as np

        np.save(out, x.cpu().numpy())
        return
    if x.ndim != 4:
        raise ValueError(
            f"expected images (n, c, h, w) for a picture, found shape {tuple(x.shape)}; write an .npy file"
        )
    columns = min(16, len(x))
    plots.save(
        plots.image_rows({str(i): x[i : i + columns] for i in range(0, len(x), columns)}, columns=columns),
        out,
    )


# ---- what there is


def _shape(description: Mapping[str, Any], given: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = given or description["metadata"].get("shape")
    if not shape:
        raise ValueError(
            "expected the shape of a sample, which the checkpoint does not say: give it, as in --shape 3 8 8"
        )
    return tuple(shape)


def _condition(
    description: Mapping[str, Any], n: int, label: int | None, device: torch.device
) -> dict[str, Tensor]:
    classes = (description["network"]["config"] or {}).get("classes")
    if classes is None and label is None:
        return {}
    if classes is None or not (label is None or -1 <= label < classes):
        expected = (
            "no label, for a network without classes"
            if classes is None
            else f"a label from 0 to {classes - 1}, or -1 for none"
        )
        raise ValueError(f"expected {expected}; found {label}")
    return {
        "label": torch.arange(n, device=device) % classes
        if label is None
        else torch.full((n,), label, device=device)
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"expected a device of this machine, such as cpu, cuda or auto; found {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device


def _machine(device: torch.device) -> dict[str, Any]:
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return {
        "device": named,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


@contextmanager
def _best_threads() -> Iterator[None]:
    """As many threads as make small convolutions fastest, at most one a core, unless OMP_NUM_THREADS is set.

    One thread wins where other processes use the cores, since threads wait for the slowest of them.
    """
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ:
        counts = sorted({1, min(cores, 2), min(cores, 4), min(cores, 8)})
        torch.set_num_threads(min(counts, key=_convolution_seconds))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _convolution_seconds(threads: int) -> float:
    """Mean time of a convolution of the size that training has most of."""
    torch.set_num_threads(threads)
    x, weight = torch.ones(128, 24, 8, 8), torch.ones(24, 24, 3, 3)
    torch.conv2d(x, weight, padding=1)
    start = time.perf_counter()
    for _ in range(50):
        torch.conv2d(x, weight, padding=1)
    return (time.perf_counter() - start) / 50
