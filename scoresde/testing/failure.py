"""How a check fails: an AssertionError with the claim, the measured number, the bound and the worst case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def at_most(claim: str, measured: Tensor | float, bound: Tensor | float, **case: Any) -> None:
    """Raises AssertionError unless `measured <= bound` everywhere; NaN is a failure.

    Both are numbers or tensors that broadcast together; the worst case is where their ratio is largest.
    `case` says what was tried: of a tensor that broadcasts to them the element at the worst place is shown,
    anything else by its repr.
    """
    found = torch.as_tensor(measured, dtype=torch.float64).detach().cpu()
    limit = torch.as_tensor(bound, dtype=torch.float64).detach().cpu()
    found, limit = torch.broadcast_tensors(found, limit)
    excess = torch.where(found <= limit, -1.0, (found - limit) / limit.abs().clamp_min(1e-300))
    excess = excess.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if excess.numel() == 0 or bool((excess < 0).all()):
        return
    worst = int(excess.argmax())
    numbers = f"measured {found.flatten()[worst].item():.4g}, bound {limit.flatten()[worst].item():.4g}"
    shown = ", ".join(f"{name}={_element(value, found.shape, worst)}" for name, value in case.items())
    raise AssertionError(f"{claim}: {numbers}" + (f"; worst case: {shown}" if shown else ""))


def holds(claim: str, condition: bool, **case: Any) -> None:
    """Raises AssertionError unless the condition holds; `case` says what was tried."""
    if not condition:
        shown = ", ".join(f"{name}={value!r}" for name, value in case.items())
        raise AssertionError(f"{claim}: found {shown}")


def _element(value: Any, shape: torch.Size, worst: int) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    try:
        return repr(value.detach().cpu().expand(shape).flatten()[worst].item())
    except RuntimeError:  # of another shape
        return repr(value.tolist())
