"""Adaptive solvers: every sample has its own clock, step and status, and leaves the batch when it is done.

Both work on half-log-SNR scales where the linear part of the process is integrated exactly, and control the step by the difference between a predictor and its
corrector, which costs one network call a step. A sample's result does not depend on its neighbours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..denoiser import DATA, FLOW, BaseDenoiser, Prediction
from ..grids import Grid
from ..noise import BrownianPath, Noise
from ..sde import LinearSDE, like
from ..tableau import NoiseSource, Step
from .base import Callback, Card, Samples, evaluating

OK, EXHAUSTED, STUCK, NOT_FINITE = "ok", "call limit reached", "step underflow", "network returned NaN or Inf"
STATUS = (OK, EXHAUSTED, STUCK, NOT_FINITE)


@dataclass(frozen=True)
class Control:
    """Error tolerances and the rule `h <- h clip(safety err^(-1/q), 1/5, growth)` for steps; err is the root mean square of error/(atol + rtol |x|) over a sample."""

    rtol: float
    atol: float
    max_calls: int
    safety: float = 0.8

    def __post_init__(self) -> None:
        if not (0 <= self.rtol < 1 and 0 <= self.atol < math.inf and self.rtol + self.atol > 0):
            raise ValueError(f"expected tolerances with 0 <= rtol < 1, 0 <= atol and at least one positive, found rtol={self.rtol}, atol={self.atol}")
        if isinstance(self.max_calls, bool) or not isinstance(self.max_calls, int) or self.max_calls < 1:
            raise ValueError(f"expected a whole number of calls max_calls >= 1, found {self.max_calls!r}")

    def error(self, difference: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """(n,) scaled errors in float64; accepted if at most 1."""
        scale = self.atol + self.rtol * torch.maximum(before.abs(), after.abs()).double()
        return (difference.double() / scale).square().flatten(1).mean(1).sqrt()

    def factor(self, error: Tensor, order: Tensor | float, growth: Tensor | float) -> Tensor:
        """(n,) by how much to change the step; an error that is not finite asks for the smallest."""
        wanted = self.safety * error.clamp_min(1e-10) ** (-1 / order)
        return torch.where(error.isfinite(), wanted.clamp_min(0.2).clamp(max=growth), 0.2)


def polynomial_weights(nodes: Tensor, valid: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """(n, P) weights of `int_start^stop` of the Lagrange polynomial through the valid ones of the nodes (n, P). Exact; every sample by itself."""
    points, weights = (torch.from_numpy(v).to(nodes.device) for v in np.polynomial.legendre.leggauss(5))
    middle, half = (start + stop) / 2, (stop - start) / 2
    u = middle[:, None] + half[:, None] * points  # (n, 5)
    gaps = nodes[:, :, None] - nodes[:, None, :]  # node j minus node i
    others = valid[:, None, :] & ~torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    factors = (u[:, None, :, None] - nodes[:, None, None, :]) / torch.where(others, gaps, 1.0)[:, :, None, :]
    basis = torch.where(others[:, :, None, :], factors, 1.0).prod(-1)  # (n, P, 5)
    return torch.where(valid, half[:, None] * (basis * weights).sum(-1), 0.0)


def _combine(weights: Tensor, outputs: Tensor) -> Tensor:
    """sum_j weights_j outputs_j over axis 1, added in a fixed order, in the dtype of the outputs."""
    total = like(weights[:, 0], outputs[:, 0]) * outputs[:, 0]
    for j in range(1, outputs.shape[1]):
        total = total + like(weights[:, j], outputs[:, j]) * outputs[:, j]
    return total


class Ledger:
    """The batch of an adaptive run: who is still running, where the others ended and why, and what it cost."""

    def __init__(self, model: BaseDenoiser, x: Tensor, control: Control) -> None:
        self.model, self.control = model, control
        self.result = x.clone()
        self.active = torch.arange(len(x), device=x.device)
        self.code = torch.zeros(len(x), dtype=torch.int8, device=x.device)
        self.evaluations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.calls = 0

    def evaluate(self, view: Prediction, x: Tensor, t: Tensor) -> Tensor:
        """The model's view for the running samples, each at its own time; counted, and checked for its shape."""
        self.calls += 1
        self.evaluations[self.active] += 1
        out = self.model.as_view(view, x, t)
        if out.shape != x.shape:
            raise ValueError(f"expected the model to return shape {tuple(x.shape)}, like its input; found {tuple(out.shape)}")
        return out.to(x.dtype)

    def settle(self, x: Tensor, arrived: Tensor, moving: Tensor, finite: Tensor) -> Tensor | None:
        """Let the samples go that arrived, cannot move, met NaN, or whose calls are spent. Returns the positions of those that stay, None if all do."""
        spent = torch.full_like(arrived, self.calls >= self.control.max_calls)
        code = torch.where(arrived, 0, torch.where(~finite, 3, torch.where(~moving, 2, 1)))
        gone = arrived | ~finite | ~moving | spent
        chosen = gone.nonzero()[:, 0]
        if len(chosen) == 0:
            return None
        self.result[self.active[chosen]] = x[chosen]
        self.code[self.active[chosen]] = code[chosen].to(torch.int8)
        stay = (~gone).nonzero()[:, 0]
        self.active = self.active[stay]
        return stay

    def samples(self, started: float, end: float, path: Sequence[Any]) -> Samples:
        """The result; one status for all if all arrived."""
        statuses = tuple(STATUS[c] for c in self.code.tolist())
        status = OK if all(s == OK for s in statuses) else statuses
        return Samples(self.result, self.calls, time.perf_counter() - started, status, tuple(path), end, evaluations=self.evaluations)


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().flatten(1).all(1)


def _choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Sample by sample."""
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)


@dataclass(frozen=True)
class Flow:
    """The probability-flow ODE as `dy = v du`, with `y = x/(alpha + sigma)`, `u = sigma/(alpha + sigma)`, `v = E[eps - x_0 | x]`."""

    sde: LinearSDE

    def scale(self, t: Tensor) -> Tensor:
        return self.sde.alpha(t) + self.sde.sigma(t)

    def u(self, t: Tensor) -> Tensor:
        return self.sde.sigma(t) / self.scale(t)

    def time(self, u: Tensor) -> Tensor:
        return self.sde.time(2 * (torch.log1p(-u) - u.log()))


class ODEState(NamedTuple):
    """The running samples: time t, u, y, next step h in log u, and the last outputs v at their nodes, of which `known` are filled."""

    t: Tensor
    u: Tensor
    y: Tensor
    h: Tensor
    nodes: Tensor
    outputs: Tensor
    known: Tensor


@dataclass(frozen=True)
class AdaptiveODE:
    """Variable-step Adams predictor-corrector (PEC) on `Flow`, where u is bounded whatever the SDE and both ends are regular.

    The predictor goes through up to `order` nodes, the corrector through one more; their difference is the error.
    """

    order: int
    control: Control
    at: tuple[float, ...]
    card: Card

    def __repr__(self) -> str:
        return f"adaptive_ode(rtol={self.control.rtol}, atol={self.control.atol}, order={self.order}, max_calls={self.control.max_calls})"

    def steps_for(self, calls: int) -> int:
        """Steps follow the tolerance, not the grid: 1, for the two ends."""
        return 1

    def solve(self, model: BaseDenoiser, x: Tensor, times: Grid | Tensor, *, noise: NoiseSource | None = None, callback: Callback | None = None) -> Samples:
        """Run from `x` at times[0] to times[-1], either way; the nodes between are not used, nor is `noise`. A run to sigma = 0 stops at `sde.default_end` and returns D there.

        The states at the times `at` come back in `path`, one (B, ...) tensor each. Otherwise `path` has what the callback returned; it sees the running samples before each attempt.
        """
        started = time.perf_counter()
        grid = Grid.of(model.sde, times)
        first, last = float(grid.t[0]), float(grid.t[-1])
        denoise = float(model.sde.sigma(last)) == 0
        with torch.no_grad(), evaluating(model):
            ledger = Ledger(model, x, self.control)
            dense = x.new_full((len(self.at), *x.shape), math.nan)
            path = self._integrate(ledger, x, first, float(model.sde.default_end) if denoise else last, dense, callback)
            if denoise:
                ledger.active = (ledger.code == 0).nonzero()[:, 0]
                arrived = ledger.result[ledger.active]
                ledger.result[ledger.active] = ledger.evaluate(DATA, arrived, torch.full((len(arrived),), model.sde.default_end, dtype=torch.float64, device=x.device))
        return ledger.samples(started, last, dense.unbind() if self.at else path)

    def _integrate(self, ledger: Ledger, x: Tensor, first: float, last: float, dense: Tensor, callback: Callback | None) -> list[Any]:
        flow = Flow(ledger.model.sde)
        state, end = self._begin(ledger, flow, x, first, last)
        goal = flow.u(end)
        path: list[Any] = []
        while len(ledger.active):
            scale = flow.scale(state.t)
            position = state.y * like(scale, state.y)
            if callback is not None:
                slope = state.outputs[:, 0]
                denoised = state.y - like(flow.u(state.t), slope) * slope
                kept = callback(Step(ledger.calls, float(state.t.max()), position, denoised))
                path.extend([] if kept is None else [kept])
            state = self._attempt(ledger, flow, state, goal, end, dense)
            stay = ledger.settle(state.y * like(flow.scale(state.t), state.y), state.u == goal, state.u * state.h.exp() != state.u, _finite(state.outputs[:, 0]))
            if stay is not None:
                state = ODEState(*(part[stay] for part in state))
        return path

    def _begin(self, ledger: Ledger, flow: Flow, x: Tensor, first: float, last: float) -> tuple[ODEState, Tensor]:
        """The state with its first output, and a first step of half the span of Euler's rule at the tolerance."""
        t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
        end = torch.tensor(last, dtype=torch.float64, device=x.device)
        u, y = flow.u(t), x / like(flow.scale(t), x)
        slope = ledger.evaluate(FLOW, x, t) if len(x) else x.clone()
        span = flow.u(end) - u
        h = 0.1 * (span / u) / self.control.error(slope * like(span, x), y, y).clamp_min(1.0).sqrt()
        width = self.order + 1
        outputs = torch.cat([slope[:, None], x.new_zeros(len(x), width - 1, *x.shape[1:])], 1)
        return ODEState(t, u, y, h, u[:, None].repeat(1, width), outputs, torch.ones_like(ledger.active)), end

    def _attempt(self, ledger: Ledger, flow: Flow, state: ODEState, goal: Tensor, end: Tensor, dense: Tensor) -> ODEState:
        """One step of every running sample, accepted or not. The output at the end of an accepted step is the next one's first node."""
        rest = (goal / state.u).log()
        arriving = rest.abs() <= state.h.abs() * (1 + 1e-9)
        target = torch.where(arriving, goal, state.u * state.h.exp())
        t = torch.where(arriving, end, flow.time(target))
        used = torch.arange(self.order + 1, device=t.device) < state.known.clamp(max=self.order)[:, None]
        predicted = state.y + _combine(polynomial_weights(state.nodes, used, state.u, target), state.outputs)
        slope = ledger.evaluate(FLOW, predicted * like(flow.scale(t), predicted), t)
        nodes = torch.cat([target[:, None], state.nodes[:, :-1]], 1)
        outputs = torch.cat([slope[:, None], state.outputs[:, :-1]], 1)
        used = torch.cat([torch.ones_like(used[:, :1]), used[:, :-1]], 1)
        corrected = state.y + _combine(polynomial_weights(nodes, used, state.u, target), outputs)
        error = self.control.error(corrected - predicted, state.y, corrected)
        accepted = error <= 1
        for r, t_r in enumerate(self.at):  # dense output: the corrector's polynomial, integrated to the wanted time
            u_r = flow.u(torch.full_like(t, t_r))
            inside = (accepted & ((u_r - state.u) * (u_r - target) <= 0)).nonzero()[:, 0]
            value = state.y + _combine(polynomial_weights(nodes, used, state.u, u_r), outputs)
            dense[r, ledger.active[inside]] = (value * like(flow.scale(torch.full_like(t, t_r)), value))[inside]
        growth = torch.where(state.known < self.order, 5.0, 1.5)  # eager while the order still rises, then smooth
        h = (target / state.u).log() * self.control.factor(error, state.known.clamp(max=self.order) + 1.0, growth)
        bad = ~_finite(slope)  # kept as the newest output, for the status
        return ODEState(
            torch.where(accepted, t, state.t),
            torch.where(accepted, target, state.u),
            _choose(accepted, corrected, state.y),
            h,
            torch.where(accepted[:, None], nodes, state.nodes),
            _choose(accepted | bad, outputs, state.outputs),
            state.known + accepted,
        )


def adaptive_ode(rtol: float = 1e-4, atol: float = 1e-4, *, order: int = 5, max_calls: int = 1000, at: Sequence[float] = ()) -> AdaptiveODE:
    """The probability-flow ODE with per-sample step control; `at` are times whose states are wanted (dense output).

    A sample that has not arrived after `max_calls` network calls, whose step underflows, or whose network returns NaN keeps its last state and says so in `Samples.status`.
    """
    if isinstance(order, bool) or order not in range(1, 9):
        raise ValueError(f"expected an order in 1..8, found {order!r}")
    card = Card(None, None, 1, False, "Hairer, Norsett and Wanner 1993, chapter III.5", frozenset(), "data", memory=order + 1)
    return AdaptiveODE(order, Control(rtol, atol, max_calls), tuple(float(t) for t in at), card)


class SDEState(NamedTuple):
    """The running samples: time t, half-log-SNR lam, x, next step h in lam, output D at t, and the Brownian path's value there."""

    t: Tensor
    lam: Tensor
    x: Tensor
    h: Tensor
    output: Tensor
    path: Tensor


@dataclass(frozen=True)
class AdaptiveSDE:
    """The reverse SDE (tau = 1) with per-sample steps, data remembered: a predictor with one node and a corrector with two, on the same noise,

        x_t = (sigma_t/sigma_s) e^-h x_s + alpha_t int_0^2h e^(v - 2h) D dv + sigma_t (1 - e^-2h)^(1/2) z,   h = lam_t - lam_s.

    The noise is an increment of one Brownian path per sample, on the clock `SNR = e^(2 lam)`: z = (W(c_t) - W(c_s))/(c_t - c_s)^(1/2). A step that is rejected and
    retried therefore stays on its path, which redrawing would bias.
    """

    control: Control
    card: Card

    def __repr__(self) -> str:
        return f"adaptive_sde(rtol={self.control.rtol}, atol={self.control.atol}, max_calls={self.control.max_calls})"

    def steps_for(self, calls: int) -> int:
        """Steps follow the tolerance, not the grid: 1, for the two ends."""
        return 1

    def solve(self, model: BaseDenoiser, x: Tensor, times: Grid | Tensor, *, noise: NoiseSource | None = None, callback: Callback | None = None) -> Samples:
        """Run from `x` at times[0] to times[-1] with the `Noise` of the samples; the nodes between are not used. A run to sigma = 0 stops at `sde.default_end` and returns D there."""
        started = time.perf_counter()
        if not isinstance(noise, Noise):
            raise TypeError(f"expected a scoresde.noise.Noise, from which Brownian paths can be made; found {type(noise).__name__}")
        sde, grid = model.sde, Grid.of(model.sde, times)
        first, last = float(grid.t[0]), float(grid.t[-1])
        if first < last or float(sde.alpha(first)) == 0:
            raise ValueError(f"expected times that decrease from a start with some signal, found {first} to {last}")
        stop = float(sde.default_end) if float(sde.sigma(last)) == 0 else last
        with torch.no_grad(), evaluating(model):
            ledger = Ledger(model, x, self.control)
            path = self._integrate(ledger, x, first, stop, noise, callback)
            if stop != last:
                ledger.active = (ledger.code == 0).nonzero()[:, 0]
                arrived = ledger.result[ledger.active]
                ledger.result[ledger.active] = ledger.evaluate(DATA, arrived, torch.full((len(arrived),), stop, dtype=torch.float64, device=x.device))
        return ledger.samples(started, last, path)

    def _integrate(self, ledger: Ledger, x: Tensor, first: float, last: float, noise: Noise, callback: Callback | None) -> list[Any]:
        sde = ledger.model.sde
        t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
        end = torch.tensor(last, dtype=torch.float64, device=x.device)
        lam, goal = 0.5 * sde.log_snr(t), 0.5 * sde.log_snr(end)
        clock = tuple(float((2 * 0.5 * sde.log_snr(v)).exp()) for v in (first, last))
        output = ledger.evaluate(DATA, x, t) if len(x) else x.clone()
        state = SDEState(t, lam, x.clone(), torch.full_like(lam, 0.1), output, torch.zeros_like(x))
        path: list[Any] = []
        while len(ledger.active):
            if callback is not None:
                kept = callback(Step(ledger.calls, float(state.t.max()), state.x, state.output))
                path.extend([] if kept is None else [kept])
            brownian = BrownianPath(Noise.of(noise.seed, noise.ids[ledger.active], device=x.device, dtype=x.dtype, offset=0), state.x.shape, *clock)
            state = self._attempt(ledger, state, goal, end, brownian)
            stay = ledger.settle(state.x, state.lam == goal, state.lam + state.h != state.lam, _finite(state.output))
            if stay is not None:
                state = SDEState(*(part[stay] for part in state))
        return path

    def _attempt(self, ledger: Ledger, state: SDEState, goal: Tensor, end: Tensor, brownian: BrownianPath) -> SDEState:
        sde = ledger.model.sde
        arriving = goal - state.lam <= state.h * (1 + 1e-9)
        lam = torch.where(arriving, goal, state.lam + state.h)
        t = torch.where(arriving, end, sde.time(2 * lam))
        z2, decay = 2 * (lam - state.lam), torch.exp(state.lam - lam)
        whole = -torch.expm1(-z2)
        rising = (z2 + torch.expm1(-z2)) / z2  # weight of the part of D that grows linearly in lam
        c_s, c_t = (2 * state.lam).exp(), (2 * lam).exp()
        path = brownian(c_t.clamp(brownian.start, brownian.stop))
        eps = (path - state.path) / like((c_t - c_s).sqrt(), path)
        sigma, alpha = sde.sigma(t), sde.alpha(t)
        base = like(sigma / sde.sigma(state.t) * decay, state.x) * state.x + like(sigma * whole.sqrt(), eps) * eps
        predicted = base + like(alpha * whole, base) * state.output
        output = ledger.evaluate(DATA, predicted, t)
        corrected = predicted + like(alpha * rising, base) * (output - state.output)
        error = self.control.error(corrected - predicted, state.x, corrected)
        accepted = error <= 1
        h = (lam - state.lam) * self.control.factor(error, 1.5, 2.0)  # D moves like the square root of the step
        bad = ~_finite(output)
        return SDEState(
            torch.where(accepted, t, state.t),
            torch.where(accepted, lam, state.lam),
            _choose(accepted, corrected, state.x),
            h,
            _choose(accepted | bad, output, state.output),
            _choose(accepted, path, state.path),
        )


def adaptive_sde(rtol: float = 0.02, atol: float = 0.01, *, max_calls: int = 10_000) -> AdaptiveSDE:
    """The reverse SDE with per-sample step control on one Brownian path per sample.

    A sample that has not arrived after `max_calls` network calls, whose step underflows, or whose network returns NaN keeps its last state and says so in `Samples.status`.
    """
    reference = "Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, for the idea; exponential corrector and Brownian consistency here"
    return AdaptiveSDE(Control(rtol, atol, max_calls), Card(None, None, 1, True, reference, frozenset(), "data", memory=2))
