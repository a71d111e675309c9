"""Adaptive probability-flow ODE: a variable-step Adams predictor-corrector with one network call a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..denoiser import FLOW, BaseDenoiser, evaluating
from ..grids import Grid
from ..sde import LinearSDE, like
from ..tableau import NoiseSource
from .adaptive_control import Control, Ledger, State, alone, factor, finite, per_sample
from .base import Callback, Card, Samples

START = 0.1  # first step, as a part of one at which Euler's rule would meet the tolerance
EAGER, SMOOTH = 5.0, 1.5  # growth of a step while the order rises, and after
SAFETY = 0.65  # smaller than for one-step methods: a rejected step is a call lost, and errors are uneven


@lru_cache
def gauss(device: torch.device) -> tuple[Tensor, Tensor]:
    """Points and weights, exact to degree 7, sent once: a step that sent them would wait for the device."""
    with torch.inference_mode(False):
        points, weights = (torch.from_numpy(v).to(device) for v in np.polynomial.legendre.leggauss(4))
    return points, weights


class Flow(NamedTuple):
    """The probability-flow ODE as `dy = v du`, with `y = x/(alpha + sigma)`, `u = sigma/(alpha + sigma)` and
    `v = E[eps - x_0 | x]`: a quadrature of network outputs, regular at both ends of every process."""

    sde: LinearSDE

    def scale(self, t: Tensor) -> Tensor:
        return self.sde.alpha(t) + self.sde.sigma(t)

    def log_u(self, t: Tensor) -> Tensor:
        return (self.sde.sigma(t) / self.scale(t)).log()

    def time(self, log_u: Tensor) -> Tensor:
        return self.sde.time(2 * ((-torch.expm1(log_u)).log() - log_u))  # alpha/sigma = (1 - u)/u

    def denoised(self, state: ODEState) -> Tensor:
        """D = (x - sigma v)/(alpha + sigma)."""
        sigma, x = self.sde.sigma(state.t), state.x
        return (x - like(sigma, x) * state.outputs[:, 0]) / like(self.scale(state.t), x)


Kernel = Callable[[Tensor], Tensor]


def integrals(
    nodes: Tensor, used: Tensor, start: Tensor, stop: Tensor, kernel: Kernel | None = None
) -> Tensor:
    """(n, P) weights w with `int_start^stop p(u) du = sum_j w_j p(u_j)` for polynomials p, u_j being those
    of the nodes (n, P) that are `used`; exact up to the degree that they determine, P <= 8. With a kernel
    K(u), smooth over a step, the integral is that of p(u) K(u)."""
    points, weights = (v[:, None] for v in gauss(nodes.device))
    middle, half = (start + stop) / 2, (stop - start) / 2
    # Samples come last: loops over an axis of 4 points are several times as slow.
    nodes, used = nodes.mT.contiguous(), used.mT.contiguous()
    u = middle + half * points
    basis = used[:, None] * weights * half  # (P, 4, n), Lagrange's basis in the making
    basis = basis if kernel is None else basis * kernel(u)
    for i in range(len(nodes)):
        other = used[i] & used
        other[i] = False
        gap = torch.where(other, nodes - nodes[i], 1.0)
        basis.mul_(torch.where(other[:, None], u - nodes[i], 1.0)).div_(gap[:, None])
    return (basis[:, 0] + basis[:, 1] + basis[:, 2] + basis[:, 3]).mT


def integrate(nodes: Tensor, outputs: Tensor, used: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """int_start^stop of the polynomial through the `used` ones of the outputs (n, P, ...), in their dtype."""
    return weighted(integrals(nodes, used, start, stop), outputs)


def weighted(weights: Tensor, outputs: Tensor) -> Tensor:
    """sum_j w_j v_j of the outputs v (n, P, ...) with weights (n, P), in the dtype of v."""
    total = torch.zeros_like(outputs[:, 0])
    for w, v in zip(weights.unbind(1), outputs.unbind(1), strict=True):
        total = total + like(w, v) * v
    return total


@dataclass
class ODEState(State):
    """s = log u; the last outputs v (n, P, ...) at nodes u (n, P), newest first, `known` (n,) or all."""

    nodes: Tensor
    outputs: Tensor
    known: Tensor


@dataclass
class RankedState(ODEState):
    """And the order (n,) of the next step, at most `known`."""

    order: Tensor


def differences(nodes: Tensor, outputs: Tensor, orders: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """(M, n, ...) corrector minus predictor of the `orders` p (M, n): integrals over [start, stop] of the
    polynomials through nodes 0..p, of which 0 is the new one, minus of those through 1..p. Not finite where
    two of these nodes are the same."""
    slots = torch.arange(nodes.shape[1], device=nodes.device)
    reach = slots <= orders[..., None]
    both = torch.stack([reach, reach & (slots > 0)])
    all_nodes, starts, stops = (
        v.expand(*both.shape[:2], *v.shape).flatten(0, 2) for v in (nodes, start, stop)
    )
    w = integrals(all_nodes, both.flatten(0, 2), starts, stops).view(both.shape)
    return torch.stack([weighted(each, outputs) for each in w[0] - w[1]])


def next_step(near: Tensor, errors: Tensor, accepted: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(order, factor of the step), both (n,), from the `errors` (3, n) of the orders `near` (3, n), which are
    one less than the present order, itself, and one more; `known` (n,) outputs were there before the step.

    The order moves to where the error is smallest; at the start it rises with every step, as long as its
    error is not above that of the order below. After a rejected step it does not rise.
    """
    _, order, higher = near
    usable = torch.where((near <= known) & errors.isfinite(), errors, math.inf)
    usable[2] = torch.where(accepted, usable[2], math.inf)
    smallest = usable.argmin(0, keepdim=True)
    rising = accepted & (order == known) & (higher > order) & (errors[1] <= errors[0])
    pick = torch.where(rising, 1, smallest)
    judged, error = near.gather(0, pick)[0], errors.gather(0, pick)[0]
    growth = torch.where(rising, EAGER, torch.where(accepted, SMOOTH, 1.0))
    return torch.where(rising, higher, judged), factor(error, judged + 1.0, growth, SAFETY)


@dataclass(frozen=True)
class AdaptiveODE:
    """See `adaptive_ode`."""

    order: int
    control: Control
    at: tuple[float, ...]
    card: Card = field(repr=False)

    def __repr__(self) -> str:
        rtol, atol, max_calls = self.control.rtol, self.control.atol, self.control.max_calls
        at = f", at={self.at}" if self.at else ""
        return f"adaptive_ode(rtol={rtol}, atol={atol}, order={self.order}, max_calls={max_calls}{at})"

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
        """Run from `x` (B, ...) at times[0] to times[-1], either way; nodes between and `noise` are not used.

        `Samples.path` has the states (B, ...) at the times `at`, NaN where a sample did not get that far.
        Without `at` it has what the callback returned, who sees the samples still running before every
        attempted step, each at its own time: `Step.t` is the largest of them.
        """
        started, sde = time.perf_counter(), model.sde
        grid = Grid.of(sde, times)
        first, last = float(grid.t[0]), float(grid.t[-1])
        if float(sde.sigma(first)) == 0:
            raise ValueError(
                f"expected to start where there is noise, found t = {first}; encode from a later end"
            )
        noiseless = float(sde.sigma(last)) == 0
        stop = min(float(sde.default_end), first) if noiseless else last
        inside = [t for t in self.at if t != last]
        if not all(min(first, stop) <= t <= max(first, stop) for t in inside):
            raise ValueError(f"expected times `at` between {first} and {stop}, found {self.at}")
        with evaluating(model):
            ledger = Ledger(model, x)
            dense = x.new_full((len(self.at), *x.shape), math.nan)
            dense[[r for r, t in enumerate(self.at) if t == first]] = x  # where no step may be needed
            path = self._integrate(ledger, x, (first, stop), dense, callback, noiseless)
            if noiseless:
                ledger.denoise(stop)
            ends = [r for r, t in enumerate(self.at) if t == last]
            dense[ends] = per_sample(ledger.arrived, ledger.result, torch.full_like(x, math.nan))
        return ledger.samples(started, last, dense.unbind() if self.at else path)

    def _integrate(
        self,
        ledger: Ledger,
        x: Tensor,
        ends: tuple[float, float],
        dense: Tensor,
        callback: Callback | None,
        reserved: int,
    ) -> list[Any]:
        """Fill `ledger` and `dense` with at most max_calls - reserved calls; what the callback returned."""
        if not len(ledger.active) or ends[0] == ends[1]:
            return []
        flow, end = Flow(ledger.model.sde), torch.tensor(ends[1], dtype=torch.float64, device=x.device)
        goal, limit = flow.log_u(end), self.control.max_calls - reserved
        state = self._begin(ledger, flow, x, ends[0], goal)
        attempt = partial(self._attempt, ledger, flow, end, dense)
        return ledger.run(state, goal, attempt, limit, flow.denoised, callback)

    def _begin(self, ledger: Ledger, flow: Flow, x: Tensor, first: float, goal: Tensor) -> RankedState:
        t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
        s, y = flow.log_u(t), x / like(flow.scale(t), x)
        slope = ledger.evaluate(FLOW, x, t)
        euler = self.control.error(like(goal.exp() - s.exp(), x) * slope, y, y)
        h = START * (goal - s) / euler.clamp_min(1.0).sqrt()
        nodes = s.exp()[:, None].repeat(1, self.order + 1)
        outputs = slope[:, None].expand(-1, self.order + 1, *x.shape[1:])
        one = torch.ones_like(ledger.active)
        return RankedState(t, s, x, h, finite(slope), nodes, outputs, one, one)

    def _attempt(
        self, ledger: Ledger, flow: Flow, end: Tensor, dense: Tensor, state: RankedState
    ) -> RankedState:
        """One step of every running sample: Adams-Bashforth, one call, Adams-Moulton of one order more.

        The call is not repeated at the corrected state (PEC): it is the newest node if the step is accepted.
        """
        goal = flow.log_u(end)
        s = state.target(goal)
        t = torch.where(s == goal, end, alone(flow.time, s))
        u, u_new, order = state.nodes[:, 0], s.exp(), state.order
        y, scale = state.x / like(flow.scale(state.t), state.x), flow.scale(t)
        slots = torch.arange(self.order + 1, device=t.device)
        predicted = y + integrate(state.nodes, state.outputs, slots < order[:, None], u, u_new)
        slope = ledger.evaluate(FLOW, predicted * like(scale, y), t)
        nodes = torch.cat([u_new[:, None], state.nodes[:, :-1]], 1)
        outputs = torch.cat([slope[:, None], state.outputs[:, :-1]], 1)
        near = torch.stack([order - 1, order, order + 1]).clamp(1, self.order)
        used = slots <= order[:, None]
        corrected = y + integrate(nodes, outputs, used, u, u_new)
        gaps = differences(nodes, outputs, near, u, u_new)
        errors = torch.stack([self.control.error(gap, y, corrected) for gap in gaps])
        accepted = errors[1] <= 1
        for t_r, states in zip(self.at, dense, strict=True):
            rows = (accepted & ((t_r - state.t) * (t_r - t) <= 0)).nonzero()[:, 0]
            if len(rows):  # of many times most lie in no sample's step
                # The corrector's polynomial, integrated to the wanted time.
                t_wanted, before = torch.full_like(u[rows], t_r), y[rows]
                u_wanted = flow.log_u(t_wanted).exp()
                change = integrate(nodes[rows], outputs[rows], used[rows], u[rows], u_wanted)
                states[ledger.active[rows]] = (before + change) * like(flow.scale(t_wanted), before)
        new_order, change = next_step(near, errors, accepted, state.known)
        return RankedState(
            torch.where(accepted, t, state.t),
            torch.where(accepted, s, state.s),
            per_sample(accepted, corrected * like(scale, y), state.x),
            (s - state.s) * change,
            finite(slope),
            per_sample(accepted, nodes, state.nodes),
            per_sample(accepted, outputs, state.outputs),
            state.known + accepted,
            new_order,
        )


def adaptive_ode(
    rtol: float = 1e-4,
    atol: float = 1e-4,
    *,
    order: int = 6,
    max_calls: int = 1000,
    at: Sequence[float] = (),
) -> AdaptiveODE:
    """The probability-flow ODE with steps chosen for each sample by itself, from noise to data or back.

    A variable-step Adams predictor and a corrector of one order more (Hairer, Norsett and Wanner 1993,
    chapter III.5) on `dy = E[eps - x_0 | x] du`, `y = x/(alpha + sigma)`, `u = sigma/(alpha + sigma)`: one
    network call a step. What is kept below 1 is their difference, root mean square over the sample in units
    of `atol + rtol |y|`. The order of the predictor, from 1 to `order`, follows the same difference for the
    orders next to it (Shampine and Gordon 1975): where the flow turns quickly a low one does better.

    max_calls  of the network. A sample that has not arrived by then, whose step underflows, or whose network
               returns NaN or Inf keeps its last state, and `Samples.status` says so
    at         times whose states are wanted besides (dense output), in `Samples.path`

    A run to sigma = 0 stops at `sde.default_end` and returns D there. Samples leave the batch when they are
    done: conditions given to `sample` are narrowed with it (what has as many entries as the batch belongs to
    the samples, see `BaseDenoiser.given`), and a network must not remember its batch. Tolerances below the
    rounding of the state count as that. Raises ValueError for other tolerances, orders and limits.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 6:
        raise ValueError(f"expected a highest order in 1..6, found {order!r}")
    reference = "Hairer, Norsett and Wanner 1993, chapter III.5"
    properties = frozenset({"marginal_exact", "clock_free", "scale_covariant"})
    card = Card(None, None, 1, False, reference, properties, "data", memory=order + 1)
    return AdaptiveODE(order, Control(rtol, atol, max_calls), tuple(float(t) for t in at), card)
