"""The public function."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import losses
from ..denoiser import DATA, TIME_INPUTS, Denoiser, view
from ..schedules import wide
from .data import Data
from .run import Classification, Objective, Run, Settings
from .surroundings import FilePath, Output, accelerator, check_savable


def fit(
    model: Denoiser,
    data: Data,
    *,
    steps: int,
    batch_size: int = 128,
    loss: losses.Loss = losses.denoising,
    weight: losses.Weighting = losses.simple,
    times: losses.Times = losses.uniform,
    draw: losses.Draw = losses.stratified,
    precision: Literal["no", "bf16", "fp16"] = "no",
    path: FilePath | None = None,
    save_every: int | None = None,
    resume: FilePath | None = None,
    log: FilePath | None = None,
    progress: bool = False,
    **settings: Any,
) -> Run:
    """Train `model`, where it is, by denoising score matching: an iterator of `Progress` that has the
    average, `.ema`.

    data        x (N, ...), or (x, labels) with labels (N,), or (x, {name: tensor}) for other conditions, or a
                map-style dataset of such items. Tensors are moved to the model's device whole. Every epoch is
                a new random order
    steps, batch_size      in all, over all devices
    loss, weight, times, draw  see `losses`; with `loss=losses.hybrid` and `times=losses.chain` a
                `LearnedVariance` is trained
    precision   "bf16" or, on a GPU, "fp16": mixed precision, by accelerate
    path        where to save: every `save_every` steps, at the end, at `close()`, and on Ctrl-C, which ends
                the step first and is then raised as KeyboardInterrupt. `checkpoint.load(path)` gives the
                averaged denoiser
    resume      a file to go on from; seed, batch size and number of samples must be those of its run
    log         a file of JSON lines, one for each record
    progress    show a bar (tqdm)

    settings    the other fields of `Settings`: lr, warmup, cosine, betas, weight_decay, clip, ema_decay,
                label_dropout, null_label, every, patience, seed

    A step whose gradient is not finite changes no weight; `patience` of them in a row end the run with
    FloatingPointError. Started by `accelerate launch` or torchrun on several devices, each takes its share of
    every batch, and the run is the same up to rounding (and dropout).

    Raises ValueError or TypeError for options or data that do not fit, CheckpointError for a file that does
    not and for a model or path that cannot be saved, and ImportError where accelerate is needed and missing.
    """
    if not isinstance(model, Denoiser):
        raise TypeError(f"model: expected a Denoiser, as in Denoiser(network, sde); found {type(model)}")
    for name, given in {"loss": loss, "weight": weight, "times": times, "draw": draw}.items():
        if not callable(given):
            raise TypeError(f"{name}: expected a function such as those of losses, found {given!r}")
    _warn_of_t_max(model)
    chosen = Settings(steps, batch_size, **settings)
    output = Output(path, save_every, log, progress)
    if path is not None:
        check_savable(path, model)
    parts = Objective(model, loss, weight), times, draw
    run = Run(model, data, chosen, parts, accelerator(model, model.device, precision), output)
    if resume is not None:
        run.restore(resume)
    output.begin(run, resume)
    return run


@torch.no_grad()
def _warn_of_t_max(model: Denoiser) -> None:
    """Say before a network is trained that the first call of `sample` will fail."""
    sde, t = model.sde, wide(model.sde.t_max)
    start = f"expected a model that can be sampled from t_max = {sde.t_max} of {sde}, found"
    if not all(bool(v.isfinite()) for v in view(DATA, model.predicts, sde.alpha(t), sde.sigma(t))):
        why = f"predicts={model.predicts.name!r}, which does not determine the data there; take 'flow'"
        warnings.warn(f"{start} {why}", stacklevel=3)
    if not bool(TIME_INPUTS[model.time_input](sde, t).isfinite()):
        why = f"time_input={model.time_input!r}, which is infinite there; take 't'"
        warnings.warn(f"{start} {why}", stacklevel=3)


def fit_classifier(
    classifier: losses.Classifies,
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    batch_size: int = 128,
    times: losses.Times = losses.uniform,
    draw: losses.Draw = losses.stratified,
    precision: Literal["no", "bf16", "fp16"] = "no",
    log: FilePath | None = None,
    progress: bool = False,
    **settings: Any,
) -> Run:
    """Train a classifier of noisy data, such as `guidance.Classifier`, by cross-entropy at the times of its
    SDE: an iterator of `Progress` that has the average, `.ema`, like `fit`.

    data is (x (N, ...), labels (N,)), or a dataset of such items. Arguments as for `fit`; classifiers have no
    checkpoints, and no labels are dropped.
    """
    if not isinstance(classifier, nn.Module) or not hasattr(classifier, "sde"):
        raise TypeError(
            "classifier: expected a module with an sde, as in guidance.Classifier(network, sde); found "
            f"{type(classifier)}"
        )
    chosen = Settings(steps, batch_size, **settings)
    if chosen.label_dropout:
        raise ValueError(f"label_dropout: expected 0 for a classifier, found {chosen.label_dropout}")
    device = next((p.device for p in classifier.parameters()), torch.device("cpu"))
    parts = Classification(classifier), times, draw
    run = Run(
        classifier,
        data,
        chosen,
        parts,
        accelerator(classifier, device, precision),
        Output(None, None, log, progress),
    )
    if "label" not in run.data.conditions:
        found = list(run.data.conditions) or "nothing"
        raise ValueError(
            f"data: expected (x, labels) for a classifier, found x with {found}; give "
            "the labels as the second part"
        )
    run.output.begin(run)
    return run
