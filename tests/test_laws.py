"""Exact laws against loops over dense matrices, quadrature, scipy, mpmath and automatic differentiation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mpmath import mp
from torch import Tensor

from scoresde.denoiser import FLOW, NOISE, SCORE, VELOCITY, BaseDenoiser
from scoresde.engines import Diagonal, Isotropic, Reduced, Rotated, shares
from scoresde.laws import Empirical, Gaussian, Law, LowRank, Mixture
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE

SDES = [VPSDE(), SubVPSDE(), VESDE(), EDM(), Rectified()]
ROUNDING = {torch.float64: 2e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def near(got: Tensor, want: object, rel: float, scale: float = 0.0) -> None:
    """Largest error at most `rel` times the largest entry of `want` (or `scale`)."""
    expected = want.detach().cpu().double() if isinstance(want, Tensor) else torch.tensor(np.array(want))
    assert got.shape == expected.shape
    error = (got.detach().cpu().double() - expected).abs().max().item()
    assert error <= rel * max(expected.abs().max().item(), scale), (error, expected.abs().max().item())


def matrix(rng: np.random.Generator, *lead: int, d: int) -> np.ndarray:
    factor = rng.normal(size=(*lead, d, d)) / math.sqrt(d)
    return factor @ np.swapaxes(factor, -1, -2) + 0.01 * np.eye(d)


def make(kind: str, seed: int) -> tuple[Law, np.ndarray, np.ndarray, np.ndarray]:
    """A law and the same as plain arrays: weights (K,), means (K, D), covariances (K, D, D)."""
    rng = np.random.default_rng(seed)
    K, d = (1, 5) if kind.startswith("one") else (3, 24 if "frame" in kind else 4)
    w = rng.dirichlet(np.ones(K)) if K > 1 else np.ones(1)
    m = rng.normal(size=(K, d))
    v = rng.uniform(0.1, 2, size=K)
    eye, kind = np.eye(d), kind.removeprefix("one ").removeprefix("frame ")
    F = rng.normal(size=(K, d, 2))
    cov, S = {
        "same": (v[0], v[0] * np.stack([eye] * K)),
        "isotropic": (v, v[:, None, None] * eye),
        "diagonal": (D := rng.uniform(0, 2, size=(K, d)), np.stack([np.diag(row) for row in D])),
        "full": (S := matrix(rng, K, d=d), S),
        "lowrank": (LowRank(torch.tensor(v), torch.tensor(F)), v[:, None, None] * eye + F @ F.swapaxes(1, 2)),
        "lowrank same": (LowRank(v[0], torch.tensor(F)), v[0] * eye + F @ F.swapaxes(1, 2)),
    }[kind]
    if K > 1:
        return Mixture(w, m, cov if isinstance(cov, LowRank) else torch.tensor(cov)), w, m, S
    if isinstance(cov, LowRank):
        return (
            Gaussian(m[0], LowRank(float(torch.as_tensor(cov.variance).reshape(-1)[0]), cov.factor[0])),
            w,
            m,
            S,
        )
    return Gaussian(m[0], torch.as_tensor(cov).reshape(cov.shape[1:] if np.ndim(cov) else ())), w, m, S


KINDS = ["same", "isotropic", "diagonal", "full", "lowrank", "lowrank same"]
ALL = [*KINDS, *(f"one {k}" for k in KINDS), *(f"frame {k}" for k in KINDS if "low" in k or "iso" in k)]


def loops(w: np.ndarray, m: np.ndarray, S: np.ndarray, x: np.ndarray, alpha: float, sigma: float):
    """(E[x_0 | x], log p(x), score) of one x (D,), component by component, with dense solves."""
    log_p, data, score = [], [], []
    for w_k, m_k, S_k in zip(w, m, S, strict=True):
        V, d = alpha**2 * S_k + sigma**2 * np.eye(len(x)), x - alpha * m_k
        pull = np.linalg.solve(V, d)
        log_p.append(np.log(w_k) - 0.5 * (d @ pull + np.linalg.slogdet(2 * np.pi * V)[1]))
        data.append(m_k + alpha * S_k @ pull)
        score.append(-pull)
    total = np.logaddexp.reduce(log_p)
    r = np.exp(np.array(log_p) - total)
    return r @ np.array(data), total, r @ np.array(score)


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_denoiser_score_and_density_match_loops(kind: str, sde: LinearSDE, device, dtype) -> None:
    law, w, m, S = make(kind, seed=3)
    rng = np.random.default_rng(1)
    t = sde.t_min + (sde.t_max - sde.t_min) * torch.tensor([0.02, 0.1, 0.4, 0.7, 0.99], dtype=torch.float64)
    alpha, sigma = sde.alpha(t).numpy(), sde.sigma(t).numpy()
    draws = m[rng.integers(len(m), size=5)] + rng.normal(size=(5, m.shape[1]))
    x = torch.tensor(alpha[:, None] * draws + sigma[:, None] * rng.normal(size=draws.shape)).to(device, dtype)
    rows = [loops(w, m, S, *row) for row in zip(x.cpu().double().numpy(), alpha, sigma, strict=True)]
    data, log_p, score = (np.stack(part) for part in zip(*rows, strict=True))
    model = law.to(device).denoiser(sde)
    rel = ROUNDING[dtype]
    near(model(x, t.to(device)), data, rel)
    near(model.log_prob(x, t.to(device)), log_p, rel)
    near(model.score(x, t.to(device)), score, rel)
    assert model(x, t.to(device)).dtype == x.dtype
    for i in range(5):  # a single time gives what a batch of times gives
        near(model(x[i : i + 1], t[i].item()), data[i : i + 1], rel)


@pytest.mark.parametrize("kind", ALL)
def test_density_moments_and_marginal_match_loops(kind: str, dtype) -> None:
    law, w, m, S = make(kind, seed=5)
    x = torch.tensor(np.random.default_rng(2).normal(size=(6, m.shape[1])))
    near(law.log_prob(x), [loops(w, m, S, row, 1.0, 0.0)[1] for row in x.numpy()], 1e-12)
    mean = w @ m
    cov = sum(a * (C + np.outer(b - mean, b - mean)) for a, b, C in zip(w, m, S, strict=True))
    near(law.mean, mean, 1e-14)
    near(law.cov, cov, 1e-13)
    near(law.variance, np.diag(cov), 1e-13)
    sde, t = VPSDE(), 0.3
    alpha, sigma = sde.alpha(t).item(), sde.sigma(t).item()
    there = law.marginal(sde, t)
    assert type(there) is type(law)
    near(there.log_prob(x), [loops(w, m, S, row, alpha, sigma)[1] for row in x.numpy()], 1e-12)
    near(there.cov, alpha**2 * cov + sigma**2 * np.eye(len(mean)), 1e-13)
    near(law.denoiser(sde).log_prob(x, t), there.log_prob(x).numpy(), 1e-12)


def test_kinds_reach_the_engine_made_for_them() -> None:
    engines = {
        Isotropic: ["same", "one same", "one isotropic"],
        Diagonal: ["isotropic", "diagonal", "one diagonal"],
        Rotated: ["full", "lowrank", "one lowrank", "one full"],
        Reduced: ["frame lowrank", "frame lowrank same", "frame isotropic"],
    }
    for engine, kinds in engines.items():
        for kind in kinds:
            assert isinstance(make(kind, 0)[0]._engine(), engine), kind


def test_all_kinds_agree_on_one_law(device) -> None:
    sde, d = VPSDE(), 12
    w, m = [0.3, 0.7], torch.randn(2, d, generator=torch.Generator().manual_seed(0))
    m = m.to(device, torch.float64)
    v = torch.tensor([0.5, 2.0], device=device, dtype=torch.float64)
    eye = torch.eye(d, device=device, dtype=torch.float64)
    covs = [
        v,
        v[:, None].expand(2, d),
        v[:, None, None] * eye,
        LowRank(v, torch.zeros(2, d, 2, device=device)),
    ]
    covs.append(LowRank(torch.zeros(2), v.sqrt()[:, None, None] * eye))  # rank D: no floor left
    models = [Mixture(w, m, cov).denoiser(sde) for cov in covs]
    x = torch.randn(7, d, generator=torch.Generator().manual_seed(1)).to(device, torch.float64)
    for t in (1e-3, 0.2, 1.0):
        for model in models[1:]:
            near(model(x, t), models[0](x, t).cpu(), 1e-13)
            near(model.log_prob(x, t), models[0].log_prob(x, t).cpu(), 1e-13)


@pytest.mark.parametrize(("shared", "width"), [(3, 3), (0, 1)])
def test_modes_that_share_directions_leave_a_narrow_frame(shared, width, device) -> None:
    d, k = 40, 4
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(d, 3, generator=draw).to(device, torch.float64)
    means = torch.randn(k, 3, generator=draw).to(device, torch.float64) @ common.mT
    v = torch.linspace(0.1, 2, k, dtype=torch.float64, device=device)
    w, sde = torch.full((k,), 1 / k), VPSDE()
    if shared:
        factor = common @ torch.randn(k, 3, 2, generator=draw).to(device, torch.float64)
        law = Mixture(w, means, LowRank(v, factor))
        cov = v[:, None, None] * torch.eye(d, device=device) + factor @ factor.mT
    else:
        law = Mixture(w, 0 * means, v)
        cov = v[:, None, None] * torch.eye(d, device=device)
    engine, dense = law._engine(), Mixture(w, law.means, cov).denoiser(sde)
    assert isinstance(engine, Reduced) and engine.frame.shape == (d, width)
    x = torch.randn(7, d, generator=draw).to(device, torch.float64)
    for t in (1e-3, 0.2, 1.0):
        near(law.denoiser(sde)(x, t), dense(x, t).cpu(), 1e-12)
        near(law.denoiser(sde).score(x, t), dense.score(x, t).cpu(), 1e-12)
        near(law.denoiser(sde).log_prob(x, t), dense.log_prob(x, t).cpu(), 1e-12)


# Tweedie, the views and Fokker-Planck


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_one_time_for_all_is_the_same_time_for_each(kind: str, grad: bool, device) -> None:
    law = make(kind, seed=5)[0].to(device)
    model, t = law.denoiser(VPSDE()), torch.tensor(0.2, dtype=torch.float64)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(7, law.dim))).to(device)
    with torch.set_grad_enabled(grad):
        for view in (model, model.score, model.log_prob):
            near(view(x, t), view(x, t.expand(7)), 1e-12)


def test_curvature_at_a_mean() -> None:
    """Where the distance that the density is made of is 0 to the last bit, and a norm has no second
    derivative."""
    S = matrix(np.random.default_rng(6), d=4)
    model, t = Gaussian(np.zeros(4), S).denoiser(VPSDE()), torch.tensor(0.3, dtype=torch.float64)
    alpha, sigma = float(model.sde.alpha(t)), float(model.sde.sigma(t))
    x = torch.zeros(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: model.log_prob(x[None], t)[0], x)
    near(hessian, -np.linalg.inv(alpha**2 * S + sigma**2 * np.eye(4)), 1e-10)


def test_faint_shares_are_nothing() -> None:
    """Not the numbers below 1e-300 that a processor takes a hundred times as long to multiply."""
    logits = torch.tensor([[0.0, -450.0, -470.0, -720.0], [math.nan, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = shares(logits)
    assert found[0, :2].tolist() == pytest.approx([1.0, math.exp(-450)]) and found[0, 1] > 0
    assert found[0, 2:].tolist() == [0.0, 0.0]
    assert found[1].isnan().all()


@pytest.mark.parametrize("sde", SDES, ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_tweedie(kind: str, sde: LinearSDE, device) -> None:
    """alpha D = x + sigma^2 grad log p_t, the gradient by autograd."""
    law = make(kind, seed=11)[0].to(device)
    model, g = law.denoiser(sde), torch.Generator().manual_seed(2)
    for fraction in (0.01, 0.3, 0.95):
        t = sde.t_min + fraction * (sde.t_max - sde.t_min)
        alpha, sigma = sde.alpha(t).item(), sde.sigma(t).item()
        x = torch.randn(4, law.dim, generator=g, dtype=torch.float64).to(device)
        x = (alpha + sigma) * x
        x.requires_grad_()
        (grad,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
        near(model.score(x, t), grad.cpu(), 1e-11)
        near(alpha * model(x, t), (x + sigma**2 * grad).detach().cpu(), 1e-11, x.abs().max().item())


@pytest.mark.parametrize("kind", ["same", "full", "frame lowrank"])
def test_views_agree_with_their_definitions(kind: str) -> None:
    law = make(kind, seed=4)[0]
    sde = SubVPSDE()
    x, t = torch.randn(3, law.dim, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9])
    model = law.denoiser(sde)
    for target in (NOISE, VELOCITY, FLOW, SCORE):
        near(model.as_view(target, x, t), BaseDenoiser.as_view(model, target, x, t), 1e-12)
    near(model.noise(x, t), model.as_view(NOISE, x, t), 0.0)
    near(model.velocity(x, t), model.as_view(VELOCITY, x, t), 0.0)


def test_denoiser_jacobian_is_symmetric_and_is_the_posterior_covariance() -> None:
    """alpha dD/dx = sigma^-2 alpha^2 Cov[x_0 | x_t]: symmetric, positive; second derivatives by gradcheck."""
    law, _, m, _ = make("full", seed=9)
    model = law.denoiser(VPSDE())
    x = torch.tensor(m[:1])
    J = torch.func.vmap(torch.func.jacrev(lambda row: model(row[None], 0.3)[0]))(x)[0]
    near(J, J.mT, 1e-13)
    assert torch.linalg.eigvalsh((J + J.mT) / 2).min() > 0
    assert torch.autograd.gradgradcheck(lambda z: model(z, 0.3), (x.clone().requires_grad_(),))


@pytest.mark.parametrize("sde", SDES, ids=str)
def test_denoiser_is_the_conditional_mean_by_quadrature(sde: LinearSDE) -> None:
    w, m, v = [0.2, 0.5, 0.3], [-1.0, 0.3, 2.0], [0.05, 0.4, 0.2]
    t = sde.t_min + 0.2 * (sde.t_max - sde.t_min)
    alpha, sigma = sde.alpha(t).item(), sde.sigma(t).item()
    law = Mixture(w, m, v)
    z = np.linspace(-8, 8, 40001)  # the trapezoidal rule is spectrally accurate here
    prior = sum(a * scipy.stats.norm.pdf(z, b, math.sqrt(c)) for a, b, c in zip(w, m, v, strict=True))
    for x in (-1.5, 0.0, 0.9):
        joint = prior * scipy.stats.norm.pdf(x, alpha * z, sigma)
        state = torch.tensor([[x]], dtype=torch.float64)
        mean = scipy.integrate.trapezoid(z * joint, z) / scipy.integrate.trapezoid(joint, z)
        near(law.denoiser(sde)(state, t), [[mean]], 1e-12, 1.0)
        near(
            law.denoiser(sde).log_prob(state, t), [math.log(scipy.integrate.trapezoid(joint, z))], 1e-12, 1.0
        )


# Points


def test_empirical_matches_loops(device, dtype) -> None:
    rng = np.random.default_rng(0)
    points, w = rng.normal(size=(17, 3)) + 5, rng.dirichlet(np.ones(17))
    law = Empirical(torch.tensor(points), w).to(device)
    x = torch.tensor(rng.normal(size=(6, 3)) + 3).to(device, dtype)
    for sde, t in ((VPSDE(), 0.1), (EDM(), 3.0), (Rectified(), 0.5)):
        alpha, sigma = sde.alpha(t).item(), sde.sigma(t).item()
        rows = [loops(w, points, np.zeros((17, 3, 3)), r, alpha, sigma) for r in x.cpu().double().numpy()]
        data, log_p, score = (np.stack(part) for part in zip(*rows, strict=True))
        near(law.denoiser(sde)(x, t), data, ROUNDING[dtype])
        near(law.denoiser(sde).log_prob(x, t), log_p, ROUNDING[dtype])
        near(law.denoiser(sde).score(x, t), score, ROUNDING[dtype])
        there = law.marginal(sde, t)
        assert type(there) is Mixture
        near(there.log_prob(x), log_p, ROUNDING[dtype])
    near(law.mean, w @ points, 1e-14)
    near(law.cov, np.cov(points.T, aweights=w, ddof=0), 1e-13)
    assert torch.equal(law.points.cpu(), torch.tensor(points))


def test_empirical_without_noise_is_the_nearest_point() -> None:
    points = torch.tensor([[0.0, 1.0], [3.0, 0.0], [-2.0, -2.0]], dtype=torch.float64)
    model = Empirical(points, [0.98, 0.01, 0.01]).denoiser(VPSDE())
    x = points[[2, 0, 1, 1]] + 0.3
    for t in (0.0, 1e-9):
        near(model(x, t), points[[2, 0, 1, 1]], 1e-15)
    assert model.log_prob(x, 0.0).isnan().all()
    assert model.log_prob(x, 1e-9).isfinite().all()


# Ends and tails


@pytest.mark.parametrize("kind", ALL)
def test_without_noise_the_data_are_known_and_without_signal_they_are_not(kind: str) -> None:
    law = make(kind, seed=8)[0]
    if "diagonal" in kind:  # the strategy draws variances from 0 on
        law = law.marginal(VPSDE(), 1e-2)
    x = torch.randn(5, law.dim, dtype=torch.float64)
    near(law.denoiser(VPSDE())(x, 0.0), x, 1e-12)
    near(law.denoiser(VPSDE()).score(x, 0.0), [loops_of(law, row)[2] for row in x], 1e-10)
    near(law.denoiser(Rectified())(x, 1.0), law.mean.expand(5, -1), 1e-12)
    for sde in SDES:
        for t in (sde.t_min, sde.t_max, torch.tensor([sde.t_min] * 3 + [sde.t_max] * 2)):
            assert law.denoiser(sde)(x, t).isfinite().all()
            assert law.denoiser(sde).score(x, t).isfinite().all()


def loops_of(law: Law, x: Tensor):
    spectrum = law._spectrum.dense().numpy()
    return loops(law.weights.numpy(), law.means.numpy(), spectrum, x.numpy(), 1.0, 0.0)


@pytest.mark.parametrize("kind", ALL)
def test_far_out(kind: str) -> None:
    """At |x| = 1e3 .. 1e8 one component rules; the denoiser is its affine map, all views stay finite."""
    law, w, m, S = make(kind, seed=6)
    direction = torch.randn(1, law.dim, dtype=torch.float64)
    sde, t = VPSDE(), 0.2
    alpha, sigma = sde.alpha(t).item(), sde.sigma(t).item()
    for size in (1e3, 1e5, 1e6, 1e8):
        x = size * direction
        data, log_p, score = loops(w, m, S, x[0].numpy(), alpha, sigma)
        near(law.denoiser(sde)(x, t), data[None], 1e-11)
        near(law.denoiser(sde).score(x, t), score[None], 1e-11)
        near(law.denoiser(sde).log_prob(x, t), [log_p], 1e-11)


# With unequal variances a log-responsibility is off by up to 2^-52 x^2 / V: 1e-11 at x = 1e3; at larger x
# the leading component has all the weight.
@pytest.mark.parametrize(("v", "exact"), [([0.25, 0.25], True), ([0.25, 1.0], False)])
@pytest.mark.parametrize("x", [2.0, -1e3, 1e5, 1e8])
@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.5, 1.0])
def test_tails_in_high_precision(v: list[float], exact: bool, x: float, t: float) -> None:
    w, m, sde = [0.4, 0.6], [-1.0, 2.0], VPSDE()
    with mp.workdps(60):
        alpha, sigma = mp.mpf(sde.alpha(t).item()), mp.mpf(sde.sigma(t).item())
        log_p, data = [], []
        for w_k, m_k, v_k in zip(w, m, v, strict=True):
            V, d = alpha**2 * v_k + sigma**2, x - alpha * m_k
            log_p.append(mp.log(w_k) - d**2 / V / 2 - mp.log(2 * mp.pi * V) / 2)
            data.append(m_k + alpha * v_k * d / V)
        top = max(log_p)
        r = [mp.exp(q - top) for q in log_p]
        want = float(mp.fdot(r, data) / sum(r))
        density = float(top + mp.log(sum(r)))
    model, state = Mixture(w, m, v).denoiser(sde), torch.tensor([[x]], dtype=torch.float64)
    near(model(state, t), [[want]], 1e-14 if exact else 1e-11)
    near(model.log_prob(state, t), [density], 1e-13)


def test_equal_variances_keep_the_weights_far_out() -> None:
    """Halfway between two points, 1e6 away from both, a direct difference of squares has lost the weights."""
    law = Mixture([0.25, 0.75], [[-1.0, 0.0], [1.0, 0.0]], 0.01)
    x = torch.tensor([[0.0, 1e6]], dtype=torch.float64)
    near(law.denoiser(EDM())(x, 0.01)[:, :1], [[0.5 * 0.01**2 / (0.01 + 0.01**2)]], 1e-10)


def test_unlikely_components_of_tiny_variance_do_not_spoil_the_rest() -> None:
    """Variances from 1e-20 to 1e20 and an eigenvalue of exactly 0."""
    v = torch.tensor([[1e-20, 1.0], [1e20, 0.0], [0.0, 0.0]], dtype=torch.float64)
    law = Mixture([0.3, 0.3, 0.4], [[0.0, 0.0], [1.0, 1.0], [3.0, 3.0]], v)
    x = torch.tensor([[3.0, 3.0], [0.1, -0.2], [1e9, 1.0]], dtype=torch.float64)
    for t in (0.0, 1e-8, 1e-3, 0.5):
        assert law.denoiser(VPSDE())(x, t).isfinite().all()
    near(law.denoiser(VPSDE())(x[:1], 1e-6), [[3.0, 3.0]], 1e-5)


# Posterior


def test_posterior_of_the_known_number() -> None:
    law = Gaussian(0.7, 0.25).posterior(1.5, [[1.0]], 0.04)
    near(law.mean, [1.3896552], 3e-8)
    near(law.cov, [[0.0344828]], 2e-6)


def exact_density(y: np.ndarray, A: np.ndarray, m: np.ndarray, S: np.ndarray, noise_var: float) -> mp.mpf:
    """N(y; A m, A S A^T + noise_var I) up to a factor, in 40 digits: float64 keeps 9 of a quiet one."""
    with mp.workdps(40):
        A_, S_, m_, y_ = (mp.matrix(v.tolist()) for v in (A, S, m, y))
        V, rest = A_ * S_ * A_.T + mp.mpf(noise_var) * mp.eye(len(y)), y_ - A_ * m_
        return mp.exp(-(rest.T * mp.lu_solve(V, rest))[0] / 2) / mp.sqrt(mp.det(V))


@given(st.sampled_from(ALL), st.integers(1, 9), st.floats(1e-3, 10), st.integers(0, 100))
@example("lowrank same", 7, 0.001, 3)
def test_posterior_matches_dense_formula(kind: str, rows: int, noise_var: float, seed: int) -> None:
    law, w, m, S = make(kind, seed)
    rng = np.random.default_rng(seed)
    A, y = rng.normal(size=(rows, m.shape[1])), rng.normal(size=rows)
    weights, means, covs = [], [], []
    for w_k, m_k, S_k in zip(w, m, S, strict=True):
        V = A @ S_k @ A.T + noise_var * np.eye(rows)
        gain = np.linalg.solve(V, A @ S_k).T
        means.append(m_k + gain @ (y - A @ m_k))
        covs.append(S_k - gain @ A @ S_k)
        weights.append(w_k * exact_density(y, A, m_k, S_k, noise_var))
    post = law.posterior(y, A, noise_var)
    assert type(post) is type(law)
    near(post.weights, [float(weight / sum(weights)) for weight in weights], 1e-11)
    near(post.means, means, 1e-9)
    near(post._spectrum.dense(), covs, 1e-9)
    near(post._spectrum.diagonal(), [np.diag(C) for C in covs], 1e-9)


def test_posterior_of_a_mixture_by_quadrature() -> None:
    w, m, v = [0.2, 0.5, 0.3], [-1.0, 0.3, 2.0], [0.05, 0.4, 0.2]
    post = Mixture(w, m, v).posterior([0.9], [[1.5]], 0.3)
    z = np.linspace(-8, 8, 40001)
    prior = sum(a * scipy.stats.norm.pdf(z, b, math.sqrt(c)) for a, b, c in zip(w, m, v, strict=True))
    joint = prior * scipy.stats.norm.pdf(0.9, 1.5 * z, math.sqrt(0.3))
    joint /= scipy.integrate.trapezoid(joint, z)
    near(post.log_prob(torch.tensor(z[10000:30000, None])).exp(), joint[10000:30000], 1e-12)


def test_posterior_of_points() -> None:
    rng = np.random.default_rng(0)
    points, A = rng.normal(size=(9, 4)), rng.normal(size=(2, 4))
    y, w = np.array([0.4, -1.0]), rng.dirichlet(np.ones(9))
    post = Empirical(torch.tensor(points), w).posterior(y, A, 0.2)
    likelihood = w * scipy.stats.multivariate_normal.pdf(y - points @ A.T, cov=0.2 * np.eye(2))
    near(post.weights, likelihood / likelihood.sum(), 1e-13)
    assert type(post) is Empirical


def test_no_observation_changes_nothing() -> None:
    for law in (*(make(kind, 0)[0] for kind in ALL), Empirical([[0.0, 1.0], [2.0, 3.0]])):
        after = law.posterior(torch.zeros(0), torch.zeros(0, law.dim), 0.1)
        assert type(after) is type(law) and torch.equal(after.means, law.means)
        near(after.weights, law.weights, 1e-15)
        assert torch.equal(after.cov, law.cov)


@pytest.mark.parametrize("noise_var", [torch.tensor([0.25]), np.array([0.25]), np.float64(0.25), [0.25]])
def test_noise_variance_is_one_number_in_any_form(unchecked, noise_var) -> None:
    for law in (Gaussian([0.0, 1.0], 1.0), Empirical([[0.0, 1.0], [2.0, 3.0]])):
        found, expected = (law.posterior([0.5], [[1.0, 1.0]], v) for v in (noise_var, 0.25))
        near(found.weights, expected.weights, 1e-15)
        assert torch.equal(found.mean, expected.mean)
        with pytest.raises(ValueError, match="expected one noise_var > 0"):
            law.posterior([0.5], [[1.0, 1.0]], torch.tensor([0.25, 0.25]))


def test_posterior_is_stable_when_almost_everything_is_known() -> None:
    """Noise 1e-14 against a prior of 1e4: textbook S - G A S would be lost in rounding."""
    for cov in (
        1e4,
        torch.full((6,), 1e4),
        1e4 * torch.eye(6, dtype=torch.float64),
        LowRank(1.0, 100 * torch.eye(6)[:, :2]),
    ):
        A = torch.eye(6, dtype=torch.float64)[:2]
        post = Gaussian(torch.zeros(6), cov).posterior([1.0, 2.0], A, 1e-14)
        near(post.mean[:2], [1.0, 2.0], 1e-14)
        near(post._spectrum.values[0].sort().values[:2], [1e-14, 1e-14], 1e-6)


def test_posterior_in_many_dimensions_stays_low_rank() -> None:
    g = torch.Generator().manual_seed(0)
    factor = torch.randn(3000, 5, generator=g, dtype=torch.float64)
    law = Gaussian(torch.zeros(3000), LowRank(0.1, factor))
    A = torch.zeros(3, 3000, dtype=torch.float64)
    A[0, 5] = A[1, 70] = A[2, 2999] = 1
    post = law.posterior([1.0, 2.0, 3.0], A, 1e-8)
    assert post._spectrum.basis is not None and post._spectrum.basis.shape == (1, 3000, 8)
    near(post.mean[[5, 70, 2999]], [1.0, 2.0, 3.0], 1e-6)


# Samples: exact bounds at a false-alarm probability of 1e-9 per assertion


def moment_tails(x: Tensor, mean: Tensor, cov: Tensor) -> float:
    """Least p-value, times their number, of means and variances along axes and oblique directions."""
    g = torch.Generator().manual_seed(99)
    extra = torch.linalg.qr(torch.randn(len(mean), len(mean), generator=g, dtype=torch.float64)).Q
    U = torch.cat((torch.eye(len(mean), dtype=torch.float64), extra))
    z = (x.double().cpu() - mean) @ U.T / ((U @ cov) * U).sum(-1).sqrt()
    n = len(z)
    of_mean = 2 * scipy.stats.norm.sf(math.sqrt(n) * z.mean(0).abs().numpy())
    square = z.square().sum(0).numpy()
    of_var = 2 * np.minimum(scipy.stats.chi2.sf(square, n), scipy.stats.chi2.cdf(square, n))
    return 2 * len(U) * min(of_mean.min(), of_var.min())


@pytest.mark.parametrize("kind", ["one " + k for k in KINDS])
def test_sample_moments_of_gaussians(kind: str, alpha_ledger) -> None:
    """n = 100000; the power against a shift of 0.03 or a variance off by 4 % exceeds 0.999: the twins."""
    law = make(kind, seed=7)[0]
    if "diagonal" in kind:
        law = law.marginal(VPSDE(), 0.1)
    x = law.sample(100_000, generator=torch.Generator().manual_seed(5))
    assert moment_tails(x, law.mean, law.cov) > alpha_ledger.spend(1e-9, f"laws: moments of {kind}")
    spread = law.variance.sqrt()
    assert moment_tails(x + 0.03 * spread, law.mean, law.cov) < 1e-9
    assert moment_tails(x, law.mean, 1.04 * law.cov) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_mixtures(kind: str, alpha_ledger) -> None:
    """Components 1000 apart can be told: counts by the binomial law, moments within each (n as it falls)."""
    near_law, w = make(kind, seed=7)[:2]
    far = near_law._make(
        Mixture, near_law._log_w, near_law._means + 1000 * torch.arange(3)[:, None], near_law._spectrum
    )
    x = far.marginal(VPSDE(), 1e-3).sample(150_000, generator=torch.Generator().manual_seed(6))
    k = (x[:, 0] / 1000).round().long()
    there = far.marginal(VPSDE(), 1e-3)
    for j in range(3):
        count = int((k == j).sum())
        p = 6 * scipy.stats.binomtest(count, len(x), float(w[j])).pvalue
        assert p > alpha_ledger.spend(1e-9, f"laws: weight {j} of {kind}")
        part = moment_tails(x[k == j], there.means[j], there._spectrum.dense()[j])
        assert part > alpha_ledger.spend(1e-9, f"laws: moments in component {j} of {kind}")
    assert scipy.stats.binomtest(int((k == 0).sum()), len(x), float(w[0]) + 0.02).pvalue < 1e-9


def test_samples_of_points(alpha_ledger) -> None:
    law = Empirical([1.0, 2.0, 4.0], [0.5, 0.2, 0.3])
    x = law.sample(100_000, generator=torch.Generator().manual_seed(0))
    counts = [int((x == p).sum()) for p in (1.0, 2.0, 4.0)]
    assert sum(counts) == 100_000
    p = 3 * min(
        scipy.stats.binomtest(c, 100_000, w).pvalue for c, w in zip(counts, (0.5, 0.2, 0.3), strict=True)
    )
    assert p > alpha_ledger.spend(1e-9, "laws: weights of points")


def test_one_component_draws_normals_only() -> None:
    draw = torch.Generator().manual_seed(3)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(
        Gaussian([1.0, -2.0], 0.25).sample(5, generator=draw), torch.tensor([1.0, -2.0]) + 0.5 * z
    )


def test_a_number_of_draws_may_be_numpy_s(unchecked) -> None:
    law, seeded = Mixture([0.5, 0.5], [0.0, 1.0], 1.0), torch.Generator().manual_seed
    assert torch.equal(law.sample(np.int64(3), generator=seeded(0)), law.sample(3, generator=seeded(0)))


def test_sampling_is_a_function_of_the_generator() -> None:
    law = make("full", 0)[0]
    a, b = (law.sample(8, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert law.sample(0).shape == (0, 4)


# Shapes, devices, dtypes


@pytest.mark.parametrize("cov", ["scalar", "diagonal", "full", "lowrank"])
def test_events_of_image_shape(cov: str) -> None:
    event, rng = (2, 3, 2), np.random.default_rng(0)
    mean, S = torch.tensor(rng.normal(size=event)), matrix(rng, d=12)
    given_cov = {
        "scalar": 0.5,
        "diagonal": torch.tensor(np.diag(S)).reshape(event),
        "full": torch.tensor(S),
        "lowrank": LowRank(0.3, torch.tensor(rng.normal(size=(12, 2)))),
    }[cov]
    law = Gaussian(mean, given_cov)
    flat = Gaussian(mean.flatten(), given_cov.flatten() if cov == "diagonal" else given_cov)
    x = torch.tensor(rng.normal(size=(5, *event)))
    assert law.event_shape == law.mean.shape == law.variance.shape == law.sample(3).shape[1:] == event
    near(law.log_prob(x), flat.log_prob(x.flatten(1)), 0.0)
    for view in ("forward", "score", "noise"):
        got = getattr(law.denoiser(VPSDE()), view)(x, 0.3)
        near(got.flatten(1), getattr(flat.denoiser(VPSDE()), view)(x.flatten(1), 0.3), 0.0)
    post = law.posterior([1.0], torch.ones(1, 12), 0.1)
    assert post.mean.shape == event
    both = Mixture([0.5, 0.5], torch.stack([mean, mean]), 0.5)
    near(both.mean, mean, 1e-14)


def test_numbers_make_events_of_one_coordinate() -> None:
    assert Gaussian(0.7, 0.25).event_shape == (1,)
    assert Mixture([0.5, 0.5], [0.0, 1.0], [1.0, 2.0]).sample(5).shape == (5, 1)
    assert Empirical([1.0, 2.0]).means.shape == (2, 1)
    x = torch.tensor([[0.2], [1.4]], dtype=torch.float64)
    near(Gaussian(0.7, 0.25).log_prob(x), scipy.stats.norm.logpdf(x[:, 0], 0.7, 0.5), 1e-14)


def test_casting_a_denoiser_leaves_the_law_in_float64(device) -> None:
    law = make("full", 1)[0]
    model = law.to(device).denoiser(VPSDE())
    assert (model.dtype, model.device.type) == (torch.float64, device.type)
    x = torch.randn(4, 4, dtype=torch.float64, device=device)
    before = model(x, 0.2)
    for cast in (model.to(torch.float32), model.half(), model.bfloat16()):
        assert torch.equal(cast(x, 0.2), before)
    assert model.dtype == torch.bfloat16 and model.law.dtype == torch.bfloat16
    assert torch.nn.ModuleList([model]).double()[0].dtype == torch.float64
    assert model(x.bfloat16(), 0.2).dtype == torch.bfloat16
    assert not model.state_dict() and not list(model.parameters())
    small = law.to(torch.float32)
    assert small.sample(2).dtype == torch.float32 and small.denoiser(VPSDE()).dtype == torch.float32
    assert small.mean.dtype == torch.float64 and small.marginal(VPSDE(), 0.1).dtype == torch.float32


def test_a_law_keeps_its_own_copy() -> None:
    mean = torch.zeros(3, dtype=torch.float64)
    law = Gaussian(mean, 1.0)
    mean += 1
    law.means.add_(1)
    law.mean.add_(1)
    near(law.mean, [0.0, 0.0, 0.0], 0.0)
    for kind in KINDS:
        law, _, _, S = make("one " + kind, seed=2)
        for part in law.eigen():
            if part is not None:
                part.zero_()
        near(law.cov, S[0], 1e-13)


def test_a_law_is_what_it_prints() -> None:
    for kind in (*KINDS, *(f"one {k}" for k in KINDS)):
        law = make(kind, seed=12)[0]
        again = eval(repr(law))
        assert type(again) is type(law) and again._spectrum.kind == law._spectrum.kind
        near(again.weights, law.weights, 1e-14)
        near(again.means, law.means, 1e-14)
        near(again._spectrum.dense(), law._spectrum.dense(), 1e-13)
    for kind in KINDS:
        for law in (make(kind, seed=12)[0], make("one " + kind, seed=12)[0]):
            law = law.posterior([1.0], torch.ones(1, law.dim), 0.1)  # some directions have lost variance
            again = eval(repr(law))
            assert type(again) is type(law)
            near(again.weights, law.weights, 1e-14)
            near(again.means, law.means, 1e-14)
            near(again._spectrum.dense(), law._spectrum.dense(), 1e-13)
    seen = Gaussian([0.0, 0.0], 1.0).posterior([1.0], [[1.0, 0.0]], 0.25)
    assert repr(seen) == "Gaussian([0.8, 0.0], [[0.2, 0.0], [0.0, 1.0]])"
    image = Gaussian(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
    assert repr(image) == "Gaussian([[0.0, 0.0]], [[1.0, 2.0]])"
    both = Mixture([0.5, 0.5], torch.zeros(2, 1, 2), torch.tensor([[[1.0, 2.0]], [[1.0, 3.0]]]))
    assert repr(both).endswith("[[[1.0, 2.0]], [[1.0, 3.0]]])")
    assert repr(Gaussian(1 / 3, 0.1 + 0.2)) == "Gaussian([0.333333333333333], 0.3)"


def test_how_much_a_law_prints() -> None:
    assert repr(Gaussian(torch.zeros(2), torch.tensor([2.0, 2.0]))) == "Gaussian([0.0, 0.0], 2.0)"
    assert repr(Mixture([0.5, 0.5], torch.zeros(2, 1), torch.tensor([2.0, 2.0]))).endswith(
        "[[0.0], [0.0]], 2.0)"
    )
    assert repr(Gaussian(torch.zeros(64), 1.0)).startswith("Gaussian([0.0, 0.0")
    assert repr(Gaussian(torch.zeros(8), torch.eye(8))).startswith("Gaussian([0.0, 0.0")
    assert repr(Gaussian(torch.zeros(9), torch.eye(9)).to(torch.float32)) == (
        "Gaussian(event_shape=(9,), cov=full, dtype=torch.float32, device=cpu)"
    )
    exact = Gaussian(0.7, 0.25).denoiser(VPSDE())
    assert [b.numel() for b in exact.buffers()] == [0] and not exact.state_dict()
    shown = repr(exact)
    assert (
        shown == "ExactDenoiser(Gaussian([0.7], 0.25), VPSDE(schedule=Linear(beta_min=0.1, beta_max=20.0)))"
    )


@pytest.mark.parametrize("kind", ["isotropic", "full", "lowrank"])
def test_the_mean_of_one_component(kind: str, dtype) -> None:
    law, _, m, S = make(kind, seed=3)
    x, k = torch.randn(6, 4, dtype=torch.float64).to(dtype), torch.tensor([0, 1, 2, 2, 1, 0])
    found = law.denoiser(VPSDE()).of_component(x, 0.3, k)
    alpha, sigma = VPSDE().alpha(0.3).item(), VPSDE().sigma(0.3).item()
    alone = [
        loops(np.ones(1), m[j : j + 1], S[j : j + 1], row, alpha, sigma)[0]
        for row, j in zip(x.double().numpy(), k.tolist(), strict=True)
    ]
    near(found, alone, ROUNDING[dtype])
    assert found.dtype == dtype
    for integer in (torch.uint8, torch.int32):
        assert torch.equal(law.denoiser(VPSDE()).of_component(x, 0.3, k.to(integer)), found)


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (torch.tensor([0, 3]), "expected components from 0 to 1, found 0 to 3"),
        (torch.tensor([-1, 0]), "expected components from 0 to 1, found -1 to 0"),
        (torch.tensor([0.0, 1.0]), r"integers of shape \(2,\) as components, found torch.float32"),
        (torch.tensor([True, False]), "found torch.bool"),
        (torch.tensor([1]), r"found torch.int64 of shape \(1,\)"),
        (1, "found 1"),
    ],
)
def test_components_that_there_are_not(k, words: str, unchecked) -> None:
    model = Mixture([0.5, 0.5], [0.0, 1.0], 1.0).denoiser(VPSDE())
    with pytest.raises(ValueError, match=words):
        model.of_component(torch.zeros(2, 1), 0.3, k)


def test_two_components_are_both_drawn() -> None:
    for law in (Mixture([0.5, 0.5], [0.0, 9.0], 0.01), Empirical([0.0, 9.0])):
        x = law.sample(64, generator=torch.Generator().manual_seed(0))
        assert 10 < int((x > 4.5).sum()) < 54
        assert law.sample(0).shape == Gaussian(0.0, 1.0).sample(0).shape == (0, 1)


def test_tolerances_of_weights_and_bases() -> None:
    near(Mixture([0.5, 0.5 + 0.9e-6], [0.0, 1.0], 1.0).weights.sum(), 1.0, 1e-15)
    with pytest.raises(ValueError, match="sum 1"):
        Mixture([0.5, 0.5 + 1.5e-6], [0.0, 1.0], 1.0)
    mean, values = torch.zeros(2), torch.tensor([0.0, 1.0])  # a variance may be 0
    for off, fits in ((0.9e-8, True), (1.5e-8, False)):
        basis = torch.diag(torch.tensor([math.sqrt(1 + off), 1.0], dtype=torch.float64))
        if fits:
            assert Gaussian.from_eigen(basis, mean, values).variance.tolist() == pytest.approx([0, 1])
        else:
            with pytest.raises(ValueError, match="orthonormal"):
                Gaussian.from_eigen(basis, mean, values)


@pytest.mark.parametrize("kind", ["same", "full", "lowrank"])
def test_log_density_without_noise_is_the_law_s(kind: str) -> None:
    law = make(kind, seed=3)[0]
    x = torch.randn(5, 4, dtype=torch.float64)
    near(law.denoiser(VPSDE()).log_prob(x, 0.0), law.log_prob(x), 1e-13)


def test_small_laws_print_as_code_and_large_ones_as_what_they_are() -> None:
    assert repr(Gaussian(0.7, 0.25)) == "Gaussian([0.7], 0.25)"
    assert repr(Mixture([0.3, 0.7], [0.0, 1.0], [0.1, 0.2]).to(torch.float32)) == (
        "Mixture([0.3, 0.7], [[0.0], [1.0]], [0.1, 0.2]).to(torch.float32)"
    )
    assert repr(Empirical([[1.0, 2.0]])) == "Empirical([[1.0, 2.0]], [1.0])"
    assert "Gaussian(event_shape=(65,), cov=isotropic" in repr(Gaussian(torch.zeros(65), 1.0))
    assert "2 x full" in repr(Mixture([0.5, 0.5], torch.zeros(2, 6), torch.eye(6).repeat(2, 1, 1)))
    assert repr(Gaussian(torch.zeros(2, 2), 1.0)) == "Gaussian([[0.0, 0.0], [0.0, 0.0]], 1.0)"
    factor = torch.tensor([[1.0], [0.0], [0.0]])
    alone = repr(Gaussian(torch.zeros(3), LowRank(torch.tensor(0.5), factor)))
    assert "LowRank(0.5, torch.tensor([[" in alone
    several = repr(
        Mixture([0.5, 0.5], torch.zeros(2, 3), LowRank(torch.tensor([0.5, 0.25]), factor.repeat(2, 1, 1)))
    )
    assert "LowRank(torch.tensor([0.5, 0.25], dtype=torch.float64), torch.tensor([[[" in several


@pytest.mark.parametrize("kind", ["one " + k for k in KINDS])
def test_eigen(kind: str) -> None:
    law, _, m, S = make(kind, seed=2)
    basis, values = law.eigen()
    Q = torch.eye(5, dtype=torch.float64) if basis is None else basis
    near(Q * values @ Q.mT, S[0], 1e-13)
    near(Q.mT @ Q, np.eye(5), 1e-14)
    back = Gaussian.from_eigen(basis, law.mean, values)
    near(back.cov, S[0], 1e-13)
    near(back.mean, m[0], 0.0)
    assert (basis is None) == (kind in ("one same", "one isotropic", "one diagonal"))


def test_eigenvalues_lost_in_rounding_are_zero(unchecked) -> None:
    """A matrix of rank 2 in 9 dimensions: seven eigenvalues of 0, which eigh returns as +-1e-16."""
    F = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = Gaussian(torch.zeros(9), F @ F.T)
    assert int((law.eigen().values == 0).sum()) == 7
    near(law.cov, F @ F.T, 1e-14)
    with pytest.raises(ValueError, match="density"):
        law.log_prob(torch.zeros(1, 9))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_covariances_of_arrays_are_as_exact_as_their_dtype(kind: type) -> None:
    """A tensor and an array of the same numbers are the same covariance, however narrow they are."""
    points = np.random.default_rng(0).normal(size=(3, 40))
    narrow = (points.T @ points).astype(kind)  # rank 3: eigenvalues of 0 are lost in its rounding
    skewed = narrow * (1 + np.triu(np.full((40, 40), np.finfo(kind).eps)))
    for S in (narrow, skewed.astype(kind)):
        found = Gaussian(np.zeros(40), S)
        assert torch.equal(found.cov, Gaussian(np.zeros(40), torch.from_numpy(S)).cov)
    with pytest.raises(ValueError, match="semidefinite"):
        Gaussian(np.zeros(40), narrow.astype(float))


def test_components_of_no_weight_do_not_matter() -> None:
    x = torch.tensor([[0.3], [9.0]], dtype=torch.float64, requires_grad=True)
    for v in (0.1, [0.1, 0.5]):
        law, alone = Mixture([1.0, 0.0], [0.0, 9.0], v), Gaussian(0.0, 0.1)
        near(law.denoiser(VPSDE())(x, 0.1), alone.denoiser(VPSDE())(x, 0.1).detach(), 1e-14)
        (grad,) = torch.autograd.grad(law.log_prob(x).sum(), x)
        near(grad, -10 * x.detach(), 1e-13)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda: Gaussian([0.0, 1.0], torch.ones(3)), "event's shape"),
        (lambda: Gaussian([0.0, 1.0], [[1.0, 0.5], [0.1, 1.0]]), "symmetric"),
        (lambda: Gaussian([0.0, 1.0], [[1.0, 2.0], [2.0, 1.0]]), "semidefinite"),
        (lambda: Gaussian(0.0, -1.0), ">= 0"),
        (lambda: Gaussian(math.nan, 1.0), "finite"),
        (lambda: Gaussian([0.0, 1.0], LowRank(1.0, torch.ones(3, 1))), "factor"),
        (lambda: Gaussian([0.0, 1.0], LowRank(-1.0, torch.ones(2, 1))), ">= 0"),
        (lambda: Gaussian.from_eigen(torch.ones(2, 2), torch.zeros(2), torch.ones(2)), "orthonormal"),
        (lambda: Gaussian.from_eigen(None, torch.zeros(2), torch.tensor([1.0, -1.0])), ">= 0"),
        (lambda: Mixture([0.5, 0.6], [0.0, 1.0], 1.0), "sum 1"),
        (lambda: Mixture([1.5, -0.5], [0.0, 1.0], 1.0), ">= 0"),
        (lambda: Mixture([1.0], [0.0, 1.0], 1.0), "2 weights"),
        (lambda: Mixture([1.0], 0.0, 1.0), "single number"),
        (lambda: Empirical(torch.zeros(0, 2)), "found"),
        (lambda: Gaussian(0.0, 0.0).log_prob(torch.zeros(1, 1)), "density"),
        (lambda: Empirical([1.0]).log_prob(torch.zeros(1, 1)), "density"),
        (lambda: Gaussian([0.0, 1.0], torch.ones(2, 2)).log_prob(torch.zeros(1, 2)), "density"),
        (lambda: Gaussian(0.0, 1.0).log_prob(torch.zeros(3)), "shape"),
        (lambda: Gaussian(0.0, 1.0).denoiser(VPSDE())(torch.zeros(3, 2), 0.1), "shape"),
        (lambda: Gaussian(0.0, 1.0).denoiser(VPSDE())(torch.zeros(3, 1), torch.zeros(2)), "times"),
        (lambda: Gaussian(0.0, 1.0).marginal(VPSDE(), torch.zeros(2)), "single time"),
        (lambda: Gaussian(0.0, 1.0).posterior(1.0, [[1.0]], 0.0), "noise_var"),
        (lambda: Gaussian(0.0, 1.0).posterior([1.0, 2.0], [[1.0]], 1.0), "shape"),
        (lambda: Gaussian(0.0, 1.0).posterior([1.0], [1.0], 1.0), r"y of shape \(m,\) and A of shape"),
        (lambda: Gaussian(0.0, 1.0).posterior([1.0], [[1.0, 2.0]], 1.0), r"A of shape \(m, 1\)"),
        (lambda: Gaussian(0.0, 1.0).posterior(1.0, [[1.0]], -1.0), "noise_var"),
        (lambda: Gaussian(0.0, 1.0).posterior(1.0, [[1.0]], math.inf), "noise_var to be finite"),
        (lambda: Gaussian(0.0, 1.0).sample(-1), "whole number of draws n >= 0, found -1"),
        (lambda: Gaussian(0.0, 1.0).sample(True), "whole number of draws"),
        (lambda: Gaussian(0.0, 1.0).sample(2.0), "whole number of draws"),
        (lambda: Gaussian([], 1.0), "at least one component and one dimension"),
        (lambda: Gaussian(0.0, 1.0).log_prob(torch.zeros(3, 1, dtype=torch.int64)), "expected floating x"),
        (lambda: Gaussian.from_eigen(None, torch.zeros(2), torch.ones(3)), r"eigenvalues >= 0 of shape"),
        (lambda: Gaussian.from_eigen(None, torch.zeros(2), torch.ones(0)), r"found shape \(0,\)"),
        (lambda: Gaussian.from_eigen(torch.ones(2, 1), torch.zeros(2), torch.ones(2)), "orthonormal"),
    ],
)
def test_errors_name_what_is_wrong(attempt, words: str, unchecked) -> None:
    with pytest.raises(ValueError, match=words):
        attempt()


@pytest.mark.parametrize("value", [[1 + 2j], torch.tensor([1 + 2j]), np.array([1 + 2j])])
def test_laws_are_of_real_numbers(value, unchecked) -> None:
    with pytest.raises(TypeError, match="expected the mean as numbers"):
        Gaussian(value, 1.0)
    with pytest.raises(TypeError, match="expected y as numbers"):
        Gaussian([0.0], 1.0).posterior(value, [[1.0]], 1.0)


def test_samples_have_a_floating_dtype(unchecked) -> None:
    with pytest.raises(TypeError, match="floating"):
        Gaussian(0.0, 1.0).to(torch.int64)


@pytest.mark.cuda
def test_evaluation_needs_no_host(unchecked) -> None:
    """No traffic between host and device at a time that lives on the device."""
    t = torch.tensor(0.3, dtype=torch.float64, device="cuda")
    for kind in ALL:
        law = make(kind, 0)[0].to("cuda")
        model, x = law.denoiser(VPSDE()), law.sample(16)
        want = model(x, t)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = model(x, t), model.score(x, t)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got[0], want)
