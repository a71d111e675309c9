"""State and log-density along the probability-flow ODE, from data to noise."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import FLOW, BaseDenoiser, Prediction
from ..sde import LinearSDE, like
from ..solvers.adaptive_control import (
    NOT_FINITE,
    OK,
    STATUS,
    Control,
    Ledger,
    alone,
    factor,
    finite,
    per_sample,
)
from ..solvers.adaptive_ode import SMOOTH, Flow, ODEState, integrals, weighted
from .divergence import Divergence, pullback

RAMP = 5  # nodes that cut up the first step of a fixed grid, each twice as far out as the one before
EAGER = 2.0  # growth of a step while the order rises: more would set nodes so unevenly that rounding counts
SAFE = 4.0  # the difference of two correctors does not see that both are evaluated at the predicted state


class Field(BaseDenoiser):
    """`[y | l] -> [v | M estimates of u div_y v]` as the flow view of a denoiser, so that `Ledger` can count
    its calls and narrow it to the running samples; the densities l (n, M) are not looked at.

    event   shape of one sample, D numbers
    probes  (n, R, D) directions of the divergence's estimator
    """

    def __init__(
        self, model: BaseDenoiser, divergence: Divergence, event: tuple[int, ...], probes: Tensor
    ) -> None:
        super().__init__()
        self.model, self.divergence, self.event, self.probes = model, divergence, event, probes

    @property
    def sde(self) -> LinearSDE:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.sde

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        return Field(self.model.narrowed(rows, batch), self.divergence, self.event, self.probes[rows])

    def as_view(self, target: Prediction, /, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        scale = like(Flow(self.sde).scale(t), x)
        state = (x[:, : self.probes.shape[-1]] * scale).reshape(len(x), *self.event)
        with torch.enable_grad():
            v = self.model.as_view(target, state.requires_grad_(), t, **cond)
        if v.shape != state.shape:
            raise ValueError(
                f"expected the model to return its input's {tuple(state.shape)}, found {tuple(v.shape)}"
            )
        trace = self.divergence.estimates(pullback(v, state), self.probes)
        return torch.cat([v.detach().flatten(1), like(self.sde.sigma(t), x) * trace], 1)  # u = sigma/scale


class Track(NamedTuple):
    """What the integration left.

    z            (B, D + M) y at t_max and the integrals of div_y v; NaN for samples that did not arrive
    first, last  (B, D + M) v and u div_y v at the start and, as predicted, at t_max
    error        (B,) estimated error of the log-density, summed over the steps
    status       (B,) words
    calls, evaluations  network calls, and (B,) those of each sample
    """

    z: Tensor
    first: Tensor
    last: Tensor
    error: Tensor
    status: tuple[str, ...]
    calls: int
    evaluations: Tensor


class _Proposal(NamedTuple):
    """A step that may be taken: the new state, derivative and history, and the local errors."""

    z: Tensor
    slope: Tensor
    nodes: Tensor
    outputs: Tensor
    difference: Tensor  # (n, D) corrector minus predictor of y
    effect: Tensor  # (n,) what it does to the log-density
    error: Tensor  # (n,) bound on the corrector's own effect


class Adams(NamedTuple):
    """Predictor-corrector for `y` and density, run from the end to t_max, one call a step.

    In s = log u, `dy = v e^s ds` and `dl = (u div_y v) ds`: what is interpolated, v and u div_y v, stays
    smooth over a step of a size that does not depend on u, and where the data vary less than u, v is constant
    and u div_y v the number of dimensions.
    """

    field: BaseDenoiser
    flow: Flow
    dim: int
    order: int

    def adaptive(self, z: Tensor, start: Tensor, stop: Tensor, control: Control) -> Track:
        """Steps chosen for each sample by itself, times () from `start` to `stop`."""
        ledger, error = Ledger(self.field, z), z.new_zeros(len(z))
        first, last = torch.zeros_like(z), torch.zeros_like(z)
        if len(z):
            goal = self.flow.log_u(stop)
            state = self._begin(ledger, z, start, goal, control)
            first = state.outputs[:, 0].clone()

            def attempt(state: ODEState) -> ODEState:
                step, new = self._attempt(ledger, state, stop, goal, control)
                error[ledger.active] += torch.where(new.known > state.known, step.error, 0.0)
                last[ledger.active] = step.slope
                return new

            ledger.run(state, goal, attempt, control.max_calls, lambda state: state.x, None)
        status = ledger.samples(0.0, 0.0, ()).status
        status = (status,) * len(z) if isinstance(status, str) else status
        arrived = per_sample(ledger.arrived, ledger.result, torch.full_like(z, math.nan))
        return Track(arrived, first, last, error, status, ledger.calls, ledger.evaluations)

    def fixed(self, z: Tensor, times: Tensor) -> Track:
        """Through the given times (N + 1,), every step taken."""
        ledger, error = Ledger(self.field, z), z.new_zeros(len(z))
        s = self.flow.log_u(times)
        ramp = s[0] + (s[1] - s[0]) * 2.0 ** -torch.arange(RAMP, 0, -1, device=s.device)
        times, s = torch.cat([times[:1], self.flow.time(ramp), times[1:]]), torch.cat([s[:1], ramp, s[1:]])
        state = self._begin(ledger, z, times[0], s[-1], Control(0, 1, 1))
        first = last = state.outputs[:, 0].clone()
        for s_k, t_k in zip(s[1:], times[1:], strict=True):
            s_new, t_new = s_k.expand(len(z)), t_k.expand(len(z))
            step = self._propose(ledger, state, s_new, t_new)
            error += step.error
            good, last = state.finite & finite(step.slope), step.slope
            state = ODEState(t_new, s_new, step.z, state.h, good, step.nodes, step.outputs, state.known + 1)
        status = tuple(STATUS[OK if good else NOT_FINITE] for good in state.finite.tolist())
        arrived = per_sample(state.finite, state.x, torch.full_like(z, math.nan))
        return Track(arrived, first, last, error, status, ledger.calls, ledger.evaluations)

    def _begin(self, ledger: Ledger, z: Tensor, start: Tensor, goal: Tensor, control: Control) -> ODEState:
        t = start.expand(len(z))
        s = self.flow.log_u(t)
        slope = ledger.evaluate(FLOW, z, t)
        y, v = z[:, : self.dim], slope[:, : self.dim]
        euler = control.error(like(goal.exp() - s.exp(), y) * v, y, y)
        h = (goal - s) / euler.clamp_min(1.0).sqrt()  # at which Euler's rule would meet the tolerance
        empty = torch.zeros_like(z)[:, None].expand(-1, self.order, -1)
        nodes, outputs = s[:, None].repeat(1, self.order + 1), torch.cat([slope[:, None], empty], 1)
        return ODEState(t, s, z, h, finite(slope), nodes, outputs, torch.ones_like(ledger.active))

    def _propose(self, ledger: Ledger, state: ODEState, s: Tensor, t: Tensor) -> _Proposal:
        """Adams-Bashforth, one call, Adams-Moulton of one order more."""
        order = state.known.clamp(max=self.order)
        old = torch.arange(self.order + 1, device=t.device) < order[:, None]
        all_of_them = torch.cat([torch.ones_like(old[:, :1]), old[:, :-1]], 1)
        predicted = self._moved(state, s, state.nodes, state.outputs, old)
        slope = ledger.evaluate(FLOW, predicted, t)
        nodes = torch.cat([s[:, None], state.nodes[:, :-1]], 1)
        outputs = torch.cat([slope[:, None], state.outputs[:, :-1]], 1)
        corrected = self._moved(state, s, nodes, outputs, all_of_them)
        lower = self._moved(state, s, nodes, outputs, old)  # without the oldest
        u, y = s.exp(), corrected[:, : self.dim]
        noise = y + like(1 - u, y) * slope[:, : self.dim]  # E[eps | y]
        # A step hands on l + log p_u(y), and grad log p_u(y) = -E[eps | y]/u.
        effect, missed = (
            z[:, self.dim :].mean(1) - (noise * z[:, : self.dim]).sum(1) / u
            for z in (corrected - predicted, corrected - lower)
        )
        local = corrected[:, : self.dim] - predicted[:, : self.dim]
        return _Proposal(corrected, slope, nodes, outputs, local, effect, SAFE * missed.abs())

    def _moved(self, state: ODEState, s: Tensor, nodes: Tensor, outputs: Tensor, used: Tensor) -> Tensor:
        """[y | l] at s by the polynomials through the `used` outputs."""
        v, rate = outputs[:, :, : self.dim], outputs[:, :, self.dim :]
        on_v, on_rate = (integrals(nodes, used, state.s, s, kernel) for kernel in (torch.exp, None))
        return state.x + torch.cat([weighted(on_v, v), weighted(on_rate, rate)], 1)

    def _attempt(
        self, ledger: Ledger, state: ODEState, stop: Tensor, goal: Tensor, control: Control
    ) -> tuple[_Proposal, ODEState]:
        """A step of every running sample, taken where state and density allow it."""
        s = state.target(goal)
        t = torch.where(s == goal, stop, alone(self.flow.time, s))
        step = self._propose(ledger, state, s, t)
        y, y_new = state.x[:, : self.dim], step.z[:, : self.dim]
        per_dim = step.effect.abs() / (control.atol * self.dim)
        # A derivative that is not finite makes both NaN: the step is refused, and the sample let go.
        size = torch.maximum(control.error(step.difference, y, y_new), per_dim)
        taken = size <= 1
        order = state.known.clamp(max=self.order) + 1.0
        growth = torch.where(state.known < self.order, EAGER, SMOOTH)
        return step, ODEState(
            torch.where(taken, t, state.t),
            torch.where(taken, s, state.s),
            per_sample(taken, step.z, state.x),
            (s - state.s) * factor(size, order, growth),
            finite(step.slope),
            per_sample(taken, step.nodes, state.nodes),
            per_sample(taken, step.outputs, state.outputs),
            state.known + taken,
        )
