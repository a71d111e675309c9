"""The boundary to networks: all predictions give one denoiser, and what a network gets is exact."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_schedules import EPS, f64
from test_sde import EXAMPLES, GaussianModel, close, marginal, over_sdes
from torch import nn

from scoresde import likelihood, sample, solvers
from scoresde.denoiser import (
    DATA,
    FLOW,
    NOISE,
    PREDICTIONS,
    SCORE,
    VELOCITY,
    BaseDenoiser,
    Denoiser,
    Karras,
    some_rows,
    view,
)
from scoresde.schedules import Cosine, Learned, tabulated_betas
from scoresde.sde import EDM, VESDE, VPSDE, Rectified, SubVPSDE, like
from scoresde.testing.strategies import at, floats, sdes

ALL = [*PREDICTIONS.values(), Karras(0.5), Karras(1.7)]
over_predictions = pytest.mark.parametrize("predicts", ALL, ids=repr)


def textbook_F(predicts, alpha, sigma, x_0, eps):
    """What a network predicts, in the words of the papers."""
    if predicts.name == "Karras":  # Karras et al. 2022, table 1, for x/alpha and kappa = sigma/alpha
        s = dict(predicts.config)["sigma_data"]
        kappa = sigma / alpha
        c_skip, c_out = s**2 / (kappa**2 + s**2), kappa * s / (kappa**2 + s**2) ** 0.5
        return (x_0 - c_skip * (x_0 + kappa * eps)) / c_out
    return {
        "data": x_0,
        "noise": eps,
        "velocity": alpha * eps - sigma * x_0,
        "flow": eps - x_0,
        "score": -eps / sigma,
    }[predicts.name]


class GaussianNetwork(nn.Module):
    """The network that is right about Gaussian data: E[F | x_t], from the input c_in x and the time t."""

    def __init__(self, law: GaussianModel, predicts, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.law, self.predicts = law, predicts
        self.weight = nn.Parameter(torch.ones((), dtype=dtype), requires_grad=False)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, inputs, time, shift=0.0):
        self.seen.append((inputs, time))
        sde = self.law.sde
        alpha, sigma = like(sde.alpha(time), inputs.double()), like(sde.sigma(time), inputs.double())
        scale = 1.0
        if self.predicts.name == "Karras":
            scale = (sigma**2 + alpha**2 * dict(self.predicts.config)["sigma_data"] ** 2) ** 0.5
        x = inputs.double() * scale
        x_0 = self.law(x, time)
        F = textbook_F(self.predicts, alpha, sigma, x_0, (x - alpha * x_0) / sigma)
        return (F + shift).to(inputs.dtype) * self.weight


def state(sde, t, shape=(3, 2), dtype=torch.float64) -> torch.Tensor:
    """A draw of x_t for GaussianModel's data."""
    m, v = marginal(GaussianModel(sde), t)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return (m + v.sqrt() * z).to(dtype)


class Same(nn.Module):
    """A network that returns its input."""

    def forward(self, inputs, time):
        return inputs


def wide(model: Denoiser) -> Denoiser:
    """The model with a float64 parameter, so that its network is fed in float64."""
    model.register_parameter("witness", nn.Parameter(torch.zeros((), dtype=torch.float64)))
    return model


# One denoiser from every prediction


FEWER = settings(max_examples=max(1, settings.default.max_examples // 3))  # each example runs all predictions


@over_predictions
@FEWER
@given(sdes(), floats(0.05, 0.95))
def test_every_prediction_gives_the_same_views(predicts, sde, share: float) -> None:  # PROPERTIES 18, 19
    t, law = at(sde, share), GaussianModel(sde)
    x = state(sde, t)
    model = Denoiser(GaussianNetwork(law, predicts), sde, predicts)
    D = law(x, t)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    eps = (x - alpha * D) / sigma
    # From noise to data the rounding grows by sigma/alpha, from data to noise by alpha/sigma, to the score by
    # 1/sigma.
    size = float(1 + x.abs().max())
    tolerance = 64 * EPS * size * float((1 + 1 / alpha) * (1 + 1 / sigma) ** 2 * (1 + sigma))
    close(model(x, t), D, atol=tolerance)
    close(model.noise(x, t), eps, atol=tolerance * float(1 + alpha))
    close(model.score(x, t), -eps / sigma, atol=tolerance * float(1 + alpha) / float(sigma))
    close(model.velocity(x, t), alpha * eps - sigma * D, atol=tolerance * float(1 + sigma) * 2)
    close(model.flow(x, t), eps - D, atol=2 * tolerance)
    for method in ("noise", "score", "velocity", "flow"):
        known = getattr(law, method)(x, t)
        close(getattr(model, method)(x, t), known, atol=4 * tolerance * float(1 + 1 / sigma))


def test_views_of_an_exact_denoiser_by_hand() -> None:
    """Rectified at t = 0.2, x = 1: alpha = 0.8, D = 0.7 + 0.2/(0.16 + 0.04) (1 - 0.56) = 1.14."""
    law, x = GaussianModel(Rectified()), f64(1.0)[:, None]
    D = 0.7 + 0.8 * 0.25 / (0.64 * 0.25 + 0.04) * (1 - 0.56)
    eps = (1 - 0.8 * D) / 0.2
    for found, known in [
        (law(x, 0.2), D),
        (law.noise(x, 0.2), eps),
        (law.score(x, 0.2), -eps / 0.2),
        (law.velocity(x, 0.2), 0.8 * eps - 0.2 * D),
        (law.flow(x, 0.2), eps - D),
    ]:
        close(found, f64(known)[:, None], rtol=1e-13)


@FEWER
@given(sdes(), floats(0.02, 0.98), st.lists(floats(-3.0, 3.0), min_size=2, max_size=2))
@example(SubVPSDE(schedule=Cosine(0.0, 3.0)), 0.25, [1.0, 0.0])
def test_view_converts_every_pair(sde, share: float, values: list[float]) -> None:
    """target = a x + b source holds for every x_0 and eps, and there and back is the identity."""
    t = at(sde, share)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x_0, eps = values
    x = alpha * x_0 + sigma * eps
    for source in ALL:
        for target in ALL:
            a, b = view(target, source, alpha, sigma)
            F = textbook_F(source, alpha, sigma, x_0, eps)
            known = textbook_F(target, alpha, sigma, x_0, eps)
            size = (a * x).abs() + (b * F).abs() + 1e-300
            size = size + (1 + b.abs()) * (abs(x_0) + abs(eps))  # F has been rounded too
            assert (a * x + b * F - known).abs() <= 64 * EPS * size * (1 + 1 / sigma)
            back_a, back_b = view(source, target, alpha, sigma)
            close(b * back_b, torch.ones_like(b), rtol=1e-13)
            close(back_a + back_b * a, torch.zeros_like(a), atol=1e-14 * float(back_a.abs() + 1e-30))


def test_views_of_what_is_proportional_need_no_state() -> None:
    """Where x tells nothing else: data without noise, noise without signal."""
    zero, one = f64(0.0), f64(1.0)
    assert [v.item() for v in view(DATA, DATA, one, zero)] == [0, 1]
    assert [v.item() for v in view(NOISE, NOISE, zero, one)] == [0, 1]
    assert [v.item() for v in view(VELOCITY, NOISE, one, zero)] == [0, 1]
    assert [v.item() for v in view(VELOCITY, DATA, zero, one)] == [0, -1]


@over_predictions
@over_sdes
def test_target_is_what_raw_should_return(predicts, sde, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t = f64(0.1, 0.3, 0.5, 0.9)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    model = Denoiser(Same(), sde, predicts)
    known = textbook_F(predicts, alpha, sigma, x_0, eps)
    close(model.target(x_0, eps, t), known, rtol=1e-12, atol=1e-12)
    found = model.target(x_0.to(dtype), eps.to(dtype), t)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), known, rtol=64 * eps, atol=0.1 * eps**0.5)


@over_predictions
def test_a_network_that_returns_the_target_is_turned_into_the_data(predicts) -> None:
    """raw -> D inverts target for one sample: F(x_t) = target(x_0, eps) gives D = x_0, noise = eps."""
    x_0, eps = f64(0.4, -1.0)[:, None], f64(1.2, 0.3)[:, None]
    for sde in EXAMPLES:
        t = f64(0.2, 0.8)

        class Knows(nn.Module):
            def forward(self, inputs, time, sde=sde, t=t):
                return Denoiser(Same(), sde, predicts).target(x_0, eps, t)

        model = wide(Denoiser(Knows(), sde, predicts))
        x = sde.marginal(x_0, t)[0] + sde.marginal(x_0, t)[1] * eps
        amplified = float((1 + 1 / sde.alpha(t)).max() * (1 + 1 / sde.sigma(t)).max() * (1 + x.abs().max()))
        close(model(x, t), x_0, atol=1e-15 * amplified**2)
        close(model.noise(x, t), eps, atol=1e-15 * amplified**2)
        close(model.raw(x, t), model.target(x_0, eps, t))


# EDM preconditioning


@pytest.mark.oracle
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.5])
def test_karras_is_table_1_of_the_paper(sigma_data: float) -> None:
    sigma = torch.logspace(-3, 2, 40, dtype=torch.float64)
    alpha = torch.ones_like(sigma)
    predicts = Karras(sigma_data)
    c_skip, c_out = view(DATA, predicts, alpha, sigma)
    close(c_skip, sigma_data**2 / (sigma**2 + sigma_data**2), rtol=1e-12)
    close(c_out, sigma * sigma_data / (sigma_data**2 + sigma**2).sqrt(), rtol=1e-12)
    close(predicts.c_in(alpha, sigma), 1 / (sigma**2 + sigma_data**2).sqrt(), rtol=1e-12)


@given(sdes(), floats(0.0, 1.0), floats(0.1, 3.0))
def test_karras_has_unit_variances_at_any_alpha(sde, share: float, sigma_data: float) -> None:
    """Input and target have unit variance for data of standard deviation sigma_data (Karras et al., B.6)."""
    t = at(sde, share)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    if alpha + sigma == 0:
        return
    predicts = Karras(sigma_data)
    p, q = predicts.pq(alpha, sigma)
    close(p**2 * sigma_data**2 + q**2, torch.ones_like(p), rtol=1e-13)
    S = sigma**2 + alpha**2 * sigma_data**2
    close(predicts.c_in(alpha, sigma) ** 2 * S, torch.ones_like(p), rtol=1e-13)
    # c_out is smallest: target and input are uncorrelated.
    assert (p * alpha * sigma_data**2 + q * sigma).abs() <= 8 * EPS * (1 + sigma)
    c_skip, c_out = view(DATA, predicts, alpha, sigma)
    close(c_skip, alpha * sigma_data**2 / S, rtol=1e-12, atol=1e-15)
    close(c_out, sigma * sigma_data / S.sqrt(), rtol=1e-12, atol=1e-15)


def test_karras_default_and_repr() -> None:
    assert repr(Karras()) == "Karras(sigma_data=0.5)" and repr(NOISE) == "noise"
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected sigma_data > 0, found"):
            Karras(wrong)
    assert Karras().name == "Karras" and Karras().config == (("sigma_data", 0.5),)


def test_predictions_are_values() -> None:
    for predicts in (*PREDICTIONS.values(), Karras()):
        assert hash(predicts) == hash(dataclasses.replace(predicts))
        with pytest.raises(dataclasses.FrozenInstanceError):
            predicts.name = "other"  # pyright: ignore


def test_only_karras_scales_its_input() -> None:
    x = f64(1.0, -2.0)[:, None]
    for predicts in ALL:
        network = GaussianNetwork(GaussianModel(VPSDE()), predicts)
        Denoiser(network, VPSDE(), predicts).raw(x, 0.3)
        ((inputs, _),) = network.seen
        if predicts.name == "Karras":
            close(inputs, x * predicts.c_in(VPSDE().alpha(0.3), VPSDE().sigma(0.3)))
        else:
            assert inputs.equal(x)


# The ends


@pytest.mark.parametrize("predicts", [DATA, VELOCITY, FLOW, Karras(0.5)], ids=repr)
def test_no_signal_left(predicts) -> None:  # FAULTS A6
    """Rectified at t = 1: x_t is noise alone, E[x_0 | x_t] the mean; 0.7 for every network that can tell."""
    sde = Rectified()
    law = GaussianModel(sde)

    class AtOne(nn.Module):
        def forward(self, inputs, time):
            x = inputs / float(predicts.c_in(f64(0.0), f64(1.0))[0])
            p, q = predicts.pq(f64(0.0), f64(1.0))
            return p * 0.7 + q * x

    model = wide(Denoiser(AtOne(), sde, predicts))
    x = f64(-1.5, 2.0)[:, None]
    for found in (model(x, 1.0), from_rows(model, x, f64(1.0, 0.5))):
        close(found, torch.full_like(x, 0.7))
    close(model.noise(x, 1.0), x)
    close(model.score(x, 1.0), -x)
    close(model.velocity(x, 1.0), torch.full_like(x, -0.7))
    close(model.flow(x, 1.0), x - 0.7)
    close(law(x, 1.0), torch.full_like(x, 0.7))


def from_rows(model: BaseDenoiser, x: torch.Tensor, times: torch.Tensor, k: int = 0) -> torch.Tensor:
    rows = model.rows(times, x)
    return rows.a[k] * x + rows.b[k] * rows.evaluate(x, k)


@pytest.mark.parametrize("predicts", ["noise", "score"])
def test_noise_does_not_determine_the_data_without_signal(predicts: str) -> None:  # FAULTS A6
    calls = []
    model = Denoiser(Counting(calls), Rectified(), predicts)
    x = torch.tensor([[0.5], [-2.0]])
    message = rf"expected times at which data from predicted {predicts} is determined, found t=1\.0: "
    times = f64(0.5, 1.0)
    for call in (lambda: model(x, 1.0), lambda: model.rows(times, x), lambda: model(x, times)):
        with pytest.raises(ValueError, match=message):
            call()
    assert len(calls) == 0  # no network call before the error
    assert model.noise(x, 1.0).equal((1 if predicts == "noise" else -1) * x)  # that it does know
    assert model.score(x, 1.0).equal((-1 if predicts == "noise" else 1) * x)


class Counting(nn.Module):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, inputs, time):
        self.calls.append(time)
        return inputs


@pytest.mark.parametrize("predicts", [NOISE, DATA, VELOCITY, FLOW, Karras()], ids=repr)
def test_no_noise_left(predicts) -> None:
    """At t = 0 of a VP-SDE the data is x itself, and the noise is not determined by the data."""
    model = Denoiser(Same(), VPSDE(), predicts)
    x = torch.tensor([[0.5], [-2.0]])
    if predicts not in (DATA,):
        close(model(x, 0.0), x, rtol=0, atol=0)
    for method in (model.score, GaussianModel(VPSDE()).noise, GaussianModel(VPSDE()).score):
        with pytest.raises(ValueError, match=r"is determined, found t=0\.0: .*without noise"):
            method(x, 0.0)


def test_log_snr_must_be_finite() -> None:
    model = Denoiser(Same(), Rectified(), "flow", "log_snr")
    x = torch.zeros(2, 1)
    for call in (lambda: model(x, 1.0), lambda: model.rows(f64(1.0, 0.5), x), lambda: model(x, 0.0)):
        with pytest.raises(ValueError, match="expected times of finite log-SNR"):
            call()


# What the network gets


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 100, 999, 1000, 4000])
@pytest.mark.parametrize("network_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_index_labels_are_exact(steps: int, network_dtype: torch.dtype) -> None:
    """i - 1 at t = i/N, although (i/N) N rounds to something else for some i (1/49 for one)."""
    model = watched(VPSDE(schedule=tabulated_betas([0.01] * steps)), "index", network_dtype)
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    model(torch.zeros(steps, 1), i / steps)
    assert model.network.seen[0][1].double().equal(i - 1)
    rows = model.rows(i / steps, torch.zeros(2, 1))
    for k in (0, steps // 2, steps - 1):
        rows.evaluate(torch.zeros(2, 1), k)
        assert model.network.seen[-1][1].double().equal(torch.full((2,), float(k), dtype=torch.float64))


def watched(sde, time_input: str, network_dtype: torch.dtype = torch.float64) -> Denoiser:
    network = Recorder().to(network_dtype)
    return Denoiser(network, sde, "data", time_input)


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()), requires_grad=False)
        self.seen = []

    def forward(self, inputs, time, **cond):
        self.seen.append((inputs, time, cond))
        return inputs * self.weight


def test_labels_between_nodes_and_without_a_table() -> None:
    t = f64(0.5, 0.2504, 0.2506, 1.0)
    for sde, steps in ((VPSDE(), 1000), (VESDE(), 1000), (VPSDE.from_betas([0.1] * 8), 8)):
        model = watched(sde, "index")
        model(torch.zeros(4, 1), t)
        close(model.network.seen[0][1], t * steps - 1, rtol=1e-14)


def test_labels_are_rounded_by_rounding_only() -> None:
    model = watched(VPSDE(), "index")
    model(torch.zeros(2, 1), f64(0.5 + 0.5e-14, 0.5 + 1.5e-14))
    near, off = model.network.seen[0][1].tolist()
    assert near == 499 and off == (0.5 + 1.5e-14) * 1000 - 1 != 499


@over_sdes
def test_time_and_log_snr_labels(sde) -> None:
    t = f64(0.02, 0.4, 0.9)
    for time_input, known in (("t", t), ("log_snr", sde.log_snr(t))):
        model = watched(sde, time_input)
        model(torch.zeros(3, 1), t)
        assert model.network.seen[0][1].equal(known)


def test_time_is_fed_by_default() -> None:
    model = Denoiser(Same(), VPSDE())
    assert model.time_input == "t" and model.predicts is NOISE


@over_predictions
@pytest.mark.parametrize("network_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
def test_dtypes(predicts, network_dtype: torch.dtype, x_dtype: torch.dtype, device: torch.device) -> None:
    """The network gets its own dtype and time in at least float32; the answer comes in the state's dtype."""
    sde = VPSDE()
    law = GaussianModel(sde)
    network = GaussianNetwork(law, predicts, network_dtype).to(device)
    model = Denoiser(network, sde, predicts)
    x = state(sde, 0.4, dtype=x_dtype).to(device)
    each = torch.full((3,), 0.4, device=device, dtype=torch.float64)
    for t in (0.4, torch.tensor(0.4, device=device), each):
        found = model(x, t)
        assert found.dtype == x_dtype and found.shape == x.shape and found.device.type == device.type
        inputs, time = network.seen[-1]
        assert inputs.dtype == network_dtype
        assert time.dtype == (torch.float64 if network_dtype == torch.float64 else torch.float32)
        assert time.shape == (3,) and time.device.type == device.type
    coarse = max(torch.finfo(network_dtype).eps, torch.finfo(x_dtype).eps)
    torch.testing.assert_close(found.double(), law(x.double(), 0.4), rtol=0, atol=40 * coarse)
    assert model.dtype == network_dtype and model.device.type == device.type


@over_predictions
@over_sdes
def test_rows_are_forward(predicts, sde) -> None:
    """D(x, t_k) = a_k x + b_k evaluate(x, k), for the same numbers."""
    model = Denoiser(GaussianNetwork(GaussianModel(sde), predicts), sde, predicts)
    times = f64(0.9, 0.6, 0.3, 0.1)
    x = state(sde, 0.5)
    rows = model.rows(times, x)
    assert all(isinstance(number, float) for number in (*rows.a, *rows.b)) and len(rows.a) == len(rows.b) == 4
    for k, t in enumerate(times):
        known = model(x, t)
        size = float((abs(rows.a[k]) * x.abs() + (rows.b[k] * rows.evaluate(x, k)).abs()).max())
        close(from_rows(model, x, times, k), known, atol=8 * EPS * size)
        close(rows.evaluate(x, k), model.raw(x, t), rtol=1e-14)


def test_a_state_that_needs_no_change_is_not_copied() -> None:
    x = torch.ones(2, 1, dtype=torch.float64)
    for predicts, same in ((DATA, True), (Karras(), False)):
        model = Denoiser(Recorder().double(), VPSDE(), predicts)
        model.rows(f64(0.5, 0.2), x).evaluate(x, 1)
        assert (model.network.seen[-1][0] is x) == same


def test_rows_of_a_denoiser_without_a_network() -> None:
    law = GaussianModel(VPSDE())
    x, times = state(law.sde, 0.5), f64(0.9, 0.1)
    for model in (law, law.given(shift=0.25)):
        for k in range(2):
            close(from_rows(model, x, times, k), model(x, times[k]), rtol=0, atol=0)
        assert model.rows(times, x).a == [0.0, 0.0] and model.rows(times, x).b == [1.0, 1.0]


# Conditions


def test_conditions_reach_the_network() -> None:
    sde, x, label = VPSDE(), torch.zeros(2, 1, dtype=torch.float64), torch.tensor([1, 2])
    model = watched(sde, "t")
    given = model.given(label=label, scale=2.0)
    assert model.given() is model
    assert given.sde is sde and given.dtype == torch.float64 and given.device == model.device
    for method in (given, given.noise, given.score, given.velocity, given.flow):
        method(x, 0.5)
    given.rows(f64(0.5), x).evaluate(x, 0)
    model.rows(f64(0.5), x, label=label, scale=2.0).evaluate(x, 0)
    for method in (model, model.noise, model.raw):
        method(x, 0.5, label=label, scale=2.0)
    assert len(model.network.seen) == 10
    assert all(cond == {"label": label, "scale": 2.0} for *_, cond in model.network.seen)
    given(x, 0.5, scale=3.0)  # what the call says goes before
    given.noise(x, 0.5, scale=3.0)
    given.given(scale=3.0)(x, 0.5)
    assert all(cond == {"label": label, "scale": 3.0} for *_, cond in model.network.seen[-3:])


class Half:
    """Knows itself what some rows of it are."""

    def narrowed(self, rows, batch):
        return ("half", rows, batch)


def test_conditions_are_cut_with_the_batch() -> None:
    """Tensors with one entry a sample, and what can cut itself; all else stays whole."""
    rows, number = torch.tensor([2, 0]), torch.tensor(7.0)
    label, wide_, other = torch.arange(3), torch.arange(6.0).view(3, 2), torch.arange(2)
    assert some_rows(label, rows, 3).tolist() == [2, 0]
    assert some_rows(wide_, slice(1, 2), 3).tolist() == [[2.0, 3.0]]
    assert some_rows(number, rows, 1) is number and some_rows(other, rows, 3) is other
    assert some_rows(Half(), rows, 3) == ("half", rows, 3) and some_rows("word", rows, 3) == "word"
    model = watched(VPSDE(), "t")
    assert model.narrowed(rows, 3) is model
    model.given(label=label, scale=2.0).given(other=other).narrowed(rows, 3)(torch.zeros(2, 1), 0.5)
    cond = model.network.seen[-1][2]
    assert cond["label"].tolist() == [2, 0] and cond["scale"] == 2.0 and cond["other"] is other


class Two(NamedTuple):
    """As many fields as a batch of two has samples."""

    place: torch.Tensor
    word: str


def test_lists_and_parts_of_mappings_are_cut_with_the_batch() -> None:
    rows, x, half = torch.tensor([2, 0]), torch.arange(6.0).view(3, 2), torch.arange(2)
    assert some_rows(["a", "b", "c"], rows, 3) == ["c", "a"]
    assert some_rows(("a", "b", "c"), slice(1, 3), 3) == ("b", "c")
    assert some_rows(np.array(["a", "b", "c"]), rows, 3).tolist() == ["c", "a"]
    assert some_rows(["a", "b"], rows, 3) == ["a", "b"] and some_rows("abc", rows, 3) == "abc"
    assert some_rows(np.array(1.0), rows, 1) == 1.0
    cut = some_rows({"at": x, "words": ["a", "b", "c"], "in": {"half": half, "n": 3}}, rows, 3)
    assert cut["at"].tolist() == [[4.0, 5.0], [0.0, 1.0]] and cut["words"] == ["c", "a"]
    assert cut["in"]["half"] is half and cut["in"]["n"] == 3
    levels = some_rows([x, half], rows, 3)
    assert torch.equal(levels[0], x[rows]) and levels[1] is half
    pair = some_rows(Two(torch.arange(2), "word"), slice(1, 2), 2)
    assert isinstance(pair, Two) and pair.place.tolist() == [1] and pair.word == "word"
    assert some_rows([Half()], rows, 3) == [("half", rows, 3)]


PLACES = {"here": [1.0, -1.0], "there": [30.0, 4.0], "far": [-0.2, 500.0]}


class Worded(BaseDenoiser):
    """Exact for N(m, 0.3) in two dimensions, m being the word's, moved by a nested condition."""

    def __init__(self) -> None:
        super().__init__()
        self.sde = VPSDE()

    def forward(self, x, t, words, inside):
        assert len(words) == len(inside["moves"]) == len(x)
        mean = torch.tensor([PLACES[word] for word in words]).to(x) + inside["moves"].to(x)
        alpha, sigma = like(self.sde.alpha(t), x), like(self.sde.sigma(t), x)
        return mean + alpha * 0.3 / (alpha**2 * 0.3 + sigma**2) * (x - alpha * mean)


@pytest.mark.parametrize("container", [list, tuple])
def test_conditions_of_samples_that_leave_the_batch(container, unchecked) -> None:
    """A sample has what it has alone, whoever runs beside it."""
    model, words = Worded(), container(["here", "far", "there"])
    moves = torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    chosen = (solvers.adaptive_ode(), solvers.adaptive_sde(), solvers.scipy_ode(per_sample=True))
    for solver in chosen:
        cond = {"words": words, "inside": {"moves": moves}}
        whole = sample(model, (3, 2), solver, condition=cond, dtype=torch.float64)
        assert whole.status == "ok" and whole.evaluations is not None
        assert len(set(whole.evaluations.tolist())) > 1  # so they leave one after another
        for i, word in enumerate(words):
            cond = {"words": [word], "inside": {"moves": moves[i : i + 1]}}
            alone = sample(model, (1, 2), solver, condition=cond, dtype=torch.float64, ids=[i])
            assert torch.equal(whole.x[i], alone.x[0])


def test_densities_with_conditions_of_samples_that_leave_the_batch() -> None:
    model, words = Worded(), ["here", "far", "there"]
    moves = torch.zeros(3, 2)
    x = torch.tensor([[1.2, -1.0], [-0.2, 500.5], [30.0, 4.9]], dtype=torch.float64)
    found = likelihood.log_prob(model, x, condition={"words": words, "inside": {"moves": moves}})
    assert found.status == "ok" and len(set(found.evaluations.tolist())) > 1
    mean = torch.tensor([PLACES[word] for word in words], dtype=torch.float64)
    t = model.sde.default_end
    alpha, variance = model.sde.alpha(t), model.sde.alpha(t) ** 2 * 0.3 + model.sde.sigma(t) ** 2
    exact = -0.5 * ((x - alpha * mean) ** 2 / variance + (2 * math.pi * variance).log()).sum(1)
    # corrected, since data at 500 are seen even at t_max
    torch.testing.assert_close(found.corrected, exact, rtol=0, atol=0.02)


def test_conditioned_views_are_those_of_the_model() -> None:
    """Through a network that predicts noise, not through D: at the noisy end that keeps the digits."""
    sde = VPSDE()
    model = Denoiser(GaussianNetwork(GaussianModel(sde), NOISE), sde, NOISE)
    x = state(sde, 1.0)
    assert model.given(shift=0.5).noise(x, 1.0).equal(model.noise(x, 1.0, shift=0.5))
    close(model.given(shift=0.5).noise(x, 1.0), model.raw(x, 1.0) + 0.5)
    law = GaussianModel(sde)
    close(law.given(shift=0.5)(x, 1.0), law(x, 1.0) + 0.5)
    close(law.given(shift=0.5).score(x, 0.5), law.score(x, 0.5, shift=0.5), rtol=0)


# Batches and errors


@over_predictions
def test_times_of_a_batch(predicts) -> None:
    sde = VPSDE()
    model = Denoiser(GaussianNetwork(GaussianModel(sde), predicts), sde, predicts)
    x, t = state(sde, 0.5), f64(0.1, 0.5, 0.9)
    whole = model(x, t)
    for row in range(3):
        assert whole[row].equal(model(x[row : row + 1], t[row])[0])
        assert whole[row].equal(model(x, t[row])[row])
    assert model(x, t[:1]).equal(model(x, t[0]))
    assert model(x[:0], t[:0]).shape == (0, 2)  # FAULTS E4
    image = x[:, :, None, None].expand(3, 2, 4, 5)
    assert model(image, t)[..., 1, 2].equal(whole)
    with pytest.raises(ValueError, match=r"expected times of shape \(\) or \(3,\), found \(2,\)"):
        model(x, t[:2])


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (3,), (5, 3, 2), ()])
def test_networks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:  # FAULTS E1
    class Wrong(nn.Module):
        def forward(self, inputs, time):
            return torch.zeros(shape)

    with pytest.raises(ValueError, match=r"expected the model to return its input's \(3, 2\), found \("):
        Denoiser(Wrong(), VPSDE())(torch.zeros(3, 2), 0.5)


def test_networks_that_return_no_tensor_are_refused() -> None:
    class Pair(nn.Module):
        def forward(self, inputs, time):
            return inputs, time

    with pytest.raises(ValueError, match="found tuple"):
        Denoiser(Pair(), VPSDE())(torch.zeros(3, 2), 0.5)


def test_networks_and_processes_are_told_from_other_things(unchecked) -> None:
    for wrong in ((3.0, VPSDE()), (Same(), 3.0), (Same(), VPSDE)):
        with pytest.raises(TypeError, match="expected a network and an SDE, found"):
            Denoiser(*wrong)
    with pytest.raises(TypeError, match="sigma_data: expected a number, found 'one'"):
        Karras("one")  # pyright: ignore[reportArgumentType]


def test_words() -> None:
    with pytest.raises(ValueError, match=r"expected predicts in \['data', .* or Karras\(.*, found 'epsilon'"):
        Denoiser(Same(), VPSDE(), "epsilon")
    with pytest.raises(ValueError, match=r"expected time_input .*\['index', 'log_snr', 't'\], found 'label'"):
        Denoiser(Same(), VPSDE(), "noise", "label")
    model = Denoiser(Same(), VPSDE(), "score")
    assert model.predicts is SCORE
    assert "predicts=score, time_input='t'" in repr(model) and "Linear" in repr(model)


def test_device_and_dtype_of_denoisers() -> None:
    law = GaussianModel(VPSDE())
    assert law.device == torch.device("cpu") and law.dtype == torch.get_default_dtype()
    law.register_buffer("count", torch.zeros((), dtype=torch.int64))
    law.register_buffer("mean_", torch.zeros((), dtype=torch.float16))
    assert law.dtype == torch.float16  # the first floating one
    assert Denoiser(nn.Linear(1, 1, dtype=torch.bfloat16), VPSDE()).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError):
        BaseDenoiser()(torch.zeros(1), 0.5)


def test_gradients_flow_through() -> None:
    sde = VPSDE()
    network = nn.Linear(2, 2, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, inputs, time):
            return self.inner(inputs)

    model = Denoiser(Net(), sde, "velocity")
    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    model(x, 0.5).sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    assert network.weight.grad is not None and network.weight.grad.abs().min() > 0


def test_learned_schedules_get_gradients_through_the_denoiser() -> None:
    schedule = Learned(hidden=3)
    model = Denoiser(Same(), VPSDE(schedule=schedule), "velocity")
    model(torch.ones(2, 1), 0.5).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in schedule.parameters())
    assert len(model.rows(f64(0.5), torch.ones(2, 1)).a) == 1


def test_edm_denoiser_is_the_papers() -> None:
    """D = c_skip x + c_out F(c_in x; c_noise) written out for sigma = 3, sigma_data = 0.5 and F(u) = 2 u."""

    class Double(nn.Module):
        def forward(self, inputs, time):
            return 2 * inputs

    model = wide(Denoiser(Double(), EDM(), Karras(0.5)))
    x = f64(1.7)[:, None]
    close(model(x, 3.0), 0.25 / 9.25 * x + 1.5 / 9.25**0.5 * 2 * x / 9.25**0.5)
