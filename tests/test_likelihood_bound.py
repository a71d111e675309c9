"""The evidence lower bound: closed forms by quadrature to rounding, and the estimator against them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from scoresde import DDPM, EDM, VPSDE, Denoiser, Rectified, grids, laws, schedules
from scoresde.likelihood import (
    DiscreteDecoder,
    GaussianDecoder,
    along,
    by_log_snr,
    diffusion_term,
    elbo,
    log_normal_mass,
    posterior_variance,
    prior_term,
    step_term,
    transition_variance,
)
from scoresde.likelihood.bound import noise_error

VP = VPSDE()
LAW = laws.Gaussian(0.7, 0.25)
V, END = 0.25, 1e-3
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * V)


def pairs(law: laws.Gaussian = LAW, nodes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, eps (n, 1) and weights (n,): Gauss-Hermite in both, exact up to degree 2 nodes - 1 in each."""
    h, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    w = w / w.sum()
    x = law.mean + law.variance.sqrt() * h
    return (
        x.repeat_interleave(nodes)[:, None],
        h.repeat(nodes)[:, None],
        w.repeat_interleave(nodes) * w.repeat(nodes),
    )


def gauss_legendre(low: float, high: float, nodes: int = 100) -> tuple[Tensor, Tensor]:
    g, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    return (low + high) / 2 + (high - low) / 2 * g, (high - low) / 2 * w


def snr(t) -> Tensor:
    return (VP.alpha(t) / VP.sigma(t)) ** 2


def decoder_at(t: float) -> GaussianDecoder:
    """The one with the exact variance of x given x_t."""
    return GaussianDecoder(float((V / (1 + V * snr(t))).sqrt()))


def decoder_term(t: float) -> float:
    x, eps, w = pairs()
    x_t = VP.alpha(t) * x + VP.sigma(t) * eps
    ratio = VP.sigma(t) / VP.alpha(t)
    return -float((w * decoder_at(t)(x, LAW.denoiser(VP)(x_t, t), ratio)).sum())


def chain_terms(nodes: Tensor, variance=posterior_variance) -> Tensor:
    """(K,) expected KL of every step between decreasing nodes, all in one call."""
    x, eps, w = pairs(nodes=2)
    n, steps = len(w), len(nodes) - 1
    t, s = (nodes[k : k + steps].repeat_interleave(n) for k in (0, 1))
    terms = step_term(LAW.denoiser(VP), x.repeat(steps, 1), eps.repeat(steps, 1), s, t, variance)
    return terms.view(steps, n) @ w


def prior_cost() -> float:
    x, _, w = pairs()
    return float((w * prior_term(VP, x)).sum())


def continuous_term(proposal=by_log_snr, nodes: int = 100, sde: VPSDE = VP) -> float:
    u, weight = gauss_legendre(0, 1, nodes)
    t, rate = proposal(sde, u, END)
    x, eps, w = pairs(nodes=2)
    n = len(w)
    error = noise_error(LAW.denoiser(sde), x.repeat(nodes, 1), eps.repeat(nodes, 1), t.repeat_interleave(n))
    return float((0.5 * rate * (error.view(nodes, n) @ w) * weight).sum())


CONTINUOUS = float(0.5 * ((1 + V * snr(END)) / (1 + V * snr(1.0))).log())


def test_the_identity_of_the_oracle(unchecked):
    """L_T + L_diffusion + L_0 = entropy + KL(q_T || prior), each to 1e-10."""
    L_T, L_0, diffusion = prior_cost(), decoder_term(END), continuous_term()
    alpha, sigma = float(VP.alpha(1.0)), float(VP.sigma(1.0))
    v = alpha**2 * V + sigma**2
    mismatch = 0.5 * (v + (0.7 * alpha) ** 2 - 1 - math.log(v))
    assert abs(diffusion - CONTINUOUS) < 1e-10
    assert abs(L_T + diffusion + L_0 - (ENTROPY + mismatch)) < 1e-10
    for found, stated in (
        (L_T, 1.59792e-5), (diffusion, 3.864782217), (L_0, -3.138996263), (mismatch, 1.05808e-5)
    ):  # fmt: skip
        assert abs(found - stated) < 1e-9
    assert abs(L_T + diffusion + L_0 - 0.725801933) < 1e-9


def test_a_grid_costs_more_than_the_continuous_bound(unchecked):
    """The four numbers of ORACLES.md; the excess falls as 1/T between fixed ends, and that is the limit."""
    excess = [
        float(chain_terms(grids.log_snr(VP, steps, END).t).sum()) - CONTINUOUS
        for steps in (10, 100, 1000, 10_000)
    ]
    for found, stated in zip(excess, (6.3775, 0.34240, 0.032437, 0.0032265), strict=True):
        assert abs(found / stated - 1) < 2e-5
    assert 0.98 < excess[2] / excess[3] / 10 < 1.02


def exact_variance(sde, s: Tensor, t: Tensor) -> Tensor:
    """That of p(x_s | x_t) for data of variance V: what q leaves open, and what is open about x itself."""
    on_data = sde.alpha(s) * sde.transition(s, t)[1] ** 2 / sde.sigma(t) ** 2
    return posterior_variance(sde, s, t) + on_data**2 * V / (1 + V * (sde.alpha(t) / sde.sigma(t)) ** 2)


@pytest.mark.parametrize("steps", [2, 10, 100])
def test_with_the_exact_reverse_variance_only_the_prior_is_missing(steps, unchecked):
    """P48: the gap is KL(q_T || prior) for any number of steps; with beta or beta-tilde it is not."""
    nodes = grids.uniform(VP, steps, END).t
    alpha, sigma = float(VP.alpha(1.0)), float(VP.sigma(1.0))
    v = alpha**2 * V + sigma**2
    mismatch = 0.5 * (v + (0.7 * alpha) ** 2 - 1 - math.log(v))
    rest = prior_cost() + decoder_term(END) - ENTROPY - mismatch
    assert abs(float(chain_terms(nodes, exact_variance).sum()) + rest) < 1e-10
    for variance in (posterior_variance, transition_variance):
        assert float(chain_terms(nodes, variance).sum()) + rest > 1e-3


def test_the_gap_of_the_ddpm_grid_is_half_of_eulers_constant(unchecked):
    """P48: on i/N with beta-tilde the gap does not vanish. It is gamma/2 + O(1/N) a dimension."""

    def gap(n: int) -> float:
        nodes = torch.arange(n, 0, -1, dtype=torch.float64) / n
        return float(chain_terms(nodes).sum()) + prior_cost() + decoder_term(1 / n) - ENTROPY

    gaps = [gap(n) for n in (25_000, 50_000, 100_000)]
    limits = [2 * b - a for a, b in itertools.pairwise(gaps)]
    assert abs(limits[-1] - 0.5 * np.euler_gamma) < 1e-3 and abs(gaps[-1] - 0.5 * np.euler_gamma) < 5e-3
    assert gaps[0] > gaps[1] > gaps[2] > 0.5 * np.euler_gamma


@pytest.mark.parametrize("variance", [posterior_variance, transition_variance])
def test_steps_of_a_ddpm(variance):
    """Against the KL of two Gaussians from a chain's own means; and against Kingma's weights."""
    chain = DDPM(torch.linspace(0.05, 0.4, 7, dtype=torch.float64))
    law = laws.Gaussian(torch.tensor([0.3, -0.5]).double(), 0.4)
    model = law.denoiser(chain.sde())
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    for i in range(2, 8):
        mean, var = chain.marginal(x, i)
        x_i = mean + var.sqrt() * eps
        D = model(x_i, i / 7)
        (mu_q, var_q), mu_p = chain.posterior(x_i, x, i), chain.mean_from_data(x_i, D, i)
        var_p = var_q if variance is posterior_variance else chain.betas[i - 1]
        kl = 0.5 * ((mu_q - mu_p).square() / var_p + var_q / var_p - 1 - (var_q / var_p).log()).sum(1)
        found = step_term(model, x, eps, (i - 1) / 7, i / 7, variance)
        assert torch.allclose(found, kl, rtol=1e-10, atol=0)
        if variance is posterior_variance:
            weighted = chain.elbo_weights[i - 1] * (x - D).square().sum(1)
            assert torch.allclose(found, weighted, rtol=1e-10, atol=0)
    whole = elbo(model, x, GaussianDecoder(), grid=chain.times.flip(0), variance=variance)
    assert whole.steps.shape == (5, 6) and whole.end == 1 / 7 and whole.network_calls == 6 + 4
    assert torch.equal(whole.times[0], chain.times.flip(0)[:-1])
    assert torch.allclose(whole.diffusion, whole.steps.sum(1))


def test_a_chain_of_one_step_goes_to_the_decoder_at_once():
    """L_T + L_0 by hand, and below log p of `x_1 ~ N(0, 1), x ~ N(D, sigma^2/alpha^2)`."""
    chain, place = DDPM([0.8]), torch.tensor([0.3, -0.5], dtype=torch.float64)
    model = laws.Empirical(place[None]).denoiser(chain.sde())  # D = place, whatever x_1 is
    x, ratio = torch.tensor([[0.2, 1.0], [-2.0, 0.0]], dtype=torch.float64), 0.8 / 0.2
    found = elbo(model, x, GaussianDecoder(), grid=chain.times.flip(0))
    q = [stats.norm(0.2**0.5 * v, 0.8**0.5) for v in x.flatten().tolist()]
    kl = [0.5 * (law.var() + law.mean() ** 2 - 1 - math.log(law.var())) for law in q]
    log_p = stats.norm(place, ratio**0.5).logpdf(x).sum(1)
    assert np.allclose(found.prior, np.reshape(kl, (2, 2)).sum(1), rtol=1e-12)
    assert np.allclose(found.decoder, -log_p, rtol=1e-12) and bool((found.value.numpy() < log_p).all())
    assert torch.allclose(found.value, -(found.prior + found.decoder)) and found.steps.shape == (2, 0)
    assert found.diffusion.tolist() == [0, 0] and found.times.shape == (2, 0) and found.end == 1
    assert found.network_calls == 4 and bool((found.standard_error < 1e-12).all())
    same = elbo(model, x, GaussianDecoder(), grid=torch.ones(1), end=1.0, variance=transition_variance)
    assert torch.equal(same.value, found.value)
    with pytest.raises(ValueError, match="starts at t_max = 1"):
        elbo(model, x, GaussianDecoder(), grid=torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"ends at end=0\.5, found 1\.0 alone"):
        elbo(model, x, GaussianDecoder(), grid=torch.ones(1), end=0.5)


BIMODAL = laws.Mixture([0.3, 0.7], torch.tensor([-1.0, 0.8]), torch.tensor([0.05, 0.2]))


@pytest.mark.parametrize("sde", [VPSDE(), EDM(0.05, 40.0), Rectified()], ids=repr)
def test_bound_is_below_log_p(sde, unchecked):
    """On average over the law, by quadrature in x and eps, continuous and on a grid, with two decoders; not
    with a tenth of the diffusion term left out. (At a single x it bounds the model's density, not the law's.)
    """
    model, end = BIMODAL.denoiser(sde), 0.05
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None]
    mass = BIMODAL.log_prob(x).exp() * 0.1
    h, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(30))
    points, noises = x.repeat_interleave(30, 0), h.repeat(61)[:, None]
    weights = (mass[:, None] * w / w.sum()).flatten()
    first = sde.t_max if math.isfinite(float(sde.log_snr(sde.t_max))) else 0.999
    lam, weight = gauss_legendre(*(float(sde.log_snr(t)) for t in (first, end)), nodes=40)
    errors = torch.stack([noise_error(model, points, noises, t) @ weights for t in sde.time(lam)])
    continuous = float(0.5 * errors @ weight)
    nodes = grids.uniform(sde, 12, end).t
    steps = [step_term(model, points, noises, s, t) @ weights for t, s in itertools.pairwise(nodes)]
    alpha, sigma = sde.alpha(end), sde.sigma(end)
    denoised = model(alpha * points + sigma * noises, end)
    truth = float(mass @ BIMODAL.log_prob(x))
    assert abs(float(mass.sum()) - 1) < 1e-6
    for width in (float(sigma / alpha), 0.2):
        L_0 = -float(GaussianDecoder(width)(points, denoised, sigma / alpha) @ weights)
        rest = float(prior_term(sde, x) @ mass) + L_0
        assert -(rest + float(sum(steps))) < -(rest + continuous) < truth
        assert -(rest + 0.9 * continuous) > truth or width == 0.2


def test_a_process_that_ends_without_signal(alpha_ledger, unchecked):
    """Draws cannot be uniform in a log-SNR without end; uniform in t, and on grids from t_max on, all is
    finite and below log p on average, at 1e-9; not with the diffusion's term halved."""
    sde, n = Rectified(), 4000
    model, x = BIMODAL.denoiser(sde), BIMODAL.sample(n, generator=torch.Generator().manual_seed(3))
    truth = BIMODAL.log_prob(x)
    with pytest.raises(ValueError, match=r"finite log-SNR .*along"):
        elbo(model, x, GaussianDecoder())
    for found in (
        elbo(model, x, GaussianDecoder(), end=0.05, proposal=along(sde)),
        elbo(model, x, GaussianDecoder(), grid=grids.uniform(sde, 30, 0.05)),
    ):
        assert bool(found.steps.isfinite().all())
        limit = -stats.norm.ppf(alpha_ledger.spend(1e-9, "bound without signal at t_max"))
        z = lambda excess: float(excess.mean() / excess.std()) * math.sqrt(n)  # noqa: E731
        assert z(found.value - truth) < limit < z(found.value - truth + 0.5 * found.diffusion)


def test_the_first_step_of_a_process_that_ends_without_signal():
    """KL of the two Gaussians, from a state that is noise alone."""
    sde, s, t = Rectified(), torch.tensor(0.6).double(), torch.tensor(1.0).double()
    x, eps = torch.tensor([[0.4], [-1.2]]).double(), torch.tensor([[0.3], [0.8]]).double()
    D = LAW.denoiser(sde)(eps, t)
    (mean_q, std), (mean_p, _) = sde.bridge(x, eps, s, t), sde.bridge(D, eps, s, t)
    known = 0.5 * ((mean_q - mean_p) / std).square().sum(1)
    assert torch.allclose(step_term(LAW.denoiser(sde), x, eps, s, t), known, rtol=1e-12)


def bounds_of(law: laws.Law, n: int, **options) -> tuple[Tensor, Tensor]:
    """Estimated bound and log p on n draws of the law."""
    x = law.sample(n, generator=torch.Generator().manual_seed(0))
    return elbo(law.denoiser(VP), x, GaussianDecoder(), **options).value, law.log_prob(x)


LAWS = {
    "rotated": laws.Gaussian(torch.tensor([0.3, -0.4]), torch.tensor([[0.3, 0.2], [0.2, 0.25]]).double()),
    "bimodal": BIMODAL,
    "ring": laws.Mixture([0.25] * 4, torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]]).double(), 0.05),
    "image": laws.Gaussian(torch.zeros(1, 3, 3), 0.2),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("grid", [False, True])
def test_estimates_are_below_log_p(name, grid, alpha_ledger, unchecked):
    """On average over the law, at 1e-9; and not above by more than the width of the decoder explains. Without
    the decoder's term they would be above.
    """
    options = {"grid": grids.log_snr(VP, 100, 1e-3)} if grid else {"draws": 32}
    bound, truth = bounds_of(LAWS[name], 600, **options)
    excess = bound - truth
    z = float(excess.mean() / excess.std()) * math.sqrt(600)
    limit = -stats.norm.ppf(alpha_ledger.spend(1e-9, f"bound of {name}, grid={grid}"))
    assert z < limit
    assert float(excess.mean()) > -LAWS[name].dim * (0.5 if grid else 0.15) - 6 * float(excess.std()) / 24


def test_estimates_and_their_errors(alpha_ledger, unchecked):
    """Each bound is unbiased, and its standard error no smaller than the spread, nor twice as large."""
    x = torch.full((3000, 1), 1.1, dtype=torch.float64)
    h, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    w, model = w / w.sum(), LAW.denoiser(VP)
    for options, nodes in (({"draws": 16}, None), ({"grid": grids.log_snr(VP, 40, END)}, 40)):
        found = elbo(model, x, decoder_at(END), **options)
        one, noises = x[:20], h[:, None]
        if nodes is None:
            u, weight = gauss_legendre(0, 1, 40)
            t, rate = by_log_snr(VP, u, END)
            true = sum(
                0.5 * r * c * noise_error(model, one, noises, s) @ w
                for s, r, c in zip(t, rate, weight, strict=True)
            )
        else:
            true = sum(
                step_term(model, one, noises, s, t) @ w
                for t, s in itertools.pairwise(grids.log_snr(VP, nodes, END).t)
            )
        denoised = model(VP.alpha(END) * one + VP.sigma(END) * noises, END)
        L_0 = -decoder_at(END)(one, denoised, VP.sigma(END) / VP.alpha(END)) @ w
        truth = -(true + L_0 + prior_term(VP, one)[0])
        limit = -stats.norm.ppf(alpha_ledger.spend(1e-9, f"bound with {list(options)}") / 2)
        off = (found.value - truth) / found.value.std() * math.sqrt(3000)
        assert abs(float(off.mean())) < limit
        wrong = (1.1 * found.diffusion + found.decoder + found.prior + truth) / found.value.std()
        assert abs(float(wrong.mean())) * math.sqrt(3000) > limit
        stated = float(found.standard_error.square().mean().sqrt())
        assert 0.95 < stated / float(found.value.std()) < 1.6


OTHERS = (VP, VPSDE(0.5, 12.0), VPSDE(schedule=schedules.Cosine(0.008, -11)))
PROPOSALS = [by_log_snr, *(along(other) for other in OTHERS)]


@pytest.mark.parametrize("proposal", PROPOSALS, ids=range(4))
def test_any_proposal_gives_the_same_mean(proposal, unchecked):
    assert abs(continuous_term(proposal, 400) - CONTINUOUS) < 1e-8


def test_uniform_time_is_along_the_process_itself():
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    t, rate = along(VP)(VP, u, END)
    assert torch.allclose(t, END + u * (1 - END), rtol=1e-12)
    x, eps, _ = pairs()
    model = LAW.denoiser(VP)
    for t_k, rate_k in zip(t, rate, strict=True):
        term = diffusion_term(model, x, eps, t_k) * (1 - END)
        assert torch.allclose(term, 0.5 * rate_k * noise_error(model, x, eps, t_k), rtol=1e-10)


class AnySchedule:
    """The denoiser of LAW under a schedule that is still being learned."""

    def __init__(self, schedule: schedules.Learned) -> None:
        self.sde = VPSDE(schedule=schedule)
        self.model = LAW.denoiser(self.sde)


def squares(schedule: schedules.Learned, u: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """Mean square of the estimates of VDM's loss, t uniform."""
    return diffusion_term(AnySchedule(schedule).model, x, eps, u).square().mean()


def learned_value(schedule: schedules.Learned) -> float:
    sde = AnySchedule(schedule).sde
    t, weight = gauss_legendre(0, 1, 300)
    x, eps, w = pairs(nodes=2)
    n = len(w)
    terms = diffusion_term(LAW.denoiser(sde), x.repeat(300, 1), eps.repeat(300, 1), t.repeat_interleave(n))
    return float((terms.view(300, n) @ w * weight).sum())


def test_a_learned_schedule_lowers_the_variance_and_not_the_value(unchecked):
    """VDM: trained through the bound with pinned ends; the value by quadrature stays, to 1e-10."""
    schedule = schedules.Learned(9.0, -10.0, hidden=8)
    generator = torch.Generator().manual_seed(0)
    u, x, eps = (
        torch.rand(4096, generator=generator).double(),
        LAW.sample(4096, generator=generator),
        torch.randn(4096, 1, generator=generator).double(),
    )
    with torch.no_grad():
        before, value = float(squares(schedule, u, x, eps)), learned_value(schedule)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.08)
    for _ in range(50):
        draw = torch.randperm(4096, generator=generator)[:256]
        optimizer.zero_grad()
        squares(schedule, u[draw], x[draw], eps[draw]).backward()
        optimizer.step()
    schedule.requires_grad_(False)
    closed = 0.5 * math.log((1 + V * math.exp(9.0)) / (1 + V * math.exp(-10.0)))
    assert abs(value - closed) < 1e-10 and abs(learned_value(schedule) - closed) < 1e-10, (
        value - closed,
        learned_value(schedule) - closed,
    )
    after = float(squares(schedule, u, x, eps))
    assert after - closed**2 < 0.75 * (before - closed**2)


def test_a_learned_proposal_for_a_model_of_another_schedule(unchecked):
    """The gradient of the mean square reaches the proposal's parameters and nothing else."""
    ends = VP.log_snr(torch.tensor([END, 1.0], dtype=torch.float64)).tolist()
    schedule = schedules.Learned(*ends, hidden=8)
    proposal = along(VPSDE(schedule=schedule))
    u = torch.rand(64, generator=torch.Generator().manual_seed(0)).double()
    t, rate = proposal(VP, u, END)
    x, eps = torch.full((64, 1), 0.9).double(), torch.ones(64, 1).double()
    (0.5 * rate * noise_error(LAW.denoiser(VP), x, eps, t)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in schedule.parameters())
    schedule.requires_grad_(False)
    assert abs(continuous_term(proposal, 300) - CONTINUOUS) < 1e-6


def test_learned_ends_get_gradients():
    """Of all three terms; at the start they are the pinned numbers."""
    pinned, free = schedules.Learned(6.0, -5.0, 4), schedules.Learned(6.0, -5.0, 4, learn_ends=True)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    assert torch.equal(pinned.log_snr(t), free.log_snr(t)) and torch.equal(pinned.beta(t), free.beta(t))
    sde = VPSDE(schedule=free)
    model = LAW.denoiser(sde)
    x, eps, w = pairs()
    x_0 = sde.alpha(0.0) * x + sde.sigma(0.0) * eps
    ratio = sde.sigma(0.0) / sde.alpha(0.0)
    cost = (w * (prior_term(sde, x) - GaussianDecoder()(x, model(x_0, 0.0), ratio))).sum()
    cost.backward()
    assert free.log_snr_max.grad.abs() > 1e-4 and free.log_snr_min.grad.abs() > 1e-4
    assert len(list(free.parameters())) == len(list(pinned.parameters())) + 2


def test_gradients_reach_the_network():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.gain * x

    model = Denoiser(Linear(), VP)
    x, eps, w = pairs()
    for term in (diffusion_term(model, x, eps, 0.5), step_term(model, x, eps, 0.4, 0.5)):
        (gradient,) = torch.autograd.grad((w * term).sum(), model.network.gain)
        assert gradient.abs() > 1e-3
    found = elbo(model.train(), x, GaussianDecoder(), draws=3)
    assert not found.value.requires_grad and model.training and model.network.gain.grad is None


def test_mass_of_cells_in_the_tails():
    """50 digits, from the centre to 40 standard deviations out, and cells that end at infinity."""
    mp.mp.dps = 60
    cells = [(-0.1, 0.2), (-1.0, 3.0), (5.0, 5.01), (-9.0, -8.9), (38.0, 40.0), (-40.0, 38.0), (0.0, 1e-6)]
    cells += [(-math.inf, 0.3), (2.0, math.inf), (-math.inf, -30.0), (30.0, math.inf), (-math.inf, math.inf)]
    middles = (0.0, 0.3, -1.7, 5.0, -37.0)
    widths = (1e-30, 1e-12, 1e-7, 1e-3, 0.02, 0.0999, 0.1001)  # of which one is as wide as a series goes
    narrow = [(m, w / max(1.0, abs(m))) for m in middles for w in widths if w > 1e-30 or not m]
    cells += [(m - 0.5 * w, m + 0.5 * w) for m, w in narrow] + [(0.0, 1e-10), (7.0, 7.0 + 1e-9)]
    a, b = torch.tensor(cells, dtype=torch.float64).requires_grad_().unbind(1)
    found = log_normal_mass(a, b)
    for value, (low, high) in zip(found.tolist(), cells, strict=True):
        low, high = (-high, -low) if low + high > 0 else (low, high)  # ncdf is exact to the left
        exact = mp.log(mp.ncdf(mp.mpf(high)) - mp.ncdf(mp.mpf(low)))
        assert abs(value - float(exact)) < 1e-12 * max(1.0, abs(float(exact)))
    a, b = torch.tensor([c for c in cells if math.isfinite(sum(c))], dtype=torch.float64).unbind(1)
    b.requires_grad_()  # d log(Phi(b) - Phi(a)) / db = phi(b)/(Phi(b) - Phi(a))
    (gradient,) = torch.autograd.grad(log_normal_mass(a, b).sum(), b)
    expected = (-0.5 * b.square() - log_normal_mass(a, b)).exp() / math.sqrt(2 * math.pi)
    assert torch.allclose(gradient, expected.detach(), rtol=1e-9, atol=0)


def test_discrete_decoder():
    """Masses sum to one over the lattice, the outer cells included; small cells give density times step."""
    lattice = torch.linspace(-1, 1, 17, dtype=torch.float64)
    decoder, ratio = DiscreteDecoder(0.125, -1.0, 1.0), torch.tensor(0.3).double()
    for mean in (-1.7, -0.2, 0.9, 4.0):
        masses = decoder(lattice[:, None], torch.full((17, 1), mean).double(), ratio).exp()
        assert abs(float(masses.sum()) - 1) < 1e-12
    x, mean = torch.tensor([[0.11, -0.2]]).double(), torch.tensor([[0.3, 0.1]]).double()
    fine = DiscreteDecoder(1e-4, -1.0, 1.0)(x, mean, ratio) - 2 * math.log(1e-4)
    assert torch.allclose(fine, GaussianDecoder()(x, mean, ratio), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected x on the lattice -1\.0, -0\.875, \.\.\., 1\.0, found"):
        decoder(x, mean, ratio)
    for off in (torch.linspace(0, 255, 5), torch.tensor([1.125]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="expected x on the lattice"):
            decoder(off[:, None].double(), torch.zeros(len(off), 1).double(), ratio)
    bits = (torch.arange(256) / 127.5 - 1).bfloat16()[:, None]  # rounded by less than the check allows
    assert DiscreteDecoder(2 / 255, -1.0, 1.0)(bits, torch.zeros(256, 1), ratio).isfinite().all()
    x = torch.tensor([[0.125, -0.25]]).double()
    assert torch.equal(DiscreteDecoder(0.125, -1, 1, 0.5)(x, mean, ratio),
                       DiscreteDecoder(0.125, -1, 1)(x, mean, torch.tensor(0.5).double()))  # fmt: skip
    normal = torch.distributions.Normal(mean, 0.3)
    assert torch.allclose(GaussianDecoder()(x, mean, ratio), normal.log_prob(x).sum(1))
    for wrong in ((0.0, -1.0, 1.0), (0.1, 1.0, -1.0), (0.1, -math.inf, 1.0)):
        with pytest.raises(ValueError, match="expected step > 0"):
            DiscreteDecoder(*wrong)


def test_coins_cost_a_bit():
    """Fair coins -1, +1 with a discrete decoder: at least one bit each, and not much more on a fine grid."""
    law = laws.Empirical(torch.tensor([-1.0, 1.0]))
    x = torch.tensor([[-1.0], [1.0]]).double().repeat(300, 1)
    found = elbo(law.denoiser(VP), x, DiscreteDecoder(2.0, -1.0, 1.0), draws=64, end=1e-2)
    spread = float(found.bits_per_dim().std()) / math.sqrt(600)
    assert 1 - 6 * spread < float(found.bits_per_dim().mean()) < 1.02 + 6 * spread and spread < 0.04
    shifted = found.bits_per_dim(0.5) - found.bits_per_dim()
    assert torch.allclose(shifted, torch.ones(600).double())


def test_the_standard_error_has_the_decoder_s_share():
    """Variance of the mean of the decoder's draws, seen by a decoder that keeps them, beside that of the
    steps."""
    kept, decoder, started = [], GaussianDecoder(0.02), time.perf_counter()

    def keeping(x: Tensor, mean: Tensor, ratio: Tensor) -> Tensor:
        kept.append(decoder(x, mean, ratio))
        return kept[-1]

    found = elbo(LAW.denoiser(VP), LAW.sample(5), keeping, grid=grids.log_snr(VP, 7, 0.01))
    costs = torch.stack(kept, 1)
    assert torch.allclose(found.decoder, -costs.mean(1))
    steps = found.steps.diff(dim=1).square().sum(1) * 7 / 12
    assert torch.allclose(found.standard_error**2, steps + costs.var(1) / costs.shape[1])
    assert 0 < found.seconds < time.perf_counter() - started


def test_a_sample_is_a_function_of_its_id():
    x = LAW.sample(5, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    for options in ({"draws": 4}, {"grid": grids.uniform(VP, 5)}):
        ask: Callable = partial(elbo, LAW.denoiser(VP), decoder=GaussianDecoder(), **options)
        whole = ask(x)
        assert torch.allclose(ask(x[3:], ids=[3, 4]).value, whole.value[3:], rtol=0, atol=1e-12)
        assert float((ask(x[3:]).value - whole.value[3:]).abs().min()) > 1e-4
        assert float((ask(x, seed=1).value - whole.value).abs().min()) > 1e-4
        assert ask(x[:0]).value.shape == (0,)
    # One time in each part of [0, 1), not the same for all samples
    times = VP.log_snr(elbo(LAW.denoiser(VP), x, GaussianDecoder(), draws=4).times)
    ends = VP.log_snr(torch.tensor([END, 1.0], dtype=torch.float64))
    parts = (ends[0] - times) / (ends[0] - ends[1]) * 4
    assert torch.equal(parts.floor(), torch.arange(4.0).double().expand(5, 4))
    assert len(set(parts[:, 0].tolist())) == 5 and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.ones(2, 1, dtype=torch.int64)}, "expected floating x"),
        ({"x": torch.ones(2)}, "at least one coordinate"),
        ({"x": torch.ones(2, 1).numpy()}, "expected a tensor x of shape .*, found ndarray"),
        ({"model": abs}, "expected a denoiser as model"),
        ({"condition": [1, 2]}, "expected a mapping from names to values"),
        ({"decoder": lambda: GaussianDecoder}, "expected a decoder object"),
        ({"decoder": lambda: None}, "expected a decoder object"),
        ({"decoder": lambda: lambda x, mean, ratio: x - mean}, r"shape \(2,\); found \(2, 1\)"),
        ({"decoder": lambda: lambda x, mean, ratio: 0.0}, r"shape \(2,\); found float"),
        ({"draws": 0}, "number of draws"),
        ({"draws": True}, "number of draws"),
        ({"end": 0.0}, "expected an end with noise"),
        ({"grid": grids.uniform(VP, 5, 0.0)}, "expected an end with noise"),
        ({"grid": grids.uniform(VP, 5).t[1:]}, "starts at t_max = 1"),
        ({"grid": grids.log_snr}, "expected a Grid such as"),
        ({"decoder": lambda: GaussianDecoder(-0.1)}, "expected a standard deviation std > 0"),
        ({"decoder": lambda: DiscreteDecoder(0.1, -1, 1, std=0.0)}, "expected a standard deviation std > 0"),
        ({"ids": [3]}, "expected 2 ids"),
    ],
)
def test_bad_arguments(options, message, unchecked):
    defaults = {"model": LAW.denoiser(VP), "x": torch.ones(2, 1), "decoder": GaussianDecoder}
    options = {**defaults, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        elbo(**{**options, "decoder": options["decoder"]()})


def test_conditions_of_the_bound_are_those_of_samplers() -> None:
    """Lists and arrays of numbers too, and labels of a few bits."""

    class Labelled(torch.nn.Module):
        def forward(self, x, time, label):
            return 0.1 * label.to(x)[:, None] * x

    model, x = Denoiser(Labelled(), VP), torch.ones(3, 2)
    label = torch.tensor([1, 2, 3])
    wanted = elbo(model, x, GaussianDecoder(), condition={"label": label}).value
    for same in ([1, 2, 3], label.numpy(), label.to(torch.uint8)):
        found = elbo(model, x, GaussianDecoder(), condition={"label": same}).value
        assert torch.equal(found, wanted)
