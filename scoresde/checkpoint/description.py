"""From a denoiser to a description that JSON can hold, and back: names from fixed lists, and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import networks
from ..denoiser import PREDICTIONS, Denoiser, Karras, Prediction
from ..schedules import Cosine, Learned, Linear, Schedule, Sigmoid, Tabulated
from ..sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE
from ..variance import LearnedVariance
from .files import CheckpointError, FilePath, Tensors
from .tensors import check_fit, load_strictly, plain

DENOISERS: dict[str, type[Denoiser]] = {c.__name__: c for c in (Denoiser, LearnedVariance)}
SDES: dict[str, type[LinearSDE]] = {c.__name__: c for c in (VPSDE, SubVPSDE, VESDE, EDM, Rectified)}
SCHEDULES: dict[str, type] = {c.__name__: c for c in (Linear, Cosine, Sigmoid, Tabulated, Learned)}


def described(model: Denoiser) -> dict[str, Any]:
    network = plain(model.network)
    name = type(network).__name__
    ours = name in networks.__all__ and type(network) is getattr(networks, name)
    return {
        "denoiser": "LearnedVariance" if isinstance(model, LearnedVariance) else "Denoiser",
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
            "log_snr_max": float(schedule.log_snr_max),
            "log_snr_min": float(schedule.log_snr_min),
            "hidden": len(schedule.center),
            "learn_ends": isinstance(schedule.log_snr_max, nn.Parameter),
        }
    return {"class": name, **_fields(schedule)}


def _fields(instance: Any) -> dict[str, Any]:
    """The arguments of a dataclass."""
    return {f.name: _plain(getattr(instance, f.name)) for f in dataclasses.fields(instance) if f.init}


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as the float that it stands for, which JSON can hold; all else as it
    is."""
    return float(value) if hasattr(value, "__float__") and not isinstance(value, int | float) else value


def _describe_prediction(predicts: Prediction) -> dict[str, Any]:
    if predicts.name != "Karras" and PREDICTIONS.get(predicts.name) != predicts:
        raise CheckpointError(
            f"expected a prediction from {sorted(PREDICTIONS)} or Karras(sigma_data), found {predicts}"
        )
    return {"name": predicts.name, **{key: _plain(value) for key, value in predicts.config}}


@contextmanager
def rebuilding(path: FilePath) -> Iterator[None]:
    """Constructors' complaints about a description, as errors of the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: the description does not rebuild a model: {type(error).__name__}: {error}"
        ) from error


def rebuilt_network(
    path: FilePath, description: dict[str, Any], tensors: Tensors, dtypes: dict[str, str]
) -> nn.Module:
    """The network, in the dtype of the description but for the tensors named in `dtypes`."""
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
        check_fit(path, make(**config).state_dict(), tensors)
    with torch.random.fork_rng(devices=[]):
        return _retyped(make(**config).to(dtype), dtypes)


def _retyped(network: nn.Module, dtypes: dict[str, str]) -> nn.Module:
    """The network with these tensors, parameters or buffers, in dtypes of their own."""
    tensors = network.state_dict(keep_vars=True)
    for key, name in dtypes.items():
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"expected a floating dtype for {key}, found {name!r}")
        tensors[key].data = tensors[key].data.to(dtype)
    return network


def _integers(config: Any) -> Iterator[int]:
    if isinstance(config, dict):
        config = list(config.values())
    if isinstance(config, list):
        for entry in config:
            yield from _integers(entry)
    elif isinstance(config, int):
        yield config


def rebuilt_sde(path: FilePath, description: dict[str, Any], tensors: Tensors) -> LinearSDE:
    options = dict(description)
    make = SDES[options.pop("class")]
    if "schedule" in options:
        options["schedule"] = _rebuilt_schedule(path, options["schedule"], tensors)
    return make(**options)


def _rebuilt_schedule(path: FilePath, description: dict[str, Any], tensors: Tensors) -> Schedule:
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    make = SCHEDULES[options.pop("class")]
    if make is Learned and not 1 <= options["hidden"] <= sum(tensor.numel() for tensor in tensors.values()):
        raise CheckpointError(
            f"{path}: expected the weights of the schedule {description}, found {sorted(tensors)}"
        )
    schedule = make(**options)
    if isinstance(schedule, Learned):
        load_strictly(path, schedule, tensors)
    return schedule


def rebuilt_prediction(description: dict[str, Any]) -> Prediction:
    options = dict(description)
    name = options.pop("name")
    return Karras(**options) if name == "Karras" else PREDICTIONS[name]
