"""Processes: kernels, Bayes, rates, the reverse SDE and the probability flow, by exact laws."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_schedules import exact_B, f64

from scoresde.denoiser import BaseDenoiser
from scoresde.grids import Grid
from scoresde.schedules import Cosine, Learned, Linear, Sigmoid, Tabulated, tabulated_betas
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE, clock, like
from scoresde.testing.strategies import at, beta_tables, cosines, floats, linears, sdes, shares, times

torchsde = pytest.importorskip("torchsde")


class GaussianModel(BaseDenoiser):
    """The exact denoiser of data N(mean, variance I): D = m + alpha v/(alpha^2 v + sigma^2)(x - alpha m)."""

    def __init__(self, sde: LinearSDE, mean: float = 0.7, variance: float = 0.25) -> None:
        super().__init__()
        self.sde, self.mean, self.variance = sde, mean, variance

    def forward(self, x, t, **cond):
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + cond.get("shift", 0.0) + like(gain, x) * (x - like(alpha, x) * self.mean)


def marginal(model: GaussianModel, t) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of x_t."""
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    return alpha * model.mean, alpha**2 * model.variance + sigma**2


EXAMPLES = [
    VPSDE(0.1, 20.0),
    VPSDE(schedule=Cosine()),
    VPSDE(schedule=Sigmoid()),
    VPSDE.from_betas(torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)),
    VPSDE(schedule=Learned().requires_grad_(False)),
    SubVPSDE(0.1, 20.0),
    VESDE(),
    EDM(),
    Rectified(),
]
over_sdes = pytest.mark.parametrize("sde", EXAMPLES, ids=repr)


# Scales


def test_definitions() -> None:
    t = f64(0.0, 0.1, 0.6, 0.9)
    B = 0.1 * t + 9.95 * t**2
    vp, sub = VPSDE(0.1, 20.0), SubVPSDE(0.1, 20.0)
    close(vp.alpha(t), (-B / 2).exp())
    close(vp.sigma(t), (1 - (-B).exp()).sqrt())
    close(sub.alpha(t), (-B / 2).exp())
    close(sub.sigma(t), 1 - (-B).exp())
    close(VESDE(0.01, 50.0).sigma(t), 0.01 * 5000**t)
    close(EDM().sigma(t), t)
    close(Rectified().sigma(t), t)
    close(Rectified().alpha(t), 1 - t)
    for sde in (VESDE(), EDM()):
        close(sde.alpha(t), torch.ones(4, dtype=torch.float64))


def close(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-13, atol: float = 1e-15) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_ends_and_priors() -> None:
    assert [(s.t_min, s.t_max, s.default_end, s.prior_std) for s in (VPSDE(), SubVPSDE(), Rectified())] == [
        (0.0, 1.0, 1e-3, 1.0)
    ] * 3
    ve, edm = VESDE(0.02, 30.0), EDM(0.01, 70.0)
    assert (ve.t_min, ve.t_max, ve.default_end, ve.prior_std) == (0.0, 1.0, 0.0, 30.0)
    assert (edm.t_min, edm.t_max, edm.default_end, edm.prior_std) == (0.01, 70.0, 0.01, 70.0)
    assert VESDE() == VESDE(0.01, 50.0) and EDM() == EDM(0.002, 80.0)
    assert ve.sigma(0.0) == 0.02 and abs(ve.sigma(1.0) - 30.0) < 1e-13 * 30


@over_sdes
def test_log_snr_of_every_kind(sde: LinearSDE) -> None:
    t = f64(0.05, 0.4, 0.9)
    log_snr = sde.log_snr(t)
    close(log_snr, 2 * (sde.alpha(t) / sde.sigma(t)).log(), rtol=1e-12, atol=1e-12)
    close(sde.time(log_snr), t, rtol=1e-13)
    close(sde.time(log_snr[1]), t[1], rtol=1e-13)


@given(sdes(), floats(0.01, 0.99))
def test_rates_are_derivatives(sde: LinearSDE, share: float) -> None:
    """f = d log alpha/dt and g^2 = d sigma^2/dt - 2 f sigma^2."""
    t = f64(at(sde, share))
    f, g2 = sde.rates(t)
    growth = derivative(lambda u: sde.sigma(u) ** 2, t)
    close(f, derivative(lambda u: sde.alpha(u).log(), t), rtol=1e-10, atol=1e-11)
    scale = float(growth.abs() + (f * sde.sigma(t) ** 2).abs()) + 1
    close(g2, growth - 2 * f * sde.sigma(t) ** 2, rtol=1e-10, atol=1e-11 * scale)
    close(sde.diffusion(t) ** 2, g2)


def derivative(function: Callable[[torch.Tensor], torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    """d function/dt of an elementwise function, by autograd; 0 where it is constant."""
    t = t.clone().requires_grad_()
    value = function(t).sum()
    return torch.autograd.grad(value, t)[0] if value.requires_grad else torch.zeros_like(t)


def test_known_rates() -> None:
    beta, B = f64(4.08), f64(0.1 * 0.2 + 9.95 * 0.04)
    for sde, f, g2 in [
        (VPSDE(), -beta / 2, beta),
        (SubVPSDE(), -beta / 2, beta * (1 - (-2 * B).exp())),
        (VESDE(), 0 * beta, 2 * math.log(5000) * (0.01 * 5000**0.2) ** 2 + 0 * beta),
        (EDM(), 0 * beta, f64(0.4)),
        (Rectified(), f64(-1.25), f64(0.5)),
    ]:
        for found, known in zip(sde.rates(f64(0.2)), (f, g2), strict=True):
            close(found, known)


# Kernels


def exact_scales(sde: LinearSDE, t: float) -> tuple[mp.mpf, mp.mpf]:
    """(alpha, sigma^2) from the definitions, in the precision of mpmath."""
    if isinstance(sde, VPSDE):
        B = exact_B(sde.schedule, t)
        noise = -mp.expm1(-B)
        return mp.exp(-B / 2), noise**2 if isinstance(sde, SubVPSDE) else noise
    if isinstance(sde, Rectified):
        return 1 - mp.mpf(t), mp.mpf(t) ** 2
    if isinstance(sde, VESDE):
        return mp.mpf(1), (mp.mpf(sde.sigma_min) ** (1 - mp.mpf(t)) * mp.mpf(sde.sigma_max) ** mp.mpf(t)) ** 2
    return mp.mpf(1), mp.mpf(t) ** 2


@pytest.mark.parametrize("sde", [SubVPSDE(), VESDE(), EDM(), Rectified()], ids=repr)
def test_values_do_not_depend_on_what_stands_beside_them(unchecked: None, sde: LinearSDE) -> None:
    """As those of schedules, bit by bit."""
    t = 0.01 + 0.9 * torch.rand(259, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function, values in ((sde.alpha, t), (sde.sigma, t), (sde.log_snr, t), (sde.time, sde.log_snr(t))):
        parts = torch.cat([function(part) for part in values.split(3)])
        assert torch.equal(function(values), parts)


@pytest.mark.oracle
@given(sdes(), shares(2))
def test_transition_in_high_precision(sde: LinearSDE, pair: list[float]) -> None:
    """a = alpha_t/alpha_s and sigma_t^2 - a^2 sigma_s^2, in 60 digits, to the rounding of B_t - B_s."""
    s, t = (at(sde, share) for share in pair)
    found_a, found_std = sde.transition(s, t)
    with mp.workdps(60):
        (alpha_s, noise_s), (alpha_t, noise_t) = exact_scales(sde, s), exact_scales(sde, t)
        a = alpha_t / alpha_s
        assert abs(found_a.item() / a - 1) < 1e-14 * condition(sde, s, t)
        assert abs(found_std.item() / mp.sqrt(noise_t - a**2 * noise_s) - 1) < 1e-14 * condition(sde, s, t)


@pytest.mark.parametrize("sde", [VESDE(), EDM(), Rectified()], ids=repr)
def test_small_steps_keep_their_digits(sde: LinearSDE) -> None:
    """Over 1e-9 the added variance is g^2 dt; a difference of variances would be off by 1e-7 and more."""
    s = 0.5 + torch.arange(8, dtype=torch.float64) / 37
    t = s + 2.0**-30
    middle = (s + t) / 2
    # The rectified step also scales what it adds to, by 1 - O(dt).
    close(sde.transition(s, t)[1] ** 2, sde.diffusion(middle) ** 2 * (t - s), rtol=6e-9)


def condition(sde: LinearSDE, s: float, t: float) -> float:
    """How much the rounding of B counts in alpha and in B_t - B_s."""
    return 1 + float(sde.B(t) + sde.B(t) / (sde.B(t) - sde.B(s))) if isinstance(sde, VPSDE) else 1.0


@given(sdes(), shares(2))
def test_bridge_is_the_conditional_of_the_joint_gaussian(sde: LinearSDE, pair: list[float]) -> None:
    """Data N(0, 1): the covariance of (x_0, x_s, x_t), conditioned by linear algebra in 50 digits."""
    s, t = (at(sde, share) for share in pair)
    one, zero = f64(1.0), f64(0.0)
    on_data, std = sde.bridge(one, zero, s, t)
    on_state, _ = sde.bridge(zero, one, s, t)
    with mp.workdps(60):
        (alpha_s, noise_s), (alpha_t, noise_t) = exact_scales(sde, s), exact_scales(sde, t)
        known = mp.matrix([[1, alpha_t], [alpha_t, alpha_t**2 + noise_t]])
        shared = mp.matrix([[alpha_s, alpha_t / alpha_s * (alpha_s**2 + noise_s)]])
        gains = shared * known**-1
        variance = alpha_s**2 + noise_s - (gains * shared.T)[0]
        for found, exact in ((on_data, gains[0]), (on_state, gains[1]), (std, mp.sqrt(variance))):
            assert abs(found.item() / exact - 1) < 4e-14 * condition(sde, s, t)


@over_sdes
def test_bridge_from_the_noiseless_end_is_the_data(sde: LinearSDE) -> None:
    x_0, x_t = f64(0.3), f64(-2.0)
    if sde.sigma(0.0) == 0:
        mean, std = sde.bridge(x_0, x_t, 0.0, sde.t_max)
        assert mean == x_0 and std == 0


@over_sdes
def test_no_time_from_the_noiseless_end_and_to_the_signalless_one(sde: LinearSDE) -> None:
    x_0, x_t = f64(0.3), f64(-2.0)
    for t in (0.0, sde.t_min, 0.5, sde.t_max):
        mean, std = sde.bridge(x_0, x_t, t, t)
        assert mean.equal(x_t) and std == 0
        a, noise = sde.transition(t, t)
        assert a == 1 and noise == 0


def test_bridge_is_in_the_state_s_dtype() -> None:
    x_0, x_t = f64(0.3), f64(-2.0).float()
    mean, std = VPSDE().bridge(x_0, x_t, 0.2, 0.6)
    exact, exact_std = VPSDE().bridge(x_0, x_t.double(), 0.2, 0.6)
    assert std.dtype == torch.float32 and std == exact_std.float()
    assert mean.item() == pytest.approx(exact.item(), rel=1e-6)


def test_scales_share_no_memory_with_times() -> None:
    for sde in EXAMPLES:
        t = f64(0.25, 0.5)
        for quantity in (sde.alpha, sde.sigma, sde.log_snr):
            quantity(t).zero_()
        assert t.tolist() == [0.25, 0.5]


def test_rectified_ends_at_one() -> None:
    sde = Rectified()
    for quantity in (sde.alpha, sde.sigma, sde.log_snr, sde.rates):
        with pytest.raises(ValueError, match="expected times t <= 1"):
            quantity(1.01)
    for kernel in (sde.scale, sde.innovation, sde.transition):
        with pytest.raises(ValueError, match="expected times t <= 1"):
            kernel(0.5, 1.01)


def test_rounding_does_not_lead_beyond_the_end_of_rectified() -> None:
    sde, beyond = Rectified(), 1 + 1e-12
    assert sde.alpha(beyond) == 0 and sde.sigma(beyond) == 1 and sde.log_snr(beyond) == -math.inf
    assert sde.transition(0.5, beyond) == sde.transition(0.5, 1.0) == (0, 1)
    assert Grid.of(sde, f64(beyond, 0.5, 0.1)).lam[0] == -math.inf


def test_default_kernels_follow_from_the_scales() -> None:
    """What a new SDE inherits: the ratio of alphas."""
    close(LinearSDE.scale(VPSDE(), 0.2, 0.6), VPSDE().scale(0.2, 0.6))
    with pytest.raises(NotImplementedError):
        LinearSDE().transition(0.1, 0.2)


# What mixes with x


@over_sdes
def test_shapes_and_dtypes(sde: LinearSDE, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, 3, generator=generator).to(device, dtype)
    end = min(sde.t_max, 1.0)
    each = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64, device=device) * end
    if isinstance(sde, VPSDE) and isinstance(sde.schedule, Learned):
        sde = VPSDE(schedule=Learned().requires_grad_(False).to(device))
    for t in (each[:1][0], each[:1], each, 0.2 * end):
        single = not isinstance(t, torch.Tensor) or t.ndim == 0
        shape = () if single else (len(t), 1, 1, 1)
        for mean, std in (sde.marginal(x, t), sde.bridge(x, x, 0.5 * t, t)):
            assert mean.shape == x.shape and mean.dtype == dtype and mean.device.type == device.type
            assert std.shape == shape and std.dtype == dtype and std.device.type == device.type
        assert sde.drift(x, t).shape == x.shape and sde.drift(x, t).dtype == dtype
        times_shape = () if single else t.shape
        for value in (sde.alpha(t), sde.sigma(t), sde.log_snr(t), sde.diffusion(t)):
            assert value.dtype == torch.float64 and value.shape == times_shape
        for value in sde.transition(0.5 * t, t):
            assert value.dtype == torch.float64 and value.shape == times_shape
        assert sde.time(sde.log_snr(t)).dtype == torch.float64
    for row, t in enumerate(each):
        assert sde.marginal(x, each)[0][row].equal(sde.marginal(x, t)[0][row])
        assert sde.bridge(x, -x, 0.1 * each, each)[0][row].equal(sde.bridge(x, -x, 0.1 * t, t)[0][row])
    torch.testing.assert_close(sde.drift(x, each)[2], (sde.rates(each)[0][2]).to(dtype) * x[2])
    assert sde.marginal(x[:0], each[:0])[0].shape == (0, 2, 3, 3)  # FAULTS E4


@over_sdes
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_marginals_of_half_precision(sde: LinearSDE, half: torch.dtype) -> None:  # FAULTS A1, A2
    x = torch.tensor([0.0, 0.75, 2.0], dtype=half)
    for t in (1e-3, 2e-3, 0.01, 0.1, 0.5, 0.9):
        t = max(t, sde.t_min)
        mean, std = sde.marginal(x, t)
        assert mean.dtype == std.dtype == half
        assert abs(std.double() / sde.sigma(t) - 1) < torch.finfo(half).eps
        close(mean.double(), sde.alpha(t) * x.double(), rtol=2 * torch.finfo(half).eps)


@over_sdes
def test_float32_times_are_widened(sde: LinearSDE) -> None:  # FAULTS A7
    t = torch.tensor([1e-8, 1e-5, 0.1, 0.7])
    for quantity in (sde.alpha, sde.sigma, sde.log_snr, sde.diffusion):
        assert quantity(t).equal(quantity(t.double()))
    s = 0.5 * t
    assert sde.transition(s, t)[1].equal(sde.transition(s.double(), t.double())[1])


@pytest.mark.parametrize("wrong", [torch.int64, torch.uint8])
def test_integer_data_and_times_are_refused(wrong: torch.dtype) -> None:  # FAULTS E5, E5b, E11
    image = torch.full((2, 1, 4, 4), 200, dtype=wrong)
    for sde in EXAMPLES:
        with pytest.raises(TypeError, match=r"expected a floating state"):
            sde.marginal(image, 0.5)
        with pytest.raises(TypeError, match=r"expected floating times"):
            sde.marginal(image.double(), torch.ones(2, dtype=wrong))


@pytest.mark.parametrize("sde", [e for e in EXAMPLES if not isinstance(e, VESDE)], ids=repr)
@pytest.mark.parametrize("t", [-1.0, -5.0, -1e-9, math.nan])
def test_negative_times_are_refused(sde: LinearSDE, t: float) -> None:  # FAULTS E5
    for value in (t, f64(0.5, t)):
        for quantity in (sde.alpha, sde.sigma, sde.log_snr, sde.rates, lambda u, s=sde: s.transition(u, 0.5)):
            with pytest.raises(ValueError, match=r"expected times .*found"):
                quantity(value)


def test_wrong_shapes_and_orders_are_refused() -> None:
    x, sde = torch.zeros(3, 2), VPSDE()
    for t in (f64(0.1, 0.2), f64(0.1, 0.2, 0.3)[:, None]):
        with pytest.raises(ValueError, match=r"expected times of shape \(\) or \(3,\), found"):
            sde.marginal(x, t)
    for one in EXAMPLES:
        with pytest.raises(ValueError, match="expected times s <= t"):
            one.transition(0.3, 0.2)
        with pytest.raises(ValueError, match="expected times s <= t"):
            one.bridge(x, x, f64(0.1, 0.3, 0.1), 0.2)


def test_other_things_are_refused(unchecked: None) -> None:
    with pytest.raises(TypeError, match=r"expected a tensor as state, found 2\.0"):
        VPSDE().marginal(2.0, 0.5)  # pyright: ignore[reportArgumentType]
    for wrong in (np.array([0.1, 0.2]), np.array([0.1]), [0.1, 0.2], None):
        with pytest.raises(TypeError, match="time: expected a number, found"):
            VPSDE().alpha(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="sigma_max: expected a number, found"):
        VESDE(0.1, np.array([1.0, 2.0]))  # pyright: ignore[reportArgumentType]
    for wrong in (0.1, "linear", Linear):
        with pytest.raises(TypeError, match="expected a schedule with B, beta and time"):
            VPSDE(schedule=wrong)  # pyright: ignore[reportArgumentType]
    for make in (VESDE, EDM):
        for ends in (("1", 2.0), (1.0, None)):
            with pytest.raises(TypeError, match=r"sigma_m..: expected a number, found"):
                make(*ends)


def test_tables_of_a_process(unchecked: None) -> None:
    """1 - beta_i is e^-(B_i - B_{i-1}), or 1 - beta(t_i)/n; what is no number of steps or rule is refused."""
    t = torch.arange(1, 22, dtype=torch.float64) / 21
    exact, euler = VPSDE().betas(21), VPSDE().betas(21, "euler")
    close(exact, 1 - (-torch.diff(VPSDE().B(t), prepend=f64(0.0))).exp(), rtol=1e-11)
    close(VPSDE().log_alphas(21), (1 - exact).log(), rtol=1e-11)
    close(euler, (0.1 + 19.9 * t) / 21, rtol=1e-12)
    close(VPSDE().log_alphas(21, "euler"), (1 - euler).log(), rtol=1e-10)
    assert VPSDE().betas(1).shape == (1,)
    assert torch.equal(VPSDE().betas(np.int64(21)), exact)  # pyright: ignore[reportArgumentType]
    for wrong in (0, -3, True, 2.0):
        with pytest.raises(ValueError, match="expected a number of steps n >= 1, found"):
            VPSDE().log_alphas(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected rule 'exact' or 'euler', found 'ho'"):
        VPSDE().betas(10, "ho")
    with pytest.raises(ValueError, match=r"expected beta\(t\)/n < 1 .* found 1 at n=20; take more steps"):
        VPSDE().betas(20, "euler")
    with pytest.raises(TypeError, match="expected a VP-SDE to discretize, found sub-VP"):
        SubVPSDE().betas(10)


def test_checks_wait_for_no_device_and_no_trace() -> None:
    assert clock(torch.tensor(-1.0, device="meta")).device.type == "meta"
    values = torch.func.vmap(VPSDE().alpha)(f64(0.1, 0.5))
    assert values.equal(VPSDE().alpha(f64(0.1, 0.5)))
    slope = torch.func.vmap(torch.func.grad(VPSDE().B))(f64(0.1, 0.5))
    close(slope, VPSDE().beta(f64(0.1, 0.5)))


@pytest.mark.parametrize("make", [VESDE, EDM])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_noise_ranges(make, ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < sigma_min < sigma_max"):
        make(*ends)


@over_sdes
def test_prior(sde: LinearSDE, device: torch.device, dtype: torch.dtype) -> None:
    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(3)

    x = sde.sample_prior((5, 2), generator=generator(), device=device, dtype=dtype)
    z = torch.randn(5, 2, generator=generator(), device=device, dtype=dtype)
    assert x.equal(sde.prior_std * z) and x.dtype == dtype and x.device.type == device.type
    assert sde.sample_prior([0, 3]).shape == (0, 3)


def test_repr() -> None:
    assert repr(VPSDE()) == "VPSDE(schedule=Linear(beta_min=0.1, beta_max=20.0))"
    assert repr(SubVPSDE.from_betas([0.1] * 41)) == "SubVPSDE(schedule=Tabulated(<41 steps>))"
    assert repr(VPSDE.from_betas([0.1] * 40)).startswith("VPSDE(schedule=Tabulated(nodes=(0.0, 0.105")
    assert repr(VPSDE(schedule=Tabulated((0.0, 0.5)))) == "VPSDE(schedule=Tabulated(nodes=(0.0, 0.5)))"
    assert repr(VPSDE(0.5, 3.0).schedule) == repr(Linear(0.5, 3.0))
    assert VPSDE(schedule=Cosine()).schedule == Cosine()
    assert VPSDE.from_betas([0.1, 0.2]).schedule == tabulated_betas([0.1, 0.2])


def test_processes_are_values() -> None:
    for sde in (VESDE(), EDM(), Rectified(), VPSDE().reverse(GaussianModel(VPSDE()))):
        assert hash(sde) == hash(dataclasses.replace(sde)) and sde == dataclasses.replace(sde)
        with pytest.raises(dataclasses.FrozenInstanceError):
            sde.sigma_min = 1.0  # pyright: ignore


# Reverse SDE


@given(sdes(), floats(0.05, 0.95), floats(-2.0, 2.0))
def test_reverse_drift_is_andersons(sde: LinearSDE, share: float, z: float) -> None:
    """f x - g^2 score, the score of a Gaussian being -(x - m)/v."""
    t, model = at(sde, share), GaussianModel(sde)
    m, v = marginal(model, t)
    x = (m + v.sqrt() * z).reshape(1, 1)
    f, g2 = sde.rates(t)
    reverse = sde.reverse(model)
    known = f * x + g2 * (x - m) / v
    amplified = float(g2 / sde.sigma(t) ** 2 * (1 + x.abs() + m.abs()))  # the rounding of D in the score
    close(reverse.drift(x, t), known, rtol=1e-12, atol=1e-14 * (1 + amplified))
    close(reverse.diffusion(t), g2.sqrt())
    close(sde.drift(x, t), f * x)


@given(sdes(), floats(0.05, 0.95))
def test_reverse_sde_moves_the_marginals_back(sde: LinearSDE, share: float) -> None:
    """With drift A x + b: dm/dt = A m + b and dv/dt = 2 A v - g^2."""
    t, model = at(sde, share), GaussianModel(sde)
    reverse = sde.reverse(model)
    b = reverse.drift(torch.zeros(1, 1, dtype=torch.float64), t)
    A = reverse.drift(torch.ones(1, 1, dtype=torch.float64), t) - b
    m, v = marginal(model, t)
    growth = derivative(lambda u: marginal(model, u)[1], f64(t))
    shift = derivative(lambda u: marginal(model, u)[0], f64(t))
    scale = float((A * v).abs() + reverse.diffusion(t) ** 2 + b.abs())
    close((A * m + b)[0], shift, rtol=1e-9, atol=1e-11 * scale)
    close((2 * A * v - reverse.diffusion(t) ** 2)[0], growth, rtol=1e-9, atol=1e-11 * scale)


@over_sdes
def test_reverse_clock_and_flattening(sde: LinearSDE, device: torch.device) -> None:
    if isinstance(sde, VPSDE) and isinstance(sde.schedule, Learned):
        sde = VPSDE(schedule=Learned().requires_grad_(False).to(device))
    model = GaussianModel(sde)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    flat, image = sde.reverse(model), sde.reverse(model, (2, 4, 4))
    y = x.flatten(1)
    strided = y.t().contiguous().t()
    for s in (0.2, f64(0.2)[0].to(device), torch.tensor(0.2, device=device)):
        t = sde.t_max - (s if not isinstance(s, torch.Tensor) else s.double())
        assert image.f(s, y).equal(-image.drift(x, t).flatten(1))
        assert image.f(s, strided).equal(image.f(s, y))
        assert flat.f(s, y).equal(image.f(s, y))
        g = image.g(s, y)
        assert g.shape == y.shape and g.equal(torch.full_like(y, float(sde.diffusion(t))))
    assert (flat.noise_type, flat.sde_type) == ("diagonal", "ito")
    over = sde.t_max - sde.t_min
    end = max(sde.t_min, 1e-3)
    assert flat.g(over + 1e-12, y).equal(flat.g(over, y))  # a clock past the end stays there
    assert flat.f(sde.t_max - end, y).isfinite().all()
    assert not isinstance(sde, VPSDE) or flat.f(-1e-12, y).equal(flat.f(0.0, y))


@pytest.mark.parametrize("sde", [VPSDE(0.1, 20.0), SubVPSDE(0.1, 20.0), EDM(0.02, 3.0)], ids=repr)
def test_torchsde_takes_the_reverse_sde(sde: LinearSDE, alpha_ledger) -> None:
    """Euler-Maruyama by torchsde against its exact Gaussian output law, from the moment recursion.

    n = 8192 x 2 draws: each of the two z-tests fails by chance with probability 1e-9 (6.11 standard errors)
    and sees, with the same certainty, 9.6 % of a standard deviation in the mean or 13.5 % in the variance.
    """
    model, steps = GaussianModel(sde), 63
    reverse = sde.reverse(model, (2, 1))
    dt = (sde.t_max - sde.t_min) / 64
    n = 8192
    y = sde.sample_prior((n, 2), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grid = torch.tensor([0.0, steps * dt], dtype=torch.float64)
    brownian = torchsde.BrownianInterval(0.0, steps * dt, size=y.shape, dtype=torch.float64, entropy=7)
    x = torchsde.sdeint(reverse, y, grid, bm=brownian, dt=dt, method="euler")[-1]

    m, v = torch.zeros(1, dtype=torch.float64), torch.full((1,), sde.prior_std**2, dtype=torch.float64)
    for k in range(steps):
        b = reverse.f(k * dt, torch.zeros(1, 2, dtype=torch.float64))[0, :1]
        A = reverse.f(k * dt, torch.ones(1, 2, dtype=torch.float64))[0, :1] - b
        m, v = m + dt * (A * m + b), (1 + dt * A) ** 2 * v + dt * reverse.diffusion(sde.t_max - k * dt) ** 2
    assert abs(float(m) - 0.7) < 0.1 and abs(float(v) - 0.25) < 0.12  # near the data's law
    z_mean = (x.mean() - m) / (v / x.numel()).sqrt()
    z_variance = (((x - m) ** 2).mean() / v - 1) / math.sqrt(2 / x.numel())
    for z, claim in ((z_mean, "mean"), (z_variance, "variance")):
        p = math.erfc(abs(float(z)) / math.sqrt(2))
        assert p > alpha_ledger.spend(1e-9, f"torchsde {type(sde).__name__} {claim}")


# Probability flow


def rk4(field, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    for t, u in itertools.pairwise(grid):
        h = u - t
        k1 = field(x, t)
        k2 = field(x + h / 2 * k1, t + h / 2)
        k3 = field(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + h * k3, u))
    return x


@over_sdes
@pytest.mark.parametrize("up", [False, True])
def test_probability_flow_moves_gaussian_marginals(sde: LinearSDE, up: bool) -> None:  # PROPERTIES 29
    """x_s = m_s + (v_s/v_t)^(1/2) (x_t - m_t), in both directions; RK4 shows order 4."""
    model = GaussianModel(sde)
    ends = (0.9, 0.3) if sde.t_max == 1 else (2.0, 0.5)
    (m0, v0), (m1, v1) = (marginal(model, t) for t in (ends[::-1] if up else ends))
    x = f64(-1.0, 0.2, 3.0)[:, None]
    exact = m1 + (v1 / v0).sqrt() * (x - m0)
    errors = []
    for n in (10, 20, 40):
        grid = torch.linspace(*(ends[::-1] if up else ends), n + 1, dtype=torch.float64)
        errors.append(float(((rk4(sde.probability_flow(model), x, grid) - exact) / v1.sqrt()).abs().max()))
    assert errors[-1] < 1e-4
    if isinstance(sde, VPSDE) and isinstance(sde.schedule, type(tabulated_betas([0.1]))):
        return  # its rate has corners
    assert errors[-1] < 1e-12 or math.log2(errors[1] / errors[2]) > 3.6


@over_sdes
def test_probability_flow_is_drift_minus_half_the_score(sde: LinearSDE) -> None:
    model = GaussianModel(sde)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = f64(0.3, 0.5, 0.9)
    f, g2 = sde.rates(t)
    v = sde.probability_flow(model)(x, t)
    close(v, f[:, None] * x - 0.5 * g2[:, None] * model.score(x, t), rtol=1e-11, atol=1e-12)
    shifted = sde.probability_flow(model)(x, t, shift=1.0)
    assert (shifted - v).abs().min() > 1e-6  # conditions are passed on


def test_standard_normal_data_does_not_move() -> None:  # PROPERTIES 28
    sde = VPSDE(0.1, 20.0)
    model = GaussianModel(sde, 0.0, 1.0)
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for t in (1e-3, 0.1, 0.9, 1.0):
        close(sde.probability_flow(model)(x, t), torch.zeros_like(x), atol=2e-13 / t)


def test_rectified_flow_at_full_noise() -> None:
    """The rates are infinite at t = 1, the flow is not: v = x - E[x_0]."""
    sde = Rectified()
    x = f64(-1.0, 2.0)[:, None]
    close(sde.probability_flow(GaussianModel(sde))(x, 1.0), x - 0.7)
    assert sde.diffusion(1.0) == math.inf
    assert sde.transition(0.3, 1.0)[0] == 0 and sde.transition(0.3, 1.0)[1] == 1


@given(st.one_of(linears(), cosines()), beta_tables(low=1e-4), times())
def test_schedules_and_betas_share_their_clock(schedule, betas: list[float], t: float) -> None:
    for sde in (VPSDE(schedule=schedule), VPSDE.from_betas(betas)):
        assert sde.B(t) == sde.schedule.B(f64(t))[0] and sde.beta(t) == sde.schedule.beta(f64(t))[0]
