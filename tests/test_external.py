"""Solvers of scipy and torchsde behind our interface: their numbers, cost, and the promises kept."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch
import torchsde
from torch import Tensor

from scoresde import decode, encode, grids, sample, solvers
from scoresde.denoiser import BaseDenoiser
from scoresde.grids import Grid
from scoresde.laws import ExactDenoiser, Gaussian, Mixture
from scoresde.noise import BrownianPath, Noise
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE
from scoresde.solvers.base import Card
from scoresde.solvers.external import SCIPY, TORCHSDE, scipy_ode, torchsde_solver
from scoresde.solvers.external_ode import Calls
from scoresde.solvers.external_sde import PathIncrements, ReverseTime, StepNoise

F64, EPS = torch.float64, float(np.finfo(float).eps)
VP = VPSDE()
EXPLICIT = ("RK23", "RK45", "DOP853", "LSODA")
# network calls for 100 steps
CALLS = {
    "euler": 100, "milstein": 100, "srk": 200, "euler_heun": 100,
    "heun": 200, "midpoint": 200, "log_ode": 200, "reversible_heun": 101,
}  # fmt: skip


def gaussian(mean: float = 2.0, variance: float = 0.25) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=F64), variance)


class Affine(BaseDenoiser):
    """The exact denoiser of a Gaussian with diagonal covariance, without ceremony: many calls are made
    here."""

    def __init__(self, law, sde):
        super().__init__()
        self.sde, self.mean, self.spread = sde, law.mean, law.variance

    def _v(self, t):
        return float(self.sde.alpha(t)), float(self.sde.alpha(t)) ** 2 * self.spread + float(
            self.sde.sigma(t)
        ) ** 2

    def forward(self, x, t):
        alpha, v = self._v(t)
        return (self.mean + alpha * self.spread / v * (x - alpha * self.mean)).to(x)

    def score(self, x, t):
        alpha, v = self._v(t)
        return ((alpha * self.mean - x) / v).to(x)


class Watched(Affine):
    """Keeps the times and batch sizes of its calls; scores are NaN once `good` calls were made."""

    def __init__(self, law, sde, good=math.inf):
        super().__init__(law, sde)
        self.good, self.times, self.batches = good, [], []

    def _seen(self, out, t):
        self.times.append(float(t))
        self.batches.append(len(out))
        return out if len(self.times) <= self.good else out * math.nan

    def forward(self, x, t):
        return self._seen(super().forward(x, t), t)

    def score(self, x, t):
        return self._seen(super().score(x, t), t)


class Shifted(ExactDenoiser):
    """Data moved by a condition: one number for each sample."""

    def forward(self, x, t, *, by):
        return super().forward(x - like_alpha(self.sde, t) * by[:, None], t) + by[:, None]

    def score(self, x, t, *, by):
        return super().score(x - like_alpha(self.sde, t) * by[:, None], t)

    def as_view(self, target, x, t, **cond):
        return self.score(x, t, **cond)


def like_alpha(sde, t):
    return float(sde.alpha(t))


def flow(law: Gaussian, sde: LinearSDE, x: Tensor, s: float, t: float) -> Tensor:
    """The exact probability flow of a Gaussian with diagonal covariance: standardised coordinates are
    kept."""
    (a, b), (c, d) = ((m.mean, m.variance.sqrt()) for m in (law.marginal(sde, s), law.marginal(sde, t)))
    return c + d * (x - a) / b


# --- scipy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SCIPY)
def test_scipy_follows_the_exact_flow(method):
    law = Gaussian(torch.tensor([[0.7, -1.0]], dtype=F64), torch.tensor([[0.1, 0.9]], dtype=F64))
    noise = Noise.of(0, batch=3, dtype=F64)
    for sde in (VP, EDM()) if method in EXPLICIT else (VP,):
        x, grid = noise.prior((3, 1, 2)) * sde.prior_std, grids.uniform(sde, 2, sde.default_end)
        model = Watched(law, sde)
        out = scipy_ode(method).solve(model, x, grid)
        truth = flow(law, sde, x, sde.t_max, sde.default_end)
        assert out.status == "ok" and out.end == sde.default_end
        assert out.network_calls == len(model.times) and set(model.batches) == {3}
        assert float((out.x - truth).abs().max()) < (2e-3 if method in ("BDF", "LSODA") else 2e-4)


def test_tighter_is_closer(unchecked):
    law, x = gaussian(), Noise.of(0, batch=3, dtype=F64).prior((3, 1))
    grid, model = grids.uniform(VP, 1), Affine(gaussian(), VP)
    errors, calls = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        out = scipy_ode("DOP853", tolerance, tolerance).solve(model, x, grid)
        errors.append(float((out.x - flow(law, VP, x, 1.0, 1e-3)).abs().max()))
        calls.append(out.network_calls)
    assert all(a > 3 * b for a, b in pairwise(errors)) and errors[-1] < 1e-8
    assert sorted(calls) == calls


@pytest.mark.parametrize("method", ["RK45", "DOP853", "LSODA"])
def test_it_is_scipy_on_a_mixture(method):
    """Equal to solve_ivp on a field written down here in numpy, calls included."""
    weights, means, variance = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), 0.1

    def velocity(t, x):
        B = 0.1 * t + 9.95 * t**2
        alpha, beta = np.exp(-B / 2), 0.1 + 19.9 * t
        v = alpha**2 * variance + 1 - alpha**2
        logits = np.log(weights) - (x[:, None] - alpha * means) ** 2 / (2 * v)
        r = np.exp(logits - logits.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        return -beta / 2 * x + beta / 2 * (r * (x[:, None] - alpha * means)).sum(1) / v

    model = Mixture(weights.tolist(), torch.from_numpy(means), variance).denoiser(VP)
    x = Noise.of(0, batch=20, dtype=F64).prior((20, 1))
    theirs = scipy.integrate.solve_ivp(
        velocity, (1.0, 1e-3), x[:, 0].numpy(), method=method, rtol=1e-4, atol=1e-6
    )
    ours = scipy_ode(method, 1e-4, 1e-6).solve(model, x, grids.uniform(VP, 7))
    assert np.abs(ours.x[:, 0].numpy() - theirs.y[:, -1]).max() < 1e-9
    assert ours.network_calls == theirs.nfev


def test_encoding_is_undone_by_decoding(unchecked):
    law, x = gaussian(), torch.tensor([[1.2], [2.9]], dtype=F64)
    model, solver = Affine(law, VP), scipy_ode("DOP853", 1e-9, 1e-9)
    latent = encode(model, x, solver, steps=3)
    torch.testing.assert_close(latent.x, flow(law, VP, x, 1e-3, 1.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(decode(model, latent, solver, steps=3).x, x, rtol=0, atol=1e-6)
    assert latent.end == 1.0


@pytest.mark.parametrize("sde", [VP, SubVPSDE(), VESDE(), EDM(), Rectified()], ids=repr)
def test_scipy_to_the_data(sde, unchecked):
    """To t = 0 the run stops at the default end and returns D; rectified flow starts without signal."""
    law = gaussian()
    x, model = sde.prior_std * Noise.of(0, batch=3, dtype=F64).prior((3, 1)), law.denoiser(sde)
    out = scipy_ode("DOP853", rtol=1e-8, atol=1e-8).solve(model, x, torch.tensor([sde.t_max, 0.0], dtype=F64))
    noiseless = float(sde.sigma(0.0)) == 0
    arrived = flow(law, sde, x, sde.t_max, sde.default_end if noiseless else 0.0)
    expected = model(arrived, sde.default_end) if noiseless else arrived
    torch.testing.assert_close(out.x, expected, rtol=0, atol=2e-6)
    assert out.end == 0 and out.status == "ok"


@pytest.mark.parametrize("method", SCIPY)
@pytest.mark.parametrize("good", [0, 1, 7])
def test_scipy_ends_at_nan(method, good):
    """scipy by itself never returns when the first slope is NaN."""
    model, x = Watched(gaussian(), VP, good), Noise.of(0, batch=2, dtype=F64).prior((2, 1))
    out = scipy_ode(method).solve(model, x, grids.uniform(VP, 1))
    assert out.status == "network returned NaN or Inf" and out.network_calls == good + 1 == len(model.times)
    assert bool(out.x.isfinite().all()) and (good > 1 or torch.equal(out.x, x))


@pytest.mark.parametrize("method", SCIPY)
@pytest.mark.parametrize("limit", [1, 2, 20])
def test_scipy_stops_at_the_limit(method, limit):
    model, x = Watched(gaussian(), VP), Noise.of(0, batch=2, dtype=F64).prior((2, 1))
    out = scipy_ode(method, 1e-9, 1e-9, max_calls=limit).solve(model, x, grids.uniform(VP, 1))
    assert out.status == "call limit reached" and out.network_calls == limit == len(model.times)
    assert bool(out.x.isfinite().all())


def test_a_network_that_returns_noise_ends_too():
    class Noisy(ExactDenoiser):
        def score(self, x, t):
            return torch.randn_like(x) * 1e3

    out = sample(Noisy(gaussian(), VP), (2, 1), scipy_ode(max_calls=500))
    assert out.status in ("call limit reached", "step underflow") and out.network_calls <= 500


def test_a_step_that_underflows_is_told(unchecked):
    """A slope that changes its sign at every call, after the third node: no step there is small enough."""

    class Jumps(Watched):
        def score(self, x, t):
            out = super().score(x, t)
            return out if float(t) > 0.5 else torch.full_like(out, 1e12 * (-1) ** len(self.times))

    model, x = Jumps(gaussian(), VP), torch.ones(2, 1, dtype=F64)
    for method in ("RK45", "DOP853"):
        model.times.clear()
        grid = torch.tensor([1.0, 0.8, 0.6, 0.1, 1e-3], dtype=F64)
        out = scipy_ode(method).solve(model, x, grid, callback=lambda s: s.t)
        assert out.status == "step underflow" and bool(out.x.isfinite().all())
        assert out.path == (1.0, 0.8, 0.6) and out.network_calls == len(model.times) < 2000
        at_once = scipy_ode(method).solve(model, x, grid[3:], callback=lambda s: s.t)
        assert at_once.status == "step underflow" and at_once.path == () and torch.equal(at_once.x, x)


def test_dense_output_of_several_runs_ends_with_the_first_of_them(unchecked):
    """One sample meets NaN below t = 0.5; and the last node is seen where the run stops there itself."""

    class Bad(ExactDenoiser):
        def as_view(self, target, x, t, *, bad):
            return self.score(x, t, bad=bad)

        def forward(self, x, t, *, bad):
            return super().forward(x, t)

        def score(self, x, t, *, bad):
            return torch.where(bad[:, None] & (float(t) < 0.5), math.nan, super().score(x, t))

    x, bad = torch.ones(2, 1, dtype=F64), torch.tensor([False, True])
    model, grid = Bad(gaussian(), VP), torch.tensor([1.0, 0.9, 0.8, 0.3, 0.2, 0.1], dtype=F64)
    solver = scipy_ode(per_sample=True)
    out = solver.solve(model.given(bad=bad), x, grid, callback=lambda s: s.t)
    assert out.status == ("ok", "network returned NaN or Inf") and out.path == (1.0, 0.9, 0.8)
    assert solver.solve(model.given(bad=bad[:0]), x[:0], grid, callback=lambda s: s.t).path == ()
    ends = torch.tensor([1.0, 1e-3, 0.0], dtype=F64)
    out = scipy_ode().solve(Affine(gaussian(), VP), x, ends, callback=lambda s: s.t)
    assert out.path == (1.0, 1e-3)


def test_callbacks_may_keep_nothing(unchecked):
    noise = Noise.of(0, batch=2, dtype=F64)
    for solver in (scipy_ode(), torchsde_solver(), torchsde_solver("heun", True, 0.1, 0.1)):
        grid = torch.tensor([0.5, 0.45, 0.4], dtype=F64)
        seen = []
        out = solver.solve(
            Affine(gaussian(), VP),
            noise.prior((2, 1)),
            grid,
            noise=noise,
            callback=lambda s, seen=seen: seen.append(s.t),
        )
        assert out.path == () and seen in ([0.5, 0.45], [0.5])


def test_samples_one_by_one(unchecked):
    """With per_sample a sample is the same alone and in company; without, it is not. Conditions are split."""
    model = Affine(gaussian(), VP)
    options = {"steps": 2, "seed": 3}
    alone = sample(model, (1, 1), scipy_ode(), ids=[2], **options)
    together = sample(model, (4, 1), scipy_ode(per_sample=True), **options)
    assert torch.equal(together.x[2:3], alone.x)
    coupled = sample(model, (4, 1), scipy_ode(), **options)
    assert 0 < float((coupled.x[2:3] - alone.x).abs().max()) < 1e-3
    counts = [sample(model, (1, 1), scipy_ode(), ids=[i], **options).network_calls for i in range(4)]
    assert together.network_calls == sum(counts) and together.evaluations.tolist() == counts
    assert coupled.evaluations.tolist() == [coupled.network_calls] * 4
    short = sample(model, (4, 1), scipy_ode(per_sample=True, max_calls=max(counts) - 1), **options)
    expected = tuple("ok" if count < max(counts) else "call limit reached" for count in counts)
    assert short.status == (expected if len(set(expected)) > 1 else expected[0])
    by = torch.tensor([0.0, 5.0, -3.0], dtype=F64)
    moved = sample(
        Shifted(gaussian(), VP),
        (3, 1),
        scipy_ode(rtol=1e-8, atol=1e-8, per_sample=True),
        condition={"by": by},
    )
    still = sample(gaussian().denoiser(VP), (3, 1), scipy_ode(rtol=1e-8, atol=1e-8))
    gap = moved.x[:, 0] - still.x[:, 0] - by * float(VP.alpha(1e-3))
    spread = float(gaussian().marginal(VP, 1e-3).variance.sqrt()) * float(VP.alpha(1.0))
    torch.testing.assert_close(
        gap, -by * spread, rtol=0, atol=1e-6
    )  # the prior is not the marginal of moved data


@pytest.mark.parametrize(
    "solver",
    [scipy_ode(per_sample=True), torchsde_solver("heun", True, 0.2, 0.2, per_sample=True)],
    ids=["scipy", "torchsde"],
)
def test_samples_one_by_one_whose_outputs_share_a_tensor(solver, unchecked):
    """A compiled denoiser may write every output where the last one was."""

    class Reusing(Affine):
        out = torch.empty(1, 1, dtype=F64)

        def forward(self, x, t):
            return self.out.copy_(super().forward(x, t))

    one, other = (
        sample(model, (3, 1), solver, steps=4, end=0.0, dtype=F64).x
        for model in (Affine(gaussian(), EDM()), Reusing(gaussian(), EDM()))
    )
    assert torch.equal(one, other) and len(other.unique()) == 3


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_callback_sees_the_dense_output(per_sample):
    law = gaussian()
    model, grid = Watched(law, VP), grids.uniform(VP, 5)
    x = Noise.of(0, batch=2, dtype=F64).prior((2, 1))
    seen = []
    out = scipy_ode("DOP853", 1e-8, 1e-8, per_sample=per_sample).solve(
        model, x, grid, callback=lambda s: seen.append(s) or s.t
    )
    assert out.path == tuple(grid.t[:-1].tolist()) and [s.k for s in seen] == list(range(5))
    assert out.network_calls == len(model.times)
    for step in seen:
        truth = flow(law, VP, x, 1.0, step.t)
        torch.testing.assert_close(step.x, truth, rtol=0, atol=1e-5)
        torch.testing.assert_close(step.denoised, law.denoiser(VP)(step.x, step.t))
    assert torch.equal(seen[0].x, x)
    cut = scipy_ode("DOP853", 1e-8, 1e-8, max_calls=60).solve(model, x, grid, callback=lambda s: s.t)
    assert cut.status == "call limit reached" and 0 < len(cut.path) < 5
    to_data = scipy_ode().solve(
        model, x, torch.tensor([1.0, 0.5, 5e-4, 0.0], dtype=F64), callback=lambda s: s.t
    )
    assert to_data.path == (1.0, 0.5)  # it was never at 5e-4


def test_scipy_gives_the_network_what_it_is_used_to(device):
    """float32 in and out, the batch's shape, no gradients."""
    law = Gaussian(torch.zeros(3, 2, 2), 0.3)
    model = law.denoiser(VP).to(torch.float32).to(device)
    out = sample(model, (4, 3, 2, 2), scipy_ode())
    assert out.x.dtype == torch.float32 and out.x.shape == (4, 3, 2, 2) and out.x.device.type == device.type
    assert not out.x.requires_grad
    double = sample(model, (4, 3, 2, 2), scipy_ode(), dtype=F64)
    assert float((out.x.double() - double.x).abs().max()) < 1e-3
    empty = sample(model, (0, 3, 2, 2), scipy_ode())
    assert empty.x.shape == (0, 3, 2, 2) and empty.network_calls == 0 and empty.status == "ok"


# --- torchsde: fixed steps ----------------------------------------------------------------------------------


def units(rows: int):
    """A batch that reads off affine maps: sample 0 starts at 0, sample 1 at 1, sample 2 + k has noise row k
    equal to 1."""
    start = torch.zeros(rows + 2, 1, dtype=F64)
    start[1] = 1

    def noise(k: int, shape: Sequence[int]) -> Tensor:
        z = torch.zeros(*shape, dtype=F64)
        z[2 + k] = 1
        return z

    return start, noise


def _law(method: str, law: Gaussian, sde: LinearSDE, grid: Grid) -> tuple[float, float]:
    """The exact output law on Gaussian data, from the exact marginal at the start."""
    start, noise = units(2 * len(grid))
    out = torchsde_solver(method).solve(Affine(law, sde), start, grid, noise=noise).x[:, 0]
    prior, slopes = law.marginal(sde, grid.t[0]), out[1:] - out[0]
    mean = out[0] + slopes[0] * prior.mean
    return float(mean), float(slopes[0] ** 2 * prior.variance + slopes[1:].square().sum())


@pytest.mark.parametrize("method", TORCHSDE)
def test_the_exact_law_converges_with_the_declared_order(method, unchecked):
    law, errors = gaussian(0.7), []
    for steps in (20, 40, 80):
        grid = grids.uniform(VP, steps, 0.1)
        grid = Grid.of(VP, torch.cat([grid.t[grid.t < 0.7], torch.tensor([0.1 - 0.3 / steps])]))
        truth = law.marginal(VP, grid.t[-1])
        mean, variance = _law(method, law, VP, grid)
        errors.append(math.hypot(mean - float(truth.mean), variance - float(truth.variance)))
    order = math.log2(errors[-2] / errors[-1])
    expected = 2 if method in ("midpoint", "log_ode") else torchsde_solver(method).card.weak_order
    assert abs(order - expected) < 0.2, (order, errors)


def _means(method: str, h: float, steps: int) -> float:
    """E[x] after one or two steps on a mixture, over the normals by Gauss-Hermite quadrature."""
    model = Mixture([0.3, 0.7], torch.tensor([-1.0, 0.8], dtype=F64), 0.1).denoiser(VP)
    nodes, weights = np.polynomial.hermite_e.hermegauss(14)
    rows = (0, 1) if steps == 1 else (0, 1, 2, 3)
    grids_ = np.meshgrid(*[nodes] * 2), np.meshgrid(*[weights / weights.sum()] * 2)
    z, w = ([torch.from_numpy(v.ravel())[:, None] for v in part] for part in grids_)
    start = torch.full((len(w[0]), 1), 0.1, dtype=F64)
    grid = torch.tensor([0.4 - k * h for k in range(steps + 1)], dtype=F64)
    out = torchsde_solver(method).solve(model, start, grid, noise=lambda k, shape: z[rows.index(k)]).x
    return float((out * w[0] * w[1]).sum())


@pytest.mark.parametrize("method", TORCHSDE)
def test_the_declared_weak_order_on_data_that_are_not_gaussian(method, unchecked):
    """The mean after one step (two, to see reversible_heun's own state) differs from that of a second-order
    method by
    O(h^3) if the weak order is 2, and by O(h^2) if it is 1."""
    steps, reference = (
        (2, "heun") if method == "reversible_heun" else (1, "heun" if method == "srk" else "srk")
    )
    gaps = [abs(_means(method, h, steps) - _means(reference, h, steps)) for h in (0.002, 0.001)]
    order, declared = math.log2(gaps[0] / gaps[1]) - 1, torchsde_solver(method).card.weak_order
    assert order > declared - 0.25 and (declared == 2 or order < declared + 0.25), gaps


@pytest.mark.parametrize("method", TORCHSDE)
def test_calls_and_law_of_a_hundred_steps(method, alpha_ledger, unchecked):
    """N(2, 0.25), 4000 samples: exact law of 100 steps within 0.02 of the truth, sample mean and deviation
    within 6.5
    standard errors of that law."""
    model, grid = Watched(gaussian(), VP), grids.uniform(VP, 100)
    out = sample(model, (4000, 1), torchsde_solver(method), grid=grid, seed=1)
    assert out.network_calls == CALLS[method] == len(model.times)
    assert torchsde_solver(method).steps_for(CALLS[method]) == 100
    assert torchsde_solver(method).steps_for(CALLS[method] + (1 if CALLS[method] == 200 else 0)) == 100
    mean, variance = _law(method, gaussian(), VP, grid)
    assert abs(mean - 2) < 0.02 and abs(math.sqrt(variance) - 0.5) < 0.02
    alpha_ledger.spend(3.3e-10, f"torchsde {method}")
    n, std = 4000, math.sqrt(variance)
    assert (
        abs(float(out.x.mean()) - mean) < 6.5 * std / math.sqrt(n) + 1e-3
    )  # the start is N(0, 1), not the marginal
    assert abs(float(out.x.std()) - std) < 6.5 * std / math.sqrt(2 * n) + 1e-3


def test_what_torchsde_costs_by_itself():
    """Its default, srk in the form for diagonal noise: ten calls a step and one for the shapes."""
    model = Watched(gaussian(), VP)
    x, clock = torch.zeros(2, 1, dtype=F64), torch.linspace(0, 0.999, 11, dtype=F64)
    torchsde.sdeint(VP.reverse(model, (1,)), x, clock, dt=float(clock[1]), method="srk")
    assert len(model.times) >= 101
    assert sample(model, (2, 1), torchsde_solver("srk"), steps=10).network_calls == 20


@pytest.mark.parametrize("sde", [VP, VESDE(), EDM(), SubVPSDE()], ids=repr)
def test_euler_and_milstein_are_our_euler_maruyama(sde, device, state_dtype):
    model = Gaussian(torch.full((3, 2, 2), 0.4, dtype=F64), 0.3).denoiser(sde).to(device)
    options = {"steps": 12, "seed": 5, "dtype": state_dtype}
    ours = sample(model, (3, 3, 2, 2), solvers.euler_maruyama(), **options)
    scale = float(ours.x.abs().max())
    for method in ("euler", "milstein"):
        theirs = sample(model, (3, 3, 2, 2), torchsde_solver(method), **options)
        assert float((ours.x - theirs.x).abs().max()) < 2e4 * torch.finfo(state_dtype).eps * scale
        assert theirs.network_calls == ours.network_calls and theirs.x.dtype == state_dtype


def _drift(model: ExactDenoiser, x: Tensor, t: float) -> Tensor:
    """The reverse SDE's drift for a positive dt, in the VP case."""
    return float(VP.beta(t)) * (x / 2 + model.score(x, t))


@pytest.mark.parametrize("method", TORCHSDE)
def test_each_method_is_the_textbook_s(method):
    """One step and another, by formulas for additive noise: `x + h f + g dW` and its kin."""
    model, grid = gaussian().denoiser(VP), Grid.of(VP, torch.tensor([0.8, 0.65, 0.4], dtype=F64))
    noise = Noise.of(4, batch=3, dtype=F64)
    x = noise.prior((3, 1))
    out = torchsde_solver(method).solve(model, x, grid, noise=noise).x
    y, z, slope = x, x, _drift(model, x, 0.8)
    for k in range(2):
        s, t = float(grid.t[k]), float(grid.t[k + 1])
        h, middle = s - t, (s + t) / 2
        g0, g1, gm, g34 = (math.sqrt(float(VP.beta(r))) for r in (s, t, middle, s - 0.75 * h))
        assert g34 > 0
        W = math.sqrt(h) * noise(k, (3, 1))
        U = h * (W / 2 + math.sqrt(h / 12) * noise(2 + k, (3, 1)))
        f = _drift(model, y, s)
        if method in ("euler", "milstein"):
            y = y + h * f + g0 * W
        elif method == "euler_heun":
            y = y + h * f + (g0 + g1) / 2 * W
        elif method == "heun":
            y = y + h / 2 * (f + _drift(model, y + h * f + g0 * W, t)) + (g0 + g1) / 2 * W
        elif method in ("midpoint", "log_ode"):
            y = y + h * _drift(model, y + h / 2 * f + g0 / 2 * W, middle) + gm * W
        elif method == "reversible_heun":
            z = 2 * y - z + h * slope + g0 * W
            after = _drift(model, z, t)
            y, slope = y + h / 2 * (slope + after) + (g0 + g1) / 2 * W, after
        else:  # Roessler 2010, SRA1
            stage = y + 0.75 * h * f + 1.5 * g1 * U / h
            y = y + h / 3 * f + 2 * h / 3 * _drift(model, stage, s - 0.75 * h) + g1 * (W - U / h) + g0 * U / h
    torch.testing.assert_close(out, y, rtol=1e-12, atol=1e-12)


def test_the_time_integral_has_the_right_law():
    """Var W = h, Cov(W, U) = h^2/2, Var U = h^3/3 for U = int W ds."""
    _, noise = units(4)
    h = 0.3
    W, U = StepNoise(noise, 1, 2, torch.Size((6, 1)), F64)(
        torch.tensor(1.0), torch.tensor(1.0 + h, dtype=F64), return_U=True
    )
    W, U = W[2:, 0], U[2:, 0]
    assert float(W @ W) == pytest.approx(h) and float(W @ U) == pytest.approx(h**2 / 2)
    assert float(U @ U) == pytest.approx(h**3 / 3)
    assert W.nonzero().tolist() == [[1]] and U.nonzero().tolist() == [[1], [3]]
    path = PathIncrements(BrownianPath(Noise.of(0, batch=2, dtype=F64), (2, 3, 2), 0.0, 1.0), F64)
    for increments in (StepNoise(Noise.of(0, batch=2, dtype=F64), 0, 2, torch.Size((2, 3, 2)), F64), path):
        plain = increments(torch.tensor(0.2), torch.tensor(0.5))
        assert plain.shape == (2, 6)
        both = increments(torch.tensor(0.2), torch.tensor(0.5), return_A=True)
        assert torch.equal(both[0], plain) and both[1] is None


@pytest.mark.parametrize("method", TORCHSDE)
@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, F64], ids=str)
def test_the_state_keeps_its_dtype(method, state, unchecked):
    """Whatever the noise has, as with tables."""
    model, grid, x = gaussian().denoiser(VP), grids.quadratic(VP, 3), torch.ones(2, 1, dtype=state)
    chosen = [torchsde_solver(method)]
    chosen += [] if method == "srk" else [torchsde_solver(method, True, 0.3, 0.3)]
    for solver in chosen:
        run = solver.solve(model, x, grid, noise=Noise.of(0, batch=2, dtype=torch.float32))
        assert run.x.dtype == state and run.status == "ok"


@pytest.mark.parametrize("method", ["euler", "srk", "reversible_heun", "heun"])
@pytest.mark.parametrize("name", ["uniform", "karras"])
def test_a_thousand_steps_are_a_thousand_steps(method, name, unchecked):
    """In float32 too, and exactly on the nodes: every node is a time of the network."""
    grid = getattr(grids, name)(VP, 1000 if method == "euler" else 50)
    model = Watched(gaussian(), VP)
    out = sample(model, (1, 1), torchsde_solver(method), grid=grid, dtype=torch.float32)
    per_step = CALLS[method] // 100
    assert out.network_calls == per_step * len(grid) + (method == "reversible_heun")
    nodes = set(grid.t[:-1].tolist())
    assert nodes <= set(model.times) and out.x.dtype == torch.float32
    assert method != "euler" or model.times == grid.t[:-1].tolist()


@pytest.mark.parametrize("method", TORCHSDE)
def test_a_sample_is_a_function_of_seed_and_id(method, device, dtype, state_dtype):
    model = Gaussian(torch.full((2, 3), 0.4, dtype=F64), 0.3).denoiser(VP).to(device, dtype)
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    options = {"steps": 4, "dtype": state_dtype}
    eight = sample(model, (8, 2, 3), torchsde_solver(method), seed=7, **options).x
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[2] == np.random.RandomState(0).get_state()[2]
    np.random.seed(1)
    assert torch.equal(sample(model, (4, 2, 3), torchsde_solver(method), seed=7, **options).x, eight[:4])
    assert torch.equal(
        sample(model, (2, 2, 3), torchsde_solver(method), seed=7, ids=[5, 2], **options).x, eight[[5, 2]]
    )
    high = sample(model, (8, 2, 3), torchsde_solver(method), seed=7 + 2**32, **options).x
    assert float((high - eight).abs().min()) > 0


def test_steps_to_the_data_and_from_little_signal():
    model = gaussian().denoiser(VP)
    for method, calls in CALLS.items():
        grid = Grid.of(VP, torch.tensor([1.0, 0.5, 0.1, 0.0], dtype=F64))
        start = Noise.of(0, batch=2, dtype=F64)
        x = start.prior((2, 1))
        out = torchsde_solver(method).solve(model, x, grid, noise=start)
        # srk takes its second noise from row K + k, K = 3 steps with the last one
        shorter = torchsde_solver(method).solve(
            model,
            x,
            Grid.of(VP, grid.t[:-1]),
            noise=lambda k, shape, start=start: start(k if k < 2 else k + 1, shape),
        )
        torch.testing.assert_close(out.x, model(shorter.x, 0.1))
        assert out.network_calls == shorter.network_calls + 1 == calls // 100 * 2 + 1 + (calls == 101)
    only = torchsde_solver().solve(model, x, torch.tensor([0.5, 0.0], dtype=F64), noise=start)
    assert torch.equal(only.x, model(x, 0.5)) and only.network_calls == 1
    near = sample(
        gaussian().denoiser(Rectified()),
        (2, 1),
        torchsde_solver(),
        grid=torch.linspace(0.99, 0.01, 9, dtype=F64),
    )
    assert bool(near.x.isfinite().all())


def test_a_brownian_path_is_noise_too(unchecked):
    """More steps follow the same path, so fine runs of two methods agree sample by sample."""
    model, x = Affine(gaussian(), VP), torch.tensor([[0.3], [-1.1]], dtype=F64)
    path = BrownianPath(Noise.of(3, batch=2, dtype=F64), (2, 1), -1.0, -0.05)
    ends = {}
    for steps in (40, 160):
        grid = grids.uniform(VP, steps, 0.05)
        for method in ("euler", "heun"):
            ends[method, steps] = torchsde_solver(method).solve(model, x, grid, noise=path.noise(-grid.t)).x
    assert float((ends["heun", 40] - ends["heun", 160]).abs().max()) < 0.02
    assert float((ends["euler", 160] - ends["heun", 160]).abs().max()) < 0.02
    assert float((ends["euler", 40] - ends["heun", 160]).abs().max()) < 0.1
    with pytest.raises(ValueError, match="offset \\+ row"):
        torchsde_solver("srk").solve(model, x, grid, noise=path.noise(-grid.t))


@pytest.mark.parametrize("method", TORCHSDE)
def test_the_callback_before_each_step(method):
    model, grid = Watched(gaussian(), VP), grids.uniform(VP, 6)
    noise, exact = Noise.of(0, batch=2, dtype=F64), gaussian().denoiser(VP)
    x, seen = noise.prior((2, 1)), []
    out = torchsde_solver(method).solve(model, x, grid, noise=noise, callback=lambda s: seen.append(s) or s.t)
    assert out.path == tuple(grid.t[:-1].tolist()) and torch.equal(seen[0].x, x)
    for step in seen:
        torch.testing.assert_close(step.denoised, exact(step.x, step.t), rtol=1e-9, atol=1e-9)
    extra = 5 if method == "reversible_heun" else 0  # it never asks at the state itself
    assert (
        out.network_calls
        == len(model.times)
        == CALLS[method] // 100 * 6 + (method == "reversible_heun") + extra
    )


@pytest.mark.parametrize("method", TORCHSDE)
def test_nan_ends_a_fixed_run_at_once(method):
    model = Watched(gaussian(), VP, good=3)
    with pytest.raises(FloatingPointError, match="at call 4, in the step from t = "):
        sample(model, (2, 1), torchsde_solver(method), steps=10)
    assert len(model.times) == 4


# --- torchsde: adaptive steps -------------------------------------------------------------------------------

ADAPTIVE = [method for method in TORCHSDE if method != "srk"]


@pytest.fixture(scope="module")
def followed():
    """A start, its noise, and where 300 Heun steps take it on the path that adaptive runs take between these
    times."""
    noise = Noise.of(3, batch=4, dtype=F64)
    x, fine = noise.prior((4, 1)), torch.linspace(0.6, 0.05, 301, dtype=F64)
    path = BrownianPath(noise, (4, 1), -0.6, -0.05)
    return noise, x, torchsde_solver("heun").solve(Affine(gaussian(), VP), x, fine, noise=path.noise(-fine)).x


@pytest.mark.parametrize("method", ["euler", "heun", "log_ode", "reversible_heun"])
def test_adaptive_steps_follow_the_path(method, followed, unchecked):
    """Rejected steps keep their noise: the result is that of many fixed steps on the same path, up to the
    tolerance."""
    noise, x, truth = followed
    errors = []
    for tolerance in (0.1, 4e-3):
        solver = torchsde_solver(method, True, tolerance, tolerance)
        model = Watched(gaussian(), VP)
        out = solver.solve(model, x, torch.tensor([0.6, 0.3, 0.05], dtype=F64), noise=noise)
        assert out.status == "ok" and out.network_calls == len(model.times)
        errors.append(float((out.x - truth).abs().max()))
    assert errors[1] < 0.03 and errors[0] < 0.5, errors


def test_adaptive_law(alpha_ledger, unchecked):
    """2000 samples with their common steps: mean and deviation within 6.5 standard errors and the
    tolerance."""
    out = sample(gaussian().denoiser(VP), (2000, 1), torchsde_solver("heun", True), steps=50, seed=2)
    alpha_ledger.spend(3.3e-10, "adaptive torchsde")
    assert abs(float(out.x.mean()) - 2) < 6.5 * 0.5 / math.sqrt(2000) + 0.02
    assert abs(float(out.x.std()) - 0.5) < 6.5 * 0.5 / math.sqrt(4000) + 0.02


def test_no_call_is_made_twice():
    """A step doubled needs the drift at its start once: 2 calls for Euler, 5 for Heun."""
    x, noise = torch.ones(2, 1, dtype=F64), Noise.of(0, batch=2, dtype=F64)
    for method, calls in (("euler", 2), ("heun", 5)):
        solver = torchsde_solver(method, True, 0.9, 1e3)
        out = solver.solve(Affine(gaussian(), VP), x, torch.tensor([0.5, 0.3], dtype=F64), noise=noise)
        assert out.network_calls == calls
    model, counted = Affine(gaussian(), VP), Calls()
    sde = ReverseTime(model, x.shape, TORCHSDE["euler"], counted)
    for t, made in ((0.5, 1), (0.5, 1), (0.4, 2)):
        assert (
            torch.equal(sde.score(torch.tensor(-t, dtype=F64), x), model.score(x, t)) and counted.made == made
        )


def test_adaptive_statuses_and_counts(unchecked):
    x, noise = torch.zeros(2, 1, dtype=F64), Noise.of(0, batch=2, dtype=F64)
    grid = grids.uniform(VP, 20)
    for limit in (1, 10):
        model = Watched(gaussian(), VP)
        out = torchsde_solver("heun", True, max_calls=limit).solve(model, x, grid, noise=noise)
        assert out.status == "call limit reached" and out.network_calls == limit == len(model.times)
        assert bool(out.x.isnan().all())
    for good in (0, 5):
        model = Watched(gaussian(), VP, good)
        out = torchsde_solver("euler", True).solve(model, x, grid, noise=noise)
        assert out.status == "network returned NaN or Inf" and out.network_calls == good + 1
    model = Watched(gaussian(), VP)
    seen = []
    out = torchsde_solver("euler", True).solve(
        model, x, grid, noise=noise, callback=lambda s: seen.append(s) or s.k
    )
    assert out.path == (0,) and torch.equal(seen[0].x, x) and out.network_calls == len(model.times)
    assert seen[0].t == 1.0 and torch.equal(seen[0].denoised, model(x, 1.0))
    model.times.clear()
    three = torch.tensor([0.5, 0.45, 0.3], dtype=F64)
    torchsde_solver("euler", True, 0.9, 1e3).solve(model, x, three, noise=noise)
    assert model.times[:2] == pytest.approx([0.5, 0.475])  # the first try is the grid's first step, halved
    to_data = torchsde_solver("euler", True).solve(
        model, x, torch.tensor([1.0, 0.9, 0.0], dtype=F64), noise=noise
    )
    to_end = torchsde_solver("euler", True).solve(
        model, x, torch.tensor([1.0, 0.9, 1e-3], dtype=F64), noise=noise
    )
    torch.testing.assert_close(to_data.x, gaussian().denoiser(VP)(to_end.x, 1e-3), rtol=0, atol=1e-12)
    assert to_data.network_calls == to_end.network_calls + 1 and to_data.end == 0


def test_adaptive_samples_one_by_one(unchecked):
    model = Mixture([0.5, 0.5], torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64), 0.05).denoiser(VP)
    options = {"grid": torch.tensor([1.0, 0.9, 0.02], dtype=F64), "seed": 2**40 + 3}
    solver, single = (
        torchsde_solver("heun", True, 0.2, 0.2),
        torchsde_solver("heun", True, 0.2, 0.2, per_sample=True),
    )
    alone = [sample(model, (1, 2), solver, ids=[i], **options) for i in range(3)]
    together = sample(model, (3, 2), single, **options)
    assert torch.equal(together.x, torch.cat([s.x for s in alone]))
    assert together.evaluations.tolist() == [s.network_calls for s in alone]
    assert together.network_calls == int(together.evaluations.sum())
    coupled = sample(model, (3, 2), solver, **options)
    assert float((coupled.x - together.x).abs().max()) > 0
    assert sample(model, (0, 2), single, **options).x.shape == (0, 2)
    assert sample(model, (0, 2), torchsde_solver(), **options).network_calls == 0


# --- care ---------------------------------------------------------------------------------------------------


def test_errors(unchecked):
    model, noise = gaussian().denoiser(VP), Noise.of(0, batch=2, dtype=F64)
    x, grid = noise.prior((2, 1)), grids.uniform(VP, 3)
    flat = gaussian().denoiser(Rectified())
    for call, words in [
        (lambda: scipy_ode("RK4"), "method to be one of"),
        (lambda: scipy_ode(rtol=0.0), "rtol"),
        (lambda: scipy_ode(rtol=math.nan), "rtol"),
        (lambda: scipy_ode(atol=-1.0), "atol"),
        (lambda: scipy_ode(max_calls=0), "max_calls"),
        (lambda: scipy_ode(max_calls=True), "max_calls"),
        (lambda: scipy_ode().solve(model, x, grids.uniform(VP, 3, 0.0).reversed()), "a time with noise"),
        (lambda: scipy_ode(rtol=99 * EPS), r"expected 2\.3e-14 <= rtol < 1"),
        (lambda: scipy_ode(rtol=1.0), "rtol"),
        (lambda: scipy_ode(atol=math.inf), "atol"),
        (lambda: scipy_ode(atol=math.nan), "atol"),
        (lambda: scipy_ode(max_calls=1.5), "max_calls"),
        (lambda: torchsde_solver("euler", True, max_calls=0), "max_calls"),
        (lambda: torchsde_solver("rk4"), "method to be one of"),
        (lambda: torchsde_solver("adjoint_reversible_heun"), "method to be one of"),
        (lambda: torchsde_solver("srk", True), "time integral"),
        (lambda: torchsde_solver("euler", True, rtol=-1.0), "rtol"),
        (lambda: torchsde_solver("heun").steps_for(1), "at least 2 calls"),
        (lambda: torchsde_solver("reversible_heun").steps_for(1), "at least 2 calls"),
        (lambda: torchsde_solver().solve(model, x, grid), "noise source"),
        (lambda: torchsde_solver().solve(model, x, grid.reversed(), noise=noise), "from data to noise"),
        (lambda: torchsde_solver().solve(flat, x, grids.uniform(Rectified(), 3), noise=noise), "some signal"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    for make in (scipy_ode, torchsde_solver):
        for wrong in ({"rtol": "1"}, {"atol": None}):
            with pytest.raises(TypeError, match=r".tol: expected a number, found"):
                make(**wrong)
    with pytest.raises(TypeError, match=r"scoresde\.noise\.Noise"):
        torchsde_solver("euler", True).solve(model, x, grid, noise=lambda k, shape: torch.zeros(*shape))


def test_limits_that_are_allowed(unchecked):
    model, x = Affine(gaussian(), VP), torch.ones(2, 1, dtype=F64)
    for solver in (scipy_ode(rtol=100 * EPS, atol=1e-3), scipy_ode(atol=0.0)):
        assert solver.solve(model, x, torch.tensor([0.5, 0.4], dtype=F64)).status == "ok"
    assert scipy_ode(max_calls=1).max_calls == 1


def test_cards_of_what_is_wrapped():
    song, li = "Song et al. 2021, arXiv:2011.13456", "Li et al. 2020, arXiv:2001.01328"
    assert scipy_ode().card == Card(None, None, 1, False, song, frozenset(), "data")
    weak = {"euler": 1, "milstein": 1, "srk": 2, "euler_heun": 1, "heun": 2, "midpoint": 1, "log_ode": 1}
    for method, order in {**weak, "reversible_heun": 2}.items():
        calls = CALLS[method] // 100
        assert torchsde_solver(method).card == Card(None, order, calls, True, li, frozenset(), "data")
        if method != "srk":
            card = torchsde_solver(method, True).card
            assert card == Card(None, None, calls, True, li, frozenset(), "data")
    for solver in (scipy_ode(), torchsde_solver()):
        with pytest.raises(FrozenInstanceError):
            solver.rtol = 0.1
        assert hash(solver) == hash(replace(solver)) and solver == replace(solver)


def test_the_time_and_the_evaluations_of_a_run(unchecked):
    noise = Noise.of(0, batch=2, dtype=F64)
    x, grid = noise.prior((2, 1)), torch.tensor([0.5, 0.45, 0.4], dtype=F64)
    for solver in (scipy_ode(), torchsde_solver(), torchsde_solver("heun", True, 0.1, 0.1)):
        started = time.perf_counter()
        out = solver.solve(Affine(gaussian(), VP), x, grid, noise=noise)
        assert 0 < out.seconds < time.perf_counter() - started and out.end == 0.4
        none = x[:0]
        empty = solver.solve(Affine(gaussian(), VP), none, grid, noise=Noise.of(0, batch=0, dtype=F64))
        assert empty.x is not none
        assert empty.status == "ok" and empty.x.shape == (0, 1) and empty.network_calls == 0
        if out.evaluations is not None:
            assert out.evaluations.tolist() == [out.network_calls] * 2 and empty.evaluations.shape == (0,)
            assert out.evaluations.add_(1).tolist() == [out.network_calls + 1] * 2


@pytest.mark.parametrize("solver", [scipy_ode(), torchsde_solver("heun", True)], ids=["scipy", "torchsde"])
def test_from_below_the_default_end_to_the_data(solver):
    model, noise = Affine(gaussian(), VP), Noise.of(0, batch=2, dtype=F64)
    x = noise.prior((2, 1))
    out = solver.solve(model, x, torch.tensor([5e-4, 0.0], dtype=F64), noise=noise)
    assert torch.equal(out.x, model(x, 5e-4)) and out.status == "ok" and out.end == 0
    assert out.network_calls <= 3


def test_the_last_four_calls_are_remembered():
    model, counted = Affine(gaussian(), VP), Calls()
    x, sde = torch.ones(2, 1, dtype=F64), ReverseTime(model, torch.Size((2, 1)), TORCHSDE["euler"], counted)
    for t, made in ((0.5, 1), (0.4, 2), (0.3, 3), (0.2, 4), (0.5, 4), (0.1, 5), (0.4, 5), (0.5, 6)):
        sde.score(torch.tensor(-t, dtype=F64), x)
        assert counted.made == made
    sde.score(torch.tensor(-0.5, dtype=F64), x.clone())  # another state, though it is equal
    assert counted.made == 7


def test_reprs_cards_and_steps():
    assert repr(torchsde_solver("heun", True, 0.1, 0.2, per_sample=True, max_calls=5)) == (
        "torchsde_solver('heun', adaptive=True, rtol=0.1, atol=0.2, per_sample=True, max_calls=5)"
    )
    assert repr(torchsde_solver("heun", True)) == (
        "torchsde_solver('heun', adaptive=True, rtol=0.01, atol=0.01, per_sample=False, max_calls=2000)"
    )
    for method, least in (("euler", 1), ("heun", 2), ("reversible_heun", 2)):
        assert torchsde_solver(method).steps_for(least) == 1
    assert torchsde_solver("reversible_heun").steps_for(11) == 10 == torchsde_solver("heun").steps_for(21)
    assert repr(scipy_ode()) == "scipy_ode('RK45', rtol=1e-05, atol=1e-05, per_sample=False, max_calls=10000)"
    assert repr(torchsde_solver()) == "torchsde_solver('euler')"
    assert repr(torchsde_solver("heun", True)).startswith("torchsde_solver('heun', adaptive=True, rtol=0.01")
    assert scipy_ode().steps_for(100) == 1 == torchsde_solver("heun", True).steps_for(100)
    assert not scipy_ode().card.stochastic and torchsde_solver().card.stochastic
    assert torchsde_solver("heun", True).card.weak_order is None
    path = PathIncrements(BrownianPath(Noise.of(0, batch=2), (2, 3, 2), 0.0, 1.0), torch.float32)
    assert path.shape == (2, 6) == StepNoise(Noise.of(0, batch=2), 0, 1, torch.Size((2, 3, 2)), F64).shape
