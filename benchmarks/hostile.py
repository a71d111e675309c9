"""Denoisers that an adaptive solver should not meet, and with which status its run may end."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.solvers.adaptive_control import STATUS

OK, EXHAUSTED, STUCK, NOT_FINITE = STATUS


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x).expand(len(x)).view(-1, *[1] * (x.ndim - 1))


def nan(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan)


def one_bad(x: Tensor, value: float) -> Tensor:
    out = 0.5 * x
    out.view(len(x), -1)[:1, :1] = value
    return out


def later(x: Tensor, t: Tensor, value: float) -> Tensor:
    return torch.where(column(t, x) < 0.5, torch.full_like(x, value), 0.5 * x)


def jittered(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda x, t: 0.5 * x + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)


HOSTILE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], set[str]]] = {
    "NaN": (lambda x, t: nan(x), {NOT_FINITE}),
    "inf": (lambda x, t: x + math.inf, {NOT_FINITE}),
    "-inf": (lambda x, t: x - math.inf, {NOT_FINITE}),
    "one NaN": (lambda x, t: one_bad(x, math.nan), {NOT_FINITE}),
    "one inf": (lambda x, t: one_bad(x, math.inf), {NOT_FINITE}),
    "NaN later": (lambda x, t: later(x, t, math.nan), {NOT_FINITE}),
    "inf later": (lambda x, t: later(x, t, math.inf), {NOT_FINITE}),
    "NaN for some x": (lambda x, t: torch.where(x > 0.5, nan(x), 0.5 * x), set(STATUS)),
    "square root": (lambda x, t: (x - 0.3).sqrt(), set(STATUS)),
    "1/x": (lambda x, t: 1 / x, set(STATUS)),
    "1/0": (lambda x, t: 1 / (x - x), {NOT_FINITE}),
    "overflow": (lambda x, t: 1e300 * x, set(STATUS)),
    "grows without end": (lambda x, t: x**3, set(STATUS)),
    "exponential": (lambda x, t: x.exp().exp(), set(STATUS)),
    "noise": (jittered(1.0), set(STATUS)),
    "much noise": (jittered(1e6), set(STATUS)),
    "a little noise": (jittered(1e-4), set(STATUS)),
    "enormous noise": (jittered(1e120), {STUCK}),
    "jump in x": (lambda x, t: x.sign(), set(STATUS)),
    "jump in t": (lambda x, t: 2.0 * (column(t, x) < 0.37) + 0 * x, {OK}),
    "jumps in t": (lambda x, t: (1e4 * column(t, x)).floor() % 2 + 0 * x, set(STATUS)),
    "fast oscillation": (lambda x, t: (1e5 * column(t, x)).sin() + 0 * x, set(STATUS)),
    "oscillation in x": (lambda x, t: (1e4 * x).sin(), set(STATUS)),
    "stiff": (lambda x, t: -1e4 * (x - 1), set(STATUS)),
    "very stiff": (lambda x, t: -1e12 * x, set(STATUS)),
    "unstable": (lambda x, t: 1e3 * x, set(STATUS)),
    "singular at the end": (lambda x, t: x / (column(t, x) - 1e-3), set(STATUS)),
    "singular inside": (lambda x, t: x + 1 / (column(t, x) - 0.3), set(STATUS)),
    "huge constant": (lambda x, t: 1e30 + 0 * x, set(STATUS)),
    "zero": (lambda x, t: torch.zeros_like(x), {OK}),
    "half precision": (lambda x, t: (0.5 * x).half(), set(STATUS)),
    "bfloat16": (lambda x, t: (0.5 * x).bfloat16(), set(STATUS)),
    "integers": (lambda x, t: x.round().clamp(-9, 9).nan_to_num().long(), set(STATUS)),
}
