"""scipy's solvers on the probability-flow ODE, and what all wrapped solvers share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, evaluating
from ..grids import Grid
from ..schedules import check_numbers
from ..sde import LinearSDE
from ..tableau import NoiseSource, Step
from .base import Callback, Card, Samples

OK, EXHAUSTED, STUCK, NOT_FINITE = "ok", "call limit reached", "step underflow", "network returned NaN or Inf"


class Halt(Exception):  # noqa: N818
    """Ends a run from inside the network call; the status is its argument."""


class Calls:
    """Counts network calls and halts a run whose calls are spent or whose output is not finite."""

    def __init__(self, limit: float | int = math.inf) -> None:
        self.limit, self.made = limit, 0

    def __call__(self, evaluate: Callable[[], Tensor]) -> Tensor:
        if self.made >= self.limit:
            raise Halt(EXHAUSTED)
        self.made += 1
        out = evaluate()
        if not bool(out.isfinite().all()):
            raise Halt(NOT_FINITE)
        return out


def checked_control(rtol: float, atol: float, max_calls: int) -> None:
    check_numbers(rtol=rtol, atol=atol)
    # below 100 roundings scipy takes another tolerance than the one it was given
    if not (100 * np.finfo(float).eps <= rtol < 1 and 0 <= atol < math.inf):
        raise ValueError(f"expected 2.3e-14 <= rtol < 1 and 0 <= atol < inf, found rtol={rtol}, atol={atol}")
    if isinstance(max_calls, bool) or not isinstance(max_calls, int) or max_calls < 1:
        raise ValueError(f"expected a whole number of calls max_calls >= 1, found {max_calls!r}")


def one_by_one(model: BaseDenoiser, batch: int) -> Iterator[tuple[slice, BaseDenoiser]]:
    """Every sample with its model: conditions that have one entry for each sample are split too."""
    for i in range(batch):
        rows = slice(i, i + 1)
        yield rows, model.narrowed(rows, batch)


def status_of(found: list[str]) -> str | tuple[str, ...]:
    return found[0] if len(set(found)) == 1 else tuple(found)


def evaluations(calls: list[int], x: Tensor) -> Tensor:
    """(B,) int64, from one number for all or one for each; what a callback asks for does not count."""
    return torch.tensor(calls or [0], dtype=torch.int64, device=x.device).expand(len(x)).clone()


def no_noise(sde: LinearSDE, t: float) -> bool:
    return float(sde.sigma(t)) == 0


SCIPY = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")


@dataclass(frozen=True)
class ScipyODE:
    """See `scipy_ode`."""

    method: str
    rtol: float
    atol: float
    per_sample: bool
    max_calls: int
    card: Card = field(repr=False)

    def __repr__(self) -> str:
        options = (
            f"rtol={self.rtol}, atol={self.atol}, per_sample={self.per_sample}, max_calls={self.max_calls}"
        )
        return f"scipy_ode({self.method!r}, {options})"

    def steps_for(self, calls: int) -> int:
        """Steps follow the tolerance, not the grid: 1, for the two ends."""
        return 1

    @torch.no_grad()
    def solve(
        self,
        model: BaseDenoiser,
        x: Tensor,
        times: Grid | Tensor,
        *,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Run from `x` (B, ...) at times[0] to times[-1], either way; `noise` is not used.

        The nodes between are only where the callback, if any, sees scipy's dense output, once the run is
        over;
        each costs a network call.
        """
        started = time.perf_counter()
        grid = Grid.of(model.sde, times)
        first, last = float(grid.t[0]), float(grid.t[-1])
        if no_noise(model.sde, first):
            raise ValueError(
                f"expected to start at a time with noise, found t = {first}; encode from a later end"
            )
        denoise = no_noise(model.sde, last)
        stop = min(float(model.sde.default_end), first) if denoise else last
        nodes = grid.t[:-1].tolist() if callback else []
        with evaluating(model):
            parts = one_by_one(model, len(x)) if self.per_sample else [(slice(None), model)]
            runs = [
                self._integrate(part, x[rows], first, stop, nodes, denoise)
                for rows, part in parts
                if x.numel()
            ]
            calls, path = sum(run.calls for run in runs), []
            for k in range(min((len(run.dense) for run in runs), default=0)):
                state = torch.cat([run.dense[k] for run in runs])
                kept = callback(Step(k, nodes[k], state, model(state, nodes[k]))) if callback else None
                path.extend([] if kept is None else [kept])
                calls += 1
        result = torch.cat([run.x for run in runs]) if runs else x.clone()
        status = status_of([run.status for run in runs]) if runs else OK
        seconds, made = time.perf_counter() - started, evaluations([run.calls for run in runs], x)
        return Samples(result, calls, seconds, status, tuple(path), last, evaluations=made)

    def _integrate(
        self, model: BaseDenoiser, x: Tensor, first: float, stop: float, nodes: list[float], denoise: bool
    ) -> ODERun:
        """One run of scipy's solver, step by step, on the flat float64 state."""
        import scipy.integrate

        calls, velocity = Calls(self.max_calls), model.sde.probability_flow(model)

        def tensor(y: np.ndarray) -> Tensor:
            return torch.from_numpy(y.astype(np.float64)).view(x.shape).to(x)

        def field(t: float, y: np.ndarray) -> np.ndarray:
            out = calls(lambda: velocity(tensor(y), float(t)))
            return out.to("cpu", torch.float64).numpy().ravel()

        y = x.to("cpu", torch.float64).numpy().ravel()
        dense: list[Tensor] = []
        try:
            solver = getattr(scipy.integrate, self.method)(
                field, first, y, stop, rtol=self.rtol, atol=self.atol
            )
            while solver.status == "running":
                solver.step()
                y = solver.y
                reached = [t for t in nodes[len(dense) :] if (t - solver.t) * (first - stop) >= 0]
                interpolant = solver.dense_output() if reached and solver.status != "failed" else None
                dense += [tensor(interpolant(t)) for t in reached] if interpolant else []
            if solver.status == "failed":
                return ODERun(tensor(y), STUCK, calls.made, dense)
            state = tensor(y)
            # a copy, for the next sample's output may be written where this one is
            result = calls(lambda: model(state, stop)).clone() if denoise else state
            return ODERun(result, OK, calls.made, dense)
        except Halt as halt:
            return ODERun(tensor(y), str(halt), calls.made, dense)


class ODERun(NamedTuple):
    """Where a run ended and how; `dense` has the states at the nodes it passed."""

    x: Tensor
    status: str
    calls: int
    dense: list[Tensor]


def scipy_ode(
    method: str = "RK45",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    *,
    per_sample: bool = False,
    max_calls: int = 10000,
) -> ScipyODE:
    """The probability-flow ODE in t by a solver of `scipy.integrate`: the "black-box" sampler of Song et al.
    (2021, arXiv:2011.13456, section 4.3 and appendix D.4), who use RK45 at 1e-5.

    method      "RK23" | "RK45" | "DOP853" | "LSODA" | "Radau" | "BDF". The last two, and LSODA where the
                problem is stiff, estimate a Jacobian by one call for each number of the state: for small ones
    rtol, atol  of the error per step, root mean square over the state. In float32 the network's rounding is
                about 1e-6 of the state: much smaller tolerances only chase it
    per_sample  False: one state for the batch, as everyone does: a sample then depends on its neighbours, by
                about the tolerance. True: one run for each sample, one after the other, so that it does not;
                conditions with as many entries as the batch belong to the samples, see `BaseDenoiser.given`
    max_calls   of a run (of each sample if per_sample)

    Only the first and the last time of the grid matter. A run to sigma = 0 stops at `sde.default_end` and
    returns D there. `Samples.status` is "ok", "call limit reached", "step underflow" or "network returned NaN
    or Inf", a tuple if samples differ; then x is the last accepted state. `network_calls` are all calls made.
    The state is float64 on the host, the network gets the dtype and device of x. It encodes as well.

    Raises ValueError for other methods, tolerances and limits.
    """
    if method not in SCIPY:
        raise ValueError(f"expected method to be one of {SCIPY}, found {method!r}")
    checked_control(rtol, atol, max_calls)
    card = Card(None, None, 1, False, "Song et al. 2021, arXiv:2011.13456", frozenset(), "data")
    return ScipyODE(method, rtol, atol, per_sample, max_calls, card)
