"""The checks of scoresde.testing: right things pass, planted mistakes are found, and cases print as code."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import scoresde
from scoresde import grids, laws, solvers
from scoresde.ddpm import DDPM, discretize
from scoresde.denoiser import BaseDenoiser, Denoiser
from scoresde.networks import MLP
from scoresde.schedules import Learned, Linear, Schedule
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, ReverseSDE, SubVPSDE, like
from scoresde.testing import (
    check_denoiser,
    check_discretization,
    check_schedule,
    check_sde,
    failure,
    profiles,
    strategies,
)

FEWER = settings(max_examples=max(1, settings.default.max_examples // 3))


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- what is right passes


@given(strategies.schedules())
def test_every_schedule_passes(schedule: Schedule) -> None:
    check_schedule(schedule)


@FEWER
@given(strategies.sdes())
def test_every_process_passes(sde: LinearSDE) -> None:
    check_sde(sde)


@given(strategies.schedules(), st.integers(1, 200))
def test_every_exact_chain_passes(schedule: Schedule, n: int) -> None:
    check_discretization(discretize(VPSDE(schedule=schedule), n), VPSDE(schedule=schedule))


def test_a_schedule_that_trains_passes() -> None:
    schedule = Learned(hidden=3)
    check_schedule(schedule)
    check_sde(VPSDE(schedule=schedule))
    check_discretization(discretize(VPSDE(schedule=schedule), 20), VPSDE(schedule=schedule))
    check_denoiser(Planted.law.denoiser(VPSDE(schedule=schedule)), Planted.law)
    assert all(p.grad is None for p in schedule.parameters())


@given(strategies.beta_tables())
def test_every_table_is_the_chain_of_its_process(betas: list[float]) -> None:
    check_discretization(torch.tensor(betas, dtype=torch.float64), VPSDE.from_betas(betas))


@FEWER
@given(st.data())
def test_every_exact_denoiser_passes(data) -> None:
    law = data.draw(strategies.laws())
    model = data.draw(strategies.denoisers(st.just(law)))
    check_denoiser(model, law)


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "flow"])
def test_a_network_passes_without_a_law(predicts: str) -> None:
    check_denoiser(Denoiser(MLP(2, hidden=8, layers=1), VPSDE(), predicts), data=torch.randn(5, 2))


class Power:
    """A user's schedule, with nothing but the three methods: B = 12 t^p."""

    def __init__(self, p: float = 1.7) -> None:
        self.p = p

    def B(self, t: Tensor) -> Tensor:
        return 12 * t**self.p

    def beta(self, t: Tensor) -> Tensor:
        return 12 * self.p * t ** (self.p - 1)

    def time(self, B: Tensor) -> Tensor:
        return (B / 12) ** (1 / self.p)


class InNumpy(Power):
    """The same without autograd."""

    def B(self, t: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(12 * t.numpy() ** self.p))


class Duck:
    """A process that only has the methods."""

    def __init__(self, sde: LinearSDE, **methods: Any) -> None:
        self.sde, self.methods = sde, methods

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["methods"].get(name, getattr(self.__dict__["sde"], name))


@pytest.mark.parametrize("schedule", [Power(), Power(1.0), InNumpy()], ids=lambda s: type(s).__name__)
def test_a_users_schedule_in_five_lines(schedule: Power) -> None:
    check_schedule(schedule)
    check_sde(VPSDE(schedule=schedule))
    check_discretization(lambda n: VPSDE(schedule=schedule).betas(n), VPSDE(schedule=schedule))
    check_discretization(
        lambda n: discretize(VPSDE(schedule=schedule), n, "euler"), VPSDE(schedule=schedule), order=1
    )


def test_a_users_process_and_denoiser() -> None:
    for sde in (VPSDE(), VESDE(), EDM(), Rectified()):
        check_sde(Duck(sde))

    class Mine:  # no base class
        sde = VPSDE()
        law = laws.Gaussian([0.3, -1.0], 0.4)

        def __call__(self, x, t):
            alpha, noise = like(self.sde.alpha(t), x), like(self.sde.sigma(t) ** 2, x)
            return self.law.mean + alpha * 0.4 / (0.4 * alpha**2 + noise) * (x - alpha * self.law.mean)

        def noise(self, x, t):
            return (x - like(self.sde.alpha(t), x) * self(x, t)) / like(self.sde.sigma(t), x)

        def score(self, x, t):
            return -self.noise(x, t) / like(self.sde.sigma(t), x)

        def velocity(self, x, t):
            return like(self.sde.alpha(t), x) * self.noise(x, t) - like(self.sde.sigma(t), x) * self(x, t)

        def flow(self, x, t):
            return self.noise(x, t) - self(x, t)

    check_denoiser(Mine(), Mine.law)


# ---- planted mistakes: schedules


class Naive(Linear):
    """alpha first, B from it: all digits are lost at small t."""

    def B(self, t: Tensor) -> Tensor:
        return -2 * (-0.5 * super().B(t)).exp().log()


class OffInverse(Linear):
    def time(self, B: Tensor) -> Tensor:
        return super().time(B) * (1 + 1e-10)


class WrongRate(Linear):
    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t**1.0000001


class WrongRateInNumpy(InNumpy):
    def beta(self, t: Tensor) -> Tensor:
        return super().beta(t) * (1 + 1e-7)


class Falling(Linear):
    def B(self, t: Tensor) -> Tensor:
        return super().B(t) * (1 - t) ** 2

    def beta(self, t: Tensor) -> Tensor:
        return super().beta(t) * (1 - t) ** 2 - 2 * (1 - t) * super().B(t)


class OfOneNumber(Power):
    def B(self, t: Tensor) -> Tensor:
        return 12 * math.exp(self.p * math.log(t))  # pyright: ignore


class Single(Linear):
    def B(self, t: Tensor) -> Tensor:
        return super().B(t.float())


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (Naive(), r"B (rises by the integral of beta, to relative accuracy at small t|increases)"),
        (
            OffInverse(),
            r"time inverts B: measured 9\.9.*e-11, bound .*; worst case: t=0\.99, schedule=OffInverse",
        ),
        (WrongRate(), r"beta is the derivative of B: measured .*, bound .*; worst case: t="),
        (WrongRateInNumpy(), r"beta is the derivative of B"),
        (Falling(), r"B\(0\) >= 0|B increases"),
        (OfOneNumber(), r"B of a schedule takes float64 tensors of any shape: \w+ \(.*\) for shape \(\d+,\)"),
        (Single(), r"B of a schedule is float64, .* found found=\(torch.float32"),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, Linear | Power) else "",
)
def test_mistakes_in_schedules_are_found(planted: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_schedule(planted)


# ---- planted mistakes: processes


class Float32Sigma(VPSDE):
    """The usual formula, in the usual precision, widened afterwards."""

    def sigma(self, t):
        return (1 - self.alpha(t).float() ** 2).sqrt().double()


class Float32SigmaThroughout(Float32Sigma):
    """The same with a log-SNR that agrees with it."""

    def log_snr(self, t):
        return 2 * (self.alpha(t).log() - self.sigma(t).log())


class Float64Subtraction(VPSDE):
    """1 - alpha^2 in float64 loses digits too."""

    def sigma(self, t):
        return (1 - self.alpha(t) ** 2).sqrt()

    def log_snr(self, t):
        return 2 * (self.alpha(t).log() - self.sigma(t).log())


class SwappedTransition(VPSDE):
    def scale(self, s, t):
        return super().scale(t, s)


class SwappedInnovation(VPSDE):
    def innovation(self, s, t):
        return super().innovation(s, t) * super().scale(s, t) ** 2


class NoHalf(VPSDE):
    def rates(self, t):
        f, g2 = super().rates(t)
        return 2 * f, g2


class NoHalfInDriftOnly(VPSDE):
    def drift(self, x, t):
        return like(-self.beta(t), x) * x


class RootOfDiffusion(VPSDE):
    def diffusion(self, t):
        return self.rates(t)[1]


class VarianceOfVP(SubVPSDE):
    """sub-VP scales with the diffusion of VP."""

    def rates(self, t):
        return -0.5 * self.beta(t), self.beta(t)


class BridgeOfSigma(VPSDE):
    def bridge(self, x0, xt, s, t):
        mean, std = super().bridge(x0, xt, s, t)
        return mean, std * like(self.sigma(s) / self.sigma(t), xt)


class BridgeWithoutAlpha(VPSDE):
    def bridge(self, x0, xt, s, t):
        a, noise = self.transition(s, t)
        total = self.sigma(t) ** 2
        return like(a * self.sigma(s) ** 2 / total, xt) * xt + like(noise**2 / total, xt) * x0, noise


class OffTime(VPSDE):
    def time(self, log_snr):
        return super().time(log_snr) + 1e-10


class FlowWithoutHalf(VPSDE):
    def probability_flow(self, denoiser):
        return lambda x, t: like(self.rates(t)[0], x) * x - like(self.rates(t)[1], x) * denoiser.score(x, t)


class ReverseOfFlow(VPSDE):
    def reverse(self, denoiser, shape=None):
        class Wrong(ReverseSDE):
            def drift(self, x, t):
                f, g2 = self.sde.rates(t)
                return like(f, x) * x - like(g2 / 2, x) * self.denoiser.score(x, t)

        return Wrong(self, denoiser, shape)


class ReverseClock(VPSDE):
    def reverse(self, denoiser, shape=None):
        class Wrong(ReverseSDE):
            def f(self, s, y):
                return self.drift(y, self._clock(s))

        return Wrong(self, denoiser, shape)


class NotWidened(VPSDE):
    def sigma(self, t):
        return super().sigma(t) if not isinstance(t, Tensor) or t.dtype == torch.float64 else self._single(t)

    def _single(self, t):
        return super().sigma(t).float().double()


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (Float32Sigma(), r"log_snr is log\(alpha\^2/sigma\^2\): measured .*bound|sigma is positive"),
        (Float32SigmaThroughout(), r"sigma is positive: .*t=1e-08, sde="),
        (Float64Subtraction(), r"time inverts log_snr: measured"),
        (
            SwappedTransition(),
            r"transition scales by alpha_t/alpha_s: measured .*; worst case: s=.*, t=.*, sde=",
        ),
        (SwappedInnovation(), r"transition from s to t adds the integral of diffusion\^2"),
        (NoHalf(), r"the drift is d log alpha/dt x"),
        (NoHalfInDriftOnly(), r"the drift is d log alpha/dt x"),
        (RootOfDiffusion(), r"the squared diffusion is d sigma\^2/dt - 2 f sigma\^2"),
        (VarianceOfVP(), r"the squared diffusion is d sigma\^2/dt - 2 f sigma\^2"),
        (BridgeOfSigma(), r"bridge is Bayes' rule: standard deviation"),
        (BridgeWithoutAlpha(), r"bridge is Bayes' rule: factor of x_0"),
        (OffTime(), r"time inverts log_snr: measured"),
        (FlowWithoutHalf(), r"the probability flow is f x - g\^2 score/2"),
        (ReverseOfFlow(), r"the reverse drift is f x - g\^2 score"),
        (ReverseClock(), r"the reverse of the reverse has the forward drift"),
        (NotWidened(), r"sigma widens a float32 time first"),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, LinearSDE) else "",
)
def test_mistakes_in_processes_are_found(planted: LinearSDE, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sde(planted)


def slightly(value: Any, part: int | None = None) -> Any:
    """A number, one of a pair, or what a function or a reverse process gives, off by 1e-8 of it."""
    if isinstance(value, Tensor):
        return value * (1 - 1e-8)
    if isinstance(value, tuple):
        return tuple(slightly(v) if k == part else v for k, v in enumerate(value))
    if isinstance(value, ReverseSDE):
        names = ("drift", "diffusion", "f", "g")
        wrong = {n: lambda *a, n=n: slightly(getattr(value, n)(*a)) for n in names[part : part + 1]}
        return type("Off", (), {**{n: getattr(value, n) for n in names}, **wrong})
    return lambda *a: slightly(value(*a))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, None) for name in ("alpha", "sigma", "log_snr", "time", "drift", "diffusion")),
        *((name, part) for name in ("transition", "marginal", "bridge") for part in (0, 1)),
        *(("reverse", part) for part in range(4)),
        ("probability_flow", None),
    ],
)
@pytest.mark.parametrize("sde", [VPSDE(), Rectified()], ids=repr)
def test_no_method_of_a_process_may_be_off_by_1e_8(sde: LinearSDE, name: str, part: int | None) -> None:
    check_sde(Duck(sde))
    method = getattr(sde, name)
    with pytest.raises(AssertionError, match=r"measured .*, bound .*; worst case: "):
        check_sde(Duck(sde, **{name: lambda *a: slightly(method(*a), part)}))


@pytest.mark.parametrize("name", ["B", "beta", "time"])
def test_no_method_of_a_schedule_may_be_off_by_1e_10(name: str) -> None:
    wrong = Power()
    method = getattr(wrong, name)
    setattr(wrong, name, lambda u: method(u) * (1 + 1e-10))
    with pytest.raises(AssertionError, match=r"measured .*, bound .*; worst case: t="):
        check_schedule(wrong)


@pytest.mark.parametrize("name", ["log_alpha_bars", "betas", "times", "marginal", "transition", "posterior"])
@pytest.mark.parametrize("part", [0, 1])
def test_nothing_of_a_chain_may_be_off_by_1e_8(name: str, part: int) -> None:
    chain = DDPM(VPSDE().betas(50))

    class Off:
        def __getattr__(self, other: str) -> Any:
            value = getattr(chain, other)
            if other != name:
                return value
            return slightly(value) if isinstance(value, Tensor) else lambda *a: slightly(value(*a), part)

        def __len__(self) -> int:
            return len(chain)

    with pytest.raises(AssertionError, match=r"measured .*, bound .*; worst case: "):
        check_discretization(Off(), VPSDE())


@pytest.mark.parametrize("name", ["forward", "noise", "score", "velocity", "flow"])
def test_no_view_of_a_denoiser_may_be_off_by_1e_8(name: str) -> None:
    planted = Planted()
    method = getattr(planted, name)
    setattr(planted, name, lambda x, t: method(x, t) * (1 + 1e-8))
    with pytest.raises(AssertionError, match=r"measured .*, bound .*; worst case: "):
        check_denoiser(planted, Planted.law)


def test_what_a_process_lacks_is_named() -> None:
    with pytest.raises(AssertionError, match=r"expected a process with alpha, .* lacks log_snr, time, drift"):
        check_sde(type("Half", (), {"alpha": abs, "sigma": abs})())
    with pytest.raises(AssertionError, match="lacks time"):
        check_schedule(type("Half", (), {"B": abs, "beta": abs})())
    with pytest.raises(AssertionError, match=r"expected a chain with .* lacks log_alpha_bars, times"):
        check_discretization(VPSDE(), VPSDE())
    with pytest.raises(AssertionError, match=r"expected a denoiser with sde, .* lacks sde, noise"):
        check_denoiser(abs, Planted.law)


# ---- planted mistakes: discretizations


class LateLabels(DDPM):
    """The time of step i is said to be (i - 1)/N."""

    def __init__(self, betas) -> None:
        super().__init__(betas)
        self.times = self.times - 1 / len(self) + 1e-9


class WrongVariance(DDPM):
    def posterior(self, x_t, x_0, i):
        mean, _ = super().posterior(x_t, x_0, i)
        return mean, self._take(self.betas, i, x_t)


class WrongMean(DDPM):
    def posterior(self, x_t, x_0, i):
        mean, variance = super().posterior(x_t, x_0, i)
        return mean + self._take(self.betas, i, x_t) ** 4 * x_t, variance


class KeepsBetas(DDPM):
    """Respacing that keeps every k-th beta instead of every k-th product."""

    def respace(self, indices):
        at = torch.tensor(indices) - 1
        return DDPM.from_log_alphas(self.log_alphas[at], self.times[at])


class ForgetsTimes(DDPM):
    def respace(self, indices):
        return DDPM.from_log_alphas(super().respace(indices).log_alphas)


class WrongTransition(DDPM):
    def transition(self, x_j, j, i):
        mean, variance = super().transition(x_j, j, i)
        return mean, variance * (1 + 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda b: VPSDE().betas(100, "euler"),
            r"marginals are the process's at every node: .*Euler's rule: say order=1\): measured 0\.85",
        ),
        (LateLabels, r"right at t = i/N, but step 1 says t = 1e-09: a shifted label\?\)"),
        (WrongVariance, r"posterior is the conditional of the joint Gaussian: variance.*i=1"),
        (WrongMean, r"posterior is the conditional of the joint Gaussian: factor of x_t"),
        (KeepsBetas, r"respacing keeps the marginals"),
        (ForgetsTimes, r"respacing keeps the times"),
        (WrongTransition, r"transitions compose to the marginal"),
    ],
    ids=["euler", "label", "variance", "mean", "respacing", "times", "transition"],
)
def test_mistakes_in_discretizations_are_found(make, message: str) -> None:
    betas = VPSDE().betas(100)
    for table in (DDPM(betas), betas, betas.tolist(), betas.numpy()):
        check_discretization(table, VPSDE())
    with pytest.raises(AssertionError, match=message):
        check_discretization(make(betas), VPSDE())


def test_orders_of_discretizations() -> None:
    sde = VPSDE(0.1, 20.0)

    def historical(n: int) -> Tensor:
        return torch.linspace(0.1 / n, 20 / n, n, dtype=torch.float64)

    def middle(n: int) -> Tensor:
        """-expm1(-beta at the middle / n): exact for a linear rate."""
        return -torch.expm1(-sde.beta((torch.arange(n, dtype=torch.float64) + 0.5) / n) / n)

    def trapezium(n: int) -> Tensor:
        return -torch.expm1(-0.25 * (sde.B(torch.arange(1, n + 1) / n * 1.0) * 0 + 1) / n)

    check_discretization(lambda n: discretize(sde, n, "euler"), sde, order=1)
    check_discretization(historical, sde, order=1)
    check_discretization(middle, sde)
    steep = VPSDE(schedule=Power(2.5))  # its rate reaches 30
    check_discretization(lambda n: discretize(steep, n, "euler"), steep, order=1)
    with pytest.raises(AssertionError, match=r"sizes=\[50, 100\]"):  # too few steps for it to show
        check_discretization(lambda n: discretize(steep, n, "euler"), steep, order=1, sizes=[50, 100])
    cosine = VPSDE(schedule=scoresde.schedules.Cosine(log_snr_min=-4.0))
    check_discretization(
        lambda n: -torch.expm1(-cosine.beta((torch.arange(n, dtype=torch.float64) + 0.5) / n) / n),
        cosine,
        order=2,
    )
    with pytest.raises(AssertionError, match=r"is of order 2, measured order 1\.0.*errors=\["):
        check_discretization(historical, sde, order=2)
    with pytest.raises(AssertionError, match="has an error to measure an order on"):
        check_discretization(middle, sde, order=2)
    with pytest.raises(AssertionError, match=r"of order 1, measured order -?0\.0"):
        check_discretization(trapezium, sde, order=1)
    with pytest.raises(TypeError, match="expected a function of N"):
        check_discretization(sde.betas(10), sde, order=1)


# ---- planted mistakes: denoisers


class Planted(BaseDenoiser):
    """An exact denoiser, to plant mistakes in."""

    law = laws.Mixture([0.3, 0.7], [[-1.0, 0.5], [0.8, 0.0]], 0.2)

    def __init__(self) -> None:
        super().__init__()
        self.sde = VPSDE()
        self.exact = self.law.denoiser(self.sde)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def forward(self, x, t):
        return self.exact(x, t)


class AlphaForSigmaInScore(Planted):
    def score(self, x, t):
        alpha = like(self.sde.alpha(t), x)
        return (alpha * self(x, t) - x) / alpha**2


class AlphaForSigmaInD(Planted):
    """x + alpha^2 score in place of x + sigma^2 score."""

    def forward(self, x, t):
        alpha = like(self.sde.alpha(t), x)
        return (x + alpha**2 * self.exact.score(x, t)) / alpha


class SignOfVelocity(Planted):
    def velocity(self, x, t):
        return -super().velocity(x, t)


class LogProbOfOther(Planted):
    def log_prob(self, x, t):
        return 1.001 * self.exact.log_prob(x, t)


class OffByOneLabel(Denoiser):
    """A network for labels 0..N-1 that is fed i."""

    def __init__(self) -> None:
        inner = strategies.AsNetwork(Planted.law.denoiser(VPSDE()))
        super().__init__(inner.network, inner.sde, "noise")

    def _label(self, t):
        return t + 1 / 1000


class CouplesTheBatch(Planted):
    def forward(self, x, t):
        t = torch.as_tensor(t)
        return self.exact(x, t) + (1e-6 * x.mean() if t.ndim else 0.0)


class OneTimeForAll(Planted):
    def forward(self, x, t):
        return self.exact(x, torch.as_tensor(t).flatten()[0])


class OneTimeForAllScores(Planted):
    def score(self, x, t):
        return self.exact.score(x, torch.as_tensor(t).max())


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (AlphaForSigmaInScore(), r"score is \(alpha D - x\)/sigma\^2 \(Tweedie\)"),
        (AlphaForSigmaInD(), r"(?s)the denoiser is E\[x_0 \| x_t\] \(Tweedie: .*law=Mixture\("),
        (SignOfVelocity(), r"velocity is alpha noise - sigma D"),
        (LogProbOfOther(), r"the denoiser is E\[x_0 \| x_t\]|the score is the gradient of the log-density"),
        (OffByOneLabel(), r"the denoiser is E\[x_0 \| x_t\]"),
        (CouplesTheBatch(), r"a batch of equal times is a single time"),
        (OneTimeForAll(), r"each sample depends on its own state and time only"),
        (OneTimeForAllScores(), r"each sample depends on its own state and time only"),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, BaseDenoiser) else "",
)
def test_mistakes_in_denoisers_are_found(planted: BaseDenoiser, message: str) -> None:
    check_denoiser(Planted(), Planted.law)
    with pytest.raises(AssertionError, match=message):
        check_denoiser(planted, Planted.law)


def test_a_denoiser_needs_something_to_look_at() -> None:
    with pytest.raises(ValueError, match="expected a law or data to look at"):
        check_denoiser(Planted())
    for empty in ({"data": torch.zeros(0, 2)}, {"times": torch.zeros(0)}):
        with pytest.raises(ValueError, match=f"{next(iter(empty))}: expected something to look at"):
            check_denoiser(AlphaForSigmaInD(), Planted.law, **empty)


def test_mates_that_move_a_sample_are_found_without_a_law() -> None:
    class Centred(Planted):
        def forward(self, x, t):
            return self.exact(x, t) + 1e-3 * (x - x.mean(0))

    data = Planted.law.sample(5)
    check_denoiser(Planted(), data=data)
    check_denoiser(Planted(), data=data[:1])
    with pytest.raises(AssertionError, match="each sample depends on its own state and time only"):
        check_denoiser(Centred(), data=data)
    labelled = Denoiser(MLP(2, hidden=8, layers=1, classes=3), VPSDE()).given(label=torch.arange(5) % 3)
    check_denoiser(labelled, data=data)  # conditions stay beside their samples


# ---- how checks fail


def test_the_worst_case_is_the_largest_excess_over_its_bound() -> None:
    failure.at_most("fine", f64(0.1, 0.2), 0.2)
    failure.at_most("of nothing", torch.zeros(0), 0.0)
    with pytest.raises(AssertionError) as caught:
        failure.at_most("gap", f64(1.0, 0.5, 0.2), f64(0.9, 0.1, 0.3), t=f64(0.1, 0.2, 0.3), who="me", k=3)
    assert str(caught.value) == "gap: measured 0.5, bound 0.1; worst case: t=0.2, who='me', k=3"
    with pytest.raises(AssertionError, match=r"^gap: measured nan, bound 1$"):
        failure.at_most("gap", math.nan, 1.0)
    with pytest.raises(AssertionError, match=r"measured inf, bound 0; worst case: x=\[1.0, 2.0, 3.0\]"):
        failure.at_most("gap", f64(0.0, math.inf), 0.0, x=f64(1.0, 2.0, 3.0))
    with pytest.raises(AssertionError, match=r"measured 2, bound 1; worst case: row=7"):
        failure.at_most("gap", torch.tensor([[0.0], [2.0]]), 1.0, row=torch.tensor([[5], [7]]))
    failure.holds("fine", True)
    with pytest.raises(AssertionError, match=r"^shape: found n=3$"):
        failure.holds("shape", False, n=3)


def test_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings.get_current_profile_name()
    try:
        for name, examples in profiles.EXAMPLES.items():
            profiles.load(name)
            assert settings.default.max_examples == examples and settings.default.deadline is None
            assert settings.default.derandomize == (name in ("quick", "ci"))
        monkeypatch.setenv(profiles.VARIABLE, "quick")
        profiles.load()
        assert settings.get_current_profile_name() == "quick"
        with pytest.raises(
            ValueError, match=r"expected a profile of \['ci', 'fresh', 'nightly', 'quick'\], found 'fast'"
        ):
            profiles.load("fast")
    finally:
        settings.load_profile(before)


# ---- cases print as code


NAMES = {
    **vars(scoresde), **vars(laws), **vars(grids), **vars(solvers), **vars(scoresde.schedules),
    **vars(strategies), "torch": torch,
}  # fmt: skip
T = f64(0.001, 0.3, 0.9)


def values_of(case: Any) -> list[Any]:
    """Numbers that tell one case from another."""
    if isinstance(case, LinearSDE):
        return [case.alpha(T), case.sigma(T)]
    if isinstance(case, laws.Law):
        x = torch.linspace(-1, 1, 3 * case.dim, dtype=torch.float64).reshape(3, case.dim)
        return [case.denoiser(VPSDE())(x, 0.3), case.mean, case.cov]
    if isinstance(case, grids.Grid):
        return [case.t, case.lam]
    if isinstance(case, scoresde.Tableau):
        return [*case.canonical()]
    if isinstance(case, BaseDenoiser):
        # of a network what it predicts: where there is hardly a signal, D magnifies its rounding
        model = case.network.model if isinstance(case, Denoiser) else case
        x = torch.ones(2, model.law.dim, dtype=torch.float64)
        t = strategies.at(case.sde, 0.4)
        predicted = case.raw(x, t) if isinstance(case, Denoiser) else x
        return [model(x, t), predicted, case.sde.alpha(t)]
    if isinstance(case, Schedule):
        return [case.B(T), case.beta(T)]
    return [case]


def same(a: Any, b: Any, exact: bool) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    return a == b


def duplicated(law: laws.Mixture) -> bool:
    means = law.means
    return len(means) > 1 and bool((means == means[0]).all())


STRATEGIES: dict[str, Any] = {
    "schedules": strategies.schedules(),
    "sdes": strategies.sdes(),
    "beta_tables": strategies.beta_tables(),
    "laws": strategies.laws(),
    "laws on one coordinate with a density": strategies.laws(1, degenerate=False),
    "laws with modes at one point": strategies.mixtures(2).filter(duplicated),
    "grids": strategies.sdes().flatmap(strategies.grids),
    "denoisers": strategies.denoisers(),
    "tableaus": strategies.tableaus(longest=4),
    "shapes_and_dtypes": strategies.shapes_and_dtypes(),
}


@pytest.mark.parametrize("number", [0, 3, 7, 11])
@pytest.mark.parametrize("name", STRATEGIES)
def test_hypothesis_prints_code_that_makes_the_case(name: str, number: int) -> None:
    """What hypothesis reports of a failure, evaluated, is the case (the parameters of laws to rounding)."""
    cases: list[Any] = []

    @settings(
        phases=[Phase.generate], max_examples=20, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(STRATEGIES[name])
    def fails(case):
        cases.append(case)
        assert len(cases) <= number

    with pytest.raises(AssertionError) as caught:
        fails()
    note = "\n".join(caught.value.__notes__)
    call = re.search(r"fails\((.*?)\n\)", note, re.DOTALL)
    assert call is not None, note
    again = eval(f"dict({call[1]}\n)", dict(NAMES))["case"]
    for a, b in zip(values_of(again), values_of(cases[-1]), strict=True):
        assert same(a, b, exact="laws" not in name and name != "denoisers"), note


@pytest.mark.parametrize("name", ["schedules", "sdes", "laws", "denoisers", "beta_tables"])
def test_repr_is_code(name: str) -> None:
    """Up to 15 digits, for those whose repr is not a table of numbers or a long list."""

    @given(STRATEGIES[name])
    def check(case):
        again = eval(repr(case), dict(NAMES))
        assert type(again) is type(case)
        for a, b in zip(values_of(again), values_of(case), strict=True):
            assert same(a, b, exact=False), repr(case)

    check()


def test_cases_shrink_to_readable_ones() -> None:
    """The least failing case has short numbers."""

    @settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @given(strategies.beta_tables())
    def fails(betas):
        assert max(betas) < 0.9

    with pytest.raises(AssertionError) as caught:
        fails()
    (table,) = re.findall(r"betas=(\[.*?\])", "\n".join(caught.value.__notes__))
    assert len(eval(table)) == 1 and len(table) < 10, table


def test_strategies_reach_the_adversarial_cases() -> None:
    seen: set[str] = set()

    @settings(max_examples=150, derandomize=True, database=None, deadline=None)
    @given(strategies.laws(), strategies.sdes(), st.data())
    def look(law, sde, data):
        means = [tuple(m) for m in law.means.flatten(1).tolist()]
        seen.update({"duplicated modes"} if len(set(means)) < len(means) else ())
        seen.update({"no weight"} if bool((law.weights == 0).any()) else ())
        seen.update({"degenerate"} if law._spectrum.singular else ())
        seen.update({"no signal left"} if float(sde.alpha(sde.t_max)) < 1e-20 else ())
        seen.update({"nearly all signal left"} if float(sde.log_snr(sde.t_max)) > -1 else ())
        grid = data.draw(strategies.grids(sde))
        steps = grid.t.diff().abs()
        seen.update({"huge beside tiny"} if steps.max() > 300 * steps.min() else ())
        seen.update({"one step"} if len(grid) == 1 else ())
        seen.update({"noiseless end"} if grid.lam[-1] == math.inf else ())

    look()
    assert seen == {
        "duplicated modes", "no weight", "degenerate", "no signal left", "nearly all signal left",
        "huge beside tiny", "one step", "noiseless end",
    }  # fmt: skip
