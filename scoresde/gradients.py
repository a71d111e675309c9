"""Gradients with respect to the state, whatever mode the caller is in.

They are taken by `torch.func`, so `requires_grad` and `.grad` of no tensor are touched, `no_grad` and
`inference_mode` around the call do not matter, `torch.compile` traces through, and the result can itself be
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pull = Callable[[Tensor], Tensor]


def pullback(f: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Pull, Tensor]:
    """For `f(x) = (value, more)`: value, the map `v -> (d value/dx)^T v`, to be called any number of times,
    and more.

    Samples must not depend on each other, so that a gradient for the batch is one for each of them.
    """
    found: Any = _outside(lambda x: torch.func.vjp(f, x, has_aux=True), x)
    value, pull, more = found
    return value, lambda v: _outside(pull, v)[0], more


def _outside(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """function(x), not in `inference_mode`: there `torch.func` finds no gradient but 0 before torch 2.13.

    A trace cannot ask for the mode, so it always leaves it.
    """
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        return function(x)
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        return function(x.clone())  # the copy is no tensor of that mode


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, name: str = "log_prob") -> tuple[Tensor, Tensor]:
    """f(x) (B,) and its gradient (B, ...) of the dtype of x. Raises ValueError if f returns another shape."""

    value, pull, _ = pullback(lambda x: _checked(f(x), x, name), x)
    return value, pull(torch.ones_like(value))


def _checked(value: Any, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"expected {name}(x, t) to return one number a sample, shape ({len(x)},); found {found}"
        )
    return value, value
