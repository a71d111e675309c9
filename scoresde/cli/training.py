"""`scoresde quickstart` and `scoresde train`: on real digits."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from .. import digits, plots
from ..tableau import Step
from ..train import Run
from ..train.surroundings import check_savable
from .common import device_named, interrupt_says, machine


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
    where = device_named(device)
    data = digits.load()
    path = out / "checkpoint.safetensors"
    hint = f"Go on with: scoresde quickstart --out {out} --resume"
    if resume and not path.exists():
        raise ValueError(f"expected a checkpoint to resume from, found no {path}; leave out --resume")
    run = digits.training(
        digits.denoiser(seed).to(where), data.train, steps=steps, seed=seed, resume=path if resume else None
    )
    _train(run, path, seconds, hint)
    with interrupt_says(lambda: f"The model is in {path}. {hint}"):
        rows, frames = digits.compare(run.ema, data, n, seed, progress=sys.stderr.isatty())
    report = {
        "digits": {part: len(images.x) for part, images in data._asdict().items()},
        "training": {
            "seconds": round(run.seconds, 1),
            "steps": run.step,
            "parameters": sum(p.numel() for p in run.model.parameters()),
        },
        "machine": machine(where),
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
    model = digits.denoiser(seed).to(device_named(device))
    run = digits.training(model, digits.load().train, steps=steps, seed=seed, resume=out if resume else None)
    _train(run, out, seconds, f"Go on with: scoresde train --out {out} --resume")
    print(f"{run.step} steps in {run.seconds:.0f} s, written to {out}\nSample with: scoresde sample {out}")


def _train(run: Run, path: Path, seconds: float | None, hint: str) -> None:
    """Train until the run's steps or `seconds` are over, with a bar; save, also on Ctrl-C, with the hint."""
    from tqdm.auto import tqdm

    if seconds is not None and not seconds > 0:
        raise ValueError(f"expected a positive number of seconds, found {seconds}")
    check_savable(path, run.model)
    steps, metadata = run.settings.steps, {"data": "digits", "shape": list(digits.SHAPE)}
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=seconds or steps,
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}" if seconds else None,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
    )
    with interrupt_says(lambda: f"Saved after step {run.step} to {path}. {hint}"), bar:
        try:
            while run.step < steps and run.seconds < (seconds or float("inf")):
                progress = next(run)
                bar.set_postfix(step=progress.step, loss=f"{progress.loss:.3f}", refresh=False)
                bar.update((min(run.seconds, seconds) if seconds else run.step) - bar.n)
        finally:
            run.save(path, metadata)


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
