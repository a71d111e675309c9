"""What a file to resume from holds beside the weights, read and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from .surroundings import FilePath

ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter that has had a gradient."""

ParameterState = dict[str, Tensor]


class Resumed(NamedTuple):
    """The state of a run, made of the entries of a file."""

    step: int
    seconds: float
    tally: dict[str, Tensor]
    clock: torch.Generator
    noise: torch.Generator
    inside: dict[str, Tensor]
    order: Tensor
    position: int
    optimizer: dict[Tensor, ParameterState]
    average: list[Tensor | None]
    scaler: dict[str, Any] | None


@contextmanager
def reading_state(path: FilePath, device: torch.device) -> Iterator[None]:
    """Complaints about entries that are missing or of another kind, as errors of the file."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the state of a run of this model on {device.type}; found another "
            f"({type(error).__name__}: {error}). Resume on the kind of device where it was saved, or start a "
            "new run from checkpoint.load"
        ) from error


def generator(device: torch.device | str, state: Tensor) -> torch.Generator:
    """A new one in that state. Raises RuntimeError for the state of another device's generator."""
    made = torch.Generator(device)
    made.set_state(state)
    return made


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by the names of the parameters; none for those that never had a gradient."""
    return {
        f"optimizer.{_plain(name)}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def optimizer_state(
    path: FilePath, model: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[Tensor, ParameterState]:
    """The inverse of `optimizer_tensors`, for the parameters that are trained now.

    AdamW begins the state of a parameter at its first gradient, so that one which the file does not have (a
    frozen one, or one that `forward` did not use) is begun as it was in the run that was saved.
    """
    given = {_plain(key): value for key, value in tensors.items() if key.startswith("optimizer.")}
    named = {f"optimizer.{_plain(name)}": p for name, p in model.named_parameters()}
    if unknown := sorted(key for key in given if key.rpartition(".")[0] not in named):
        raise CheckpointError(
            f"{path}: expected the optimiser's state of parameters of the model; found {unknown[0]}. Build "
            "the model that was saved"
        )
    state: dict[Tensor, ParameterState] = {}
    for name, p in named.items():
        if p.requires_grad and any(f"{name}.{key}" in given for key in ADAM):
            state[p] = {key: _placed(f"{name}.{key}", given[f"{name}.{key}"], p) for key in ADAM[1:]}
            state[p]["step"] = given[f"{name}.step"].reshape(()).to(p.device)
    return state


def average_tensors(ema: nn.Module, average: Sequence[Tensor]) -> dict[str, Tensor]:
    """The accumulators that are wider than the average's parameters; the others are its weights."""
    return {
        f"average.{_plain(name)}": wide
        for (name, p), wide in zip(ema.named_parameters(), average, strict=True)
        if wide.dtype != p.dtype
    }


def average_state(ema: nn.Module, tensors: Mapping[str, Tensor]) -> list[Tensor | None]:
    """The inverse of `average_tensors`; None where the file has no accumulator, as files written before
    there were any.
    """
    given = {_plain(key): value for key, value in tensors.items() if key.startswith("average.")}
    named = [(f"average.{_plain(name)}", p) for name, p in ema.named_parameters()]
    return [
        _placed(name, given[name].float(), p) if narrow(p) and name in given else None for name, p in named
    ]


def narrow(p: Tensor) -> bool:
    """Whether an average in its dtype would lose small changes."""
    return p.dtype.itemsize < 4


def _plain(name: str) -> str:
    """The name without torch.compile's wrappers, so that a run may go on compiled or not."""
    return name.replace("_orig_mod.", "")


def _placed(name: str, value: Tensor, p: Tensor) -> Tensor:
    """A tensor of a parameter's size where and as the run makes it: in the layout of the parameter."""
    if value.shape != p.shape:
        raise RuntimeError(f"{name} has the shape {tuple(value.shape)}, its parameter {tuple(p.shape)}")
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)
