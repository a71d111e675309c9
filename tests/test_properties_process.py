"""The properties of schedules, processes, chains and laws, each by its number, over generated cases.

Tolerances are those stated for ordinary cases, times the condition of the case (the rounding of B, of small
steps, of 1/alpha), so that they hold for steep rates and vanishing signal too. Schedules compute in float64
whatever they are given, so the float32 tolerances concern what mixes with x.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_ddpm import any_chains, nodes
from test_schedules import EPS, check_against_high_precision, f64
from test_sde import close, condition, derivative
from torch import Tensor, nn

from scoresde import checkpoint, losses, solvers, train
from scoresde.ddpm import DDPM, discretize
from scoresde.denoiser import FLOW, NOISE, SCORE, VELOCITY, BaseDenoiser, Denoiser
from scoresde.laws import Law, Mixture
from scoresde.networks import MLP
from scoresde.schedules import Linear, Schedule
from scoresde.sde import EDM, VPSDE, LinearSDE, SubVPSDE, like
from scoresde.testing import strategies
from scoresde.testing.strategies import (
    at,
    exact_denoiser,
    floats,
    laws,
    linears,
    schedules,
    sdes,
    shares,
    times,
)

FEWER = settings(max_examples=max(1, settings.default.max_examples // 3))  # for the dearer ones
FEWEST = settings(max_examples=max(1, settings.default.max_examples // 10))


def vps() -> st.SearchStrategy[VPSDE]:
    return st.builds(VPSDE, schedule=schedules())


def smooth_laws(dim: int | None = None) -> st.SearchStrategy[Law]:
    return laws(dim, degenerate=False)


def states(law: Law, sde: LinearSDE, t: float, n: int = 4) -> Tensor:
    """Draws of x_t (n, D)."""
    generator = torch.Generator().manual_seed(0)
    x0 = law.sample(n, generator=generator)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return sde.alpha(t) * x0 + sde.sigma(t) * eps


# ---- schedule and VP <-> DDPM


@given(schedules(), times())
def test_p01_beta_is_the_derivative_of_the_log_of_alpha_bar(schedule: Schedule, t: float) -> None:
    sde, rate = VPSDE(schedule=schedule), schedule.beta(f64(t))
    slope = derivative(lambda u: -2 * sde.alpha(u).log(), f64(t))
    rounding = 16 * EPS * (1 + sde.B(t)) * (1 + 1 / sde.alpha(t).clamp_min(0.1)) * rate
    assert (derivative(sde.B, f64(t)) - rate).abs() <= 1e-12 * rate + 64 * EPS * sde.B(t)
    assert sde.alpha(t) < 1e-100 or (slope - rate).abs() <= 1e-12 * rate + rounding + 64 * EPS * sde.B(t)


@given(schedules(), times(1e-8))
def test_p02_alpha_and_sigma_preserve_variance(schedule: Schedule, t: float) -> None:
    sde = VPSDE(schedule=schedule)
    assert abs(sde.alpha(t) ** 2 + sde.sigma(t) ** 2 - 1) <= 4e-16


@pytest.mark.oracle
@given(schedules(), times(1e-8))
def test_p03_sigma_in_high_precision(schedule: Schedule, t: float) -> None:
    """1e-15 for the linear schedule; others to the rounding of their own B, at most 1e-12. A time in float32
    is that number, so sigma is as right there."""
    single = torch.tensor(t, dtype=torch.float32).clamp(max=1)
    for time in (t, float(single)):
        check_against_high_precision(schedule, time, 1e-15 if isinstance(schedule, Linear) else 1e-12)
    sde = VPSDE(schedule=schedule)
    assert sde.sigma(single).equal(sde.sigma(single.double()))


@given(sdes(), st.integers(2, 200), st.one_of(floats(0.0, 1.0), times(1e-8)))
def test_p04_log_snr_falls_and_time_is_its_inverse(sde: LinearSDE, n: int, share: float) -> None:
    grid = torch.tensor([at(sde, k / n) for k in range(n + 1)], dtype=torch.float64)
    assert (sde.log_snr(grid).diff() < 0).all()
    t = at(sde, max(share, 1e-8))
    alpha, sigma, log_snr = sde.alpha(t), sde.sigma(t), sde.log_snr(t)
    if alpha == 0:
        assert log_snr == -math.inf
        return
    close(log_snr, 2 * (alpha.log() - sigma.log()), rtol=1e-12, atol=1e-12)
    falls = sde.rates(t)[1] / sigma**2  # -d log_snr/dt
    rounding = 16 * EPS * (1 + log_snr.abs() - 2 * alpha.log()) / falls
    if isinstance(sde, VPSDE) and sde.B(0.0) == 0:  # time goes through B, which keeps its digits at small t
        rounding = rounding.clamp(
            max=4 * EPS * ((1 + log_snr.abs()) * sde.sigma(t) ** 2 + 8 * sde.B(t)) / falls
        )
    assert (sde.time(log_snr) - t).abs() <= 1e-14 * t + rounding


@given(schedules(), st.one_of(st.integers(1, 50), st.integers(1, 10000)))
def test_p05_exact_betas_multiply_to_alpha_bar(schedule: Schedule, n: int) -> None:
    sde = VPSDE(schedule=schedule)
    chain, B = discretize(sde, n), sde.B(nodes(n))
    close(chain.betas, sde.betas(n), rtol=0, atol=0)
    assert ((chain.log_alpha_bars + B).abs() <= 1e-12 * B.clamp(min=1)).all()
    product = (1 - chain.betas).cumprod(0)
    # 1 - beta has no digits left where beta rounds to 1
    lost = (EPS / (1 - chain.betas).clamp(min=EPS)).cumsum(0)
    assert ((product - (-B).exp()).abs() <= 2e-14 + lost * (-B).exp()).all()
    assert ((chain.betas > 0) & (chain.betas <= 1)).all() and chain.betas.dtype == torch.float64


@FEWER
@given(st.one_of(linears(), strategies.cosines(), strategies.sigmoids()))
def test_p06_the_euler_rule_is_first_order(schedule: Schedule) -> None:
    """The largest error of log alpha_bar over the nodes falls as 1/N, once N is large against the rates."""
    sde = VPSDE(schedule=schedule)
    rates = schedule.beta(torch.linspace(0, 1, 2001, dtype=torch.float64))
    assume(float(rates.max()) < 300 and float(rates.diff().abs().max()) < 0.05 * float(rates.max()))
    smallest = int(200 * max(1.0, float(rates.max())))
    gaps = []
    for n in (smallest, 2 * smallest, 4 * smallest):
        chain = discretize(sde, n, "euler")
        gaps.append(float((chain.log_alpha_bars + sde.B(nodes(n))).abs().max()))
    for coarse, fine in itertools.pairwise(gaps):
        assert abs(math.log2(coarse / fine) - 1) < 0.1


def test_p06_gaps_of_the_linear_schedule() -> None:
    sde, gaps = VPSDE(0.1, 20.0), []
    for n, known in ((100, -0.857), (200, -0.405), (400, -0.197), (800, -0.0974)):
        gaps.append(float(discretize(sde, n, "euler").log_alpha_bars[-1] + sde.B(1.0)))
        assert abs(gaps[-1] / known - 1) < 3e-3
    assert all(abs(math.log2(a / b) - 1) < 0.1 for a, b in itertools.pairwise(gaps))


@given(any_chains(), st.data())
def test_p07_respacing_keeps_the_marginals(chain: DDPM, data) -> None:
    kept = sorted(data.draw(st.sets(st.integers(1, len(chain)), min_size=1)))
    short, index = chain.respace(kept), torch.tensor(kept) - 1
    bars = chain.log_alpha_bars[index]
    assert ((short.log_alpha_bars - bars).abs() <= 1e-13 * bars.abs().clamp(min=1)).all()
    assert short.times.equal(chain.times[index])
    previous = torch.cat([torch.ones(1, dtype=torch.float64), chain.alpha_bars[index][:-1]])
    if chain.alpha_bars.min() > 1e-3:
        close(short.betas, 1 - chain.alpha_bars[index] / previous, rtol=1e-9, atol=1e-12)
    twice = short.respace([len(kept)])
    close(twice.log_alpha_bars, bars[-1:], rtol=1e-13)
    assert twice.times.equal(short.times[-1:])


@given(schedules(), st.one_of(floats(0.0, 1.0), times(1e-8)))
def test_p08_sub_vp_has_less_noise_and_the_same_mean(schedule: Schedule, t: float) -> None:
    vp, sub = VPSDE(schedule=schedule), SubVPSDE(schedule=schedule)
    assert sub.alpha(t) == vp.alpha(t)
    assert sub.sigma(t) <= vp.sigma(t)
    close(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-14)


@given(schedules(), shares(2))
def test_p09_ve_is_vp_divided_by_alpha(schedule: Schedule, pair: list[float]) -> None:
    vp, ve, (s, t) = VPSDE(schedule=schedule), EDM(), pair
    kappa = [vp.sigma(u) / vp.alpha(u) for u in (s, t)]
    assume(float(kappa[1]) < 1e100)
    _, std = vp.transition(s, t)
    _, std_ve = ve.transition(*kappa)
    rounding = 1e-13 * condition(vp, s, t) * float(kappa[1] ** 2 / (kappa[1] ** 2 - kappa[0] ** 2))
    close(std / vp.alpha(t), std_ve, rtol=rounding)
    x_0, x_t = f64(0.4), f64(-1.2)
    mean, _ = vp.bridge(x_0, x_t, s, t)
    mean_ve, _ = ve.bridge(x_0, x_t / vp.alpha(t), *kappa)
    close(mean / vp.alpha(s), mean_ve, rtol=10 * rounding, atol=10 * rounding / float(vp.alpha(t)))


@FEWER
@given(smooth_laws(), linears(), st.integers(1, 8))
def test_p09_samplers_commute_with_the_map_to_ve(law: Law, schedule: Schedule, steps: int) -> None:
    vp = VPSDE(schedule=schedule)
    t = torch.linspace(1, 0.01, steps + 1, dtype=torch.float64)
    kappa = vp.sigma(t) / vp.alpha(t)
    assume(float(kappa[0]) < 1e5 and float(kappa[-1]) > 1e-4)
    ve = EDM(float(kappa[-1]) * (1 - 1e-12), float(kappa[0]) * (1 + 1e-12))
    z = torch.randn(3, law.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for solver in (solvers.ddim(), solvers.dpmpp(2), solvers.unipc(2)):
        one = run(solver, law.denoiser(vp), z, t) / vp.alpha(t[-1])
        two = run(solver, law.denoiser(ve), z / vp.alpha(t[0]), kappa)
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * float(1 + two.abs().max()))


def run(solver, model: BaseDenoiser, x: Tensor, t: Tensor) -> Tensor:
    return solver.solve(model, x, t, noise=lambda *a: torch.zeros_like(x)).x


@given(linears(), schedules(), shares(2))
def test_p10_kernels_depend_on_the_clock_through_B_only(
    linear: Linear, schedule: Schedule, pair: list[float]
) -> None:
    """Another schedule with the same B at another time has the same kernels."""
    one, two = VPSDE(schedule=linear), VPSDE(schedule=schedule)
    B = two.B(f64(*pair))
    assume(float(B[1]) <= float(one.B(1.0)) and float(B[1] - B[0]) > 1e-3 * float(B[1]))
    for ours, theirs in zip(two.transition(*schedule.time(B)), one.transition(*linear.time(B)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-300)


@FEWER
@given(st.one_of(linears(), strategies.cosines()), st.integers(2, 8))
def test_p10_exponential_integrators_depend_on_the_lam_grid_only(schedule: Schedule, steps: int) -> None:
    """The coefficients of two processes at the times of equal log-SNR are the same."""
    one, two = VPSDE(0.1, 20.0), VPSDE(schedule=schedule)
    low = max(float(one.log_snr(1.0)), float(two.log_snr(1.0))) + 0.1
    lam = torch.linspace(low, low + 8.0, steps + 1, dtype=torch.float64)
    for solver in (solvers.dpmpp(2), solvers.dpm(2), solvers.sde_dpmpp(2)):
        tables = [solver.tableau(sde, sde.time(lam)).canonical() for sde in (one, two)]
        for a, b in zip(*(table[1:] for table in tables), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# ---- kernels


@given(sdes(), shares(3))
def test_p11_transitions_compose(sde: LinearSDE, triple: list[float]) -> None:
    s, t, u = (at(sde, share) for share in triple)
    (a_st, v_st), (a_tu, v_tu) = sde.transition(s, t), sde.transition(t, u)
    a_su, v_su = sde.transition(s, u)
    # B rounds, and alpha is its exponential
    rounding = 1e-14 + 4 * EPS * float(-sde.alpha(u).log())
    close(a_su, a_st * a_tu, rtol=rounding, atol=0)
    steps = max(condition(sde, s, t), condition(sde, t, u)) if isinstance(sde, VPSDE) else 1.0
    close(v_su**2, a_tu**2 * v_st**2 + v_tu**2, rtol=1e-14 + 4 * EPS * steps, atol=0)


@given(sdes(), shares(2), floats(0.0, 4.0))
def test_p12_transitions_carry_the_marginals(sde: LinearSDE, pair: list[float], variance: float) -> None:
    s, t = (at(sde, share) for share in pair)
    a, std = sde.transition(s, t)
    v_s, v_t = (sde.alpha(u) ** 2 * variance + sde.sigma(u) ** 2 for u in (s, t))
    size = 1 + float(-sde.alpha(t).log())
    close(a**2 * v_s + std**2, v_t, rtol=4e-15 * size, atol=0)
    close(a, sde.alpha(t) / sde.alpha(s), rtol=4e-15 * size, atol=0)


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - std.log()


@given(sdes(), shares(2), st.lists(floats(-3.0, 3.0), min_size=3, max_size=3))
def test_p13_bayes(sde: LinearSDE, pair: list[float], z: list[float]) -> None:
    """log q(x_s|x_t,x_0) + log q(x_t|x_0) = log q(x_t|x_s) + log q(x_s|x_0)."""
    s, t = (at(sde, share) for share in pair)
    x_0, x_s = f64(z[0]), sde.alpha(s) * z[0] + sde.sigma(s) * f64(z[1])
    a, std = sde.transition(s, t)
    x_t = a * x_s + std * z[2]
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        one, two = x_0.to(dtype), x_t.to(dtype)
        terms = [
            log_normal(x_s, *(v.double() for v in sde.bridge(one, two, s, t))),
            log_normal(two.double(), *(v.double() for v in sde.marginal(one, t))),
            log_normal(two.double(), a * x_s, std),
            log_normal(x_s, *sde.marginal(one.double(), s)),
        ]
        size = 1 + sum(term.abs() for term in terms) + (x_t.abs() / std + x_s.abs() / sde.sigma(s)) ** 2
        gap = (terms[0] + terms[1] - terms[2] - terms[3]).abs()
        assert gap < 10 * rtol * size * condition(sde, s, t)


@given(any_chains())
def test_p14_posterior_variances_lie_between_0_and_beta(chain: DDPM) -> None:
    assert (chain.posterior_variances >= 0).all() and (chain.posterior_variances <= chain.betas).all()
    assert chain.posterior_variances[0] == 0


@given(sdes(), st.one_of(floats(0.0, 1.0), times(1e-8)), strategies.shapes_and_dtypes())
def test_p15_no_time_no_change(sde: LinearSDE, share: float, case) -> None:
    t, (shape, dtype) = at(sde, share), case
    a, std = sde.transition(t, t)
    assert a == 1 and std == 0
    x_0, x_t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean, std = sde.bridge(x_0, x_t, t, t)
    assert mean.equal(x_t) and std == 0 and mean.dtype == dtype


@given(schedules(), shares(2))
def test_p16_standard_normal_data_are_in_detailed_balance(schedule: Schedule, pair: list[float]) -> None:
    """x_s | x_t has the law of x_t | x_s: bridge averaged over x_0 | x_t ~ N(alpha x_t, sigma^2)."""
    sde, (s, t) = VPSDE(schedule=schedule), pair
    one, zero = f64(1.0), f64(0.0)
    on_data, std = sde.bridge(one, zero, s, t)
    on_state, _ = sde.bridge(zero, one, s, t)
    a, forward = sde.transition(s, t)
    rounding = 1e-14 * condition(sde, s, t)
    close(on_state + on_data * sde.alpha(t), a[None], rtol=rounding, atol=rounding)
    close(std**2 + on_data**2 * sde.sigma(t) ** 2, forward[None] ** 2, rtol=rounding, atol=rounding)


@given(smooth_laws(), sdes(), floats(0.05, 0.95))
def test_p17_the_reverse_of_the_reverse_is_the_forward_sde(law: Law, sde: LinearSDE, share: float) -> None:
    """On the clock s the drift is -(f x - g^2 score); reversed again, with the same score, it is f x."""
    t, model = at(sde, share), law.denoiser(sde)
    x, s = states(law, sde, t), sde.t_max - t
    t, reverse = sde.t_max - s, sde.reverse(model)
    pull = reverse.g(s, x) ** 2 * model.score(x, t)
    again = -(reverse.f(s, x) - pull)
    size = float((reverse.f(s, x).abs() + pull.abs()).max())
    close(again, sde.drift(x, t), rtol=0, atol=4 * EPS * size)


# ---- score and conversions


@FEWER
@given(laws(), sdes(), st.one_of(floats(0.01, 0.99), times(1e-3)))
def test_p18_tweedie(law: Law, sde: LinearSDE, share: float) -> None:
    """alpha D = x + sigma^2 grad log p_t, the gradient by autograd; and the law of x_t says the same."""
    t, model = at(sde, min(share, 0.99)), law.denoiser(sde)
    x = states(law, sde, t).requires_grad_()
    alpha, noise = sde.alpha(t), sde.sigma(t) ** 2
    for density in (lambda y: model.log_prob(y, t), law.marginal(sde, t).log_prob):
        (gradient,) = torch.autograd.grad(density(x).sum(), x)
        size = float((x.detach().abs() + (noise * gradient).abs()).max())
        # far from narrow components responsibilities lose digits
        slack = 1e-13 * size * (1 + float((x.detach() ** 2).max() / noise.clamp_min(1e-300)) * 1e-2)
        close(alpha * model(x, t).detach(), (x + noise * gradient).detach(), rtol=0, atol=slack)
        close(noise * model.score(x, t).detach(), noise * gradient, rtol=0, atol=slack)
    single = x.detach().float()
    left = alpha.float() * model(single, t)
    right = single + noise.float() * model.score(single, t)
    torch.testing.assert_close(left, right, rtol=0, atol=2e-5 * size)


@given(sdes(), floats(0.0, 1.0), floats(-3.0, 3.0), floats(-3.0, 3.0))
def test_p19_data_noise_and_velocity_go_round(sde: LinearSDE, share: float, x_0: float, eps: float) -> None:
    """x_0 = (alpha x - sigma v)/(alpha^2 + sigma^2) and eps = (sigma x + alpha v)/(alpha^2 + sigma^2)."""
    t = at(sde, share)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    assume(float(alpha + sigma) > 0)
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        one, two = (torch.tensor([[v]], dtype=dtype) for v in (x_0, eps))
        mean, std = sde.marginal(one, t)
        x = mean + std * two
        a, s = like(alpha, x), like(sigma, x)
        v, total = a * two - s * one, a**2 + s**2
        size = float(abs(x_0) + abs(eps)) * float((1 + alpha + sigma) ** 2 / total) + 1e-300
        close((a * x - s * v) / total, one, rtol=0, atol=rtol * size)
        close((s * x + a * v) / total, two, rtol=0, atol=rtol * size)


@FEWER
@given(laws(2), sdes(), floats(0.05, 0.95), strategies.predictions())
def test_p19_every_prediction_gives_the_same_views(law: Law, sde: LinearSDE, share: float, predicts) -> None:
    t, exact = at(sde, share), exact_denoiser(law, sde)
    model, x = strategies.AsNetwork(exact, predicts), states(law, sde, t)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    assume(float(alpha) > 1e-6)
    # From noise to data rounding grows by sigma/alpha, from data to noise by alpha/sigma, to the score by
    # 1/sigma, and c_in may cost a few digits.
    size = float(1 + x.abs().max() + exact(x, t).abs().max())
    slack = 64 * EPS * size * float((1 + 1 / alpha) * (1 + 1 / sigma) ** 2 * (1 + sigma) * (1 + 1 / sigma))
    # where the law is narrow D itself is steep, and so is the rounding of x/c_in*c_in
    slack = slack * float(1 + alpha / sigma) * (1 + float(sigma / alpha))
    close(model(x, t), exact(x, t), rtol=0, atol=slack)
    for target, factor in ((NOISE, 1 + alpha), (VELOCITY, 2 * (1 + sigma)), (FLOW, 2.0), (SCORE, 1 + alpha)):
        scale = float(factor) / (float(sigma) if target is SCORE else 1.0)
        known = exact.as_view(target, x, t)
        close(model.as_view(target, x, t), known, rtol=0, atol=4 * slack * scale * float(1 + 1 / sigma))


@FEWER
@given(smooth_laws(1), vps(), floats(0.05, 1.0))
def test_p20_moments_of_the_score(law: Law, sde: VPSDE, t: float) -> None:
    """E[s] = 0 and E[s^2] = -E[ds/dx], by the trapezoidal rule, which is spectrally accurate here."""
    model, there = law.denoiser(sde), law.marginal(sde, t)
    reach = float(there.means.abs().max()) + 12 * float(there._spectrum.values.max().sqrt())
    narrow = float(there._spectrum.values.min().sqrt())
    steps = int(min(2 * reach / narrow * 4, 40000)) + 200
    x = torch.linspace(-reach, reach, steps, dtype=torch.float64)[:, None].requires_grad_()
    assume(2 * reach / steps < narrow / 2)
    s = model.score(x, t)
    (slope,) = torch.autograd.grad(s.sum(), x)
    p = there.log_prob(x).exp().detach() * 2 * reach / (steps - 1)
    s, slope = s.detach()[:, 0], slope[:, 0]
    information = float((p * s**2).sum())
    assert abs(float(p.sum()) - 1) < 1e-10
    assert abs(float((p * s).sum())) < 1e-10 * (1 + information)
    assert abs(information + float((p * slope).sum())) < 1e-10 * (1 + information)


def log_density_terms(model, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d log p/dt (B,), score (B, D), its divergence (B,), |score|^2 (B,)), all with graphs to x."""
    score = model.score(x, t)
    columns = score.unbind(1)
    rows = [torch.autograd.grad(s.sum(), x, create_graph=True)[0][:, i] for i, s in enumerate(columns)]
    moving = t.detach().clone().requires_grad_()
    log_p = model.log_prob(x, moving.expand(len(x))).sum()
    (change,) = torch.autograd.grad(log_p, moving, create_graph=True)
    return change, score, torch.stack(rows).sum(0), score.square().sum(1)


@FEWER
@given(laws(), sdes(), floats(0.05, 0.95))
def test_p21_fokker_planck(law: Law, sde: LinearSDE, share: float) -> None:
    """d log p/dt = -f (d + x.s) + g^2/2 (div s + |s|^2); for the VP-SDE f = -beta/2, g^2 = beta."""
    t, model = at(sde, share), law.denoiser(sde)
    time = f64(t)[0]
    f, g2 = sde.rates(time)
    for row in states(law, sde, t, 3):
        x = row[None].clone().requires_grad_()
        change, s, divergence, square = log_density_terms(model, x, time)
        inner = (x * s).sum(1)
        right = -f * (law.dim + inner) + 0.5 * g2 * (divergence + square)
        size = f.abs() * (law.dim + inner.abs()) + g2 * (divergence.abs() + square)
        rounding = 1e-13 * (1 + float(x.detach().square().sum() / sde.sigma(t) ** 2) * 1e-1)
        assert (change - right).abs().max() <= rounding * size + 1e-300


@FEWER
@given(smooth_laws(), vps(), floats(0.05, 0.95))
def test_p22_the_score_solves_its_own_equation(law: Law, sde: VPSDE, t: float) -> None:
    """ds/dt = grad [beta/2 (div s + |s|^2) + beta/2 x.s]."""
    model, time = law.denoiser(sde), f64(t)[0]
    beta = sde.beta(t)
    x = states(law, sde, t, 1).requires_grad_()
    _, s, divergence, square = log_density_terms(model, x, time)
    (right,) = torch.autograd.grad((0.5 * beta * (divergence + square + (x * s).sum(1))).sum(), x)
    left = torch.stack(
        [derivative(lambda u, i=i: model.score(x.detach(), u)[0, i], time) for i in range(law.dim)]
    )
    spread = 1 / float(sde.sigma(t) ** 2)
    size = beta * float(square.detach().max() + 1) * spread * float(1 + x.detach().abs().max()) * 4
    assert (left - right[0]).abs().max() <= 1e-12 * size * (
        1 + 1e-1 * float(x.detach().square().sum()) * spread
    )


class Bend(nn.Module):
    """A network with something to learn, elementwise in x."""

    def __init__(self, a: float = 0.7, b: float = -0.4, c: float = 0.3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([a, b, c], dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        w = self.w.to(x.dtype)
        return w[0] * x + w[1] * (x * w[2]).tanh() + 0.1 * time.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Off(BaseDenoiser):
    """The exact denoiser, moved by d."""

    def __init__(self, exact: BaseDenoiser, d: float) -> None:
        super().__init__()
        self.exact, self.sde, self.d = exact, exact.sde, d

    def forward(self, x, t):
        return self.exact(x, t) + self.d


BENDS = st.builds(Bend, *[floats(-1.0, 1.0)] * 3)


def broad_mixtures() -> st.SearchStrategy[Mixture]:
    """Two modes on a line that a quadrature of few points resolves."""
    pair, widths = (st.lists(floats(low, 1.0), min_size=2, max_size=2) for low in (-1.0, 0.2))
    return st.builds(lambda w, m, v: Mixture([w, 1 - w], m, v), floats(0.0, 1.0), pair, widths)


@FEWER
@given(broad_mixtures(), floats(0.3, 0.9), BENDS, floats(-0.5, 0.5))
def test_p23_denoising_and_explicit_score_matching_differ_by_a_constant(
    law: Mixture, t: float, bend: Bend, d: float
) -> None:
    """E w |x_0 - D|^2 - E w |E[x_0|x_t] - D|^2 is the same for every D, by the trapezoidal rule in x_0 and
    eps; the exact denoiser has the least loss."""
    sde = VPSDE()
    exact = law.denoiser(sde)
    x0, z = (torch.linspace(-reach, reach, 121, dtype=torch.float64) for reach in (10, 9))
    p = law.log_prob(x0[:, None]).exp() * (x0[1] - x0[0])
    q = (-0.5 * z**2).exp() / math.sqrt(2 * math.pi) * (z[1] - z[0])
    weights = (p[:, None] * q).flatten()
    data, eps = x0.repeat_interleave(len(z))[:, None], z.repeat(len(x0))[:, None]
    time = torch.full((len(data),), t, dtype=torch.float64)
    x = sde.alpha(t) * data + sde.sigma(t) * eps
    with torch.no_grad():
        truth, snr = exact(x, time), float(losses.simple(sde, f64(t)[0]))
        left, risks = [], []
        for model in (exact, Off(exact, d), Denoiser(bend, sde, "velocity"), Denoiser(bend, sde, "data")):
            risks.append(float((weights * losses.denoising(model, data, eps, time)).sum()))
            left.append(risks[-1] - snr * float((weights * (truth - model(x, time))[:, 0] ** 2).sum()))
    size = 1 + max(risks)
    assert max(left) - min(left) < 1e-9 * size
    assert risks[0] <= min(risks) + 1e-9 * size
    assert risks[1] >= risks[0] + 0.99 * snr * d**2 - 1e-9 * size


@given(sdes(), st.lists(floats(0.02, 0.98), min_size=1, max_size=5), BENDS, st.integers(0, 99))
def test_p24_weighting_by_sigma_squared_is_the_error_of_the_noise(
    sde: LinearSDE, at_shares: list[float], bend: Bend, seed: int
) -> None:
    """sigma^2 |s_theta - grad log q|^2 is |eps_theta - eps|^2 with the same gradients; both are `simple`."""
    t = torch.tensor([at(sde, share) for share in at_shares], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64, generator=generator)
    mean, std = sde.marginal(x0, t)
    std = like(std.flatten(), x0)
    x = mean + std * eps
    of_noise, of_score = (Denoiser(bend, sde, predicts) for predicts in ("noise", "score"))
    parameters = [bend.w]
    plain = (of_noise.noise(x, t) - eps).square().mean(1)
    weighted = (std**2 * (of_noise.score(x, t) + eps / std) ** 2).mean(1)
    torch.testing.assert_close(losses.denoising(of_noise, x0, eps, t), plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad(loss.sum(), parameters) for loss in (weighted, plain))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(1 + b.abs().max()))
    known = (std**2 * (of_score.score(x, t) + eps / std) ** 2).mean(1)
    found = losses.denoising(of_score, x0, eps, t)
    torch.testing.assert_close(found, known, rtol=1e-12, atol=0)
    (a,), (b,) = (torch.autograd.grad(loss.sum(), parameters) for loss in (found, known))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(1 + b.abs().max()))


# ---- training


def new_fit(seed: int, predicts: str, time_input: str, **options) -> train.Run:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = MLP(2, hidden=8, layers=1, dropout=options.pop("dropout", 0.0), time_input=time_input)
        for p in network.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(seed))
    model = Denoiser(network, VPSDE(), predicts, time_input)
    return train.fit(model, x, **{"steps": 12, "batch_size": 8, "every": 1, "seed": seed, **options})


def everything(run: train.Run) -> dict[str, Tensor]:
    """All that a run is made of."""
    tensors, values = run.state()
    counts = {k: torch.tensor(v) for k, v in values.items() if isinstance(v, int)}
    both = {**run.model.state_dict(prefix="model."), **run.ema.state_dict(prefix="ema.")}
    return {k: v.clone() for k, v in {**tensors, **both, **counts}.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@FEWEST
@given(floats(0.0, 0.99), st.integers(0, 40), floats(-3.0, 3.0), st.integers(0, 9))
def test_p51_average_of_constant_weights(d: float, n: int, value: float, seed: int) -> None:
    """d^n theta_0 + (1 - d^n) theta, in both precisions."""
    for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        run = new_fit(seed, "noise", "t", ema_decay=d, steps=10**6)
        run.model.to(dtype)
        run.ema.to(dtype)
        start = copy.deepcopy(list(run.ema.parameters()))
        with torch.no_grad():
            for p in run.model.parameters():
                p.copy_(value)
        run.step = 10**5  # where the decay is warm
        for _ in range(n):
            run._average()
        for p, q in zip(run.ema.parameters(), start, strict=True):
            known = d**n * q.detach() + (1 - d**n) * value
            torch.testing.assert_close(p.detach(), known, rtol=0, atol=(n + 1) * rtol * (abs(value) + 1))


@FEWEST
@given(
    st.integers(1, 11),
    st.integers(0, 9),
    st.sampled_from(["noise", "data", "velocity", "flow"]),
    st.sampled_from(["t", "log_snr", "index"]),
    st.sampled_from([0.0, 0.3]),
)
def test_p52_save_and_load_are_the_identity_and_resuming_changes_no_bit(
    tmp_path_factory, n: int, seed: int, predicts: str, time_input: str, dropout: float
) -> None:
    """load(save(state)) = state, and train(12) = resume(train(n), 12 - n)."""
    path = tmp_path_factory.mktemp("p52") / "run"
    whole = new_fit(seed, predicts, time_input, dropout=dropout)
    list(whole)
    part = new_fit(seed, predicts, time_input, dropout=dropout)
    for _ in range(n):
        next(part)
    part.save(path)
    again = new_fit(seed, predicts, time_input, dropout=dropout, resume=path)
    assert equal(everything(again), everything(part))
    loaded = checkpoint.load(path)
    assert equal(loaded.state_dict(), part.ema.state_dict())
    assert loaded.time_input == time_input and loaded.predicts == part.model.predicts
    list(again)
    assert equal(everything(again), everything(whole))
