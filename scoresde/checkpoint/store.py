"""Saving and loading."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..denoiser import Denoiser
from .description import DENOISERS, described, rebuilding, rebuilt_network, rebuilt_prediction, rebuilt_sde
from .files import (
    VERSION,
    CheckpointError,
    FilePath,
    Tensors,
    read,
    read_description,
    reading,
    serialize,
    write,
)
from .tensors import (
    check_finite,
    check_fit,
    dtypes,
    group,
    grouped,
    load_strictly,
    network_tensors,
    plain,
    schedule_tensors,
)

Weights = Literal["ema", "model"]


class Training(NamedTuple):
    """What resuming needs beside the weights: tensors, and values that JSON can hold."""

    tensors: Tensors
    values: dict[str, Any]


def save(
    path: FilePath,
    model: Denoiser,
    *,
    ema: Denoiser | None = None,
    training: Training | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `model`, and if given its average `ema` and the state of its training, to one file, atomically.

    dtype     store the network's parameters in this dtype, for a smaller file; they are converted back at
              loading, each to the dtype it had. Buffers and schedules stay exact
    metadata  anything JSON can hold; `describe(path)["metadata"]` gives it back

    Raises CheckpointError if a weight is not finite, if something has no description, or if the file cannot
    be written; an existing file is then unchanged.
    """
    for one in (model, model if ema is None else ema):
        if not isinstance(one, Denoiser):
            raise CheckpointError(
                f"expected a Denoiser to save, found {type(one).__name__}; save the Denoiser that it is made "
                "of, or the parameters of another module by safetensors"
            )
    if not (dtype is None or dtype.is_floating_point):
        raise CheckpointError(f"expected a floating dtype to store weights in, found {dtype}")
    if dtype is not None and training is not None:
        raise CheckpointError(
            f"expected exact weights in a file to resume from, found dtype={dtype}; save the small file by "
            "a second call"
        )
    description = {
        "version": VERSION,
        **described(model),
        "dtypes": _dtypes(model, ema),
        "ema": ema is not None,
        "training": None if training is None else training.values,
        "metadata": dict(metadata or {}),
    }
    tensors = grouped("model", network_tensors(model, dtype))
    tensors |= grouped("ema", {} if ema is None else network_tensors(ema, dtype))
    tensors |= grouped("schedule", schedule_tensors(model.sde))
    check_finite(path, tensors)
    tensors |= grouped("training", {} if training is None else training.tensors)
    write(Path(os.path.realpath(path)), serialize(tensors, description))


def _dtypes(model: Denoiser, ema: Denoiser | None) -> dict[str, str]:
    """Tensors that are not in the model's dtype, such as norms kept in float32, and the dtypes they have."""
    average = {} if ema is None else dtypes(ema, model.dtype)
    return grouped("model", dtypes(model, model.dtype)) | grouped("ema", average)


def load(
    path: FilePath,
    *,
    weights: Weights | None = None,
    network: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> Denoiser:
    """The denoiser in the file, in evaluation mode: its EMA weights if it has them, or the `weights` asked
    for.

    `network` is needed for a network that is not one of `scoresde.networks`; the weights are loaded into it,
    strictly.

    Raises CheckpointError for a missing, truncated or changed file, for one that is no checkpoint, and where
    names, shapes or values do not fit.
    """
    description, tensors = read(path)
    kind = weights or ("ema" if description["ema"] else "model")
    if not group(tensors, kind):
        raise CheckpointError(
            f"{path}: expected {kind} weights, found none; use weights='model' or save(..., ema=...)"
        )
    check_finite(path, {key: value for key, value in tensors.items() if not key.startswith("training.")})
    with rebuilding(path):
        own = group(description["dtypes"] or {}, kind)
        if network is None:
            network = rebuilt_network(path, description, group(tensors, kind), own)
        sde = rebuilt_sde(path, description["sde"], group(tensors, "schedule"))
        predicts = rebuilt_prediction(description["predicts"])
        make = DENOISERS[description["denoiser"]]
        model = make(network, sde, predicts, time_input=description["time_input"])
    load_strictly(path, plain(network), group(tensors, kind))
    if isinstance(getattr(sde, "schedule", None), nn.Module):
        sde.schedule.to(device)  # pyright: ignore[reportAttributeAccessIssue]
    return model.to(device).eval()


def describe(path: FilePath) -> dict[str, Any]:
    """The description in the file: denoiser, network, sde, predicts, time_input, dtype, dtypes (of tensors
    that are in another one), ema, training, metadata. Raises like `load`.
    """
    with reading(path) as opened:
        return read_description(path, opened)


def restore(path: FilePath, model: Denoiser, ema: Denoiser) -> Training:
    """Load a file with training state into `model` and `ema`, all or nothing, and return that state. Raises
    like `load`, and if the model in the file is another.
    """
    description, tensors = read(path)
    given = json.loads(json.dumps(described(model)))
    if description["dtypes"] is not None:
        given["dtypes"] = _dtypes(model, ema)
    for key, expected in given.items():
        if description[key] != expected:
            wanted, found = reprlib.repr(expected), reprlib.repr(description[key])
            raise CheckpointError(
                f"{path}: expected {key} {wanted}, as in the model given; found {found}. "
                "Build the model that was saved"
            )
    if description["training"] is None or not description["ema"]:
        raise CheckpointError(
            f"{path}: expected the state of a training run, found weights only; load them with "
            "checkpoint.load and start a new run"
        )
    check_finite(path, tensors)
    check_fit(path, plain(model.network).state_dict(), group(tensors, "model"))
    load_strictly(path, plain(ema.network), group(tensors, "ema"))
    load_strictly(path, plain(model.network), group(tensors, "model"))
    for sde in (model.sde, ema.sde):
        if isinstance(schedule := getattr(sde, "schedule", None), nn.Module):
            load_strictly(path, schedule, group(tensors, "schedule"))
    return Training(group(tensors, "training"), description["training"])
