"""A learned variance of the reverse step, on Gaussian data, where the best one is known."""

from __future__ import annotations

import itertools
import math
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from exact import affine_law, distance
from torch import Tensor, nn

from scoresde import (
    VPSDE,
    Denoiser,
    LearnedVariance,
    Rectified,
    checkpoint,
    grids,
    guidance,
    laws,
    likelihood,
    losses,
    networks,
    sample,
    solvers,
    train,
)
from scoresde.denoiser import PREDICTIONS, BaseDenoiser, Karras
from scoresde.likelihood import GaussianDecoder, elbo, learned_step_term, posterior_variance, step_term
from scoresde.noise import Noise
from scoresde.schedules import wide
from scoresde.variance import log_ratio, step_divergence, with_variance

pytestmark = pytest.mark.usefixtures("unchecked")
F64 = torch.float64
VP = VPSDE()
N = 8
V = torch.tensor([0.25, 0.6], dtype=F64)  # a coordinate each
LAW = laws.Gaussian(torch.tensor([0.7, -0.2], dtype=F64), V)
NODES = torch.arange(N, 0, -1, dtype=F64) / N


def reverse_variance(s: Tensor, t: Tensor) -> Tensor:
    """(..., 2) that of x_s given x_t, by the conditional of the joint Gaussian."""
    at_s = (VP.alpha(s) ** 2)[..., None] * V + (VP.sigma(s) ** 2)[..., None]
    scale, std = (c[..., None] for c in VP.transition(s, t))
    return at_s * std**2 / (scale**2 * at_s + std**2)


def best_share(s: Tensor, t: Tensor) -> Tensor:
    """(..., 2) the v of that variance."""
    ratio = (reverse_variance(s, t) / posterior_variance(VP, s, t)[..., None]).log()
    return ratio / log_ratio(VP, s, t)[..., None]


class Exact(nn.Module):
    """The exact prediction for the Gaussian, plus `off`, and v from a table with an entry a step and
    coordinate."""

    def __init__(self, predicts: str = "noise", share: Tensor | None = None) -> None:
        super().__init__()
        self.predicts = predicts
        self.off = nn.Parameter(torch.zeros(2, dtype=F64))
        self.v = nn.Parameter(torch.full((N, 2), 0.5, dtype=F64) if share is None else share.clone())

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        F = LAW.denoiser(VP).as_view(PREDICTIONS[self.predicts], x, time) + self.off
        v = self.v[(time * N).round().long() - 1]
        v = v if label is None else v + label[:, None]
        return torch.cat([F, 2 * v - 1], 1)


def built(predicts: str = "noise", share: Tensor | float | None = None) -> LearnedVariance:
    table = torch.full((N, 2), share, dtype=F64) if isinstance(share, float) else share
    return LearnedVariance(Exact(predicts, table), VP, predicts)


def best() -> Tensor:
    """(N, 2) by step, that to 0 being of no matter."""
    i = torch.arange(2, N + 1, dtype=F64)
    return torch.cat([torch.zeros(1, 2, dtype=F64), best_share((i - 1) / N, i / N)])


def quadrature(nodes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x and eps (n, 2), both coordinates alike, and weights: exact for what is quadratic in each."""
    h, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    w = w / w.sum()
    x = LAW.mean + V.sqrt() * h.repeat_interleave(nodes)[:, None]
    return x, h.repeat(nodes)[:, None].expand(-1, 2), w.repeat_interleave(nodes) * w.repeat(nodes)


# ---- the variance


def test_v_runs_between_the_two_classical_variances() -> None:
    s, t = torch.tensor([0.1, 0.5], dtype=F64), torch.tensor([0.2, 0.9], dtype=F64)
    beta = likelihood.transition_variance(VP, s, t)
    torch.testing.assert_close(log_ratio(VP, s, t).exp() * posterior_variance(VP, s, t), beta)


def test_the_divergence_is_that_of_two_gaussians() -> None:
    s, t, v = 0.3, 0.4, torch.tensor([[-0.3, 0.2, 1.4]], dtype=F64)
    x, eps, D = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    x_t = VP.alpha(t) * x + VP.sigma(t) * eps
    var_q, beta = (
        posterior_variance(VP, wide(s), wide(t)),
        likelihood.transition_variance(VP, wide(s), wide(t)),
    )
    var_p = beta**v * var_q ** (1 - v)
    mean_q, mean_p = VP.bridge(x, x_t, s, t)[0], VP.bridge(D, x_t, s, t)[0]
    known = 0.5 * ((mean_q - mean_p).square() / var_p + var_q / var_p - 1 - (var_q / var_p).log())
    torch.testing.assert_close(step_divergence(VP, s, t, (x - D).square(), v), known, rtol=1e-11, atol=1e-13)


def test_a_step_from_noise_without_signal() -> None:
    """The KL of two Gaussians again; SNR_t = 0 and a finite SNR_s."""
    sde, s, t, v = Rectified(), 0.6, 1.0, torch.tensor([[0.2, 0.9]], dtype=F64)
    x, D = torch.tensor([[0.4, -1.2]], dtype=F64), torch.tensor([[0.1, -1.0]], dtype=F64)
    var_q = posterior_variance(sde, wide(s), wide(t))
    var_p = likelihood.transition_variance(sde, wide(s), wide(t)) ** v * var_q ** (1 - v)
    gap = sde.bridge(x, x, s, t)[0] - sde.bridge(D, x, s, t)[0]
    known = 0.5 * (gap.square() / var_p + var_q / var_p - 1 - (var_q / var_p).log())
    torch.testing.assert_close(step_divergence(sde, s, t, (x - D).square(), v), known, rtol=1e-12, atol=0)


def test_short_steps_keep_their_divergence_in_float32() -> None:
    """r is 1 to 1e-6 there, and `r - 1 - log r` all that is left of it; its slope is what trains v."""
    t = torch.tensor([0.9, 0.5], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        v = torch.tensor([[0.25], [0.75]], dtype=dtype, requires_grad=True)
        found = step_divergence(VP, t - 1e-4, t, torch.zeros(2, 1, dtype=dtype), v)
        gap = v.detach().double() * log_ratio(VP, t - 1e-4, t)[:, None]
        known = gap**2 / 4 - gap**3 / 12  # (exp(-g) - 1 + g)/2
        torch.testing.assert_close(found.detach(), known, rtol=1e-4, atol=0)
        (slope,) = torch.autograd.grad(found.sum(), v)
        expected = log_ratio(VP, t - 1e-4, t)[:, None] * (gap / 2 - gap**2 / 4)
        torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=0)


def test_preconditioned_networks_are_given_the_same_state_for_both_halves() -> None:
    """Karras' c_in is not symmetric in alpha and sigma."""
    seen: list[Tensor] = []

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            seen.append(x)
            return self.one * torch.cat([x.sin(), x.cos()], 1)

    model = LearnedVariance(Recording(), VP, Karras(0.5))
    x, t = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([0.3], dtype=F64)
    with torch.no_grad():
        D, v = model.data_and_share(x, t)
        torch.testing.assert_close(D, model(x, t), rtol=1e-14, atol=0)
    assert torch.equal(seen[0], seen[1])
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    c_in = (alpha**2 * 0.25 + sigma**2).rsqrt()[:, None]
    torch.testing.assert_close(seen[0], c_in * x, rtol=1e-14, atol=0)
    torch.testing.assert_close(v, (1 + (c_in * x).cos()) / 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "flow"])
def test_it_is_the_denoiser_to_everybody_else(predicts: str) -> None:
    model, exact = built(predicts), LAW.denoiser(VP)
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64), torch.full((4,), 0.5)
    for name in ("forward", "noise", "score", "velocity", "flow"):
        torch.testing.assert_close(getattr(model, name)(x, t), getattr(exact, name)(x, t))
    D, v = model.data_and_share(x, t)
    torch.testing.assert_close(D, exact(x, t))
    assert torch.equal(v, torch.full((4, 2), 0.5, dtype=F64))
    one, other = (solvers.dpmpp(2).solve(m, x, grids.uniform(VP, 4, 0.125)).x for m in (model.given(), exact))
    torch.testing.assert_close(one, other)
    guided = guidance.classifier(model, lambda x, t: -0.5 * x.square().sum(1), 1.0)
    assert bool(guided(x, 0.5).isfinite().all())


# ---- the loss


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_the_hybrid_loss_is_best_at_the_exact_reverse_variance(predicts: str) -> None:
    """Newton's method on the expected loss finds the v of the conditional of the joint Gaussian, and the
    prediction has the gradient of the plain loss alone."""
    model, (x, eps, w) = built(predicts), quadrature()
    network: Any = model.network
    i = torch.arange(1, N + 1)
    n = len(w)
    t = (i / N).double().repeat_interleave(n)

    def expected(loss) -> Tensor:
        return (loss(model, x.repeat(N, 1), eps.repeat(N, 1), t).view(N, n) @ w).sum()

    hybrid = partial(losses.hybrid, n=N, scale=1.0)
    for _ in range(40):
        (slope,) = torch.autograd.grad(expected(hybrid), network.v, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), network.v)
        with torch.no_grad():
            network.v -= (slope / curvature.clamp_min(1e-6)).clamp(-0.3, 0.3)
    torch.testing.assert_close(network.v[1:].detach(), best()[1:], rtol=0, atol=1e-6)
    assert torch.equal(network.v[0].detach(), torch.full((2,), 0.5, dtype=F64))  # the decoder's step
    assert bool(((best()[1:] > 0.01) & (best()[1:] < 0.99)).all())  # neither of the classical ones

    with torch.no_grad():
        network.off += 0.1
    gradients = [torch.autograd.grad(expected(loss), network.off)[0] for loss in (hybrid, losses.denoising)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    assert float(gradients[0].abs().min()) > 1e-3


def test_the_scale_counts_steps() -> None:
    """Averaged over the chain, scale times the sum of the ELBO's steps, a dimension."""
    model, (x, eps, _) = built(share=0.3), quadrature()
    total = torch.zeros(len(x), dtype=F64)
    plain = torch.zeros_like(total)
    for i in range(1, N + 1):
        t = torch.full((len(x),), i / N, dtype=F64)
        total = total + losses.hybrid(model, x, eps, t, n=N, scale=0.01) / N
        plain = plain + losses.denoising(model, x, eps, t) / N
    steps = sum(learned_step_term(model, x, eps, (i - 1) / N, i / N) for i in range(2, N + 1))
    torch.testing.assert_close(total - plain, 0.01 * steps / 2, rtol=1e-10, atol=1e-12)


def test_importance_sampling_keeps_the_mean_and_lowers_the_variance() -> None:
    """Over the law of t given by its quantile function, exactly; best for the root mean squares."""
    model, (x, eps, w) = built(share=0.3), quadrature(8)
    i = torch.arange(1, N + 1, dtype=F64)
    t, hybrid = (i / N).repeat_interleave(len(w)), partial(losses.hybrid, n=N, scale=1.0)
    xs, noises = x.repeat(N, 1), eps.repeat(N, 1)
    plain = hybrid(model, xs, noises, t).detach().view(N, -1)
    squares = plain.square() @ w
    moments = {}
    for name, sizes in (("uniform", torch.ones(N)), ("other", i), ("best", squares.sqrt())):
        u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
        drawn = losses.in_proportion(VP, u, sizes=sizes)
        shares = torch.stack([(drawn == j / N).double().mean() for j in i])
        assert bool((drawn.diff() >= 0).all()) and shares.sum() == 1
        torch.testing.assert_close(shares, (sizes / sizes.sum()).double(), rtol=0, atol=1e-4)
        values = losses.important(model, xs, noises, t, sizes=sizes, loss=hybrid).detach().view(N, -1)
        shares = (sizes / sizes.sum()).double()
        assert abs(float(shares @ (values @ w)) - float((plain @ w).mean())) < 1e-12
        moments[name] = float(shares @ (values.square() @ w))
    assert moments["best"] < 0.9 * min(moments["uniform"], moments["other"])
    assert losses.in_proportion(VP, torch.tensor([0.0, 1 - 2**-53], dtype=F64), sizes=i).tolist() == [
        1 / N,
        1.0,
    ]
    for sizes in (torch.tensor([1.0, 0.0]), torch.ones(2, 2), torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError, match="sizes: expected positive numbers"):
            losses.in_proportion(VP, torch.zeros(1, dtype=F64), sizes=sizes)


# ---- the bound


def terms(model: BaseDenoiser, term) -> float:
    x, eps, w = quadrature()
    with torch.no_grad():
        return float(sum(term(model, x, eps, s, t) @ w for t, s in itertools.pairwise(NODES)))


def test_the_bound_is_exact_with_the_best_variance_and_looser_with_others() -> None:
    x, eps, w = quadrature()
    end, alpha, sigma = NODES[-1], VP.alpha(NODES[-1]), VP.sigma(NODES[-1])
    prior = float(likelihood.prior_term(VP, x) @ w)
    # L_0 with the exact variance of x given x_end, coordinate by coordinate.
    denoised = LAW.denoiser(VP)(alpha * x + sigma * eps, end)
    left = V * sigma**2 / (V * alpha**2 + sigma**2)
    decoder = float((0.5 * ((x - denoised).square() / left + (2 * math.pi * left).log()).sum(1)) @ w)
    entropy = float(0.5 * (2 * math.pi * math.e * V).log().sum())
    total = VP.alpha(1.0) ** 2 * V + VP.sigma(1.0) ** 2
    mismatch = float(0.5 * (total + (VP.alpha(1.0) * LAW.mean).square() - 1 - total.log()).sum())

    gaps = {
        share: terms(built(share=best() if share is None else share), learned_step_term)
        + prior + decoder - entropy - mismatch
        for share in (None, 0.0, 0.5, 1.0)
    }  # fmt: skip
    assert abs(gaps.pop(None)) < 1e-10
    assert min(gaps.values()) > 1e-3
    model = LAW.denoiser(VP)
    for share, variance in ((0.0, posterior_variance), (1.0, likelihood.transition_variance)):
        known = terms(model, partial(step_term, variance=variance))
        assert abs(terms(built(share=share), learned_step_term) - known) < 1e-10


def test_conditions_filled_in_reach_the_term() -> None:
    model, (x, eps, _) = built(share=0.2), quadrature()
    label = torch.full((len(x),), 0.3, dtype=F64)
    one = learned_step_term(model.given(label=label), x, eps, 0.5, 0.625)
    assert torch.equal(one, learned_step_term(model, x, eps, 0.5, 0.625, label=label))
    assert torch.equal(one, learned_step_term(model.given(label=2 * label), x, eps, 0.5, 0.625, label=label))
    assert not torch.equal(one, learned_step_term(model, x, eps, 0.5, 0.625))


def test_the_estimate_takes_the_model_s_variance() -> None:
    x = LAW.sample(50, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"grid": NODES}
    for share, variance in ((0.0, posterior_variance), (1.0, likelihood.transition_variance)):
        model = built(share=share)
        one = elbo(model, x, GaussianDecoder(), variance=None, **options)
        other = elbo(model, x, GaussianDecoder(), variance=variance, **options)
        torch.testing.assert_close(one.steps, other.steps, rtol=1e-9, atol=1e-12)
    found = elbo(built(share=best()), x, GaussianDecoder(), variance=None, **options)
    assert found.network_calls == N - 1 + 4
    assert float(found.value.mean()) > float(other.value.mean())
    with pytest.raises(TypeError, match=r"expected a LearnedVariance .* found .*posterior_variance"):
        elbo(LAW.denoiser(VP), x, GaussianDecoder(), variance=None, **options)


# ---- sampling


@pytest.mark.parametrize("end", [0.125, 0.0])
def test_samples_have_the_exact_law_with_the_best_variance(end: float) -> None:
    """However few steps: the reverse chain of a Gaussian is Gaussian. v = 0, 1 are the tables of DDPM."""
    times = NODES if end else torch.cat([NODES, NODES.new_zeros(1)])
    rows = len(times) - 1
    law = partial(affine_law, grid=times, rows=rows)
    start = LAW.marginal(VP, 1.0)
    found = law(solvers.ddpm_learned(), built(share=best()), start=start)
    if end:
        assert distance(found, LAW.marginal(VP, end)) < 1e-12
        half = law(solvers.ddpm_learned(), built(share=0.5), start=start)
        assert distance(half, LAW.marginal(VP, end)) > 1e-3
    for share, variance in ((0.0, "small"), (1.0, "large")):
        one = law(solvers.ddpm_learned(), built(share=share), start=start)
        other = law(solvers.ddpm(variance), LAW.denoiser(VP), start=start)
        assert distance(one, other) < 1e-12


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, F64], ids=str)
def test_the_state_keeps_its_dtype(state: torch.dtype) -> None:
    """Whatever the noise has, as with tables."""
    noise = Noise.of(0, batch=3, dtype=torch.float32)
    found = solvers.ddpm_learned().solve(built(share=0.2), torch.ones(3, 2, dtype=state), NODES, noise=noise)
    assert found.x.dtype == state and bool(found.x.isfinite().all())


def test_sampling_with_conditions_and_a_callback() -> None:
    started = time.perf_counter()
    model, solver = built(share=0.2), solvers.ddpm_learned()
    options: dict[str, Any] = {"grid": NODES, "seed": 3, "dtype": F64}
    label = torch.tensor([0, 1, 0])
    seen = sample(
        model, (3, 2), solver, condition={"label": label}, callback=lambda step: step.denoised, **options
    )
    plain = sample(model, (3, 2), solver, **options)
    assert seen.network_calls == N - 1 == len(seen.path) == solver.steps_for(N - 1)
    assert torch.equal(seen.x[::2], plain.x[::2]) and not torch.equal(seen.x[1], plain.x[1])
    assert seen.end == plain.end == 1 / N and repr(solver) == "ddpm_learned()"
    assert 0 < plain.seconds < time.perf_counter() - started
    inner, cond = with_variance(model.given(label=1).given(label=2, other=3))
    assert inner is model and cond == {"label": 2, "other": 3}


def drift(x: Tensor, t: Tensor) -> Tensor:
    """A classifier's log-probability, not linear in x."""
    return (t[:, None] - x).sin().sum(1)


LABEL = torch.tensor([0.3, -0.2, 0.5], dtype=F64)
NULL = {"label": 0.0}
GUIDES: dict[str, Any] = {
    "classifier": lambda model: guidance.classifier(model, drift, 1.3),
    "classifier, conditions inside": lambda model: guidance.classifier(
        model.given(label=LABEL), drift, guidance.interval(1.3, -4.0, 2.0)
    ),
    "classifier, off": lambda model: guidance.classifier(model, drift, 0.0),
    "classifier-free": lambda model: guidance.classifier_free(model, 1.7, null=NULL).given(label=LABEL),
    "classifier-free, doubled": lambda model: guidance.classifier_free(
        model, 1.7, null=NULL, doubled=True
    ).given(label=LABEL),
    "classifier-free, conditional": lambda model: guidance.classifier_free(model, 1, null=NULL).given(
        label=LABEL
    ),
    "classifier-free, by noise": lambda model: guidance.classifier_free(
        model, guidance.interval(2.0, -4.0, 2.0, outside=1.0), null=NULL
    ).given(label=LABEL),
    "classifier-free, rescaled": lambda model: guidance.classifier_free(
        model, 1.7, null=NULL, rescale=0.4
    ).given(label=LABEL),
}


class Pushed(nn.Module):
    """A prediction that labels move."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        F, u = self.network(x, time).chunk(2, 1)
        return torch.cat([F if label is None else F + label[:, None], u], 1)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize(("share", "variance"), [(0.0, "small"), (1.0, "large")])
def test_guided_samples(guide: str, share: float, variance: str) -> None:
    """With v = 0 or 1 those of ancestral sampling with that variance, for the same guided denoiser; and
    guidance moves them."""
    model, options = LearnedVariance(Pushed(built(share=share).network), VP), {"grid": NODES, "dtype": F64}
    guided = GUIDES[guide](model)
    found = sample(guided, (3, 2), solvers.ddpm_learned(), **options).x
    expected = sample(guided, (3, 2), solvers.ddpm(variance), **options).x
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    label = {"label": LABEL} if "inside" in guide or "free" in guide else {}
    plain = sample(model.given(**label), (3, 2), solvers.ddpm_learned(), **options).x
    assert torch.equal(found, plain) == (guide in ("classifier, off", "classifier-free, conditional"))


@pytest.mark.parametrize(
    ("scale", "doubled", "calls"), [(0, False, 1), (1, True, 1), (2, False, 2), (2, True, 1)]
)
def test_calls_of_a_guided_model(scale: float, doubled: bool, calls: int) -> None:
    """As many as `classifier_free` promises, with the same result."""
    model, x = built(share=0.2), torch.ones(3, 2, dtype=F64)
    seen: list[int] = []
    model.network.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    guided = guidance.classifier_free(model, scale, null=NULL, doubled=doubled)
    D, _ = guided.data_and_share(x, 0.5, label=LABEL)
    assert len(seen) == calls
    torch.testing.assert_close(D, guided(x, 0.5, label=LABEL), rtol=1e-12, atol=1e-14)


def test_the_share_of_a_guided_model() -> None:
    """The conditional one, without guidance the null one; conditions of the call before those inside."""
    model, x, t = built(share=0.2), torch.ones(3, 2, dtype=F64), torch.tensor(0.5, dtype=F64)
    shares = {
        scale: guidance.classifier_free(model, scale, null=NULL).data_and_share(x, t, label=LABEL)[1][:, 0]
        for scale in (0.0, 0.5, 1.0, 2.0)
    }
    for scale, share in shares.items():
        assert torch.allclose(share, 0.2 + (LABEL if scale else 0 * LABEL), rtol=0, atol=1e-15)
    for guided in (
        guidance.classifier(model.given(label=1 - LABEL), drift, 1.0),
        guidance.classifier_free(model.given(label=1 - LABEL), 2.0, null=NULL),
    ):
        inner, cond = with_variance(guided.given(label=LABEL))
        assert inner is guided and cond == {"label": LABEL}
        D, v = inner.data_and_share(x, t, **cond)
        assert torch.allclose(v[:, 0], 0.2 + LABEL, rtol=0, atol=1e-15)
        assert torch.equal(D, guided(x, t, label=LABEL))
    pushed = LearnedVariance(Pushed(built(share=0.0).network), VP).given(label=1 - LABEL)
    guided = guidance.classifier_free(pushed, 2.0, null=NULL)
    assert torch.equal(guided.data_and_share(x, t, label=LABEL)[0], guided(x, t, label=LABEL))
    with pytest.raises(TypeError, match=r"expected a LearnedVariance denoiser, .* found ExactDenoiser"):
        with_variance(guidance.classifier(LAW.denoiser(VP), drift, 1.0))
    with pytest.raises(TypeError, match=r"expected a LearnedVariance denoiser, .* found Observed"):
        with_variance(guidance.linear_inverse(model, torch.eye(2, dtype=F64), x[0], 0.1))


def test_errors_of_the_solver_and_of_the_network() -> None:
    noise = Noise.of(0, None, batch=2, device=torch.device("cpu"), dtype=F64)
    x, solver = torch.zeros(2, 2, dtype=F64), solvers.ddpm_learned()
    with pytest.raises(TypeError, match=r"expected a LearnedVariance denoiser, .*solvers\.ddpm\(\)"):
        solver.solve(LAW.denoiser(VP), x, NODES, noise=noise)
    with pytest.raises(ValueError, match="cannot run from data to noise"):
        solver.solve(built(), x, grids.uniform(VP, 4).reversed(), noise=noise)
    with pytest.raises(ValueError, match="expected a noise source, found None"):
        solver.solve(built(), x, NODES)
    with pytest.raises(ValueError, match="at least 1 calls"):
        solver.steps_for(0)
    single = LearnedVariance(networks.MLP(2).double(), VP)
    for call in (
        lambda: single(x, 0.5),
        lambda: single.data_and_share(x, 0.5),
        lambda: solvers.ddim().solve(single, x, NODES),
    ):
        with pytest.raises(ValueError, match=r"prediction and variance, \(2, 4\), found \(2, 2\)"):
            call()
    broken = built(share=math.nan)
    broken.network.off.data += math.nan
    with pytest.raises(
        FloatingPointError, match=r"ddpm_learned\(\): the network returned NaN or Inf at call 1"
    ):
        solver.solve(broken, x, NODES, noise=noise)


# ---- in practice


def test_a_u_net_is_trained_saved_and_sampled(tmp_path, device) -> None:
    torch.manual_seed(0)
    network = networks.UNet(1, base=4, multipliers=(1,), blocks=1, attention=(), out_channels=2)
    model = LearnedVariance(network.to(device), VP, "velocity")
    x0, t = torch.randn(16, 1, 4, 4, device=device), torch.full((16,), 0.5, device=device)
    assert torch.equal(model.data_and_share(x0, t)[1], torch.full_like(x0, 0.5))  # a new one
    path = tmp_path / "model.safetensors"
    run = train.fit(
        model, x0, steps=3, batch_size=16, path=path,
        loss=partial(losses.hybrid, n=10), times=partial(losses.chain, n=10),
    )  # fmt: skip
    assert all(math.isfinite(progress.loss) for progress in run)
    again = checkpoint.load(path, device=device)
    assert isinstance(again, LearnedVariance) and checkpoint.describe(path)["denoiser"] == "LearnedVariance"
    assert torch.equal(again.data_and_share(x0, t)[1], run.ema.data_and_share(x0, t)[1])
    assert not torch.equal(again.data_and_share(x0, t)[1], torch.full_like(x0, 0.5))
    drawn = sample(again, (3, 1, 4, 4), solvers.ddpm_learned(), steps=10, grid=grids.uniform, end=0.1)
    assert bool(drawn.x.isfinite().all())
    plain = Denoiser(networks.MLP(2), VP)
    checkpoint.save(path, plain)
    assert type(checkpoint.load(path)) is Denoiser
