"""What a function costs, counted and not timed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Work(TorchDispatchMode):
    """Counts the operations on tensors, and keeps the sizes, in bytes, of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.made += [t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor) and storage(t) not in given]
        return out

    def large(self, least: int) -> int:
        """How many tensors of at least so many bytes were made."""
        return sum(n >= least for n in self.made)


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
