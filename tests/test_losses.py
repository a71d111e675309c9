"""Losses against exact integrals: Gaussian laws, quadrature, the DDPM chain."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoresde import losses
from scoresde.ddpm import discretize
from scoresde.denoiser import BaseDenoiser, Denoiser, Karras
from scoresde.guidance import Classifier
from scoresde.schedules import Sigmoid
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE
from scoresde.variance import LearnedVariance

SDES = [VPSDE(), VPSDE(0.3, 9.0), SubVPSDE(), VESDE(0.02, 30.0), EDM(), Rectified()]
PREDICTIONS = ["noise", "data", "velocity", "flow", "score", Karras(0.6)]
WEIGHTS = [
    losses.simple,
    losses.likelihood,
    losses.min_snr,
    losses.truncated_snr,
    losses.snr_plus_one,
    losses.edm,
    functools.partial(losses.min_snr, gamma=2.0),
]


def inner_times(sde: LinearSDE, n: int = 9) -> torch.Tensor:
    """Times inside the range, without its ends."""
    return sde.t_min + (sde.t_max - sde.t_min) * (torch.arange(n, dtype=torch.float64) + 0.7) / (n + 0.5)


class Bend(torch.nn.Module):
    """A network with something to learn, elementwise in x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.7, -0.4, 0.3], dtype=torch.float64))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        w = self.w.to(x.dtype)
        return w[0] * x + w[1] * (x * w[2]).tanh() + 0.1 * time.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Shrink(BaseDenoiser):
    """The exact denoiser of N(0, v I), times a factor."""

    def __init__(self, sde: LinearSDE, v: float, factor: float = 1.0) -> None:
        super().__init__()
        self.sde, self.v, self.factor = sde, v, factor

    def forward(self, x, t):
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        return self.factor * (a * self.v / (a**2 * self.v + s**2)).view(-1, 1).to(x) * x


def normal_nodes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Hermite: E f(z) = sum w f(z), exact for polynomials of degree 2n - 1."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(z), torch.tensor(w / math.sqrt(2 * math.pi))


def unit_nodes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre on [0, 1]."""
    u, w = np.polynomial.legendre.leggauss(n)
    return torch.tensor((u + 1) / 2), torch.tensor(w / 2)


# ---- weightings


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_weightings_are_the_formulas_of_the_papers(sde):
    t = inner_times(sde)
    a, s = sde.alpha(t), sde.sigma(t)
    snr = (a / s) ** 2
    g2 = sde.diffusion(t) ** 2
    expected = {
        losses.simple: snr,
        losses.likelihood: g2 * snr / s**2 / 2,
        losses.min_snr: torch.where(snr < 5, snr, 5.0),
        losses.truncated_snr: torch.where(snr > 1, snr, 1.0),
        losses.snr_plus_one: snr + 1,
        losses.edm: (s**2 + a**2 / 4) / (s / 2) ** 2,
    }
    for weight, value in expected.items():
        torch.testing.assert_close(weight(sde, t), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.parametrize("name, target", [("noise", "eps"), ("data", "x0"), ("velocity", "v"), ("flow", "u")])
def test_unit_weight_is_the_plain_error_of_each_view(sde, name, target):
    """The prediction's own error computed from its textbook definition, with D wrong by a known amount."""
    t = inner_times(sde)
    a, s = (c[:, None] for c in (sde.alpha(t), sde.sigma(t)))
    x0, eps, off = torch.randn(3, len(t), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = a * x0 + s * eps
    wrong = x0 + off
    wrong_eps = (x - a * wrong) / s
    error = {
        "eps": wrong_eps - eps,
        "x0": off,
        "v": (a * wrong_eps - s * wrong) - (a * eps - s * x0),
        "u": (wrong_eps - wrong) - (eps - x0),
    }[target]
    prediction = Denoiser(Bend(), sde, name).predicts
    torch.testing.assert_close(
        losses.unit(prediction, sde, t)[:, None] * off**2, error**2, rtol=1e-9, atol=1e-12
    )


def test_velocity_error_on_vp_is_snr_plus_one_and_karras_output_error_is_edm():
    sde, t = VPSDE(), inner_times(VPSDE())
    velocity = Denoiser(Bend(), sde, "velocity").predicts
    torch.testing.assert_close(losses.unit(velocity, sde, t), losses.snr_plus_one(sde, t), rtol=1e-12, atol=0)
    weight = functools.partial(losses.edm, sigma_data=0.6)
    for process in SDES:
        t = inner_times(process)
        model = Denoiser(Bend(), process, Karras(0.6))
        x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        mean, std = process.marginal(x0, t)
        raw = (model.raw(mean + std * eps, t) - model.target(x0, eps, t)).square().mean(1)
        torch.testing.assert_close(losses.denoising(model, x0, eps, t, weight), raw, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_likelihood_weight_integrates_to_the_elbo_weights(sde):
    """int_s^t w = (SNR_s - SNR_t)/2."""
    s, t = (sde.t_min + f * (min(sde.t_max, 20) - sde.t_min) for f in (0.3, 0.6))
    u, w = unit_nodes(60)
    integral = (t - s) * (w * losses.likelihood(sde, s + (t - s) * u)).sum()
    snr = sde.log_snr(torch.tensor([s, t], dtype=torch.float64)).exp()
    torch.testing.assert_close(integral, (snr[0] - snr[1]) / 2, rtol=1e-10, atol=0)


# ---- denoising score matching


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.parametrize("predicts", PREDICTIONS, ids=repr)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_loss_is_the_weight_times_the_error_of_the_denoiser(sde, predicts, weight):
    t = inner_times(sde)
    model = Denoiser(Bend(), sde, predicts)
    x0, eps = torch.randn(2, len(t), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mean, std = sde.marginal(x0, t)
    error = (x0 - model(mean + std * eps, t)).square().mean((1, 2))
    got = losses.denoising(model, x0, eps, t, weight)
    assert got.shape == t.shape and got.dtype == torch.float64
    torch.testing.assert_close(got, weight(sde, t) * error, rtol=1e-7, atol=1e-9)


def test_loss_of_any_denoiser_and_of_one_behind_conditions():
    sde, t = VPSDE(), inner_times(VPSDE())
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mean, std = sde.marginal(x0, t)
    model = Shrink(sde, 0.4)
    expected = losses.min_snr(sde, t) * (x0 - model(mean + std * eps, t)).square().mean(1)
    torch.testing.assert_close(losses.denoising(model, x0, eps, t, losses.min_snr), expected)


@pytest.mark.parametrize("shape", [(6, 1), (1, 3), (3,), ()])
def test_noise_is_not_broadcast(unchecked, shape):
    x0, t = torch.zeros(6, 3, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)
    eps = torch.ones(shape, dtype=torch.float64)
    learned = LearnedVariance(torch.nn.Identity(), VPSDE())
    classes = torch.zeros(6, dtype=torch.long)
    for loss, model, extra in (
        (losses.denoising, Denoiser(Bend(), VPSDE()), ()),
        (losses.denoising, Shrink(VPSDE(), 0.7), ()),
        (functools.partial(losses.important, sizes=torch.ones(4)), Shrink(VPSDE(), 0.7), ()),
        (losses.hybrid, learned, ()),
        (losses.classification, Classifier(torch.nn.Linear(3, 2), VPSDE()), (classes,)),
    ):
        with pytest.raises(ValueError, match=r"expected noise of the state's shape \(6, 3\)"):
            loss(model, x0, eps, t, *extra)


def test_simple_loss_on_the_chain_is_algorithm_1():
    chain = discretize(VPSDE(), 50)
    sde = chain.sde()
    u = losses.stratified(7, torch.Generator().manual_seed(4))
    t = losses.chain(sde, u, n=50)
    x0, eps = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    model = Denoiser(Bend(), sde, "noise")
    i = (t * 50).round().long()
    torch.testing.assert_close(
        losses.denoising(model, x0, eps, t), chain.loss(model, x0, i, eps), rtol=1e-9, atol=0
    )


def test_nothing_cancels_at_small_noise():
    """In float32 at sigma = 1e-3 the loss keeps its digits; through D it would lose half of them."""
    sde, t = VESDE(1e-4, 50.0), torch.full((64,), 0.1754, dtype=torch.float64)
    x0, eps = torch.randn(2, 64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    model = Denoiser(Bend(), sde, "noise")
    exact = losses.denoising(model, x0, eps, t)
    single = losses.denoising(model.float(), x0.float(), eps.float(), t)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=0)


def test_dtype_and_device_of_the_loss_are_those_of_the_data(device, dtype):
    sde = VPSDE()
    model = Denoiser(Bend(), sde, "noise").to(device, dtype)
    x0, eps = torch.randn(2, 5, 3, device=device, dtype=dtype)
    loss = losses.denoising(model, x0, eps, inner_times(sde, 5).to(device))
    assert loss.shape == (5,) and loss.dtype == dtype and loss.device.type == device.type


# ---- implicit and sliced score matching

# p = N(m, S) in two dimensions and affine scores s(x) = A x + b, for which quadrature with 4 nodes a side is
# exact.
M = torch.tensor([0.5, -1.0], dtype=torch.float64)
S = torch.tensor([[1.2, 0.5], [0.5, 0.7]], dtype=torch.float64)
A = torch.tensor([[-0.9, 0.4], [0.1, -1.5]], dtype=torch.float64)
B = torch.tensor([0.3, 0.2], dtype=torch.float64)


def gaussian_nodes() -> tuple[torch.Tensor, torch.Tensor]:
    z, w = normal_nodes(4)
    grid = torch.stack([z.repeat_interleave(4), z.repeat(4)], 1)
    return M + grid @ torch.linalg.cholesky(S).T, (w[:, None] * w).flatten()


def affine(x: torch.Tensor) -> torch.Tensor:
    return x @ A.T + B


def fisher_divergence(score) -> torch.Tensor:
    """E|s - grad log p|^2 / 2 by quadrature."""
    x, w = gaussian_nodes()
    truth = -torch.linalg.solve(S, (x - M).T).T
    return 0.5 * (w * (score(x) - truth).square().sum(1)).sum()


def test_implicit_loss_is_the_fisher_divergence_up_to_its_constant():
    x, w = gaussian_nodes()
    constant = 0.5 * torch.linalg.inv(S).trace()  # E|grad log p|^2 / 2
    for score in (affine, lambda x: -x, lambda x: -torch.linalg.solve(S, (x - M).T).T, lambda x: 0 * x):
        expected = fisher_divergence(score) - constant
        torch.testing.assert_close((w * losses.implicit(score, x)).sum(), expected, rtol=1e-12, atol=1e-12)


def test_implicit_loss_of_a_curved_score_by_hand():
    """s = (sin x1 x2, x1^2): |s|^2/2 + x2 cos(x1 x2), in the shape of images too."""
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(8))

    def score(x):
        y = x.view(6, 2)
        return torch.stack([(y[:, 0] * y[:, 1]).sin(), y[:, 0] ** 2], 1).view(x.shape)

    a, b = x.T
    expected = 0.5 * ((a * b).sin() ** 2 + a**4) + b * (a * b).cos()
    torch.testing.assert_close(losses.implicit(score, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.implicit(score, x.view(6, 1, 1, 2)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduce_variance", [True, False])
def test_sliced_loss_is_unbiased_exactly(reduce_variance):
    """The mean over all four Rademacher directions: their second moment is the identity."""
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    each = [losses.sliced(affine, x, v.expand(5, 2), reduce_variance=reduce_variance) for v in signs]
    torch.testing.assert_close(torch.stack(each).mean(0), losses.implicit(affine, x), rtol=1e-12, atol=1e-12)
    along = affine(x) @ signs[1]
    if not reduce_variance:  # the plain form, written out
        expected = signs[1] @ A @ signs[1] + 0.5 * along**2
        torch.testing.assert_close(each[1], expected, rtol=1e-12, atol=1e-12)


def test_one_direction_is_exact_for_a_diagonal_jacobian_and_reduced_variance_reduces_it():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    v = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64).expand(5, 3)
    score = lambda x: -(x**3)  # noqa: E731
    torch.testing.assert_close(losses.sliced(score, x, v), losses.implicit(score, x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(losses.sliced(score, x, v, reduce_variance=False), losses.implicit(score, x))


@pytest.mark.parametrize("name", ["implicit", "sliced"])
def test_their_gradients_are_those_of_the_fisher_divergence(name):
    """d/dA of the expected loss; central differences of the exact divergence, which is quadratic in A."""
    x, w = gaussian_nodes()
    a = A.clone().requires_grad_()
    signs = [torch.tensor(v, dtype=torch.float64).expand(len(x), 2) for v in ([1.0, 1.0], [1.0, -1.0])]
    if name == "implicit":
        values = losses.implicit(lambda x: x @ a.T + B, x)
    else:
        values = sum(losses.sliced(lambda x: x @ a.T + B, x, v) for v in signs) / 2
    (gradient,) = torch.autograd.grad((w * values).sum(), a)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = torch.zeros(2, 2, dtype=torch.float64)
        step[i, j] = 0.5
        up, down = (fisher_divergence(lambda x, m=m: x @ m.T + B) for m in (A + step, A - step))
        torch.testing.assert_close(gradient[i, j], up - down, rtol=1e-10, atol=1e-10)


def test_score_matching_needs_an_axis_after_the_batch(unchecked):
    x = torch.randn(5)
    for loss in (lambda: losses.implicit(torch.neg, x), lambda: losses.sliced(torch.neg, x, x)):
        with pytest.raises(ValueError, match=r"expected x of shape \(B, \.\.\.\) .* found \(5,\)"):
            loss()


def test_score_matching_works_without_gradients_around_it_and_refuses_other_shapes():
    x = torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(losses.implicit(affine, x), losses.implicit(affine, x))
        assert losses.sliced(affine, x, torch.ones_like(x)).shape == (4,)
    assert not x.requires_grad
    with pytest.raises(ValueError, match=r"shape of x, \(4, 2\); found \(4, 1\)"):
        losses.implicit(lambda x: x[:, :1], x)


# ---- times


@given(n=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_stratified_puts_one_number_into_each_stratum(n, seed):
    u = losses.stratified(n, torch.Generator().manual_seed(seed))
    assert u.dtype == torch.float64 and u.shape == (n,)
    offset = u * n - torch.arange(n)
    assert bool((offset > -1e-9).all()) and bool((offset < 1 + 1e-9).all())
    torch.testing.assert_close(offset, offset[:1].expand(n), rtol=0, atol=1e-9)
    assert losses.independent(n, torch.Generator().manual_seed(seed)).shape == (n,)


def test_draws_are_uniform(alpha_ledger):
    """The Dvoretzky-Kiefer-Wolfowitz bound at 1e-9; sees a shift of 0.066 with certainty 1 - 1e-9."""
    n, g = 10_000, torch.Generator().manual_seed(11)
    draws = {
        "independent": losses.independent(n, g),
        "stratified, each alone": torch.stack([losses.stratified(7, g)[3] for _ in range(n)]) * 7 - 3,
    }
    for name, u in draws.items():
        bound = math.sqrt(math.log(2 / alpha_ledger.spend(1e-9, f"{name} is uniform")) / (2 * n))
        rank = torch.arange(1, n + 1, dtype=torch.float64) / n
        assert float((u.sort().values - rank).abs().max()) < bound + 1 / n
    differences = losses.independent(n, g).diff()
    assert float(differences.abs().min()) > 0


def test_stratified_never_reaches_one(monkeypatch):
    """(n - 1 + u)/n rounds to 1 for the largest u below 1."""
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, **__: torch.tensor(1 - 2.0**-53, dtype=dtype))
    assert float(losses.stratified(3, torch.Generator()).max()) < 1


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(), EDM()], ids=repr)
def test_times_are_the_quantile_functions_they_say(sde):
    u = torch.tensor([0.0, 0.25, 0.5, 0.9, 1 - 2.0**-53], dtype=torch.float64)
    low, high = sde.default_end, sde.t_max
    torch.testing.assert_close(losses.uniform(sde, u), low + u * (high - low))
    first, last = sde.log_snr(torch.tensor([low, high], dtype=torch.float64))
    torch.testing.assert_close(
        sde.log_snr(losses.uniform_log_snr(sde, u)), first + u * (last - first), rtol=1e-7, atol=1e-7
    )
    noise = functools.partial(losses.log_normal, mean=-0.5, std=0.8)(sde, u)
    assert float(noise[0]) == low and float(noise.max()) <= high
    z = torch.tensor([-0.6744897501960817, 0.0, 1.2815515655446004], dtype=torch.float64)  # normal quantiles
    torch.testing.assert_close(
        (sde.sigma(noise) / sde.alpha(noise))[1:4].log(), -0.5 + 0.8 * z, rtol=1e-7, atol=1e-7
    )


def test_options_of_times_and_their_errors():
    u = torch.tensor([0.0, 0.999999], dtype=torch.float64)
    assert losses.uniform(VPSDE(), u, end=0.2).tolist() == pytest.approx([0.2, 0.9999992])
    assert losses.uniform_log_snr(VPSDE(), u, end=0.2)[0].item() == pytest.approx(0.2)
    assert losses.log_normal(EDM(), torch.tensor([0.5], dtype=torch.float64)).item() == pytest.approx(
        math.exp(-1.2)
    )
    near = VPSDE(schedule=Sigmoid(log_snr_min=-2.0))  # which the law of the noise levels goes beyond
    t = losses.log_normal(near, torch.tensor([0.5, 0.95, 0.999], dtype=torch.float64), mean=0.9)
    assert 0.9 < float(t[0]) < 1 and t[1:].tolist() == pytest.approx([1.0, 1.0])
    assert losses.chain(VPSDE(), torch.tensor([0.0, 0.0999, 0.1, 0.9999]), n=10).tolist() == pytest.approx(
        [0.1, 0.1, 0.2, 1.0]
    )
    with pytest.raises(ValueError, match="finite range of log-SNR"):
        losses.uniform_log_snr(Rectified(), u)
    for sde in (EDM(), EDM(0.002, 1.0)):
        for times in (losses.chain, functools.partial(losses.in_proportion, sizes=torch.ones(9))):
            with pytest.raises(ValueError, match=r"expected a process with times in \[0, 1\].*found EDM"):
                times(sde, u)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), EDM()], ids=repr)
def test_uniform_log_snr_with_the_simple_weight_estimates_the_likelihood_integral(sde):
    """int w_likelihood L dt = (range of log-SNR)/2 E[w_simple L], by quadrature over u both ways."""
    u, w = unit_nodes(400)
    error = lambda t: 1 / (1 + sde.log_snr(t).exp())  # noqa: E731  -- Var(x_0 | x_t) of N(0, 1) data
    t = losses.uniform_log_snr(sde, u)
    first, last = sde.log_snr(torch.tensor([sde.default_end, sde.t_max], dtype=torch.float64))
    ours = (first - last) / 2 * (w * losses.simple(sde, t) * error(t)).sum()
    # d/dlam of log(1 + SNR)/2
    exact = 0.5 * (torch.nn.functional.softplus(first) - torch.nn.functional.softplus(last))
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=0)
    span = sde.t_max - sde.default_end
    t = sde.default_end + span * u**6  # nodes where the integrand is
    direct = (w * 6 * u**5 * span * losses.likelihood(sde, t) * error(t)).sum()
    torch.testing.assert_close(direct, exact, rtol=1e-4, atol=0)
