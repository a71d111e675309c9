"""Guidance against closed forms: on Gaussian data the guided denoiser is affine, so every law is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import protocol
import pytest
import torch
from exact import affine_law, distance
from scipy.integrate import quad
from torch import Tensor, nn

from scoresde import (
    DDPM,
    EDM,
    VESDE,
    VPSDE,
    Denoiser,
    Rectified,
    grids,
    guidance,
    likelihood,
    sample,
    solvers,
)
from scoresde.denoiser import DATA, FLOW, NOISE, SCORE, VELOCITY, BaseDenoiser
from scoresde.laws import Gaussian, Mixture
from scoresde.schedules import Cosine
from scoresde.sde import LinearSDE, like
from scoresde.tableau import coefficients, loop

F64 = torch.float64
VP = VPSDE()
PRIOR = Gaussian(torch.tensor([0.7], dtype=F64), 0.25)
Y, R = 1.5, 0.04  # y = x + N(0, R)
POSTERIOR = PRIOR.posterior(Y, [[1.0]], R)
SDES = [VP, VPSDE(schedule=Cosine()), VESDE(), EDM(), Rectified()]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def kalman(
    law: Gaussian, sde: LinearSDE, y: Tensor, A: Tensor, R: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(y | x_t) of `y = A x + N(0, R)` for Gaussian data: `N(y; A E[x_0|x_t], R + A Cov A^T)`."""
    mean, S, eye = law.mean.flatten(), law.cov, torch.eye(law.dim, dtype=F64)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = sde.alpha(t)[:, None, None], sde.sigma(t)[:, None, None]
        gain = alpha * S @ torch.linalg.inv(alpha**2 * S + sigma**2 * eye)
        D = mean + (gain @ (x.double().flatten(1) - alpha[:, 0] * mean)[:, :, None])[:, :, 0]
        C = R * torch.eye(len(A), dtype=F64) + A @ (S - alpha * gain @ S) @ A.mT
        error = (y - D @ A.mT)[:, :, None]
        return (-0.5 * (error.mT @ torch.linalg.solve(C, error)))[:, 0, 0].to(x.dtype)

    return log_prob


def guided(scale: guidance.Scale = 1.0, sde: LinearSDE = VP):
    return guidance.classifier(
        PRIOR.denoiser(sde), kalman(PRIOR, sde, f64(Y), torch.eye(1, dtype=F64), R), scale
    )


# ---- classifier guidance: the ground truth


@pytest.mark.oracle
def test_the_posterior_of_the_oracle() -> None:
    assert abs(float(POSTERIOR.mean) - 1.3896552) < 1e-7 and abs(float(POSTERIOR.cov) - 0.0344828) < 1e-7


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_exact_guidance_is_the_denoiser_of_the_posterior(sde) -> None:
    """Every view, at one time for each sample, on correlated data seen through a matrix."""
    law = Gaussian(
        f64(0.3, -0.5, 0.1), torch.tensor([[0.5, 0.2, 0.1], [0.2, 0.4, 0.0], [0.1, 0.0, 0.3]], dtype=F64)
    )
    A, y = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=F64), f64(0.4, -0.2)
    exact = law.posterior(y, A, 0.1).denoiser(sde)
    model = guidance.classifier(law.denoiser(sde), kalman(law, sde, y, A, 0.1))
    t = sde.time(torch.linspace(-4, 6, 5, dtype=F64))
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) * like(
        torch.hypot(sde.alpha(t), sde.sigma(t)), torch.ones(5, 3, dtype=F64)
    )
    for view in (DATA, NOISE, SCORE, VELOCITY, FLOW):
        found, expected = model.as_view(view, x, t), exact.as_view(view, x, t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    rows = model.rows(t, x)
    for k in range(5):
        torch.testing.assert_close(
            rows.a[k] * x + rows.b[k] * rows.evaluate(x, k), exact(x, t[k]), rtol=1e-9, atol=1e-9
        )


AFFINE = {
    **protocol.table_solvers(),
    **{
        repr(s): s
        for s in (
            solvers.predictor_corrector(solvers.dpmpp(2), norm="sigma"),
            *(solvers.reversible(p) for p in (1, 2)),
        )
    },
}


@pytest.mark.parametrize("name", AFFINE)
def test_every_sampler_gives_the_law_that_it_gives_on_the_posterior(name: str, unchecked) -> None:
    """Guided by the exact classifier from the guided marginal, 5 steps: as if the data were p(x | y)."""
    solver, grid, start = AFFINE[name], grids.log_snr(VP, 5), POSTERIOR.marginal(VP, 1.0)
    table = solver.tableau(VP, grid) if hasattr(solver, "tableau") else None
    rows = (10 if table is None else len(table)) if solver.card.stochastic else 0
    found = affine_law(solver, guided(), grid, start, rows)
    if table is None:
        expected, plain = (
            affine_law(solver, law.denoiser(VP), grid, start, rows) for law in (POSTERIOR, PRIOR)
        )
    else:
        expected, plain = (table.law(law, VP, prior=start) for law in (POSTERIOR, PRIOR))
    assert distance(found, expected) < 1e-9 < 1e-3 < distance(found, plain)


@pytest.mark.parametrize("name", protocol.table_solvers())
def test_that_law_tends_to_the_posterior_at_the_order_of_the_sampler(name: str) -> None:
    """By exact law, from lam = -2 to 1, over five Gaussians. A history that begins by itself costs O(h^2), so
    orders up to 2 are seen.
    """
    solver, steps, errors = protocol.table_solvers()[name], (160, 320), []
    prior = Gaussian(f64(0.7, -0.3, 0.4, 0.9, -1.0), f64(0.04, 0.15, 0.5, 1.3, 2.0))
    law = prior.posterior(f64(1.5, 0.2, -0.5, 1.0, -0.7), torch.eye(5), 0.1)
    for n in steps:
        grid = VP.time(torch.linspace(-4, 2, n + 1, dtype=F64))
        start, end = (law.marginal(VP, t) for t in (grid[0], grid[-1]))
        errors.append(distance(solver.tableau(VP, grid).law(law, VP, prior=start), end))
    declared = solver.card.weak_order if solver.card.stochastic else solver.card.order
    if declared is not None:
        assert errors[0] / errors[1] > 2 ** (min(declared, 2) - 0.25) or errors[1] < 1e-7, errors
        assert errors[1] < 0.02


@pytest.mark.oracle
def test_a_standard_normal_start_leaves_the_gap_of_the_prior(unchecked) -> None:
    """ORACLES.md: mean 1.387880, variance 0.034590 at end 1e-3, not those of the posterior's marginal."""
    grid = grids.log_snr(VP, 150, 1e-3)
    standard = Gaussian(f64(0.0), 1.0)
    found = affine_law(solvers.dpmpp(3), guided(), grid, standard)
    assert abs(float(found.mean) - 1.387880) < 1e-6 and abs(float(found.cov) - 0.034590) < 1e-6
    marginal = POSTERIOR.marginal(VP, 1e-3)
    right = affine_law(solvers.dpmpp(3), guided(), grid, POSTERIOR.marginal(VP, 1.0))
    assert distance(right, marginal) < 2e-6 < 1e-3 < distance(found, marginal)


def flow_law(scale: float, u0: float, u1: float, start: Gaussian, noise: bool) -> tuple[float, float]:
    """Mean and variance of x/alpha at `u = (sigma/alpha)^2 = u1`, begun with `start` at u0 > u1.

    With d = x/alpha - m, posterior variance q and posterior mean m + g the guided flow is

        dd/du = n/2 ([(1 - s)/(u + v) + s/(u + q)] d - s g/(u + q)),   n = 1 (ODE), 2 (reverse SDE)

    and the SDE adds variance n - 1 for each unit of u, so with Phi = (u + v)^(n(1-s)/2) (u + q)^(ns/2) all is
    an integral.
    """
    m, v = float(PRIOR.mean), float(PRIOR.cov)
    q, g, n = float(POSTERIOR.cov), float(POSTERIOR.mean - PRIOR.mean), 2 if noise else 1

    def log_phi(u: float) -> float:
        return n / 2 * ((1 - scale) * math.log(u + v) + scale * math.log(u + q))

    def integral(f: Callable[[float], float]) -> float:
        """int f(u) du, by log u."""
        return quad(
            lambda z: f(math.exp(z)) * math.exp(z),
            math.log(u1),
            math.log(u0),
            epsabs=0,
            epsrel=1e-11,
            limit=500,
        )[0]

    top, bottom = log_phi(u1), log_phi(u0)
    drive = integral(lambda u: n / 2 * scale * g / (u + q) * math.exp(top - log_phi(u)))
    spread = integral(lambda u: math.exp(2 * (top - log_phi(u)))) if noise else 0.0
    ratio = math.exp(top - bottom)
    return m + ratio * (float(start.mean) - m) + drive, ratio**2 * float(start.cov) + spread


@pytest.mark.parametrize(
    ("scale", "solver", "steps", "tolerance"),
    [
        *((scale, solvers.dpmpp(3), 100, 3e-4) for scale in (-0.5, 0.5, 2.0, 5.0)),
        *((scale, solvers.sde_dpmpp(2), 100, 1e-2) for scale in (0.5, 2.0)),
    ],
    ids=repr,
)
def test_the_law_at_other_scales_is_the_documented_one(scale, solver, steps, tolerance, unchecked) -> None:
    lam = (-4.0, 3.0)
    times = VP.time(2 * torch.linspace(*lam, steps + 1, dtype=F64))
    alpha, start, noisy = VP.alpha(times), POSTERIOR.marginal(VP, times[0]), solver.card.stochastic
    found = affine_law(solver, guided(scale), times, start, steps if noisy else 0)
    scaled = Gaussian(start.mean / alpha[0], start.cov / alpha[0] ** 2)
    mean, variance = flow_law(scale, math.exp(-2 * lam[0]), math.exp(-2 * lam[1]), scaled, noisy)
    tolerance *= 1 + 2 * scale**2  # the stronger, the stiffer
    assert abs(float(found.mean / alpha[-1]) - mean) < tolerance
    assert abs(float(found.cov / alpha[-1] ** 2) / variance - 1) < tolerance
    if not noisy:  # the limits in the docstring of `classifier`, and that they are not the product
        v, q = float(PRIOR.cov), float(POSTERIOR.cov)
        limit = flow_law(scale, 1e12, 1e-12, Gaussian(f64(0.0), 1e12), False)[1]
        assert abs(limit / (v ** (1 - scale) * q**scale) - 1) < 1e-6
        if 0 < scale != 1:
            assert abs(limit * ((1 - scale) / v + scale / q) - 1) > 0.1


# ---- mixtures


MIXTURE = Mixture([0.2, 0.5, 0.3], f64(-1.2, 0.4, 1.5), f64(0.02, 0.05, 0.03))


def log_responsibility(k: int, sde: LinearSDE = VP) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(component k | x_t) of MIXTURE, by hand."""

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        V = alpha**2 * f64(0.02, 0.05, 0.03) + sigma**2
        logits = f64(0.2, 0.5, 0.3).log() - 0.5 * ((x - alpha * f64(-1.2, 0.4, 1.5)) ** 2 / V + V.log())
        return logits.log_softmax(1)[:, k]

    return log_prob


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_class_of_a_mixture_is_its_component(k: int) -> None:
    model = guidance.classifier(MIXTURE.denoiser(VP), log_responsibility(k))
    component = Gaussian(MIXTURE.means[k], [0.02, 0.05, 0.03][k]).denoiser(VP)
    t = torch.linspace(0.02, 1, 9, dtype=F64)
    x = torch.linspace(-2, 2, 9, dtype=F64).flip(0)[:, None]
    torch.testing.assert_close(model(x, t), component(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.score(x, t), component.score(x, t), rtol=1e-9, atol=1e-9)


def cdf(law: Mixture, x: Tensor) -> Tensor:
    scale = torch.stack([law._spectrum.diagonal()[k, 0].sqrt() for k in range(len(law.weights))])
    return (law.weights * torch.special.ndtr((x[:, None] - law.means[:, 0]) / scale)).sum(1)


def test_an_observed_mixture_has_the_right_weights(unchecked) -> None:
    """In one dimension the probability flow keeps quantiles: what starts at the guided marginal's ends at the
    posterior's, so every component gets its weight, here to 1e-6. No Monte Carlo.
    """
    law = MIXTURE.posterior(0.3, [[1.0]], 0.5)
    prior, exact = MIXTURE.denoiser(VP), law.denoiser(VP)
    model = guidance.classifier(prior, lambda x, t: exact.log_prob(x, t) - prior.log_prob(x, t))
    grid = grids.log_snr(VP, 180, 1e-3)
    x = torch.linspace(-3.2, 3.2, 11, dtype=F64)[:, None]
    end = solvers.unipc(3).solve(model, x, grid).x[:, 0]
    started, ended = cdf(law.marginal(VP, 1.0), x[:, 0]), cdf(law.marginal(VP, 1e-3), end)
    assert (started - ended).abs().max() < 1e-6
    # The valleys between the components, where the weights can be read, are among them.
    assert (started - cdf(MIXTURE.marginal(VP, 1e-3), end)).abs().max() > 0.05
    assert torch.allclose(law.weights.cumsum(0)[:2], cdf(law, f64(-0.5, 0.95)), atol=0.02)


# ---- the gradient


class Peaks(nn.Module):
    """A classifier with weights, dropout and a buffer."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.drop, self.out = nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, classes)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.out(self.drop(torch.tanh(self.hidden(x) + time[:, None].to(x.dtype))))


class Net(nn.Module):
    """A network with classes (0..4, null -1), that counts its calls and the rows they had."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.linear, self.rows = nn.Embedding(6, 3), nn.Linear(3, 3), []

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor | None = None, vector: Tensor | None = None
    ) -> Tensor:
        self.rows.append(len(x))
        shift = self.table.weight[0] if label is None else self.table(label + 1)
        shift = shift if vector is None else shift + vector
        return torch.tanh(self.linear(x) + shift + time[:, None])


def networks_of(dtype: torch.dtype, device: torch.device):
    """A denoiser and log p(label | x_t), with labels for 4 samples."""
    model = Denoiser(Net(), VP).to(device, dtype).eval()
    classifier = guidance.Classifier(Peaks(), VP).to(device, dtype).eval()
    return model, classifier, torch.tensor([0, 2, 1, 2], device=device)


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_classes_may_be_of_any_integer_dtype(device, dtype, unchecked) -> None:
    _, classifier, label = networks_of(F64, device)
    x = draw(device, F64, 4, 3)
    assert torch.equal(classifier.log_prob(label.to(dtype))(x, 0.5), classifier.log_prob(label)(x, 0.5))


def test_the_gradient_is_the_central_difference(device) -> None:  # PROPERTIES 50
    model, classifier, label = networks_of(F64, device)
    log_prob, x, t = classifier.log_prob(label), draw(device, F64, 4, 3), f64(0.1, 0.3, 0.6, 1.0).to(device)
    score = guidance.classifier(model, log_prob, 3.0).score(x, t) - model.score(x, t)
    for i in range(3):
        e = 1e-4 * torch.eye(3, dtype=F64, device=device)[i]
        difference = (log_prob(x + e, t) - log_prob(x - e, t)) / 2e-4
        torch.testing.assert_close(score[:, i], 3 * difference, rtol=1e-6, atol=1e-6)


def test_modes_gradients_and_flags_are_left_as_found(device) -> None:  # PROPERTIES 50, FAULTS C5, E9
    model, classifier, label = networks_of(F64, device)
    classifier.train()
    frozen, trained = list(classifier.parameters())[:1], list(classifier.parameters())[1:]
    for p in frozen:
        p.requires_grad_(False)
    for p in trained:
        p.grad = torch.ones_like(p)
    guided = guidance.classifier(model, classifier.log_prob(label), 2.0)
    x = draw(device, F64, 4, 3)
    expected = None
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = solvers.dpmpp(2).solve(guided, x.clone(), grids.log_snr(VP, 5)).x
            torch.rand(3)
        expected = found if expected is None else expected
        assert torch.equal(found, expected) and not found.requires_grad
    assert classifier.training and classifier.network.drop.training and not model.training
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in trained)
    assert all(not p.requires_grad and p.grad is None for p in frozen)
    assert all(p.grad is None for p in model.parameters())
    x.requires_grad_()
    assert guided(x, 0.3).requires_grad and x.grad is None


def test_what_is_made_in_inference_mode_can_be_guided(device) -> None:  # FAULTS E9
    model, classifier, label = networks_of(F64, device)
    with torch.inference_mode():
        x = draw(device, F64, 4, 3)
        guided = guidance.classifier(model, classifier.log_prob(label.clone()), 2.0)
        found = guided(x, 0.3), guided.score(x, torch.full((4,), 0.3, dtype=F64, device=device))
    with torch.no_grad():
        x = x.clone()
        assert torch.equal(found[0], guided(x, 0.3))
    torch.testing.assert_close(found[1], guided.score(x, 0.3))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(half, device) -> None:
    """A classifier in half precision, or under autocast, guides a state in float32."""
    model, classifier, label = networks_of(torch.float32, device)
    x = draw(device, torch.float32, 4, 3)
    expected = guidance.classifier(model, classifier.log_prob(label), 2.0)(x, 0.3)
    with torch.no_grad(), torch.autocast(device.type, half):
        cast = guidance.classifier(model, classifier.log_prob(label), 2.0)(x, 0.3)
    lower = guidance.classifier(model, classifier.to(half).log_prob(label), 2.0)(x, 0.3)
    for found in (cast, lower):
        assert found.dtype == torch.float32
        assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_guided_loop_is_one_graph(device, unchecked) -> None:
    model, classifier, label = networks_of(torch.float32, device)
    free = guidance.classifier_free(model, 3.0, null={"label": -1}).given(label=label)
    for guided in (guidance.classifier(model, classifier.log_prob(label), 2.0), free):
        table = solvers.ddpm().tableau(VP, grids.log_snr(VP, 2))
        x, z = draw(device, torch.float32, 4, 3), draw(device, torch.float32, 4, 4, 3, seed=1)
        rows = guided.rows(table.times[:-1], x)
        numbers = coefficients(table, rows, x.dtype)

        def whole(x: Tensor, z: Tensor, numbers=numbers, rows=rows) -> Tensor:
            return loop(numbers, rows.evaluate, x, lambda k, shape: z[k])

        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(whole, fullgraph=True, backend="eager")(x, z)
            torch.testing.assert_close(found, whole(x, z), rtol=1e-5, atol=1e-6)


def test_guidance_can_be_differentiated() -> None:
    """As likelihoods need it: the Jacobian of the guided denoiser, forward and reverse."""
    x = f64(0.3, -0.2)[:, None]
    exact = POSTERIOR.denoiser(VP)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(lambda x: guided()(x, 0.4).sum(0))(x)
        torch.testing.assert_close(found, jacobian(lambda x: exact(x, 0.4).sum(0))(x), rtol=1e-9, atol=1e-9)
    x.requires_grad_()
    (found,) = torch.autograd.grad(guided()(x, 0.4).sum(), x)
    assert torch.allclose(found, torch.autograd.grad(exact(x, 0.4).sum(), x)[0])


def test_samples_do_not_see_each_other(device, dtype, unchecked) -> None:
    """Also where samples leave the batch: their labels leave with them."""
    model, classifier, label = networks_of(torch.promote_types(dtype, torch.float32), device)
    x = draw(device, model.dtype, 4, 3)
    for solver in (solvers.dpmpp(2), solvers.adaptive_ode(rtol=1e-2, atol=1e-2)):

        def run(rows: slice, solver=solver) -> Tensor:
            guided = guidance.classifier(model, classifier.log_prob(label[rows]), 2.0)
            both = guidance.classifier_free(guided, 1.5, null={"label": -1}).given(label=label[rows])
            return solver.solve(both, x[rows], grids.log_snr(VP, 6)).x

        together = run(slice(None))
        for i in (0, 2):
            torch.testing.assert_close(run(slice(i, i + 1)), together[i : i + 1], rtol=1e-4, atol=1e-4)


# ---- DDPM's own words


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_mean_of_the_ancestral_step_moves(variance) -> None:
    """By `beta/(1 - beta)^(1/2) scale grad`; by the variance of the step for it, as in algorithm 1 of
    Dhariwal and Nichol, with the gain of the step's end, and the same to first order.
    """
    scale, N, i = 2.5, 20, 12
    t, s = f64(i / N)[0], f64((i - 1) / N)[0]
    chain, model, plain = DDPM(VP.betas(N)), guided(scale), PRIOR.denoiser(VP)
    x = f64(0.3, -1.0, 1.8)[:, None]
    g = model.score(x, t) - plain.score(x, t)  # scale grad log p(y | x_t)
    mean, variance_small = chain.posterior(x, plain(x, t), i)
    beta = float(chain.betas[i - 1])
    moved = chain.posterior(x, model(x, t), i)[0]
    torch.testing.assert_close(moved, mean + beta / math.sqrt(1 - beta) * g, rtol=1e-10, atol=1e-12)
    a, V_root = VP.transition(s, t)
    torch.testing.assert_close(moved, mean + V_root**2 / a * g, rtol=1e-10, atol=1e-12)
    step = solvers.ddpm(variance).solve(
        model, x, torch.stack([t, s]), noise=lambda k, shape: torch.zeros(shape, dtype=F64)
    )
    torch.testing.assert_close(step.x, moved, rtol=1e-10, atol=1e-12)
    there = plain(x, t) + VP.sigma(s) ** 2 / VP.alpha(s) * g
    torch.testing.assert_close(
        chain.posterior(x, there, i)[0], mean + variance_small * g, rtol=1e-10, atol=1e-12
    )
    ratios = []
    for n in (100, 1000, 10000):
        betas = VP.betas(n)
        i = n // 2
        small = DDPM(betas).posterior(x, x, i)[1]
        ratios.append(abs(float(small) / float(betas[i - 1]) * math.sqrt(1 - float(betas[i - 1])) - 1))
    assert ratios[0] < 0.1 and all(8 < a / b < 12 for a, b in pairwise(ratios))


# ---- scales


def test_scales_are_functions_of_noise_level(device) -> None:
    scale = guidance.interval(3.0, -2.0, 4.0, outside=1.0)
    ramp = guidance.ramp(1.0, 5.0, -2.0, 2.0)
    for sde in SDES:
        t = sde.time(f64(-6.0, -2.01, -1.99, 0.0, 1.0, 3.99, 4.01)).to(device)
        assert scale(sde, t).tolist() == [1, 1, 3, 3, 3, 3, 1] and scale(sde, t).device == t.device
        expected = f64(1.0, 1.0, 1.01, 3.0, 4.0, 5.0, 5.0)
        torch.testing.assert_close(ramp(sde, t).cpu(), expected, rtol=1e-6, atol=1e-6)
    nested = guidance.interval(ramp, -1.0, 1.0)
    assert nested(VP, VP.time(f64(-1.5, 0.5, 1.5))).tolist() == pytest.approx([0, 3.5, 0])
    shifted = guidance.ho_salimans(ramp)
    assert callable(shifted) and float(shifted(VP, VP.time(f64(0.0)))) == pytest.approx(4.0)
    assert guidance.ho_salimans(1.5) == 2.5
    assert "low=-2.0, high=4.0" in repr(guided(scale))


def test_refining_the_grid_does_not_move_the_interval() -> None:
    """The same law in the limit: guided at noise levels, not at step numbers. Outside, no gradient is
    taken.
    """
    seen: list[float] = []
    log_prob = kalman(PRIOR, VP, f64(Y), torch.eye(1, dtype=F64), R)

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.extend((float(VP.log_snr(t[0])),) if len(seen) < 10**4 else ())
        return log_prob(x, t)

    model = guidance.classifier(PRIOR.denoiser(VP), watched, guidance.interval(2.0, -3.0, 1.0))
    means, shares = [], []
    for n in (60, 240):
        seen.clear()
        found = affine_law(solvers.ddim(), model, grids.log_snr(VP, n), Gaussian(f64(0.0), 1.0))
        assert min(seen) >= -3 and max(seen) <= 1
        means.append(float(found.mean))
        shares.append(len(seen) / n)
    assert abs(means[0] - means[1]) < 0.02 and abs(shares[0] - shares[1]) < 0.02 and shares[0] < 0.4
    assert abs(means[1] - float(PRIOR.mean)) > 0.1


@pytest.mark.parametrize(
    "scale", [0.0, 0.7, guidance.interval(1.5, -1.0, 2.0), guidance.ramp(0.5, 2.0, -1.0, 3.0)]
)
def test_prepared_rows_are_the_forward_pass(scale, device) -> None:
    model, classifier, label = networks_of(F64, device)
    x, times = draw(device, F64, 4, 3), VP.time(f64(-3.0, -0.5, 0.5, 2.5))
    log_prob = classifier.log_prob(label)
    cases = [
        (guidance.classifier(model, log_prob, scale), {}),
        (guidance.classifier(PRIOR_3.denoiser(VP).to(device), log_prob, scale), {}),
        (guidance.classifier_free(model, scale, null={"label": -1}), {"label": label}),
        (guidance.classifier_free(model, scale, null={"label": -1}, doubled=True), {"label": label}),
        (guidance.classifier_free(model, scale, null={"label": -1}, rescale=0.5), {"label": label}),
    ]
    for guided, cond in cases:
        rows = guided.given(**cond).rows(times, x)
        for k, t in enumerate(times):
            found = rows.a[k] * x + rows.b[k] * rows.evaluate(x, k)
            torch.testing.assert_close(found, guided(x, t, **cond), rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(
                found, guided(x, t.expand(4).to(device), **cond), rtol=1e-11, atol=1e-12
            )


PRIOR_3 = Gaussian(f64(0.7, 0.0, -0.3), 0.25)


# ---- classifier-free guidance


class TwoLaws(BaseDenoiser):
    """An exact conditional denoiser: the posterior's for label 0, the prior's without (label -1)."""

    def __init__(self) -> None:
        super().__init__()
        self.sde, self.given_y, self.null = VP, POSTERIOR.denoiser(VP), PRIOR.denoiser(VP)

    def forward(self, x: Tensor, t: Tensor | float, label: Tensor) -> Tensor:
        return torch.where(label[:, None] == 0, self.given_y(x, t), self.null(x, t))


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.4, 1.0, 3.0, guidance.ramp(0.0, 4.0, -2.0, 4.0)])
def test_both_kinds_of_guidance_agree(scale, doubled, unchecked) -> None:
    """With exact models: D_null + scale (D_cond - D_null) is guidance by the classifier at that scale."""
    free = guidance.classifier_free(TwoLaws(), scale, null={"label": -1}, doubled=doubled)
    x, t, label = f64(-0.5, 0.3, 1.2)[:, None], f64(0.1, 0.5, 1.0), torch.zeros(3, dtype=torch.long)
    for view in (DATA, NOISE, SCORE, VELOCITY, FLOW):
        found, expected = free.as_view(view, x, t, label=label), guided(scale).as_view(view, x, t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    sampled = sample(free, (3, 1), solvers.dpmpp(2), steps=4, condition={"label": label}, dtype=F64)
    torch.testing.assert_close(
        sampled.x,
        sample(guided(scale), (3, 1), solvers.dpmpp(2), steps=4, dtype=F64).x,
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_scale_0_is_unconditional_and_1_conditional(rescale, device, dtype) -> None:  # PROPERTIES 49
    """Bit for bit, in every view, also from a schedule; in solvers with one call of one batch."""
    model, _, label = networks_of(dtype, device)
    x = draw(device, torch.promote_types(dtype, torch.float32), 4, 3)
    null = torch.full_like(label, -1)
    for scale, same in ((0.0, null), (1.0, label)):
        for strength in (scale, guidance.interval(7.0, 90.0, 91.0, outside=scale)):
            free = guidance.classifier_free(model, strength, null={"label": -1}, rescale=rescale)
            for view in (DATA, NOISE, SCORE, VELOCITY):
                if not rescale or view == DATA:
                    found = free.as_view(view, x, 0.4, label=label)
                    assert torch.equal(found, model.as_view(view, x, 0.4, label=same))
            if not rescale:
                model.network.rows.clear()
                found = sample(free, (4, 3), solvers.dpmpp(2), steps=5, condition={"label": label})
                assert model.network.rows == [4] * 5
                assert torch.equal(
                    found.x, sample(model, (4, 3), solvers.dpmpp(2), steps=5, condition={"label": same}).x
                )


class Reusing(nn.Module):
    """A network that writes every output into one tensor, as one in a CUDA graph does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.out = network, {}

    def forward(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        fresh = self.network(x, time, **cond)
        return self.out.setdefault(fresh.shape, torch.empty_like(fresh)).copy_(fresh)


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("network_dtype", [torch.float32, F64], ids=str)
def test_a_network_may_write_both_outputs_into_one_tensor(network_dtype, doubled, device) -> None:
    model, _, label = networks_of(network_dtype, device)
    reusing, condition = Denoiser(Reusing(model.network), VP), {"label": label}
    for rescale in (0.0, 0.5):
        found = []
        for inner in (model, reusing):
            free = guidance.classifier_free(inner, 3.0, null={"label": -1}, rescale=rescale, doubled=doubled)
            run = sample(free, (4, 3), solvers.dpmpp(2), steps=5, condition=condition, dtype=F64)
            found.append((run.x, free(draw(device, F64, 4, 3), 0.4, **condition)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
    plain = sample(model, (4, 3), solvers.dpmpp(2), steps=5, condition=condition, dtype=F64).x
    free = guidance.classifier_free(reusing, 3.0, null={"label": -1}, doubled=doubled)
    guided = sample(free, (4, 3), solvers.dpmpp(2), steps=5, condition=condition, dtype=F64).x
    assert float((guided - plain).abs().max()) > 0.01


def test_one_doubled_batch_or_two_calls(device) -> None:
    model, _, label = networks_of(F64, device)
    x, vector = draw(device, F64, 4, 3), draw(device, F64, 4, 3, seed=2)
    cond, null = {"label": label, "vector": vector}, {"label": -1, "vector": 0.0}
    found = []
    for doubled, rows in ((False, [4, 4]), (True, [8])):
        model.network.rows.clear()
        free = guidance.classifier_free(model, 2.5, null=null, doubled=doubled)
        found.append(free(x, 0.3, **cond))
        assert model.network.rows == rows
        free.given(**cond).rows(f64(0.3), x).evaluate(x, 0)
        assert model.network.rows == 2 * rows
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)
    without = model(x, 0.3, label=torch.full_like(label, -1), vector=torch.zeros_like(vector))
    torch.testing.assert_close(found[0], 2.5 * model(x, 0.3, **cond) - 1.5 * without)


def test_it_is_affine_in_the_scale_and_w_is_the_paper_s(device) -> None:  # PROPERTIES 49
    model, _, label = networks_of(F64, device)
    x, t = draw(device, F64, 4, 3), f64(0.1, 0.4, 0.7, 1.0).to(device)

    def score(scale: guidance.Scale) -> Tensor:
        return guidance.classifier_free(model, scale, null={"label": -1}).score(x, t, label=label)

    without, given = score(0.0), score(1.0)
    for s in (-1.0, 0.3, 0.5, 2.0, 7.5):
        torch.testing.assert_close(score(s), without + s * (given - without), rtol=1e-11, atol=1e-11)
        w = s - 1
        torch.testing.assert_close(score(guidance.ho_salimans(w)), (1 + w) * given - w * without)


def test_a_negative_condition_takes_the_place_of_none(device) -> None:
    model, _, label = networks_of(F64, device)
    x = draw(device, F64, 4, 3)
    other = torch.tensor([3, 3, 4, 3], device=device)
    found = guidance.classifier_free(model, 2.0, null={"label": other})(x, 0.4, label=label)
    expected = 2 * model(x, 0.4, label=label) - model(x, 0.4, label=other)
    torch.testing.assert_close(found, expected)
    left_out = guidance.classifier_free(model, 2.0, null={"label": None})(x, 0.4, label=label)
    torch.testing.assert_close(left_out, 2 * model(x, 0.4, label=label) - model(x, 0.4))


def test_a_condition_that_is_a_mapping_has_a_null_of_its_parts(device) -> None:
    class Nested(nn.Module):
        def forward(self, x, time, text):
            return x * text["scale"][:, None] + text["shift"][:, None]

    model, x = Denoiser(Nested(), VP), draw(device, F64, 4, 3)
    text = {"scale": draw(device, F64, 4), "shift": draw(device, F64, 4)}
    found = guidance.classifier_free(model, 2.0, null={"text": {"scale": 0.0}})(x, 0.4, text=text)
    null = {"scale": torch.zeros_like(text["scale"]), "shift": text["shift"]}
    torch.testing.assert_close(found, 2 * model(x, 0.4, text=text) - model(x, 0.4, text=null))


def test_rescaling_by_hand(device) -> None:
    model, _, label = networks_of(F64, device)
    x = draw(device, F64, 4, 3)
    given, plain = (
        model(x, 0.4, label=label),
        guidance.classifier_free(model, 4.0, null={"label": -1})(x, 0.4, label=label),
    )
    for phi in (0.3, 1.0):
        free = guidance.classifier_free(model, 4.0, null={"label": -1}, rescale=phi)
        found = free(x, 0.4, label=label)
        for i in range(4):
            ratio = float(np.std(given[i].tolist()) / np.std(plain[i].tolist()))
            torch.testing.assert_close(found[i], plain[i] * (1 - phi + phi * ratio))
        alpha, sigma = float(VP.alpha(0.4)), float(VP.sigma(0.4))
        torch.testing.assert_close(free.noise(x, 0.4, label=label), (x - alpha * found) / sigma)
    flat = guidance.classifier_free(TwoLaws(), 4.0, null={"label": -1}, rescale=1.0)  # one element, no spread
    assert flat(f64(0.5)[:, None], 0.4, label=torch.zeros(1, dtype=torch.long)).isfinite().all()


# ---- the classifier


@pytest.mark.parametrize("time_input", ["t", "log_snr", "index"])
@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_what_a_classifier_gets_and_gives(sde, time_input, device) -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float32))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            self.x, self.time = x, time
            return x * self.weight

    network = Seen().to(device)
    classifier = guidance.Classifier(network, sde, time_input)
    t = sde.time(f64(-2.0, 0.0, 3.0, 5.0)).to(device)
    x = draw(device, F64, 4, 3) * like(torch.hypot(sde.alpha(t), sde.sigma(t)), draw(device, F64, 4, 3))
    log_p = classifier(x, t)
    assert log_p.dtype == F64 and network.x.dtype == network.time.dtype == torch.float32
    torch.testing.assert_close(network.x.double(), draw(device, F64, 4, 3), rtol=1e-6, atol=1e-6)
    expected = {"t": t, "log_snr": sde.log_snr(t), "index": t * 1000 - 1}[time_input]
    torch.testing.assert_close(network.time.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(4, dtype=F64, device=device))
    torch.testing.assert_close(log_p, network.x.double().log_softmax(1), rtol=1e-6, atol=1e-6)
    label = torch.tensor([2, 0, 1, 1], device=device)
    assert torch.equal(classifier.log_prob(label)(x, t), log_p[torch.arange(4), label])
    assert torch.equal(classifier.log_prob(1)(x, t), log_p[:, 1])


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_guidance_in_every_mode(around, fullgraph, unchecked) -> None:
    """Before torch 2.13 `torch.func` finds no gradient in inference_mode, and says nothing of it."""
    model, x = guided(), draw(torch.device("cpu"), F64, 4, 1)
    expected = model(x, 0.3)
    assert not torch.allclose(expected, PRIOR.denoiser(VP)(x, 0.3), rtol=0, atol=0.1)
    torch._dynamo.reset()
    with around():
        found = torch.compile(lambda x: model(x, 0.3), backend="eager", fullgraph=fullgraph)(x.clone())
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12) and not found.requires_grad


# ---- errors and ends


def test_no_signal_no_guidance() -> None:
    sde, x = Rectified(), f64(0.3)[:, None]
    model = guided(sde=sde)
    for call in (lambda: model(x, 1.0), lambda: model.rows(f64(1.0, 0.5), x)):
        with pytest.raises(ValueError, match=r"determined, found t=1\.0: without signal"):
            call()
    assert model.noise(x, f64(0.999)).isfinite().all()
    late = guided(guidance.interval(1.0, -5.0, 9.0), sde=sde)
    assert torch.equal(late.rows(f64(1.0, 0.5), x).evaluate(x, 0), PRIOR.denoiser(sde)(x, 1.0))


@pytest.mark.parametrize("two", [np.int64(2), np.float32(2), np.arange(3)[2]], ids=type)
def test_numbers_of_numpy_are_scales(two, unchecked) -> None:
    made = guidance.classifier(PRIOR.denoiser(VP), lambda x, t: x.sum(1), two)
    assert type(made.scale) is float and made.scale == 2


def test_a_scale_that_is_one_number() -> None:
    """A function may return a number, or one time's number for all of a grid's."""
    x, one = f64(0.3, -1.0)[:, None], torch.tensor([0, 0])
    for scale in (lambda sde, t: 2.0, lambda sde, t: torch.tensor(2.0)):
        for make in (
            lambda s: guided(s),
            lambda s: guidance.classifier_free(TwoLaws(), s, null={"label": -1}).given(label=one),
        ):
            model, wanted = make(scale), make(2.0)
            rows, known = (m.rows(f64(1.0, 0.5), x) for m in (model, wanted))
            for k in range(2):
                assert torch.equal(rows.evaluate(x, k), known.evaluate(x, k))
            assert torch.equal(model(x, f64(0.3, 0.6)), wanted(x, f64(0.3, 0.6)))


def test_a_classifier_without_parameters() -> None:
    class Signs(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.cat([x, -x], 1)

    classifier, x = guidance.Classifier(Signs(), VP), f64(0.3, -1.0)[:, None]
    assert classifier.device.type == "cpu"
    assert torch.allclose(classifier(x, 0.4).exp().sum(1), torch.ones(2, dtype=F64))
    assert torch.allclose(classifier(x, 0.4)[:, 0] - classifier(x, 0.4)[:, 1], 2 * x[:, 0])


def test_at_scales_0_and_1_one_call_is_enough() -> None:
    seen, x, label = [], f64(0.3, -1.0)[:, None], torch.zeros(2, dtype=torch.long)
    model = TwoLaws()
    model.register_forward_hook(lambda *_: seen.append(1))
    for scale, calls in ((0.0, 1), (1.0, 1), (0.5, 2)):
        seen.clear()
        guidance.classifier_free(model, scale, null={"label": -1})(x, 0.3, label=label)
        assert len(seen) == calls


def test_a_null_that_is_made_in_inference_mode_can_be_differentiated() -> None:
    class Moved(BaseDenoiser):
        sde = VP

        def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
            return shift * PRIOR.denoiser(VP)(x, t)

    x = f64(0.3, -1.0)[:, None]
    with torch.inference_mode():
        free = guidance.classifier_free(Moved(), 2.0, null={"shift": torch.full((1, 1), 0.5, dtype=F64)})
    found = likelihood.log_prob(free, x, condition={"shift": torch.ones(2, 1, dtype=F64)}, tolerance=1e-2)
    assert bool(found.value.isfinite().all())


def test_errors(device, unchecked) -> None:
    model, classifier, label = networks_of(torch.float32, device)
    x = draw(device, torch.float32, 4, 3)
    plain = PRIOR.denoiser(VP)
    for wrong in (lambda x, t: x.sum(), lambda x, t: x, lambda x, t: 1.0):
        with pytest.raises(ValueError, match=r"log_prob\(x, t\) to return one number a sample, shape \(4,\)"):
            guidance.classifier(plain, wrong)(torch.zeros(4, 1), 0.3)
    with pytest.raises(TypeError, match="expected a denoiser to guide, found Net"):
        guidance.classifier(model.network, classifier.log_prob(label))
    with pytest.raises(TypeError, match="log_prob: expected a function"):
        guidance.classifier(model, 3.0)
    for wrong, kind in (("2", TypeError), (True, TypeError), (math.nan, ValueError), (math.inf, ValueError)):
        with pytest.raises(kind, match="scale: expected"):
            guidance.classifier(model, classifier.log_prob(label), wrong)
        with pytest.raises(kind, match="scale: expected"):
            guidance.classifier_free(model, wrong, null={"label": -1})
    for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="low < high"):
            guidance.interval(1.0, low, high)
        with pytest.raises(ValueError, match="low < high"):
            guidance.ramp(1.0, 2.0, low, high)
    with pytest.raises(ValueError, match="finite numbers"):
        guidance.ramp(1.0, 2.0, -math.inf, 0.0)
    for wrong in (torch.zeros(4, 1, dtype=torch.long), torch.zeros(4), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"label: expected an integer or integers of shape \(B,\)"):
            classifier.log_prob(wrong)
    for sde in (EDM(), VPSDE(0.1, 19.0)):
        with pytest.raises(ValueError, match="log_prob: expected a classifier on the model's process, "):
            guidance.classifier(PRIOR.denoiser(sde), classifier.log_prob(label))
    with pytest.raises(ValueError, match="label: expected classes 0 to 2, found 0 to 3"):
        classifier.log_prob(torch.tensor([0, 3, 0, 0]))(x, 0.3)
    with pytest.raises(ValueError, match="label: expected classes from 0 on, found -1"):
        classifier.log_prob(torch.tensor([0, -1, 2, 0]))
    calls = []
    handle = classifier.register_forward_pre_hook(lambda *call: calls.append(call))
    with pytest.raises(ValueError, match="label: expected 4 labels, one a sample, found 2"):
        classifier.log_prob(torch.tensor([0, 1]))(x, 0.3)
    handle.remove()
    assert not calls
    with pytest.raises(ValueError, match="label: expected an integer"):
        classifier.log_prob(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="time_input"):
        guidance.Classifier(Peaks(), VP, "sigma")
    with pytest.raises(ValueError, match=r"expected the network to return logits \(4, K\), found"):
        guidance.Classifier(nn.Sequential(), VP)
        guidance.Classifier(Flat(), VP)(x, 0.3)
    for null in ({}, None, -1):
        with pytest.raises(TypeError, match="null: expected the conditions"):
            guidance.classifier_free(model, 2.0, null=null)
    with pytest.raises(ValueError, match=r"rescale: expected a number from 0 to 1"):
        guidance.classifier_free(model, 2.0, null={"label": -1}, rescale=1.5)
    free = guidance.classifier_free(model, 2.0, null={"label": -1})
    with pytest.raises(ValueError, match=r"the condition \['label'\] that null=.* replaces, found none"):
        free(x, 0.3)
    with pytest.raises(ValueError, match="the condition"):
        sample(free, (4, 3), solvers.ddim())
    doubled = guidance.classifier_free(model, 2.0, null={"label": None}, doubled=True)
    with pytest.raises(ValueError, match="use doubled=False"):
        doubled(x, 0.3, label=label)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x.sum(1) * self.weight


def test_an_empty_batch(device) -> None:
    model, classifier, label = networks_of(torch.float32, device)
    x = torch.zeros(0, 3, device=device)
    assert guidance.classifier(model, classifier.log_prob(label[:0]), 2.0)(x, 0.3).shape == (0, 3)
    free = guidance.classifier_free(model, 2.0, null={"label": -1}, doubled=True)
    assert free(x, 0.3, label=label[:0]).shape == (0, 3)


def test_a_huge_scale_is_an_error_that_names_the_call(device) -> None:  # FAULTS E7
    model, classifier, label = networks_of(torch.float32, device)
    guided = guidance.classifier(model, classifier.log_prob(label), 1e38)
    with pytest.raises(FloatingPointError, match="call"):
        sample(guided, (4, 3), solvers.ddim(), steps=20)


def test_device_and_dtype_are_those_of_the_model(device, dtype) -> None:
    model, classifier, label = networks_of(dtype, device)
    for guided in (
        guidance.classifier(model, classifier.log_prob(label), 2.0),
        guidance.classifier_free(model, 2.0, null={"label": -1}),
    ):
        assert guided.device == model.device and guided.dtype == dtype and guided.sde is VP
