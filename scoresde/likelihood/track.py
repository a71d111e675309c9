"""State and log-density along the probability-flow ODE, from data to noise."""

from __future__ import annotations

import math
from functools import partial
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
from ..solvers.adaptive_ode import EAGER, SMOOTH, START, Flow, ODEState, integrate
from .divergence import Divergence, pullback

RAMP = 5  # nodes that cut up the first step of a fixed grid, each 4 times as far out as the one before
SAFE = 4.0  # the difference of two correctors does not see that both are evaluated at the predicted state


class Field(BaseDenoiser):
    """`[y | l] -> [v | M estimates of div_y v]` as the flow view of a denoiser, so that `Ledger` can count
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
        return torch.cat([v.detach().flatten(1), scale * trace], 1)


class Track(NamedTuple):
    """What the integration left.

    z            (B, D + M) y at t_max and the integrals of div_y v; NaN for samples that did not arrive
    first        (B, D + M) v and div_y v at the start
    error        (B,) estimated error of the log-density, summed over the steps
    status       (B,) words
    calls, evaluations  network calls, and (B,) those of each sample
    """

    z: Tensor
    first: Tensor
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
    """Predictor-corrector of `adaptive_ode` for `y` and density, run from the end to t_max."""

    field: BaseDenoiser
    flow: Flow
    dim: int
    order: int

    def adaptive(self, z: Tensor, start: Tensor, stop: Tensor, control: Control) -> Track:
        """Steps chosen for each sample by itself, times () from `start` to `stop`."""
        ledger, error, first = Ledger(self.field, z), z.new_zeros(len(z)), torch.zeros_like(z)
        if len(z):
            goal = self.flow.log_u(stop)
            state = self._begin(ledger, z, start, goal, control)
            first = state.outputs[:, 0].clone()
            attempt = partial(self._attempt, ledger, error, stop, goal, control)
            ledger.run(state, goal, attempt, control.max_calls, lambda state: state.x, None)
        status = ledger.samples(0.0, 0.0, ()).status
        status = (status,) * len(z) if isinstance(status, str) else status
        arrived = per_sample(ledger.arrived, ledger.result, torch.full_like(z, math.nan))
        return Track(arrived, first, error, status, ledger.calls, ledger.evaluations)

    def fixed(self, z: Tensor, times: Tensor) -> Track:
        """Through the given times (N + 1,), every step taken."""
        ledger, error = Ledger(self.field, z), z.new_zeros(len(z))
        s = self.flow.log_u(times)
        ramp = s[0] + (s[1] - s[0]) * 4.0 ** -torch.arange(RAMP, 0, -1, device=s.device)
        times, s = torch.cat([times[:1], self.flow.time(ramp), times[1:]]), torch.cat([s[:1], ramp, s[1:]])
        state = self._begin(ledger, z, times[0], s[-1], Control(0, 1, 1))
        first = state.outputs[:, 0].clone()
        for s_k, t_k in zip(s[1:], times[1:], strict=True):
            s_new, t_new = s_k.expand(len(z)), t_k.expand(len(z))
            step = self._propose(ledger, state, s_new, t_new)
            error += step.error
            good = state.finite & finite(step.slope)
            state = ODEState(t_new, s_new, step.z, state.h, good, step.nodes, step.outputs, state.known + 1)
        status = tuple(STATUS[OK if good else NOT_FINITE] for good in state.finite.tolist())
        arrived = per_sample(state.finite, state.x, torch.full_like(z, math.nan))
        return Track(arrived, first, error, status, ledger.calls, ledger.evaluations)

    def _begin(self, ledger: Ledger, z: Tensor, start: Tensor, goal: Tensor, control: Control) -> ODEState:
        t = start.expand(len(z))
        s = self.flow.log_u(t)
        slope = ledger.evaluate(FLOW, z, t)
        y, v = z[:, : self.dim], slope[:, : self.dim]
        euler = control.error(like(goal.exp() - s.exp(), y) * v, y, y)
        h = START * (goal - s) / euler.clamp_min(1.0).sqrt()
        empty = torch.zeros_like(z)[:, None].expand(-1, self.order, -1)
        nodes, outputs = s.exp()[:, None].repeat(1, self.order + 1), torch.cat([slope[:, None], empty], 1)
        return ODEState(t, s, z, h, finite(slope), nodes, outputs, torch.ones_like(ledger.active))

    def _propose(self, ledger: Ledger, state: ODEState, s: Tensor, t: Tensor) -> _Proposal:
        """Adams-Bashforth, one call, Adams-Moulton of one order more."""
        u, u_new = state.s.exp(), s.exp()
        order = state.known.clamp(max=self.order)
        used = torch.arange(self.order + 1, device=t.device) < order[:, None]
        predicted = state.x + integrate(state.nodes, state.outputs, used, u, u_new)
        slope = ledger.evaluate(FLOW, predicted, t)
        nodes = torch.cat([u_new[:, None], state.nodes[:, :-1]], 1)
        outputs = torch.cat([slope[:, None], state.outputs[:, :-1]], 1)
        lower = state.x + integrate(nodes, outputs, used, u, u_new)  # the corrector without the oldest node
        used = torch.cat([torch.ones_like(used[:, :1]), used[:, :-1]], 1)
        corrected = state.x + integrate(nodes, outputs, used, u, u_new)
        y = corrected[:, : self.dim]
        noise = y + like(1 - u_new, y) * slope[:, : self.dim]  # E[eps | y]

        def effect(local: Tensor) -> Tensor:
            # A step hands on l + log p_u(y), and grad log p_u(y) = -E[eps | y]/u.
            return local[:, self.dim :].mean(1) - (noise * local[:, : self.dim]).sum(1) / u_new

        local = corrected - predicted
        error = SAFE * effect(corrected - lower).abs()
        return _Proposal(corrected, slope, nodes, outputs, local[:, : self.dim], effect(local), error)

    def _attempt(
        self, ledger: Ledger, error: Tensor, stop: Tensor, goal: Tensor, control: Control, state: ODEState
    ) -> ODEState:
        """A step of every running sample, taken where state and density allow it."""
        s = state.target(goal)
        t = torch.where(s == goal, stop, alone(self.flow.time, s))
        step = self._propose(ledger, state, s, t)
        y, y_new = state.x[:, : self.dim], step.z[:, : self.dim]
        per_dim = step.effect.abs() / (control.atol * self.dim)
        # A derivative that is not finite makes both NaN: the step is refused, and the sample let go.
        size = torch.maximum(control.error(step.difference, y, y_new), per_dim)
        taken = size <= 1
        error[ledger.active] += torch.where(taken, step.error, 0.0)
        growth = torch.where(state.known < self.order, EAGER, SMOOTH)
        return ODEState(
            torch.where(taken, t, state.t),
            torch.where(taken, s, state.s),
            per_sample(taken, step.z, state.x),
            (s - state.s) * factor(size, self.order + 1.0, growth),
            finite(step.slope),
            per_sample(taken, step.nodes, state.nodes),
            per_sample(taken, step.outputs, state.outputs),
            state.known + taken,
        )
