"""Checks of schedules and processes: ours, and a user's own.

Each is a plain function: it returns nothing, or raises AssertionError with the worst case, the measured
number and the bound. What is checked needs no base class, only the methods. Nothing is compared with another
implementation: derivatives, integrals, Bayes' rule and the Fokker-Planck equation hold for any process, and
the laws of Gaussian mixtures are known. Bounds are rounding, carried through the condition of what is
computed, or the stated relative accuracy `rtol`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser
from ..schedules import Time
from ..sde import like
from .failure import at_most, holds
from .numerics import EPS, derivative, has, inside, integral, is_float64, name_of, shares

# ---- schedules


@torch.no_grad()
def check_schedule(schedule: Any, *, times: Tensor | None = None, rtol: float = 1e-12) -> None:
    """That `B, beta, time` are a schedule: float64, B increasing, beta its derivative, time its inverse.

    `times` (K,), increasing in (0, 1), are where it is looked at (None: 1e-8 to 0.999, small steps and
    large). B must be right to `rtol` relative even where it is tiny, or sigma = (1 - exp(-B))^(1/2) loses its
    digits at small t: its increments are compared with integrals of beta.
    """
    has(schedule, "schedule", ("B", "beta", "time"))
    t = shares() if times is None else times
    where: dict[str, Any] = {"t": t, "schedule": schedule}
    for method in (schedule.B, schedule.beta, schedule.time):
        is_float64(method, t, f"{name_of(method)} of a schedule", schedule)

    B, beta, ends = schedule.B(t), schedule.beta(t), schedule.B(torch.tensor([0.0, 1.0], dtype=t.dtype))
    holds("B(0) >= 0 and B(1) is finite", bool(0 <= ends[0] < ends[1] < math.inf), B=ends, schedule=schedule)
    at_most("B increases", B[:-1] - B[1:], 16 * EPS * B[1:], t=t[1:], schedule=schedule)
    coarse = schedule.B(torch.linspace(0, 1, 65, dtype=torch.float64))
    at_most("B increases strictly", -coarse.diff().min(), -torch.finfo(t.dtype).tiny, schedule=schedule)
    at_most("beta is positive", -beta, -torch.finfo(t.dtype).tiny, **where)

    slope, unsure = derivative(schedule.B, t, 0.0, 1.0)
    at_most(
        "beta is the derivative of B", (slope - beta).abs(), 1e-11 * beta + 64 * EPS * B + unsure, **where
    )

    start = torch.cat([t.new_zeros(1), t[:-1]])
    total, unsure = integral(lambda u, s, t: schedule.beta(u), start, t)
    rise = B - torch.cat([ends[:1], B[:-1]])
    claim = "B rises by the integral of beta, to relative accuracy at small t"
    bound = rtol * total.abs() + 64 * EPS * B + unsure
    at_most(claim, (rise - total).abs(), bound, since=start, **where)

    back = schedule.time(B)
    at_most("time inverts B", (back - t).abs(), rtol * t + 64 * EPS * B / beta, **where)


# ---- processes


SDE_METHODS = (
    "alpha", "sigma", "log_snr", "time", "drift", "diffusion", "marginal", "transition", "bridge", "reverse",
    "probability_flow",
)  # fmt: skip


@torch.no_grad()
def check_sde(sde: Any, *, times: Tensor | None = None, rtol: float = 1e-12) -> None:
    """That a process is one: its scales, rates, kernels, reverse and flow belong to one linear SDE.

    Scales are float64, log-SNR falls and `time` inverts it; drift and diffusion are d log alpha/dt and d
    sigma^2/dt - 2 f sigma^2, also integrated, so that sigma keeps its digits at small t; transitions carry
    the marginals and compose; the bridge is Bayes' rule; the laws of a mixture solve the Fokker-Planck
    equation, and the probability flow the continuity equation; the reverse of the reverse is the forward SDE.

    `times` (K,) increase strictly inside (t_min, t_max). Derive from `LinearSDE` to get what follows from
    `alpha, sigma, log_snr, time, rates, innovation`.
    """
    has(sde, "process", SDE_METHODS)
    t = inside(sde) if times is None else times
    _check_scales(sde, t)
    _check_rates(sde, t, rtol)
    _check_kernels(sde, t, rtol)
    _check_laws(sde, t)


def _check_scales(sde: Any, t: Tensor) -> None:
    where: dict[str, Any] = {"t": t, "sde": sde}
    for method in (sde.alpha, sde.sigma, sde.log_snr, sde.diffusion):
        is_float64(method, t, f"{name_of(method)} of a process", sde)
        # only where the float32 neighbour is still a time of the process
        single = t[len(t) // 4 : -1].float()
        gap = (method(single) - method(single.double())).abs()
        at_most(f"{name_of(method)} widens a float32 time first", gap, 0.0, t=single, sde=sde)
    alpha, sigma, log_snr = sde.alpha(t), sde.sigma(t), sde.log_snr(t)
    at_most("alpha is positive", -alpha, -torch.finfo(t.dtype).tiny, **where)
    at_most("sigma is positive", -sigma, -torch.finfo(t.dtype).tiny, **where)
    size = 1 + log_snr.abs() + 2 * alpha.log().abs()
    gap = (log_snr - 2 * (alpha.log() - sigma.log())).abs()
    at_most("log_snr is log(alpha^2/sigma^2)", gap, 1e-12 * size, **where)
    rise = log_snr[1:] - log_snr[:-1]
    at_most("log_snr falls", rise, 16 * EPS * size[1:], t=t[1:], sde=sde)
    slope, unsure = derivative(sde.log_snr, t, sde.t_min, sde.t_max, size=1.0)
    at_most("log_snr falls", slope - unsure, 0.0, **where)
    gap = (sde.time(log_snr) - t).abs()
    at_most("time inverts log_snr", gap, 1e-13 * t + 64 * EPS * size / slope.abs(), **where)


def _rates(sde: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """(f, g^2) at t (K,), from the drift of ones."""
    return sde.drift(torch.ones(len(t), 1, dtype=torch.float64), t)[:, 0], sde.diffusion(t) ** 2


def _check_rates(sde: Any, t: Tensor, rtol: float) -> None:
    where: dict[str, Any] = {"t": t, "sde": sde}
    f, g2 = _rates(sde, t)
    x = torch.tensor([[-3.0, 0.0, 0.5]], dtype=torch.float64).expand(len(t), 3)
    gap = (sde.drift(x, t) - f[:, None] * x).abs().amax(1)
    at_most("the drift is linear in x", gap, 8 * EPS * 3 * f.abs(), **where)

    slope, unsure = derivative(lambda u: sde.alpha(u).log(), t, sde.t_min, sde.t_max, size=1.0)
    size = f.abs() + slope.abs()
    at_most("the drift is d log alpha/dt x", (f - slope).abs(), 1e-10 * size + unsure, **where)
    sigma2 = sde.sigma(t) ** 2
    growth, unsure = derivative(lambda u: sde.sigma(u) ** 2, t, sde.t_min, sde.t_max)
    known = growth - 2 * f * sigma2
    size = g2 + growth.abs() + 2 * f.abs() * sigma2
    claim = "the squared diffusion is d sigma^2/dt - 2 f sigma^2"
    at_most(claim, (g2 - known).abs(), 1e-10 * size + unsure, **where)

    # What the noise adds from s to t: sigma_t^2 - a^2 sigma_s^2 = int_s^t g(u)^2 (alpha_t/alpha_u)^2 du.
    s = torch.cat([t.new_full((1,), sde.t_min), t[:-1]])
    added, unsure = integral(lambda u, s, t: sde.diffusion(u) ** 2 * (sde.alpha(t) / sde.alpha(u)) ** 2, s, t)
    a = sde.alpha(t) / sde.alpha(s)
    rounding = 64 * EPS * (1 + sde.alpha(t).log().abs()) * sigma2
    bound = rtol * added + rounding + unsure
    gap = (sigma2 - a**2 * sde.sigma(s) ** 2 - added).abs()
    claim = "sigma^2 grows by the integral of diffusion^2, to relative accuracy at small t"
    at_most(claim, gap, bound, since=s, **where)
    V = sde.transition(s, t)[1] ** 2
    claim = "the transition from s to t adds the integral of diffusion^2"
    at_most(claim, (V - added).abs(), bound, s=s, **where)


def _check_kernels(sde: Any, t: Tensor, rtol: float) -> None:
    """Transition, marginal and bridge, between all pairs of a few times."""
    few = t[:: max(1, len(t) // 12)]
    i, j = torch.triu_indices(len(few), len(few), offset=1)
    s, u = few[i], few[j]
    where: dict[str, Any] = {"s": s, "t": u, "sde": sde}
    a, std = sde.transition(s, u)
    alpha_s, alpha_u = sde.alpha(s), sde.alpha(u)
    slack = rtol * (1 + alpha_u.log().abs())  # the rounding of log alpha
    at_most("transition scales by alpha_t/alpha_s", (a - alpha_u / alpha_s).abs(), slack * a.abs(), **where)
    noise_s, noise_u = sde.sigma(s) ** 2, sde.sigma(u) ** 2
    gap = (a**2 * noise_s + std**2 - noise_u).abs()
    at_most(
        "transition carries the marginal: a^2 sigma_s^2 + std^2 = sigma_t^2", gap, slack * noise_u, **where
    )

    middle = s + 0.37 * (u - s)
    (a1, std1), (a2, std2) = sde.transition(s, middle), sde.transition(middle, u)
    at_most("transitions compose: scale", (a - a1 * a2).abs(), slack * a.abs(), middle=middle, **where)
    gap = (std**2 - a2**2 * std1**2 - std2**2).abs()
    # B_t - B_s rounds like B_t, whatever is left of it
    at_most("transitions compose: variance", gap, slack * std**2 + 8 * EPS * noise_u, middle=middle, **where)
    still, nothing = sde.transition(few, few)
    changed = (still - 1).abs() + nothing
    at_most("the transition from t to t changes nothing", changed, 0.0, t=few, sde=sde)

    x0 = torch.tensor([[0.4, -2.0]], dtype=torch.float64).expand(len(s), 2)
    mean, spread = sde.marginal(x0, u)
    gap = (mean - alpha_u[:, None] * x0).abs().amax(1) + (spread.flatten() - sde.sigma(u)).abs()
    bound = 8 * EPS * (2 * alpha_u + sde.sigma(u))
    at_most("marginal is (alpha x_0, sigma)", gap, bound, **where)
    single, spread = sde.marginal(x0.float(), u)
    holds("marginal keeps the dtype of x", single.dtype == spread.dtype == torch.float32, dtype=single.dtype)

    # Bayes: x_s | x_0 ~ N(alpha_s x_0, sigma_s^2) and x_t | x_s ~ N(a x_s, std^2), precisions added.
    one, zero = torch.ones(len(s), 1, dtype=torch.float64), torch.zeros(len(s), 1, dtype=torch.float64)
    on_data, width = sde.bridge(one, zero, s, u)
    on_state, _ = sde.bridge(zero, one, s, u)
    total = std**2 + a**2 * noise_s
    for claim, found, known in (
        ("bridge is Bayes' rule: factor of x_0", on_data[:, 0], alpha_s * std**2 / total),
        ("bridge is Bayes' rule: factor of x_t", on_state[:, 0], a * noise_s / total),
        ("bridge is Bayes' rule: standard deviation", width.flatten(), std * (noise_s / total).sqrt()),
    ):
        at_most(claim, (found - known).abs(), 4 * slack * known.abs() + 1e-300, **where)


def _check_laws(sde: Any, t: Tensor) -> None:
    """Fokker-Planck, continuity, and the reverse, on the exact laws of a mixture."""
    few = t[sde.log_snr(t).abs() < 14]
    model = _Exact(sde)
    for time in few[:: max(1, len(few) // 8)]:
        _check_laws_at(sde, model, time)


def _check_laws_at(sde: Any, model: _Exact, time: Tensor) -> None:
    z = torch.tensor([-2.5, -1.0, 0.0, 0.3, 1.1, 3.0], dtype=torch.float64)
    at = time.expand(len(z))
    alpha, noise, (f, g2) = sde.alpha(at), sde.sigma(at) ** 2, _rates(sde, at)
    width = (alpha**2 * model.variance + noise).sqrt()
    x = alpha * model.mean + width * z
    column, where = x[:, None], {"x": x, "t": float(time), "sde": sde}

    # d log p/dt by the chain rule through (alpha, sigma^2)
    by_alpha, by_noise, s, curvature = model.slopes(x, alpha, noise)
    d_alpha, unsure_alpha = derivative(sde.alpha, at, sde.t_min, sde.t_max, size=1.0)
    d_noise, unsure_noise = derivative(lambda u: sde.sigma(u) ** 2, at, sde.t_min, sde.t_max)
    change = by_alpha * d_alpha + by_noise * d_noise
    terms = [by_alpha * d_alpha, by_noise * d_noise, f, f * x * s, g2 * curvature, g2 * s**2]
    size = torch.stack(terms).abs().sum(0)
    unsure = 2 * (by_alpha.abs() * unsure_alpha + by_noise.abs() * unsure_noise) + 1e-9 * size
    known = -f - f * x * s + 0.5 * g2 * (curvature + s**2)
    at_most("the marginals solve the Fokker-Planck equation", (change - known).abs(), unsure, **where)

    flow = sde.probability_flow(model)
    v, size = flow(column, at)[:, 0], (f * x).abs() + g2 * s.abs()
    # A field that is not computed from the rates rounds like d alpha/dt and d sigma/dt.
    bound = 1e-9 * (size + d_alpha.abs() + d_noise.abs() / noise.sqrt())
    at_most("the probability flow is f x - g^2 score/2", (v - f * x + 0.5 * g2 * s).abs(), bound, **where)
    along_x = (-math.inf, math.inf, float(width[0]))
    stretch, unsure_v = derivative(lambda y: flow(y[:, None], at)[:, 0], x, *along_x)
    claim = "the probability flow carries the marginals (continuity equation)"
    at_most(claim, (change + stretch + v * s).abs(), unsure + unsure_v, **where)

    reverse = sde.reverse(model)
    b = reverse.drift(column, at)[:, 0]
    at_most("the reverse drift is f x - g^2 score", (b - f * x + g2 * s).abs(), 1e-10 * size, **where)
    at_most("the reverse keeps the diffusion", (reverse.diffusion(at) ** 2 - g2).abs(), 8 * EPS * g2, **where)
    clock = sde.t_max - float(time)
    told = sde.t_max - clock  # the time that this clock says, which rounds
    again = -(reverse.f(clock, column) - reverse.g(clock, column) ** 2 * model.score(column, told))
    gap = (again - sde.drift(column, told))[:, 0].abs()
    claim = "the reverse of the reverse has the forward drift"
    at_most(claim, gap, 1e-12 * size + 1e-300, clock=clock, **where)


class _Exact(BaseDenoiser):
    """The exact denoiser of a mixture of two Gaussians on a line, under any process with `alpha, sigma`."""

    weights, means, variances = (0.3, 0.7), (-1.0, 0.8), (0.1, 0.4)
    mean = 0.3 * -1.0 + 0.7 * 0.8
    variance = 0.3 * (0.1 + 1.26**2) + 0.7 * (0.4 + 0.54**2)

    def __init__(self, sde: Any) -> None:
        super().__init__()
        self.sde = sde

    def _parts(self, x: Tensor, alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Responsibilities, distances d_k = x - alpha m_k, variances v_k and means m_k, stacked first."""
        shape = (2, *[1] * x.ndim)
        w, m, S = (
            torch.tensor(v, dtype=x.dtype).view(shape) for v in (self.weights, self.means, self.variances)
        )
        v, d = alpha**2 * S + noise, x - alpha * m
        return (w.log() - 0.5 * v.log() - 0.5 * d**2 / v).softmax(0), d, v, m

    def slopes(self, x: Tensor, alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives of log p(x; alpha, sigma^2): by alpha, by sigma^2, by x, and twice by x."""
        r, d, v, m = self._parts(x, alpha, noise)
        S = torch.tensor(self.variances, dtype=x.dtype).view(2, *[1] * x.ndim)
        by_v = 0.5 * (d**2 / v - 1) / v  # of each log-density, by its variance
        s = -(r * d / v).sum(0)
        curvature = (r * (d**2 / v - 1) / v).sum(0) - s**2
        return (r * (by_v * 2 * alpha * S + d * m / v)).sum(0), (r * by_v).sum(0), s, curvature

    def _at(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        return like(self.sde.alpha(t), x), like(self.sde.sigma(t), x) ** 2

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        alpha, noise = self._at(x, t)
        r, d, v, m = self._parts(x, alpha, noise)
        S = torch.tensor(self.variances, dtype=x.dtype).view(2, *[1] * x.ndim)
        return (r * (m + alpha * S * d / v)).sum(0)

    def score(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        r, d, v, _ = self._parts(x, *self._at(x, t))
        return -(r * d / v).sum(0)
