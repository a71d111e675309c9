"""The properties of guidance, likelihood and ELBO, each by its number, over generated cases."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scoresde import VPSDE, Denoiser, grids, guidance, laws, likelihood
from scoresde.laws import Gaussian, Law
from scoresde.likelihood import (
    GaussianDecoder,
    Hutchinson,
    posterior_variance,
    prior_term,
    rademacher,
    step_term,
    transition_variance,
)
from scoresde.networks import MLP
from scoresde.noise import Noise
from scoresde.sde import LinearSDE
from scoresde.testing import check_divergence, check_guidance, check_interval, check_likelihood

pytestmark = pytest.mark.usefixtures("unchecked")
FEWER = settings(max_examples=max(1, settings.default.max_examples // 3))
FEWEST = settings(max_examples=max(1, settings.default.max_examples // 16))
VP = VPSDE()
F64 = torch.float64


def numbers(low: int, high: int, *shape: int) -> st.SearchStrategy[Tensor]:
    """Eighths from low to high."""
    count = math.prod(shape)
    entries = st.lists(st.integers(8 * low, 8 * high), min_size=count, max_size=count)
    return entries.map(lambda k: torch.tensor(k, dtype=F64).view(shape) / 8)


def broad_laws(dim: int) -> st.SearchStrategy[Law]:
    """Gaussians and mixtures of two that one step of noise does not drown."""
    variances = st.floats(0.05, 2.0)
    one = st.builds(Gaussian, numbers(-2, 2, dim), variances)
    two = st.builds(laws.Mixture, st.just([0.3, 0.7]), numbers(-2, 2, 2, dim), variances)
    return st.one_of(one, two)


# ---- likelihood


@FEWEST
@given(broad_laws(2))
def test_p45_the_log_density_is_the_closed_form(law: Law) -> None:
    check_likelihood(partial(likelihood.log_prob, tolerance=1e-5), law, VP)


@FEWEST
@given(broad_laws(1))
def test_p45_the_density_integrates_to_one(law: Law) -> None:
    x = torch.linspace(-10, 10, 501, dtype=F64)[:, None]
    found = likelihood.log_prob(law.denoiser(VP), x, tolerance=1e-4)
    assert abs(float(torch.trapezoid(found.value.exp(), x[:, 0])) - 1) < 1e-4


@FEWEST
@given(numbers(-2, 2, 2, 2), numbers(-1, 1, 2))
def test_p46_affine_maps_shift_by_the_log_of_the_determinant(A: Tensor, b: Tensor) -> None:
    assume(abs(float(A.det())) > 0.3)
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    law, mapped = Gaussian(b.flip(0), cov), Gaussian(A @ b.flip(0) + b, A @ cov @ A.mT)
    x = law.sample(4, generator=torch.Generator().manual_seed(0))
    one, other = (
        likelihood.log_prob(m.denoiser(VP), z, end=1e-7, tolerance=1e-6)
        for m, z in ((law, x), (mapped, x @ A.mT + b))
    )
    change = other.corrected - other.truncation - (one.corrected - one.truncation)
    budget = 1e-6 + one.solver_error + other.solver_error
    # The stated gap is of second order in alpha/sigma at t_max; what is left grows with the data.
    budget = budget + 0.05 * (one.prior_gap.abs() + other.prior_gap.abs())
    assert bool(((change + A.det().abs().log()).abs() <= budget).all())


@FEWER
@given(numbers(-3, 3, 5), st.integers(1, 4))
def test_p47_rademacher_probes_are_exact_for_diagonal_jacobians(diagonal: Tensor, count: int) -> None:
    noise = Noise.of(0, None, batch=3, device=torch.device("cpu"), dtype=F64)
    estimates = Hutchinson(count).estimates(lambda W: W * diagonal, rademacher(noise, count, 5))
    torch.testing.assert_close(estimates, diagonal.sum().expand(3, count), rtol=1e-14, atol=1e-14)


@FEWEST
@given(st.integers(1, 6), st.integers(2, 9), st.sampled_from([rademacher, likelihood.gaussian]))
def test_p47_probes_are_unbiased(count: int, dim: int, law) -> None:
    check_divergence(Hutchinson(count, law), dim)


# ---- ELBO


def expected(law: Gaussian, nodes: Tensor, variance) -> float:
    """L_T + sum of steps + L_0 with the optimal decoder, minus the entropy: by Gauss-Hermite, which is exact
    for what is quadratic in x and eps."""
    h, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    w = (w / w.sum()).repeat_interleave(3) * (w / w.sum()).repeat(3)
    v = float(law.variance)
    x, eps = (law.mean + math.sqrt(v) * h).repeat_interleave(3)[:, None], h.repeat(3)[:, None]
    model, end = law.denoiser(VP), nodes[-1]
    steps, n = len(nodes) - 1, len(w)
    t, s = (nodes[k : k + steps].repeat_interleave(n) for k in (0, 1))
    terms = step_term(model, x.repeat(steps, 1), eps.repeat(steps, 1), s, t, variance).view(steps, n) @ w
    alpha, sigma = VP.alpha(end), VP.sigma(end)
    decoder = GaussianDecoder(math.sqrt(v / (1 + v * float((alpha / sigma) ** 2))))
    L_0 = -decoder(x, model(alpha * x + sigma * eps, end), sigma / alpha) @ w
    entropy = 0.5 * math.log(2 * math.pi * math.e * v)
    return float(prior_term(VP, x) @ w + terms.sum() + L_0) - entropy


@FEWER
@given(st.floats(-2, 2), st.floats(0.01, 4.0), st.integers(1, 40), st.floats(1e-4, 0.1))
def test_p48_the_gap_of_the_elbo(mean: float, v: float, steps: int, end: float) -> None:
    """With the exact reverse variance it is KL(q_T || prior); with beta or beta-tilde it is larger, and the
    bound is below log p with each."""
    law = Gaussian(torch.tensor([mean], dtype=F64), v)

    def exact(sde: LinearSDE, s: Tensor, t: Tensor) -> Tensor:
        at_s = sde.alpha(s) ** 2 * v + sde.sigma(s) ** 2
        scale, std = sde.transition(s, t)
        return at_s * std**2 / (scale**2 * at_s + std**2)

    nodes = grids.uniform(VP, steps, end).t
    alpha, sigma = float(VP.alpha(1.0)), float(VP.sigma(1.0))
    total = alpha**2 * v + sigma**2
    mismatch = 0.5 * (total + (mean * alpha) ** 2 - 1 - math.log(total))
    gap = expected(law, nodes, exact)
    assert abs(gap - mismatch) < 1e-10 / math.sqrt(end)
    for variance in (posterior_variance, transition_variance):
        assert expected(law, nodes, variance) > gap - 1e-10 / math.sqrt(end)


def test_p48_beta_tilde_leaves_half_of_eulers_constant() -> None:
    """Whatever the law, on the grid i/N: from above, and not to 0."""
    law, half = Gaussian(torch.tensor([0.7], dtype=F64), 0.25), 0.5 * np.euler_gamma
    nodes = [torch.arange(n, 0, -1, dtype=F64) / n for n in (1000, 8000)]
    coarse, fine = (expected(law, t, posterior_variance) - half for t in nodes)
    assert 0 < fine < coarse / 4 < 0.04


# ---- guidance


def perturbed(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    network = MLP(2, hidden=8, layers=1, classes=3).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.4)
    return Denoiser(network, VP, "noise").eval()


@FEWEST
@given(st.integers(0, 99), st.booleans())
def test_p49_guidance_without_a_classifier(seed: int, doubled: bool) -> None:
    model, label = perturbed(seed), torch.tensor([0, 1, 2])
    null = {"label": -1}

    def guide(scale: guidance.Scale):
        return guidance.classifier_free(model, scale, null=null, doubled=doubled).given(label=label)

    data = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)
    ends = model.given(label=torch.full((3,), -1)), model.given(label=label)
    times = torch.tensor([0.05, 0.6], dtype=F64)
    check_guidance(guide, ends[0], data=data, conditional=ends[1], times=times)


@FEWEST
@given(broad_laws(2), numbers(-2, 2, 1, 2), st.floats(0.05, 2.0))
def test_p49_p50_a_linear_observation_guides_to_the_posterior(law: Law, A: Tensor, noise: float) -> None:
    """The guided law is `law.posterior`, the gradient the central difference, and nothing is left behind."""
    posterior, model = law.posterior(torch.tensor([0.5]), A, noise), law.denoiser(VP)
    known = posterior.denoiser(VP)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return known.log_prob(x, t) - model.log_prob(x, t)

    guide = partial(guidance.classifier, model, log_prob)
    data = law.sample(4, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.02, 0.3, 0.9], dtype=F64)
    check_guidance(guide, model, data=data, posterior=posterior, log_prob=log_prob, times=times)
    check_interval(guide, VP, data=data)
