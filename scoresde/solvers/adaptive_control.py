"""What adaptive solvers share: tolerances, and a batch in which every sample has its own clock and status.

No bit of a sample depends on its neighbours: all is made of elementwise operations and of `total`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..denoiser import DATA, BaseDenoiser, Prediction, checked
from ..schedules import check_numbers
from ..tableau import Step
from .base import Callback, Samples

STATUS = ("ok", "call limit reached", "step underflow", "network returned NaN or Inf")
OK, EXHAUSTED, STUCK, NOT_FINITE = range(4)

SAFETY = 0.8  # aim at steps a little smaller than the error allows
SHRINK = 0.2  # the smallest factor between steps


def total(x: Tensor) -> Tensor:
    """(n,) sums of the rows of x (n, D), D >= 1, by halving: elementwise additions in an order fixed by D."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half] + x[:, half : 2 * half], x[:, 2 * half :]], 1)
    return x[:, 0]


def alone(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """`function(values)`, elementwise, with the bits that an element has in any other batch.

    torch's CPU loops finish the last few elements with other instructions than the rest, and pow, sigmoid or
    logaddexp then differ in the last digit. Multiples of 64 have no such rest.
    """
    return function(torch.cat([values, values[:1].expand(-len(values) % 64)]))[: len(values)]


def per_sample(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the samples where the mask (n,) holds, else `old`."""
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)


def finite(x: Tensor) -> Tensor:
    """(n,) whether all numbers of a sample are finite."""
    return x.isfinite().flatten(1).all(1)


@dataclass(frozen=True)
class Control:
    """Tolerances and the largest number of network calls. Raises ValueError for those that cannot be met."""

    rtol: float
    atol: float
    max_calls: int

    def __post_init__(self) -> None:
        check_numbers(rtol=self.rtol, atol=self.atol)
        if not (0 <= self.rtol < 1 and 0 <= self.atol < math.inf and self.rtol + self.atol > 0):
            raise ValueError(
                "expected tolerances 0 <= rtol < 1 and 0 <= atol < inf, at least one of them positive; "
                f"found rtol={self.rtol}, atol={self.atol}"
            )
        if isinstance(self.max_calls, bool) or not isinstance(self.max_calls, int) or self.max_calls < 1:
            raise ValueError(f"expected a whole number of calls max_calls >= 1, found {self.max_calls!r}")

    def error(self, difference: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """(n,) root mean squares of `difference/(atol + rtol max(|before|, |after|))`, float64.

        What is only rounding stays below 1: rtol counts as at least 8 units in the last place of the state.
        """
        rtol = max(self.rtol, 8 * torch.finfo(difference.dtype).eps)
        scale = self.atol + rtol * torch.maximum(before.abs(), after.abs()).double()
        squares = (difference.double() / scale.clamp_min(torch.finfo(torch.float64).tiny)).square().flatten(1)
        return (total(squares) / squares.shape[1]).sqrt()


def factor(error: Tensor, order: Tensor | float, growth: Tensor | float, safety: float = SAFETY) -> Tensor:
    """(n,) factors for a step: `safety error^(-1/order)` in [SHRINK, growth]; SHRINK if not finite."""
    wanted = safety * (-error.clamp_min(1e-10).log() / order).exp()
    return torch.where(error.isfinite(), wanted.clamp(min=SHRINK).clamp(max=growth), SHRINK)


@dataclass
class State:
    """The n running samples: time t, place s on the solver's own scale, state x, next step h in s, and
    whether the last network output was finite. t, s, h are float64."""

    t: Tensor
    s: Tensor
    x: Tensor
    h: Tensor
    finite: Tensor

    def take(self, rows: Tensor) -> Any:
        """Some of the samples."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def target(self, goal: Tensor) -> Tensor:
        """(n,) where the next step ends: at the goal, rather than just short of it."""
        return torch.where((goal - self.s).abs() <= self.h.abs() * (1 + 1e-9), goal, self.s + self.h)


S = TypeVar("S", bound=State)


class Ledger:
    """The account of a batch: who is running, where the others ended and why, and what it cost.

    active       (n,) numbers of the running samples, in order
    result       (B, ...) last states of those that are not
    evaluations  (B,) network evaluations
    """

    def __init__(self, model: BaseDenoiser, x: Tensor) -> None:
        self.model = self._whole = model
        self.result = x.clone()
        self.active = torch.arange(len(x) if x.numel() else 0, device=x.device)
        self.calls = 0
        self.evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self._code = torch.zeros_like(self.evaluations)

    def evaluate(self, view: Prediction, x: Tensor, t: Tensor) -> Tensor:
        """The model's `view` of the running samples x (n, ...) at their times t (n,), in the dtype of x."""
        self.calls += 1
        self.evaluations[self.active] += 1
        return checked(self.model.as_view(view, x, t), x)

    def run(
        self,
        state: S,
        goal: Tensor,
        attempt: Callable[[S], S],
        limit: int,
        look: Callable[[S], Tensor],
        callback: Callback | None,
    ) -> list[Any]:
        """Attempt steps until no sample runs; what the callback returned. It sees the samples `active`, at
        the largest of their times as `Step.t`, and D at the state, which `look` gives."""
        path: list[Any] = []
        while len(self.active):
            state = self._release(state, goal, self.calls >= limit)
            if not len(self.active):
                break
            if callback is not None:
                kept = callback(Step(self.calls - 1, float(state.t.max()), state.x, look(state)))
                path.extend([] if kept is None else [kept])
            state = attempt(state)
        return path

    def _release(self, state: S, goal: Tensor, spent: bool) -> S:
        """Let the samples go that arrived, met NaN, or cannot move; all of them if the calls are spent."""
        arrived, stuck = state.s == goal, state.s + state.h == state.s
        ends = arrived | stuck | ~state.finite
        gone = (torch.ones_like(ends) if spent else ends).nonzero()[:, 0]
        if len(gone) == 0:
            return state
        code = torch.where(~state.finite, NOT_FINITE, torch.where(stuck, STUCK, EXHAUSTED))
        self.result[self.active[gone]] = state.x[gone]
        self._code[self.active[gone]] = torch.where(arrived, OK, code)[gone]
        stay = (~ends).nonzero()[:, 0] if not spent else gone[:0]
        self._keep(self.active[stay])
        return state.take(stay)

    def _keep(self, active: Tensor) -> None:
        self.active = active
        self.model = self._whole.narrowed(active, len(self.result))

    def denoise(self, t: float) -> None:
        """Replace the states that arrived at t by D(x, t); where it is not finite they stay, and say so."""
        self._keep(self.arrived.nonzero()[:, 0])
        if len(self.active) and self.result.numel():
            x = self.result[self.active]
            out = self.evaluate(DATA, x, torch.full((len(x),), t, dtype=torch.float64, device=x.device))
            self.result[self.active] = per_sample(finite(out), out, x)
            self._code[self.active] = torch.where(finite(out), OK, NOT_FINITE)

    @property
    def arrived(self) -> Tensor:
        """(B,) which samples got to the end."""
        return self._code == OK

    def samples(self, started: float, end: float, path: Sequence[Any]) -> Samples:
        """The result, with one status if all samples share it."""
        found = tuple(STATUS[code] for code in self._code.tolist()) or (STATUS[OK],)
        status = found[0] if len(set(found)) == 1 else found
        seconds = time.perf_counter() - started
        kept = tuple(path)
        return Samples(self.result, self.calls, seconds, status, kept, end, evaluations=self.evaluations)
