"""Batches of tensors or of a dataset, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate

Condition = dict[str, Tensor]


@runtime_checkable
class MapDataset(Protocol):
    """What torch calls a map-style dataset; items are x, (x, label) or (x, {name: condition})."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Data = Tensor | tuple[Tensor, Any] | MapDataset


class Batches:
    """Batches in a new random order every epoch, without end; the last one of an epoch is filled from the
    next epoch.

    Tensors are moved to `device` whole, the items of a dataset batch by batch. Raises ValueError or TypeError
    for data that is empty, not finite, not floating point, or whose conditions have another length; of a
    dataset, whose items may be made when they are asked for, the first and the last one are looked at.

    Attributes: conditions, their names.
    """

    def __init__(self, data: Data, size: int, device: torch.device, seed: int) -> None:
        self.size, self.device = size, device
        self.tensors: tuple[Tensor, Condition] | None = None
        if isinstance(data, Tensor | tuple):
            x, cond = _checked(*_split(data))
            self.tensors = x.to(device), {name: value.to(device) for name, value in cond.items()}
            self.length = len(x)
        elif isinstance(data, MapDataset) and not isinstance(data, Mapping) and len(data):
            self.dataset, self.length = data, len(data)
            cond = _checked_items(data)
        else:
            raise TypeError(
                f"data: expected x, (x, labels), or a dataset with a length above 0; found {type(data)}"
            )
        self.conditions = tuple(cond)
        self.generator = torch.Generator().manual_seed(seed)
        self.go_to(self.generator.get_state(), 0)

    def __len__(self) -> int:
        """The number of samples."""
        return self.length

    def go_to(self, before_epoch: Tensor, position: int) -> None:
        """To `position` samples into the epoch whose order is drawn from the state `before_epoch`."""
        self.before_epoch, self.position = before_epoch, position
        self.generator.set_state(before_epoch)
        self.order = torch.randperm(self.length, generator=self.generator)

    def next(self) -> tuple[Tensor, Condition]:
        """x (B, ...) and its conditions, each (B, ...)."""
        chosen = [self._take(self.size)]
        while (missing := self.size - sum(map(len, chosen))) > 0:
            self.go_to(self.generator.get_state(), 0)
            chosen.append(self._take(missing))
        return self._gather(torch.cat(chosen))

    def _take(self, n: int) -> Tensor:
        part = self.order[self.position : self.position + n]
        self.position += len(part)
        return part

    def _gather(self, index: Tensor) -> tuple[Tensor, Condition]:
        if self.tensors is not None:
            index = index.to(self.device, non_blocking=True)
            return self.tensors[0][index], {name: value[index] for name, value in self.tensors[1].items()}
        x, cond = _split(default_collate([self.dataset[i] for i in index.tolist()]))
        return x.to(self.device), {name: value.to(self.device) for name, value in cond.items()}


def _split(batch: Any) -> tuple[Tensor, Condition]:
    """x and its conditions; one that has no name is the label."""
    if isinstance(batch, Tensor):
        return batch, {}
    if len(batch) not in (1, 2):
        raise ValueError(f"data: expected x, (x, labels) or (x, {{name: values}}), found {len(batch)} parts")
    x, second = [*batch, {}][:2]
    cond = second if isinstance(second, Mapping) else {"label": second}
    return _tensor("data", x), {str(name): _tensor(name, value) for name, value in cond.items()}


def _tensor(name: Any, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor with one entry a sample, found {type(values).__name__}; give the "
            "parts of a nested condition names of their own"
        ) from error


def _checked_items(dataset: MapDataset) -> Condition:
    """The conditions of a batch of the first and the last item. Items that draw random numbers do not move
    the global generator.
    """
    with torch.random.fork_rng(devices=[]):
        first, last = dataset[0], dataset[len(dataset) - 1]
    expected = (
        "data: expected items x, (x, label) or (x, {name: condition}), x floating point and of one shape"
    )
    if isinstance(first, Mapping):
        raise TypeError(
            f"{expected}; found dicts of {sorted(map(str, first))}. Wrap the dataset in one whose items are, "
            'for example, (item["image"], item["label"])'
        )
    try:
        x, cond = _split(default_collate([first, last]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{expected}; found items that make no batch ({type(error).__name__}: {error}). Turn them into "
            "tensors of one shape; whole tensors are given as the tuple (x, labels)"
        ) from error
    return _checked(x, cond)[1]


def _checked(x: Tensor, cond: Condition) -> tuple[Tensor, Condition]:
    if not x.is_floating_point():
        raise TypeError(f"data: expected a floating dtype, scaled to about [-1, 1]; found {x.dtype}")
    if x.ndim < 2 or not len(x):
        raise ValueError(f"data: expected shape (N, ...) with N > 0, found {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"data: expected finite numbers, found {int((~x.isfinite()).sum())} NaN or infinite ones"
        )
    for name, value in cond.items():
        found = len(value) if value.ndim else "one number"
        if found != len(x):
            raise ValueError(f"{name}: expected {len(x)} entries, one for each sample, found {found}")
    return x, cond
