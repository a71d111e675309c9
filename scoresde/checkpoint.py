"""Checkpoints: one safetensors file that holds weights and a JSON description which rebuilds the denoiser.

    groups of tensors   model.*, ema.*, schedule.* (of a learned schedule), training.* (optimiser, generators: what resuming needs)
    metadata            "scoresde": the description as JSON; "sha256": of the whole file, taken with 64 zeros
                        in its own place

Loading reads numbers and names, never code. A file is written beside its final place and moved there when it
is complete and on the disk, so a crash leaves the previous one. Any changed byte is found at loading. Every
fault is a `CheckpointError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import networks
from .denoiser import PREDICTIONS, Denoiser, Karras, Prediction
from .schedules import Cosine, Learned, Linear, Schedule, Sigmoid, Tabulated
from .sde import EDM, LinearSDE, Rectified, SubVPSDE, VESDE, VPSDE

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None

FilePath = str | os.PathLike[str]
Weights = Literal["ema", "model"]
Tensors = dict[str, Tensor]

VERSION = 1
UNSIGNED = "0" * 64
SDES: dict[str, type[LinearSDE]] = {c.__name__: c for c in (VPSDE, SubVPSDE, VESDE, EDM, Rectified)}
SCHEDULES: dict[str, type] = {c.__name__: c for c in (Linear, Cosine, Sigmoid, Tabulated, Learned)}


class CheckpointError(ValueError):
    """A checkpoint could not be written, or a file is not the checkpoint that was expected."""


class Training(NamedTuple):
    """What resuming needs beside the weights: tensors, and values that JSON can hold."""

    tensors: Tensors
    values: dict[str, Any]


# ---- saving and loading


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
              loading. Buffers and schedules stay exact
    metadata  anything JSON can hold; `describe(path)["metadata"]` gives it back

    Raises CheckpointError if a weight is not finite, if something has no description, or if the file cannot
    be written; an existing file is then unchanged.
    """
    if dtype is not None and training is not None:
        raise CheckpointError(
            f"expected exact weights in a file to resume from, found dtype={dtype}; save the small file by "
            "a second call"
        )
    description = {
        "version": VERSION,
        **_describe(model),
        "ema": ema is not None,
        "training": None if training is None else training.values,
        "metadata": dict(metadata or {}),
    }
    tensors = _grouped("model", _network_tensors(model, dtype))
    tensors |= _grouped("ema", {} if ema is None else _network_tensors(ema, dtype))
    tensors |= _grouped("schedule", _schedule_tensors(model.sde))
    _check_finite(path, tensors)
    tensors |= _grouped("training", {} if training is None else training.tensors)
    _write(Path(os.path.realpath(path)), _serialize(tensors, description))


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
    description, tensors = _read(path)
    group = weights or ("ema" if description["ema"] else "model")
    if not _group(tensors, group):
        raise CheckpointError(
            f"{path}: expected {group} weights, found none; use weights='model' or save(..., ema=...)"
        )
    _check_finite(path, {key: value for key, value in tensors.items() if not key.startswith("training.")})
    with _rebuilding(path):
        network = _rebuilt_network(path, description, _group(tensors, group)) if network is None else network
        sde = _rebuilt_sde(path, description["sde"], _group(tensors, "schedule"))
        predicts = _rebuilt_prediction(description["predicts"])
        model = Denoiser(network, sde, predicts, time_input=description["time_input"])
    _load_strictly(path, _plain(network), _group(tensors, group))
    if isinstance(getattr(sde, "schedule", None), nn.Module):
        sde.schedule.to(device)  # pyright: ignore[reportAttributeAccessIssue]
    return model.to(device).eval()


def describe(path: FilePath) -> dict[str, Any]:
    """The description in the file: network, sde, predicts, time_input, dtype, ema, training, metadata. Raises
    like `load`.
    """
    with _reading(path) as opened:
        return _description(path, opened)


def restore(path: FilePath, model: Denoiser, ema: Denoiser) -> Training:
    """Load a file with training state into `model` and `ema`, all or nothing, and return that state. Raises
    like `load`, and if the model in the file is another.
    """
    description, tensors = _read(path)
    for key, expected in json.loads(json.dumps(_describe(model))).items():
        if description[key] != expected:
            raise CheckpointError(
                f"{path}: expected {key} {expected}, as in the model given; found {description[key]}. Build "
                "the model that was saved"
            )
    if description["training"] is None or not description["ema"]:
        raise CheckpointError(
            f"{path}: expected the state of a training run, found weights only; load them with "
            "checkpoint.load and start a new run"
        )
    _check_finite(path, tensors)
    _check_fit(path, _plain(model.network).state_dict(), _group(tensors, "model"))
    _load_strictly(path, _plain(ema.network), _group(tensors, "ema"))
    _load_strictly(path, _plain(model.network), _group(tensors, "model"))
    for sde in (model.sde, ema.sde):
        if isinstance(schedule := getattr(sde, "schedule", None), nn.Module):
            _load_strictly(path, schedule, _group(tensors, "schedule"))
    return Training(_group(tensors, "training"), description["training"])


# ---- descriptions


def _describe(model: Denoiser) -> dict[str, Any]:
    network = _plain(model.network)
    name = type(network).__name__
    ours = name in networks.__all__ and type(network) is getattr(networks, name)
    return {
        "network": {"class": name, "config": network.config if ours else None},
        "sde": _describe_sde(model.sde),
        "predicts": _describe_prediction(model.predicts),
        "time_input": model.time_input,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _describe_sde(sde: LinearSDE) -> dict[str, Any]:
    name = type(sde).__name__
    if SDES.get(name) is not type(sde):
        raise CheckpointError(
            f"expected one of the SDEs {sorted(SDES)}, found {type(sde)}: a file could not rebuild it"
        )
    if isinstance(sde, VPSDE):
        return {"class": name, "schedule": _describe_schedule(sde.schedule)}
    return {"class": name, **_fields(sde)}


def _describe_schedule(schedule: Schedule) -> dict[str, Any]:
    name = type(schedule).__name__
    if SCHEDULES.get(name) is not type(schedule):
        raise CheckpointError(
            f"expected one of the schedules {sorted(SCHEDULES)}, found {type(schedule)}: save it as a "
            "Tabulated one"
        )
    if isinstance(schedule, Learned):
        return {
            "class": name,
            "log_snr_max": schedule.log_snr_max,
            "log_snr_min": schedule.log_snr_min,
            "hidden": len(schedule.center),
        }
    return {"class": name, **_fields(schedule)}


def _fields(instance: Any) -> dict[str, Any]:
    """The arguments of a dataclass."""
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}


def _describe_prediction(predicts: Prediction) -> dict[str, Any]:
    if predicts.name != "Karras" and PREDICTIONS.get(predicts.name) != predicts:
        raise CheckpointError(
            f"expected a prediction from {sorted(PREDICTIONS)} or Karras(sigma_data), found {predicts}"
        )
    return {"name": predicts.name, **dict(predicts.config)}


@contextmanager
def _rebuilding(path: FilePath) -> Iterator[None]:
    """Constructors' complaints about a description, as errors of the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: the description does not rebuild a model: {type(error).__name__}: {error}"
        ) from error


def _rebuilt_network(path: FilePath, description: dict[str, Any], tensors: Tensors) -> nn.Module:
    name, config = description["network"]["class"], description["network"]["config"]
    if name not in networks.__all__ or config is None:
        raise CheckpointError(
            f"{path}: expected one of scoresde.networks {networks.__all__}, found {name!r}; pass load(..., "
            "network=...)"
        )
    elements = sum(tensor.numel() for tensor in tensors.values())
    if any(abs(size) > elements for size in _integers(config)):
        raise CheckpointError(
            f"{path}: expected a network of {elements} elements, as stored; found the configuration {config}"
        )
    make = getattr(networks, name)
    dtype = getattr(torch, description["dtype"])
    with torch.device("meta"):  # shapes first: no memory is taken for a configuration that does not fit
        _check_fit(path, make(**config).state_dict(), tensors)
    with torch.random.fork_rng(devices=[]):
        return make(**config).to(dtype)


def _integers(config: Any) -> Iterator[int]:
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, list):
        for entry in config:
            yield from _integers(entry)
    elif isinstance(config, int):
        yield config


def _rebuilt_sde(path: FilePath, description: dict[str, Any], tensors: Tensors) -> LinearSDE:
    options = dict(description)
    make = SDES[options.pop("class")]
    if "schedule" in options:
        options["schedule"] = _rebuilt_schedule(path, options["schedule"], tensors)
    return make(**options)


def _rebuilt_schedule(path: FilePath, description: dict[str, Any], tensors: Tensors) -> Schedule:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in description.items()}
    make = SCHEDULES[options.pop("class")]
    if make is Learned and not 1 <= options["hidden"] <= sum(tensor.numel() for tensor in tensors.values()):
        raise CheckpointError(
            f"{path}: expected the weights of the schedule {description}, found {sorted(tensors)}"
        )
    schedule = make(**options)
    if isinstance(schedule, Learned):
        _load_strictly(path, schedule, tensors)
    return schedule


def _rebuilt_prediction(description: dict[str, Any]) -> Prediction:
    options = dict(description)
    name = options.pop("name")
    return Karras(**options) if name == "Karras" else PREDICTIONS[name]


# ---- tensors


def _plain(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's wrapper."""
    return getattr(network, "_orig_mod", network)


def _network_tensors(model: Denoiser, dtype: torch.dtype | None) -> Tensors:
    network = _plain(model.network)
    small = set() if dtype is None else {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return {key: value.to(dtype) if key in small else value for key, value in network.state_dict().items()}


def _schedule_tensors(sde: LinearSDE) -> Tensors:
    schedule = getattr(sde, "schedule", None)
    return dict(schedule.state_dict()) if isinstance(schedule, nn.Module) else {}


def _grouped(group: str, tensors: Tensors) -> Tensors:
    return {f"{group}.{key}": value for key, value in tensors.items()}


def _group(tensors: Tensors, group: str) -> Tensors:
    return {
        key.removeprefix(f"{group}."): value for key, value in tensors.items() if key.startswith(f"{group}.")
    }


def _check_finite(path: FilePath, tensors: Tensors) -> None:
    bad = [
        key
        for key, value in tensors.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if bad:
        raise CheckpointError(
            f"{path}: expected finite weights, found NaN or infinity in {_some(bad)}; use an earlier "
            "checkpoint, or another dtype if one was asked for"
        )


def _check_fit(path: FilePath, expected: Mapping[str, Tensor], found: Tensors) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: expected the {len(expected)} tensors of the network; missing {_some(missing)}, not "
            f"expected {_some(unexpected)}. Load it into the network that was saved"
        )
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            raise CheckpointError(
                f"{path}: expected {key} of shape {tuple(tensor.shape)}, found {tuple(found[key].shape)}. "
                "Load it into the network that was saved"
            )


def _load_strictly(path: FilePath, module: nn.Module, tensors: Tensors) -> None:
    _check_fit(path, module.state_dict(), tensors)
    module.load_state_dict(tensors)


def _some(names: list[str], most: int = 5) -> str:
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    ) or "none"


# ---- bytes


def _serialize(tensors: Tensors, description: dict[str, Any]) -> bytes:
    # Clones: safetensors takes neither tied nor strided tensors.
    owned = {
        k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors.items()
    }
    try:
        text = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"expected metadata that JSON can hold, found {description}: {error}"
        ) from error
    return safetensors.torch.save(owned, {"scoresde": text, "sha256": UNSIGNED})


def _write(path: Path, content: bytes) -> None:
    header = 8 + int.from_bytes(content[:8], "little")
    signature = hashlib.sha256(content).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            file.write(content[:header].replace(f'"{UNSIGNED}"'.encode(), f'"{signature}"'.encode()))
            file.write(memoryview(content)[header:])
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror or error}); a file that was there before is "
            "unchanged. Free some space or choose another place"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when it is complete and on the disk."""
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if fcntl is not None:
                fcntl.flock(
                    file, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # held for as long as this process lives and writes
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _sweep(path: Path) -> None:
    """Remove what a killed process left: temporary files of `path` that nobody holds."""
    pattern = re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.tmp"
    for stale in path.parent.iterdir():
        if re.fullmatch(pattern, stale.name):
            with suppress(OSError), open(stale, "rb") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    stale.unlink()
            if fcntl is None:
                with suppress(OSError):
                    stale.unlink()


def _read(path: FilePath) -> tuple[dict[str, Any], Tensors]:
    with _reading(path) as opened:
        return _description(path, opened), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


@contextmanager
def _reading(path: FilePath) -> Iterator[Any]:
    """A file whose bytes are those that were written."""
    try:
        with open(path, "rb") as file:
            _check_signature(path, file)
        with safetensors.safe_open(path, framework="pt") as opened:
            yield opened
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint file, found none that can be read ({error.strerror or error})"
        ) from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint, found a damaged file ({error}); use another copy"
        ) from error


def _description(path: FilePath, opened: Any) -> dict[str, Any]:
    description = json.loads(opened.metadata()["scoresde"])
    version = description.get("version") if isinstance(description, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{path}: expected a checkpoint of version {VERSION}, found version {version}; use a release of "
            "scoresde that reads it"
        )
    missing = {
        "network",
        "sde",
        "predicts",
        "time_input",
        "dtype",
        "ema",
        "training",
        "metadata",
    } - description.keys()
    if missing:
        raise CheckpointError(f"{path}: expected a complete description, found none of {sorted(missing)}")
    return description


def _check_signature(path: FilePath, file: BinaryIO) -> None:
    length = os.fstat(file.fileno()).st_size
    header = 8 + int.from_bytes(file.read(8), "little")
    if not 8 < header <= length:
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {length} bytes that are none or a part of one; use "
            "another copy"
        )
    file.seek(0)
    head = file.read(header)
    signatures = re.findall(rb'"sha256":"([0-9a-f]{64})"', head)
    if len(signatures) != 1 or b'"scoresde":' not in head:
        raise CheckpointError(
            f"{path}: expected a checkpoint of this library, found another safetensors file or a damaged "
            "one; write it with checkpoint.save"
        )
    digest = hashlib.sha256(head.replace(signatures[0], UNSIGNED.encode()))
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest().encode() != signatures[0]:
        raise CheckpointError(
            f"{path}: expected SHA-256 {signatures[0].decode()}, found {digest.hexdigest()}: the file is "
            "truncated or was changed; use another copy"
        )
