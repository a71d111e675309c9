"""Tensors by name: which a module has, and whether those in a file fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..sde import LinearSDE
from .files import CheckpointError, FilePath, Tensors

T = TypeVar("T")


def plain(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's wrapper."""
    return getattr(network, "_orig_mod", network)


def network_tensors(model: Denoiser, dtype: torch.dtype | None) -> Tensors:
    network = plain(model.network)
    small = set() if dtype is None else {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return {key: value.to(dtype) if key in small else value for key, value in network.state_dict().items()}


def dtypes(model: Denoiser, usual: torch.dtype) -> dict[str, str]:
    """Names of the dtypes of those floating tensors of the network that are not in the `usual` one."""
    return {
        key: str(value.dtype).removeprefix("torch.")
        for key, value in network_tensors(model, None).items()
        if value.is_floating_point() and value.dtype != usual
    }


def schedule_tensors(sde: LinearSDE) -> Tensors:
    schedule = getattr(sde, "schedule", None)
    return dict(schedule.state_dict()) if isinstance(schedule, nn.Module) else {}


def grouped(name: str, tensors: Mapping[str, T]) -> dict[str, T]:
    return {f"{name}.{key}": value for key, value in tensors.items()}


def group(tensors: Mapping[str, T], name: str) -> dict[str, T]:
    """The entries called `name.*`, without that prefix."""
    return {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }


def check_finite(path: FilePath, tensors: Tensors) -> None:
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


def check_fit(path: FilePath, expected: Mapping[str, Tensor], found: Tensors) -> None:
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


def load_strictly(path: FilePath, module: nn.Module, tensors: Tensors) -> None:
    check_fit(path, module.state_dict(), tensors)
    module.load_state_dict(tensors)


def _some(names: list[str], most: int = 5) -> str:
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    ) or "none"
