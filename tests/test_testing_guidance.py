"""The checks of guidance, likelihood, divergence and bound: what is right passes, planted mistakes do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoresde import EDM, VPSDE, Rectified, grids, guidance, laws, likelihood
from scoresde.denoiser import BaseDenoiser, Denoiser, Rows
from scoresde.gradients import gradient
from scoresde.guidance.base import Guided
from scoresde.guidance.scales import at
from scoresde.likelihood import (
    Elbo,
    Exact,
    GaussianDecoder,
    Hutchinson,
    HutchPP,
    LogProb,
    Orthogonal,
    gaussian,
    transition_variance,
)
from scoresde.networks import MLP
from scoresde.schedules import Time, wide
from scoresde.sde import like
from scoresde.testing import (
    check_bound,
    check_divergence,
    check_guidance,
    check_interval,
    check_likelihood,
)

pytestmark = pytest.mark.usefixtures("unchecked")
F64 = torch.float64
VP = VPSDE()
PRIOR = laws.Gaussian(torch.tensor([0.3, -0.4]), torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=F64))
POSTERIOR = PRIOR.posterior(torch.tensor([0.9]), torch.tensor([[1.0, 0.5]]), 0.1)
DATA = PRIOR.sample(6, generator=torch.Generator().manual_seed(0))
MODEL = PRIOR.denoiser(VP)


def evidence(x: Tensor, t: Tensor) -> Tensor:
    """log p(y | x_t), by Bayes."""
    return POSTERIOR.denoiser(VP).log_prob(x, t) - PRIOR.denoiser(VP).log_prob(x, t)


def exact(scale: Any) -> BaseDenoiser:
    return guidance.classifier(MODEL, evidence, scale)


def networks_by_label(scale: Any) -> BaseDenoiser:
    torch.manual_seed(0)
    network = MLP(2, hidden=16, layers=1, classes=3).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    model = Denoiser(network, VP, "velocity").eval()
    given = {"label": torch.tensor([0, 1, 2, 0, 1, 2])}
    return guidance.classifier_free(model, scale, null={"label": -1}).given(**given)


# ---- guidance


@pytest.mark.parametrize("sde", [VP, EDM(0.01, 20.0), Rectified()], ids=repr)
def test_exact_guidance_passes(sde) -> None:
    model, ends = PRIOR.denoiser(sde), (PRIOR.denoiser(sde), POSTERIOR.denoiser(sde))

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return ends[1].log_prob(x, t) - ends[0].log_prob(x, t)

    guide = partial(guidance.classifier, model, log_prob)
    times = None if sde is VP else AT * sde.t_max
    check_guidance(guide, model, data=DATA, posterior=POSTERIOR, log_prob=log_prob, times=times)
    check_interval(guide, sde, data=DATA)
    check_interval(guide, sde, data=DATA, outside=1.0)


def test_guidance_without_a_classifier_passes() -> None:
    end = {w: networks_by_label(w) for w in (0.0, 1.0)}
    check_guidance(networks_by_label, end[0.0], data=DATA, conditional=end[1.0])
    with pytest.raises(AssertionError, match="scale 1 is the conditional model, bit for bit"):
        check_guidance(networks_by_label, end[0.0], data=DATA, conditional=end[0.0])

    def one(scale: Any) -> BaseDenoiser:
        return guidance.classifier_free(networks_by_label(1.0).model.model, scale, null={"label": -1}).given(
            label=torch.tensor([2])
        )

    check_interval(lambda w: _EachAlone(one(w)), VP, data=DATA, outside=1.0)


class _EachAlone(Guided):
    """One condition for samples one by one."""

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        times = wide(t).expand(len(x))
        return torch.cat([self.model(x[i : i + 1], times[i], **cond) for i in range(len(x))])


Gain = Callable[[Tensor, Tensor, Tensor], Tensor]


class Mistaken(Guided):
    """Guidance by the gradient with another gain(scale, alpha, sigma), and what may go wrong on the way."""

    def __init__(self, scale: Any, gain: Gain = lambda w, a, s: w * s**2 / a, side_effect: str = "") -> None:
        super().__init__(MODEL)
        self.scale, self.gain, self.side_effect = scale, gain, side_effect
        self.weight = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        t = wide(t)
        plain, strength = self.model(x, t), at(self.scale, VP, t)
        if self.scale == 0:
            return plain
        if self.side_effect == "x" and not torch.is_inference_mode_enabled():
            x.requires_grad_()
        if self.side_effect == "grad":
            self.weight.grad = torch.ones_like(self.weight)
        if self.side_effect == "flag":
            self.weight.requires_grad_(False)
        if self.side_effect == "eval":
            self.eval()
        if self.side_effect == "mode" and not torch.is_grad_enabled():
            strength = 0.5 * strength
        pulled = gradient(lambda x: evidence(x, t.expand(len(x))), x.detach())[1]
        return plain + like(self.gain(strength, VP.alpha(t), VP.sigma(t)), x) * pulled

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        off = 1.01 if self.side_effect == "rows" else 1.0
        prepared = super().rows(times, x, **cond)
        return Rows(prepared.evaluate, prepared.a, [off * b for b in prepared.b])


AT = torch.tensor([0.02, 0.5], dtype=F64)
FULL = {"times": AT, "data": DATA, "posterior": POSTERIOR, "log_prob": evidence}
WRONG_GAINS: dict[str, tuple[Gain, str]] = {
    "sign": (lambda w, a, s: -w * s**2 / a, "Tweedie"),
    "not squared": (lambda w, a, s: w * s / a, "Tweedie"),
    "no alpha": (lambda w, a, s: w * s**2, "Tweedie"),
    "scale off": (lambda w, a, s: (w + 0.01) * s**2 / a, "Tweedie"),
    "scale squared": (lambda w, a, s: w**2 * s**2 / a, "affine in the scale"),
    "clipped scale": (lambda w, a, s: w.clamp(max=2.0) * s**2 / a, "affine in the scale"),
    "constant scale": (lambda w, a, s: s**2 / a, "affine in the scale"),
}


def test_the_planted_class_is_right_without_a_mistake() -> None:
    check_guidance(Mistaken, MODEL, **FULL)


@pytest.mark.parametrize("name", WRONG_GAINS)
def test_wrong_gains_are_found(name: str) -> None:
    gain, message = WRONG_GAINS[name]
    with pytest.raises(AssertionError, match=message):
        check_guidance(partial(Mistaken, gain=gain), MODEL, **FULL)
    if message == "Tweedie":  # the gradient alone sees it too
        with pytest.raises(AssertionError, match=r"times the gradient of log_prob|affine"):
            check_guidance(partial(Mistaken, gain=gain), MODEL, data=DATA, log_prob=evidence, times=AT)


@pytest.mark.parametrize(
    ("side_effect", "message"),
    [
        ("x", "the state's requires_grad"),
        ("grad", "the gradients of parameters"),
        ("flag", "requires_grad is left as found"),
        ("eval", "training flags"),
        ("mode", "all gradient modes"),
        ("rows", "rows prepared for a solver"),
    ],
)
def test_side_effects_are_found(side_effect: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_guidance(partial(Mistaken, side_effect=side_effect), MODEL, data=DATA, times=AT)


def test_an_unguided_end_that_is_only_close_is_found() -> None:
    with pytest.raises(AssertionError, match="scale 0 is the unguided model, bit for bit"):
        check_guidance(lambda w: exact(w + 1e-13), MODEL, data=DATA, times=AT)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda scale: lambda sde, t: 3.0 * (at(scale, sde, t) == 0),  # inside out
        lambda scale: lambda sde, t: at(scale, sde, t).min().expand(t.shape),  # one scale for the batch
        lambda scale: lambda sde, t: at(scale, sde, (t * 1.02).clamp(max=1)),  # another clock
        lambda scale: lambda sde, t: at(scale, sde, t) * (at(scale, sde, t * 0.999) > 0),  # an open end
    ],
)
def test_wrong_intervals_are_found(wrong) -> None:
    with pytest.raises(AssertionError, match="guidance counts for log-SNR"):
        check_interval(lambda w: exact(wrong(w) if callable(w) else w), VP, data=DATA)


# ---- likelihood

BIMODAL = laws.Mixture([0.3, 0.7], torch.tensor([[-1.0, 0.2], [0.8, 0.0]]).double(), 0.2)
log_prob = partial(likelihood.log_prob, tolerance=1e-4)


@pytest.mark.parametrize("sde", [VP, EDM(0.01, 20.0), Rectified()], ids=repr)
@pytest.mark.parametrize("law", [PRIOR, BIMODAL], ids=["gaussian", "bimodal"])
def test_log_densities_pass(law: laws.Law, sde) -> None:
    check_likelihood(log_prob, law, sde)


def test_log_densities_from_probes_pass() -> None:
    check_likelihood(partial(log_prob, divergence=Hutchinson(16)), PRIOR, VP)


def changed(model: BaseDenoiser, x: Tensor, change: Callable[[LogProb], dict[str, Any]]) -> LogProb:
    found = log_prob(model, x)
    return replace(found, **change(found))


LOG_SCALE = float((VP.alpha(1e-3) + VP.sigma(1e-3)).log())
WRONG_DENSITIES: dict[str, tuple[Callable[[LogProb], dict[str, Any]], str]] = {
    "forgotten log-det": (lambda f: {"value": f.value + 2 * LOG_SCALE}, "log p at the end"),
    "trace of the other sign": (lambda f: {"value": -f.value}, "log p at the end"),
    "gap counted twice": (lambda f: {"value": f.value + f.prior_gap}, "log p at the end"),
    "missing gap": (lambda f: {"prior_gap": 0 * f.prior_gap}, "prior gap"),
    "gap of the other sign": (lambda f: {"prior_gap": -f.prior_gap}, "prior gap"),
    "truncation of the other sign": (lambda f: {"truncation": -f.truncation}, "truncation"),
    "no solver error": (
        lambda f: {"value": f.value + 2e-5, "solver_error": 0 * f.solver_error},
        "log p at the end",
    ),
    "NaN": (lambda f: {"value": f.value * math.nan}, "log p at the end"),
}


@pytest.mark.parametrize("name", WRONG_DENSITIES)
def test_wrong_densities_are_found(name: str) -> None:
    change, message = WRONG_DENSITIES[name]
    # Far from standard normal under this process, so that its gap is larger than the errors.
    with pytest.raises(AssertionError, match=message):
        check_likelihood(partial(changed, change=change), PRIOR, VPSDE(0.1, 8.0))


def test_what_depends_on_the_axes_is_found() -> None:
    def lopsided(model: BaseDenoiser, x: Tensor) -> LogProb:
        found = log_prob(model, x)
        known = model.log_prob(x, 1e-3) if hasattr(model, "log_prob") else found.value + found.prior_gap
        return replace(found, value=known - found.prior_gap + (0 if hasattr(model, "log_prob") else 0.01))

    with pytest.raises(AssertionError, match="a rotation of data and model changes nothing"):
        check_likelihood(lopsided, PRIOR, VP)


@pytest.mark.parametrize(
    "divergence",
    [Exact(), Hutchinson(8), Hutchinson(8, gaussian), Hutchinson(1), Orthogonal(4), HutchPP(2, 3)],
)
def test_divergences_pass(divergence) -> None:
    check_divergence(divergence)


class OffTrace(Hutchinson):
    def estimates(self, pull, probes):
        return super().estimates(pull, probes) * 1.1


class Careless(Hutchinson):
    """Takes orthogonal probes' correction, without their orthogonality."""

    def standard_error(self, values, dim):
        return super().standard_error(values, dim) * math.sqrt(1 - values.shape[1] / dim)


class Uniform(Hutchinson):
    """Probes of variance 1/3."""

    def probes(self, noise, dim):
        return torch.special.ndtr(super().probes(noise, dim)) * 2 - 1


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (OffTrace(4), "the mean of the estimates is the trace"),
        (Uniform(4, gaussian), "the mean of the estimates is the trace"),
        (Careless(3), "the stated standard error"),
    ],
)
def test_wrong_divergences_are_found(divergence, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_divergence(divergence)


# ---- bounds


def elbo(model: BaseDenoiser, x: Tensor, **options: Any) -> Elbo:
    return likelihood.elbo(model, x, GaussianDecoder(), **options)


NODES = grids.log_snr(VP, 12, 1e-3)


@pytest.mark.parametrize("sde", [VP, EDM(0.01, 20.0)], ids=repr)
def test_bounds_pass(sde) -> None:
    grid = grids.log_snr(sde, 12)
    check_bound(partial(elbo, draws=8), PRIOR, sde)
    check_bound(partial(elbo, draws=8), BIMODAL, sde)
    check_bound(partial(elbo, grid=grid), PRIOR, sde, grid=grid)
    large = {"grid": grid, "variance": transition_variance}
    check_bound(partial(elbo, **large), PRIOR, sde, **large)


def altered(model: BaseDenoiser, x: Tensor, change: Callable[[Elbo], dict[str, Any]], **options: Any) -> Elbo:
    found = elbo(model, x, **options)
    changes = change(found)
    if "steps" in changes:
        changes["diffusion"] = changes["steps"].sum(1)
    return replace(found, **changes)


@pytest.mark.parametrize("grid", [None, NODES], ids=["continuous", "grid"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"prior": 0 * f.prior}, "prior is KL"),
        (lambda f: {"prior": f.prior + 1e-8}, "prior is KL"),
        (lambda f: {"decoder": f.decoder - 20}, "at most log p"),
        (lambda f: {"steps": -f.steps}, "at most log p|diffusion"),
        (lambda f: {"steps": 1.2 * f.steps}, "log.*SNR_end|KL of each step"),
        (lambda f: {"steps": f.steps.roll(1, 1)}, "KL of each step|passes"),
        (lambda f: {"diffusion": f.diffusion * (1 + 1e-9)}, "sum of steps"),
    ],
)
def test_wrong_bounds_are_found(change, message: str, grid) -> None:
    if message.endswith("passes") and grid is None:
        return  # which draw is which does not matter to the continuous bound
    options: dict[str, Any] = {"draws": 8} if grid is None else {"grid": grid}
    with pytest.raises(AssertionError, match=message):
        check_bound(partial(altered, change=change, **options), PRIOR, VP, grid=grid)


def test_another_variance_is_found() -> None:
    with pytest.raises(AssertionError, match="KL of each step"):
        check_bound(partial(elbo, grid=NODES, variance=transition_variance), PRIOR, VP, grid=NODES)


def test_another_value_is_found() -> None:
    class Off(Elbo):
        value = property(lambda self: -(self.prior + self.diffusion + self.decoder) * 1.001)

    def off(model: BaseDenoiser, x: Tensor) -> Elbo:
        found = elbo(model, x, draws=2)
        return Off(**{name: getattr(found, name) for name in found.__dataclass_fields__})

    with pytest.raises(AssertionError, match="value is -"):
        check_bound(off, PRIOR, VP, draws=4)


def test_nothing_to_look_at_is_no_pass() -> None:
    wrong, none = partial(guidance.classifier, MODEL, lambda x, t: x.sum(1)), DATA[:0]
    for check in (
        lambda: check_guidance(wrong, MODEL, data=none, posterior=POSTERIOR),
        lambda: check_guidance(wrong, MODEL, data=DATA, times=torch.zeros(0), posterior=POSTERIOR),
        lambda: check_interval(wrong, VP, data=none),
        lambda: check_likelihood(lambda model, x: likelihood.log_prob(MODEL, x), PRIOR, VP, data=none),
    ):
        with pytest.raises(ValueError, match="expected something to look at"):
            check()


def test_what_a_report_lacks_is_named() -> None:
    def lacking(model, x):
        found = {field: getattr(likelihood.log_prob(model, x), field) for field in FOUND}
        return type("Report", (), found)()

    FOUND = ("value", "standard_error", "solver_error", "prior_gap", "latent", "end")
    with pytest.raises(AssertionError, match="lacks truncation"):
        check_likelihood(lacking, PRIOR, VP)


def test_names_are_listed() -> None:
    from scoresde import testing

    for a, b in itertools.pairwise(testing.__all__):
        assert a < b and hasattr(testing, a)
