"""What a solver is: an immutable, printable object with `.solve(model, x, times, *, noise, callback)` and
`.steps_for(calls)`."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, Rows, evaluating
from ..grids import Grid
from ..sde import LinearSDE
from ..tableau import NoiseSource, Step, Tableau, check_finite, not_finite, run
from .watch import States

Callback = Callable[[Step], Any]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Samples:
    """What a run returns.

    x              (B, ...) the state at `end`
    network_calls  calls of the model on a batch; for adaptive solvers the largest number any sample needed
    seconds        wall time of the run, the grid and table included
    status         "ok", or for adaptive solvers what happened; one entry a sample if they differ
    path           what the callback returned, call by call (without the Nones)
    end            the time of `x`
    seed           the seed of `sample`
    companion      the second half of a reversible solver's state
    evaluations    (B,) network evaluations of each sample, from adaptive solvers
    """

    x: Tensor
    network_calls: int
    seconds: float
    status: str | tuple[str, ...] = "ok"
    path: tuple[Any, ...] = ()
    end: float = 0.0
    seed: int | None = None
    companion: Tensor | None = None
    evaluations: Tensor | None = None


@dataclass(frozen=True)
class Card:
    """What is known of a solver. Declared properties are tested, undeclared ones are shown false.

    order, weak_order  of convergence on smooth problems; None where the notion does not apply
    properties         of "marginal_exact" (keeps the law of a point mass), "clock_free" (depends on the grid
                       through lam only), "scale_covariant" (commutes with x -> x/alpha)
    final              what a last step to sigma = 0 does: "data" returns D, "extrapolate" keeps the order,
                       "none" is not special
    """

    order: int | None
    weak_order: int | None
    calls_per_step: int
    stochastic: bool
    reference: str
    properties: frozenset[str] = frozenset()
    final: str = "data"
    memory: int = 1


@runtime_checkable
class Solver(Protocol):
    """Anything `sample` can hand over to."""

    def solve(
        self,
        model: BaseDenoiser,
        x: Tensor,
        times: Grid | Tensor,
        *,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Run from `x` (B, ...) at times[0] to times[-1]."""
        raise NotImplementedError

    def steps_for(self, calls: int) -> int:
        """The largest number of grid steps that takes at most `calls` network calls."""
        raise NotImplementedError


@dataclass(frozen=True)
class TableSolver:
    """A solver that is a function `(sde, grid) -> Tableau`, with the options it was made with."""

    name: str
    build: Callable[[LinearSDE, Grid], Tableau]
    card: Card
    options: tuple[tuple[str, Any], ...] = ()
    calls: Callable[[int], int] = lambda steps: steps

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.options)})"

    @torch.no_grad()
    def tableau(self, sde: LinearSDE, times: Grid | Tensor) -> Tableau:
        """The table for `sde` on a Grid or a decreasing tensor of times. Raises ValueError for a stochastic
        solver on a reversed grid."""
        grid = Grid.of(sde, times)
        if self.card.stochastic and float(grid.t[0]) < float(grid.t[-1]):
            raise ValueError(
                f"{self} is stochastic and cannot run from data to noise: encode with a deterministic solver"
            )
        return self.build(sde, grid)

    def steps_for(self, calls: int) -> int:
        """The largest number of grid steps that takes at most `calls` network calls."""
        check_calls(calls, self.calls(1), self)
        return bisect_right(range(1, calls + 1), calls, key=self.calls)  # a step takes a call or more

    def solve(
        self,
        model: BaseDenoiser,
        x: Tensor,
        times: Grid | Tensor,
        *,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Run from `x` (B, ...) at times[0] to times[-1]. `noise(k, shape)` gives the normals of row k."""
        started = time.perf_counter()
        return execute(
            self.tableau(model.sde, times), model, x, noise=noise, callback=callback, started=started
        )


def execute(
    table: Tableau,
    model: BaseDenoiser,
    x: Tensor,
    *,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
    started: float | None = None,
) -> Samples:
    """Run a table without gradients, watch for NaN and Inf, collect what the callback returns."""
    started = time.perf_counter() if started is None else started
    path: list[Any] = []
    with torch.no_grad(), evaluating(model):
        x = x.clone()  # dense: kernels round differently on strided and expanded states
        rows = model.rows(table.times[:-1], x)
        seen, at_once = States(), x.device.type == "cpu"
        guard = partial(check_finite, table) if at_once else None
        before = guard if callback is None else _Watched(guard, rows, table.times, callback, path)
        result = run(table, rows, x, noise, before=before, after=None if at_once else seen)
    if (bad := seen.first_bad()) is not None:
        raise not_finite(table, bad)
    return Samples(
        result, len(table), time.perf_counter() - started, path=tuple(path), end=float(table.times[-1])
    )


class _Watched(NamedTuple):
    """Shows each row to a callback after the guard, and keeps what it returns."""

    guard: Callable[[int, Tensor, Tensor], object] | None
    rows: Rows
    times: Tensor
    callback: Callback
    path: list[Any]

    def __call__(self, k: int, x: Tensor, F: Tensor) -> None:
        if self.guard is not None:
            self.guard(k, x, F)
        a, b = self.rows.a[k], self.rows.b[k]
        kept = self.callback(Step(k, float(self.times[k]), x, F * b + x * a))
        self.path.extend([] if kept is None else [kept])


def check_calls(calls: int, least: int, solver: object) -> None:
    """ValueError unless `calls` is a whole number that pays for one step."""
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < least:
        raise ValueError(
            f"expected at least {least} calls, the cost of one step of {solver}; found {calls!r}"
        )


def from_pair(x: Tensor | Pair) -> Pair:
    """A state as two copies; a single tensor stands for both."""
    return (x, x) if isinstance(x, Tensor) else x
