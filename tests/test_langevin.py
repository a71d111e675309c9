"""Langevin dynamics: laws of chains and correctors, mostly exact, for on Gaussians everything is affine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoresde import grids, sample, solvers
from scoresde.denoiser import Denoiser
from scoresde.laws import ExactDenoiser, Gaussian, Mixture
from scoresde.noise import Noise
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified
from scoresde.solvers.base import Card
from scoresde.solvers.langevin import (
    annealed_langevin,
    langevin,
    mala,
    predictor_corrector,
    square_norm,
)

F64 = torch.float64
VP = VPSDE()


def gaussian(mean: float = 0.7, variance: float = 0.25) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=F64), variance)


def units(rows: int) -> tuple[Tensor, Callable[[int, Sequence[int]], Tensor]]:
    """A batch that reads off affine maps: sample 0 starts at 0, sample 1 at 1, sample 2 + k has noise row k
    equal to 1."""
    start = torch.zeros(rows + 2, 1, dtype=F64)
    start[1] = 1

    def noise(k: int, shape: Sequence[int]) -> Tensor:
        z = torch.zeros(*shape, dtype=F64)
        z[2 + k] = 1
        return z

    return start, noise


def law_of(out: Tensor, mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of the affine map read off by `units`, for a start N(mean, variance)."""
    constant = out[0, 0]
    slopes = out[1:, 0] - constant
    return float(constant + slopes[0] * mean), float(slopes[0] ** 2 * variance + slopes[1:].square().sum())


class Zero(ExactDenoiser):
    """A score of 0."""

    def score(self, x, t):
        return torch.zeros_like(x)


class Counted(ExactDenoiser):
    """Counts what it is asked."""

    def __init__(self, law, sde):
        super().__init__(law, sde)
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return super().forward(x, t)

    def score(self, x, t):
        self.calls += 1
        return super().score(x, t)


class Broken(ExactDenoiser):
    """NaN below t = 0.5, in the second sample only."""

    def _spoil(self, out, t):
        bad = torch.zeros_like(out)
        bad[1] = math.nan
        return out + bad if float(t) < 0.5 else out

    def forward(self, x, t):
        return self._spoil(super().forward(x, t), t)

    def score(self, x, t):
        return self._spoil(super().score(x, t), t)


# --- at a fixed time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "t"), [(0.05, 0.3), (0.7, 0.05), (1.0, 0.6), (1.9, 0.9)])
def test_the_stationary_law_of_the_unadjusted_chain(share, t):
    """N(m, v/(1 - step/(2v))), from the chain's own affine map: the variance after n steps is a geometric
    series."""
    law = gaussian()
    marginal = law.marginal(VP, t)
    v, n = float(marginal.variance), 15
    start, noise = units(n)
    step = share * v
    out = langevin(law.denoiser(VP), start, t, step=step, steps=n, noise=noise)
    limit = v / (1 - step / (2 * v))
    mean, variance = law_of(out.x, float(marginal.mean), limit)  # started in the limit, it stays there
    assert abs(mean - float(marginal.mean)) < 1e-13
    assert abs(variance - limit) < 1e-12 * limit
    assert out.network_calls == n and bool((out.acceptance == 1).all())


def test_every_sample_may_have_its_own_step(device):
    law = gaussian()
    x = torch.tensor([[0.1], [0.2]], dtype=F64, device=device)
    step = torch.tensor([0.05, 0.2], dtype=F64)
    noise = Noise.of(1, batch=2, device=device, dtype=F64)
    both = langevin(law.denoiser(VP).to(device), x, 0.4, step=step, steps=3, noise=noise)
    for i in range(2):
        one = Noise.of(1, [i], device=device, dtype=F64)
        alone = langevin(
            law.denoiser(VP).to(device), x[i : i + 1], 0.4, step=float(step[i]), steps=3, noise=one
        )
        assert torch.equal(alone.x, both.x[i : i + 1])


def _log_normal(x: Sequence[float], mean: Sequence[float], variance: float) -> float:
    square = sum((a - b) ** 2 for a, b in zip(x, mean, strict=True))
    return -square / (2 * variance) - len(x) / 2 * math.log(2 * math.pi * variance)


def test_acceptance_by_hand():
    """One proposal in two dimensions, R from its definition in plain Python; a uniform just below and above
    it."""
    t, step, weights, means, variance = 0.3, 0.35, (0.4, 0.6), ((-1.0, 0.5), (0.8, -0.2)), 0.3
    model = Mixture(list(weights), torch.tensor(means, dtype=F64), variance).denoiser(VP)
    alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
    v = alpha**2 * variance + sigma**2
    centers = [[alpha * c for c in m] for m in means]

    def log_p(x):
        return math.log(
            sum(w * math.exp(_log_normal(x, m, v)) for w, m in zip(weights, centers, strict=True))
        )

    def score(x):
        terms = [w * math.exp(_log_normal(x, m, v)) for w, m in zip(weights, centers, strict=True)]
        return [
            sum(w * (m[i] - x[i]) for w, m in zip(terms, centers, strict=True)) / v / sum(terms)
            for i in (0, 1)
        ]

    x, z = [0.9, -0.4], [-1.1, 1.4]
    new = [a + step * s + math.sqrt(2 * step) * e for a, s, e in zip(x, score(x), z, strict=True)]
    there = [a + step * s for a, s in zip(x, score(x), strict=True)]
    back = [a + step * s for a, s in zip(new, score(new), strict=True)]
    ratio = log_p(new) + _log_normal(x, back, 2 * step) - log_p(x) - _log_normal(new, there, 2 * step)
    assert -3 < ratio < -0.1
    edge = float(torch.special.ndtri(torch.tensor(ratio, dtype=F64).exp()))
    for shift, accepted in ((-1e-9, True), (1e-9, False)):
        rows = [torch.tensor([z], dtype=F64), torch.tensor([[edge + shift]], dtype=F64)]
        start = torch.tensor([x], dtype=F64)
        chain = mala(
            model, start, t, step=step, steps=1, noise=lambda k, shape, rows=rows: rows[k].view(shape)
        )
        expected = torch.tensor([new if accepted else x], dtype=F64)
        torch.testing.assert_close(chain.x, expected, rtol=0, atol=1e-12)
        assert chain.acceptance.tolist() == [float(accepted)] and chain.network_calls == 2


def test_a_rejected_chain_goes_on_from_where_it_was():
    """State, score and density are kept together: n steps are n times one step."""
    model = gaussian().denoiser(VP)
    noise = Noise.of(3, batch=50, dtype=F64)
    x = noise.prior((50, 1))
    whole = mala(model, x, 0.2, step=0.4, steps=12, noise=noise)
    y, taken = x, torch.zeros(50, dtype=F64)
    for k in range(12):
        one = mala(model, y, 0.2, step=0.4, steps=1, noise=noise.shift(2 * k))
        y, taken = one.x, taken + one.acceptance
    torch.testing.assert_close(whole.x, y, rtol=0, atol=1e-13)
    assert torch.allclose(whole.acceptance, taken / 12) and 0.2 < float(whole.acceptance.mean()) < 0.98


def _distance(x: Tensor, law: Mixture) -> float:
    """Kolmogorov's distance of a sample in one dimension to a mixture of equal standard deviations."""
    x = x.flatten().sort().values
    mean, std = (
        law.means.flatten(),
        (law.variance - ((law.means.flatten() - law.mean) ** 2 * law.weights).sum()).sqrt(),
    )
    F = (torch.special.ndtr((x[:, None] - mean) / std) * law.weights).sum(1)
    above = torch.arange(1, len(x) + 1, dtype=F64) / len(x)
    return float(torch.maximum((above - F).abs(), (above - 1 / len(x) - F).abs()).max())


def test_the_adjusted_chain_keeps_the_law_and_the_unadjusted_does_not(alpha_ledger):
    """20000 chains of 40 steps from the law itself. The Dvoretzky-Kiefer-Wolfowitz bound; the power is shown
    by the twin."""
    n, t, step = 20000, 0.2, 0.4
    law = Mixture([0.3, 0.7], torch.tensor([-1.0, 0.8], dtype=F64), 0.2)
    marginal, model = law.marginal(VP, t), law.denoiser(VP)
    x = marginal.sample(n, generator=torch.Generator().manual_seed(7))
    options = {"step": step, "steps": 40, "noise": Noise.of(11, batch=n, dtype=F64)}
    bound = math.sqrt(math.log(2 / alpha_ledger.spend(1e-10, "MALA keeps the law")) / (2 * n))
    adjusted = mala(model, x, t, **options)
    assert 0.3 < float(adjusted.acceptance.mean()) < 0.95
    assert _distance(adjusted.x, marginal) < bound
    assert _distance(langevin(model, x, t, **options).x, marginal) > 1.2 * bound


def test_acceptance_goes_to_one_with_the_step():
    """The rejected share falls with step^(3/2): by 31 for every factor of ten."""
    model, noise = gaussian().denoiser(VP), Noise.of(5, batch=20000, dtype=F64)
    x = gaussian().marginal(VP, 0.2).sample(20000, generator=torch.Generator().manual_seed(3))
    lost = [
        1 - float(mala(model, x, 0.2, step=step, steps=2, noise=noise).acceptance.mean())
        for step in (0.4, 0.04, 0.004)
    ]
    assert lost[0] > 15 * lost[1] > 200 * lost[2] and lost[2] < 1e-3, lost


def test_mala_takes_any_log_density():
    model, noise = gaussian().denoiser(VP), Noise.of(5, batch=6, dtype=F64)
    x = noise.prior((6, 1))
    own = mala(model, x, 0.2, step=0.3, steps=5, noise=noise)
    given_ = mala(
        model, x, 0.2, step=0.3, steps=5, noise=noise, log_prob=lambda x, t: model.log_prob(x, t) + 5
    )
    torch.testing.assert_close(own.x, given_.x, rtol=0, atol=1e-12)
    out = torch.empty(6, dtype=F64)  # one tensor for every output, as in a CUDA graph

    def reusing(x, t):
        return out.copy_(model.log_prob(x, t))

    assert torch.equal(mala(model, x, 0.2, step=0.3, steps=5, noise=noise, log_prob=reusing).x, own.x)
    nowhere = mala(model, x, 0.2, step=0.3, steps=5, noise=noise, log_prob=lambda x, t: x[:, 0] * math.nan)
    assert torch.equal(nowhere.x, x) and float(nowhere.acceptance.max()) == 0
    for wrong in (model.log_prob(x, 0.2).sum(), x, x[:1, 0]):  # would broadcast to another acceptance
        with pytest.raises(ValueError, match=r"log_prob to return one number a sample, \(6,\), found \("):
            mala(model, x, 0.2, step=0.3, steps=5, noise=noise, log_prob=lambda x, t, wrong=wrong: wrong)
    seen = []
    mala(model, x, 0.2, step=0.3, steps=5, noise=noise, callback=lambda k, x: seen.append((k, x.clone())))
    assert [k for k, _ in seen] == list(range(5)) and torch.equal(seen[-1][1], own.x)


# --- predictor-corrector ------------------------------------------------------------------------------------

PREDICTORS = [
    solvers.ddpm(),
    solvers.ddim(),
    solvers.euler_maruyama(),
    solvers.dpmpp(2),
    solvers.unipc(2),
    solvers.heun(),
    solvers.restart(),
    solvers.euler_maruyama("score_sde"),
]


@pytest.mark.parametrize("predictor", PREDICTORS, ids=repr)
def test_no_corrections_are_the_predictor_bit_for_bit(predictor, device, dtype, state_dtype):
    model = gaussian().denoiser(VP).to(device, dtype)
    options = {"steps": 7, "seed": 4, "dtype": state_dtype, "callback": lambda s: s.denoised}
    plain = sample(model, (3, 1), predictor, **options)
    pc = sample(model, (3, 1), predictor_corrector(predictor, 0), **options)
    assert torch.equal(plain.x, pc.x) and plain.network_calls == pc.network_calls and plain.end == pc.end
    assert all(torch.equal(a, b) for a, b in zip(plain.path, pc.path, strict=True))
    assert predictor_corrector(predictor, 0).card.stochastic == predictor.card.stochastic


def _by_hand(
    sde: LinearSDE, law: Gaussian, table, grid, M: int, snr: float, nodes: list[int]
) -> tuple[float, float]:
    """The law after predictor and corrector in scalar recursions on unit vectors; `nodes` are the rows that
    end at nodes."""
    K, center, spread = len(table), float(law.mean), float(law.variance)
    unit = torch.eye(2 + K + M * len(nodes), dtype=F64)
    x, outputs, extra = unit[1], [], 2 + K
    for k in range(K):
        alpha, sigma = float(sde.alpha(table.times[k])), float(sde.sigma(table.times[k]))
        v = alpha**2 * spread + sigma**2
        D = center * unit[0] + alpha * spread / v * (x - alpha * center * unit[0])
        outputs.insert(0, table.skip[k] * x + table.out[k] * D)
        x = (
            table.keep[k] * x
            + sum(w * m for w, m in zip(table.mix[k], outputs, strict=False))
            + table.noise[k] * unit[2 + k]
        )
        if k in nodes:
            j = nodes.index(k) + 1
            alpha, sigma = float(sde.alpha(grid.t[j])), float(sde.sigma(grid.t[j]))
            v = alpha**2 * spread + sigma**2
            for _ in range(M if sigma > 0 else 0):
                eps = 2 * (float(sde.alpha(grid.t[j - 1])) / alpha) ** 2 * (snr * sigma) ** 2
                x = x - eps * (x - alpha * center * unit[0]) / v + math.sqrt(2 * eps) * unit[extra]
                extra += 1
    return float(x[0]), float((x[1] * sde.prior_std) ** 2 + x[2:].square().sum())


@pytest.mark.parametrize("sde", [VP, EDM(), VESDE()], ids=repr)
@pytest.mark.parametrize("name", ["ddpm", "dpmpp", "unipc", "heun"])
def test_the_law_with_the_deterministic_norm(sde, name):
    """Exact output law on Gaussian data: corrections at the nodes, at the new time, with the history kept."""
    predictor = {
        "ddpm": solvers.ddpm(),
        "dpmpp": solvers.dpmpp(2),
        "unipc": solvers.unipc(2),
        "heun": solvers.heun(),
    }[name]
    law, steps, M, snr = gaussian(), 9, 2, 0.3
    for end in (None, 0.0):
        grid = grids.karras(sde, steps, end)
        table = predictor.tableau(sde, grid)
        width = predictor.card.calls_per_step
        nodes = [min(width * (j + 1), len(table)) - 1 for j in range(steps)]
        start, noise = units(len(table) + M * steps)
        pc = predictor_corrector(predictor, M, snr, "sigma")
        out = pc.solve(law.denoiser(sde), start, grid, noise=noise)
        corrected = steps - (float(sde.sigma(grid.t[-1])) == 0)
        assert out.network_calls == len(table) + M * corrected
        mean, variance = law_of(out.x, 0.0, sde.prior_std**2)
        expected = _by_hand(sde, law, table, grid, M, snr, nodes)
        assert mean == pytest.approx(expected[0], abs=1e-11) and variance == pytest.approx(
            expected[1], abs=1e-11
        )


def test_the_corrector_improves_the_law():
    """Five corrections a step take errors off Euler-Maruyama in 20 steps: the law is exact on both sides."""
    law, grid = gaussian(), grids.uniform(VP, 20, 1e-2)
    predictor = solvers.euler_maruyama()
    truth = law.marginal(VP, grid.t[-1])
    before = predictor.tableau(VP, grid).law(law, VP)
    start, noise = units(20 * 6)
    out = predictor_corrector(predictor, 5, 0.5, "sigma").solve(law.denoiser(VP), start, grid, noise=noise)
    mean, variance = law_of(out.x, 0.0, 1.0)
    assert abs(variance - float(truth.variance)) < 0.7 * abs(float(before.variance - truth.variance))
    assert abs(mean - float(truth.mean)) < 0.75 * abs(float(before.mean - truth.mean))


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_the_published_step_by_hand(norm):
    """One step with one correction on images: eps = 2 a (snr ||z||/||score||)^2."""
    law = Gaussian(torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 2, 2), 0.2)
    model, grid, shape = law.denoiser(VP), grids.uniform(VP, 1, 0.4), (5, 3, 2, 2)
    noise = Noise.of(2, batch=5, dtype=F64)
    x = noise.prior(shape)
    y = solvers.ddpm().solve(model, x, grid, noise=noise).x
    z, g = noise(1, shape), model.score(y, 0.4)
    lengths = [v.reshape(5, 12).norm(dim=1) for v in (z, g)]
    a, b = lengths if norm == "sample" else [v.mean() for v in lengths]
    eps = 2 * float(VP.alpha(1.0) / VP.alpha(0.4)) ** 2 * (0.16 * a / b) ** 2
    eps = eps.reshape(-1, 1, 1, 1)
    out = predictor_corrector(solvers.ddpm(), 1, 0.16, norm).solve(model, x, grid, noise=noise).x
    torch.testing.assert_close(out, y + eps * g + (2 * eps).sqrt() * z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [predictor_corrector(solvers.ddpm(), 2), annealed_langevin(2)], ids=repr)
def test_a_sample_does_not_depend_on_its_batch(solver, device, dtype, state_dtype):
    model = Gaussian(torch.zeros(3, 2, 2, dtype=F64), 0.3).denoiser(VP).to(device, dtype)
    options = {"steps": 5, "seed": 9, "dtype": state_dtype}
    eight = sample(model, (8, 3, 2, 2), solver, **options).x
    assert torch.equal(
        sample(model, (4, 3, 2, 2), solver, ids=[6, 1, 0, 3], **options).x, eight[[6, 1, 0, 3]]
    )
    assert torch.equal(sample(model, (1, 3, 2, 2), solver, ids=[5], **options).x, eight[[5]])


def test_the_historical_norm_couples_the_batch():
    """With batch means, mates twenty times as large change a sample; with its own norm they do not."""
    model, noise = Gaussian(torch.zeros(16, dtype=F64), 0.3).denoiser(VP), Noise.of(0, batch=4, dtype=F64)
    x = noise.prior((4, 16))
    loud = x * torch.tensor([1.0, 20.0, 20.0, 20.0], dtype=F64)[:, None]
    grid = grids.uniform(VP, 3, 1e-3)
    change = {}
    for norm in ("sample", "batch"):
        pc = predictor_corrector(solvers.ddpm(), 1, 0.16, norm)
        quiet, mates = (pc.solve(model, start, grid, noise=noise).x[0] for start in (x, loud))
        change[norm] = float((quiet - mates).abs().max())
    assert change["sample"] == 0 and change["batch"] > 0.01


@pytest.mark.parametrize("norm", ["sample", "batch", "sigma"])
def test_a_score_of_zero_stays_finite(norm, state_dtype):
    """Without a score the step is the bound: eps = 2 a (alpha^2 + sigma^2), so x changes by 2 spread z."""
    grid, noise = grids.uniform(VP, 1, 0.3), Noise.of(0, batch=3, dtype=state_dtype)
    x = noise.prior((3, 4))
    model = Zero(Gaussian(torch.zeros(4, dtype=F64), 0.3), VP)
    plain = solvers.ddpm().solve(model, x, grid, noise=noise).x
    out = predictor_corrector(solvers.ddpm(), 1, 0.16, norm).solve(model, x, grid, noise=noise).x
    a, z = float(VP.alpha(1.0) / VP.alpha(0.3)), noise(1, (3, 4))
    length = 0.16 * float(VP.sigma(0.3)) if norm == "sigma" else 1.0
    torch.testing.assert_close(out - plain, 2 * a * length * z, rtol=1e-5, atol=1e-6)


def test_predictors_that_skip_nodes_are_refused():
    model, noise = gaussian().denoiser(VP), Noise.of(0, batch=2, dtype=F64)
    for predictor in (solvers.dpm_fast(), solvers.edm(churn=40.0)):
        with pytest.raises(ValueError, match="stops at every node"):
            grid = grids.karras(VP, 9)
            predictor_corrector(predictor).solve(model, noise.prior((2, 1)), grid, noise=noise)


# --- annealed -----------------------------------------------------------------------------------------------


def test_annealed_by_hand():
    """Langevin steps of size step sigma^2 at every node, x/alpha carried from node to node; D at the end."""
    law = Gaussian(torch.tensor([0.7, -0.4], dtype=F64), torch.tensor([0.2, 0.5], dtype=F64))
    model, noise, M, step = law.denoiser(VP), Noise.of(8, batch=3, dtype=F64), 3, 0.2
    for end in (1e-2, 0.0):
        grid = grids.quadratic(VP, 4, end)
        x, row, calls = noise.prior((3, 2)), 0, 0
        out = annealed_langevin(M, step).solve(model, x, grid, noise=noise)
        times = grid.t.tolist()
        for j, t in enumerate(times):
            if t == 0:
                x, calls = model(x, times[j - 1]), calls + 1
                continue
            x = x * float(VP.alpha(t) / VP.alpha(times[j - 1])) if j else x
            for _ in range(M):
                eps = step * float(VP.sigma(t)) ** 2
                x = x + eps * model.score(x, t) + math.sqrt(2 * eps) * noise(row, (3, 2))
                row, calls = row + 1, calls + 1
        torch.testing.assert_close(out.x, x, rtol=1e-11, atol=1e-12)
        assert out.network_calls == calls
    solver = annealed_langevin(M, step)
    assert solver.calls(4) == len(solver.tableau(VP, grids.uniform(VP, 4, 1e-2))) == 15
    assert solver.steps_for(15) == solver.steps_for(17) == 4


def test_annealed_depends_on_noise_levels_only():
    """In y = x/alpha the same numbers for VP and EDM on nodes of equal lam and a start of equal y."""
    lam = torch.linspace(-2, 3, 6, dtype=F64)
    edm, law, solver = EDM(), gaussian(), annealed_langevin(2, 0.15)
    noise, y = Noise.of(1, batch=4, dtype=F64), torch.linspace(-3, 3, 4, dtype=F64)[:, None]
    ends = []
    for sde in (VP, edm):
        t = sde.time(2 * lam)
        out = solver.solve(law.denoiser(sde), y * sde.alpha(t[0]), t, noise=noise)
        ends.append(out.x / sde.alpha(t[-1]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)


def test_annealed_approaches_the_law():
    """Bias only of the step, when levels are close and steps many: variance v/(1 - step/2 sigma^2/v) at the
    last level."""
    law, step, end = gaussian(), 0.05, 0.4
    found = annealed_langevin(150, step).tableau(VP, grids.log_snr(VP, 8, end)).law(law, VP)
    truth = law.marginal(VP, end)
    v, sigma2 = float(truth.variance), float(VP.sigma(end)) ** 2
    assert float(found.variance) == pytest.approx(v / (1 - step * sigma2 / (2 * v)), rel=1e-3)
    assert float(found.mean) == pytest.approx(float(truth.mean), rel=1e-3)


@pytest.mark.parametrize("end", [None, 0.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_annealed_from_pure_noise(steps, end):
    """Rectified flow starts without signal: the first row is DDIM's, which says alpha E[x_0] + sigma z."""
    table = annealed_langevin(2).tableau(Rectified(), grids.log_snr(Rectified(), steps, end))
    first = solvers.ddim().tableau(Rectified(), grids.log_snr(Rectified(), steps, end))
    for key in ("keep", "mix", "noise"):
        torch.testing.assert_close(getattr(table, key)[0], getattr(first, key)[0], rtol=1e-12, atol=1e-14)
    tail = end == 0.0
    assert len(table) == 1 + 2 * (steps - tail) + (1 if tail and steps > 1 else 0)


# --- care ---------------------------------------------------------------------------------------------------


def test_calls_are_counted():
    model = Counted(gaussian(), VP)
    for solver in (predictor_corrector(solvers.heun(), 3), annealed_langevin()):
        model.calls = 0
        assert sample(model, (2, 1), solver, steps=4).network_calls == model.calls
    pc = predictor_corrector(solvers.heun(), 3)
    assert (
        pc.steps_for(5) == 1
        and pc.steps_for(24) == 4
        and pc.steps_for(25) == 5
        and pc.card.calls_per_step == 5
    )
    noise = Noise.of(0, batch=2, dtype=F64)
    for chain in (langevin, mala):
        model.calls = 0
        assert (
            chain(model, noise.prior((2, 1)), 0.5, step=0.1, steps=4, noise=noise).network_calls
            == model.calls
        )


def test_nan_ends_the_run_at_once():
    model = Broken(gaussian(), VP)
    grid = grids.uniform(VP, 10, 0.4)
    noise = Noise.of(0, batch=2, dtype=F64)
    x = noise.prior((2, 1))
    # the corrector is the first to see a time below 0.5: 6 predictor calls and 5 corrections before it
    with pytest.raises(FloatingPointError, match=r"call 12, t = 0\.46"):
        predictor_corrector(solvers.ddpm()).solve(
            model, x, torch.linspace(1, 0.46, 7, dtype=F64), noise=noise
        )
    with pytest.raises(FloatingPointError):
        annealed_langevin().solve(model, x, grid, noise=noise)
    for chain in (langevin, mala):
        with pytest.raises(FloatingPointError, match=r"call 1, t = 0\.4"):
            chain(model, x, 0.4, step=0.1, steps=3, noise=noise)


class Halves(torch.nn.Module):
    """A network that returns half its input."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.factor * x


def test_what_callbacks_see():
    """The predictor's calls: number, time, state, D there; of chains the number and the state after it."""
    model, noise = gaussian().denoiser(VP), Noise.of(0, batch=2, dtype=F64)
    x, grid, steps = noise.prior((2, 1)), grids.uniform(VP, 4), []
    for predictor, calls in ((solvers.ddim(), 4), (solvers.heun(), 8)):
        steps.clear()
        pc = predictor_corrector(predictor, 2)
        out = pc.solve(model, x, grid, noise=noise, callback=lambda s: steps.append(s) or (s.k or None))
        table = predictor.tableau(VP, grid)
        assert [s.k for s in steps] == list(range(calls)) and out.path == tuple(range(1, calls))
        assert [s.t for s in steps] == table.times[:-1].tolist() and torch.equal(steps[0].x, x)
        for s in steps:
            torch.testing.assert_close(s.denoised, model(s.x, s.t))
        assert 0 < out.seconds < 60 and out.status == "ok" and out.end == grid.t[-1]
    network = Denoiser(Halves(), VP, "noise").double()
    predictor_corrector(solvers.ddim()).solve(network, x, grid, noise=noise, callback=steps.append)
    for s in steps[-4:]:
        torch.testing.assert_close(s.denoised, network(s.x, s.t))
    seen = []
    chain = langevin(
        model, x, 1.0, step=0.1, steps=3, noise=noise, callback=lambda k, x: seen.append((k, x.clone()))
    )
    assert [k for k, _ in seen] == [0, 1, 2] and torch.equal(seen[-1][1], chain.x)
    step = torch.tensor(0.1, dtype=F64, requires_grad=True)
    assert torch.equal(langevin(model, x, 1.0, step=step, steps=3, noise=noise).x, chain.x)
    assert not langevin(model, x, 1.0, step=step, steps=3, noise=noise).x.requires_grad


def test_no_corrections_run_either_way_and_need_no_noise():
    model, grid = gaussian().denoiser(VP), grids.uniform(VP, 4)
    x = torch.linspace(-1, 1, 3, dtype=F64)[:, None]
    for times in (grid, grid.reversed()):
        plain = solvers.ddim().solve(model, x, times).x
        assert torch.equal(predictor_corrector(solvers.ddim(), 0).solve(model, x, times).x, plain)
    for predictor in (solvers.dpm_fast(), solvers.edm(churn=40.0)):  # which do not stop at every node
        noise, times = Noise.of(0, batch=3, dtype=F64), grids.karras(VP, 9)
        plain = predictor.solve(model, x, times, noise=noise).x
        assert torch.equal(predictor_corrector(predictor, 0).solve(model, x, times, noise=noise).x, plain)


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_without_score_and_noise_nothing_moves(norm):
    model, grid = Zero(Gaussian(torch.zeros(4, dtype=F64), 0.3), VP), grids.uniform(VP, 2)
    x, still = torch.ones(3, 4, dtype=F64), lambda k, shape: torch.zeros(*shape, dtype=F64)
    plain = solvers.ddim().solve(model, x, grid).x
    out = predictor_corrector(solvers.ddim(), 1, 0.16, norm).solve(model, x, grid, noise=still).x
    torch.testing.assert_close(out, plain)


def test_cards_of_langevin_dynamics():
    inner = solvers.dpmpp(3).card
    song = "Song et al. 2021, arXiv:2011.13456"
    card = predictor_corrector(solvers.dpmpp(3), 2).card
    assert card == Card(None, None, 3, True, song, frozenset({"clock_free"}), inner.final, inner.memory)
    card = predictor_corrector(solvers.dpmpp(3), 0).card
    assert card == Card(None, None, 1, False, song, inner.properties, inner.final, inner.memory)
    assert inner.memory > 1 and len(inner.properties) > 1
    song = "Song and Ermon 2019, arXiv:1907.05600"
    card = annealed_langevin(4).card
    assert card == Card(None, None, 4, True, song, frozenset({"clock_free", "scale_covariant"}))
    for solver in (predictor_corrector(solvers.ddim()), annealed_langevin()):
        with pytest.raises(FrozenInstanceError):
            solver.card = card


@given(n=st.integers(1, 40))
def test_square_norms(n):
    v = torch.linspace(-1, 2, 2 * n, dtype=F64).reshape(2, n)
    torch.testing.assert_close(square_norm(v), v.norm(dim=1) ** 2, rtol=1e-13, atol=0)


def test_square_norms_of_nothing():
    assert square_norm(torch.zeros(2, 0)).tolist() == [0, 0] and square_norm(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("norm", ["sample", "batch", "sigma"])
def test_float32_images_and_empty_batches(norm):
    model = Gaussian(torch.zeros(3, 4, 4, dtype=F64), 0.3).denoiser(VP).to(torch.float32)
    pc = predictor_corrector(solvers.dpmpp(2), 1, 0.16, norm)
    single = sample(model, (3, 3, 4, 4), pc, steps=20, seed=1)
    double = sample(model, (3, 3, 4, 4), pc, steps=20, seed=1, dtype=F64)
    assert single.x.dtype == torch.float32 and float((single.x - double.x).abs().max()) < 1e-5
    for solver in (pc, annealed_langevin()):
        assert sample(model, (0, 3, 4, 4), solver, steps=3).x.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("drawn", [torch.float32, F64], ids=str)
def test_the_state_keeps_its_dtype(state, drawn):
    """Whatever the noise has, as with tables."""
    model, x = gaussian().denoiser(VP), torch.ones(3, 1, dtype=state)
    noise = Noise.of(0, batch=3, dtype=drawn)
    solver = predictor_corrector(solvers.ddpm(), corrector_steps=2, norm="sigma")
    assert solver.solve(model, x, grids.quadratic(VP, 3), noise=noise).x.dtype == state
    seen = []
    options = {"step": 0.1, "steps": 2, "noise": noise, "callback": lambda k, x: seen.append(x.dtype)}
    chains = [sampler(model, x, 0.3, **options) for sampler in (langevin, mala)]
    assert {chain.x.dtype for chain in chains} == set(seen) == {state}


def test_errors(unchecked):
    model, noise = gaussian().denoiser(VP), Noise.of(0, batch=2, dtype=F64)
    x, grid = noise.prior((2, 1)), grids.uniform(VP, 3)
    pc = predictor_corrector(solvers.ddim())
    for call, words in [
        (lambda: predictor_corrector(solvers.ddim(), -1), "corrector_steps >= 0"),
        (lambda: predictor_corrector(solvers.ddim(), True), "corrector_steps >= 0"),
        (lambda: predictor_corrector(solvers.ddim(), 1, 0.0), "snr > 0"),
        (lambda: predictor_corrector(solvers.ddim(), 1, math.nan), "snr > 0"),
        (lambda: predictor_corrector(solvers.ddim(), 1, 0.1, "mean"), "norm to be one of"),
        (lambda: pc.solve(model, x, grid), "noise source"),
        (lambda: pc.solve(model, x, grid.reversed(), noise=noise), "from data to noise"),
        (lambda: pc.solve(model, x, grids.uniform(VP, 1).reversed(), noise=noise), "from data to noise"),
        (lambda: pc.steps_for(1), "at least 2 calls"),
        (lambda: annealed_langevin(0), "steps_per_level >= 1"),
        (lambda: annealed_langevin(1, -0.1), "step > 0"),
        (lambda: annealed_langevin().solve(model, x, grid.reversed(), noise=noise), "from data to noise"),
        (lambda: langevin(model, x, 0.5, step=0.0, steps=1, noise=noise), "step > 0"),
        (lambda: langevin(model, x, 0.5, step=torch.ones(3), steps=1, noise=noise), "step > 0"),
        (lambda: langevin(model, x, 0.0, step=0.1, steps=1, noise=noise), "time with noise"),
        (lambda: langevin(model, x, 1.5, step=0.1, steps=1, noise=noise), "time with noise"),
        (lambda: mala(model, x, 0.5, step=0.1, steps=0, noise=noise), "steps >= 1"),
        (lambda: mala(model, x, 0.5, step=0.1, steps=True, noise=noise), "steps >= 1"),
        (lambda: langevin(model, x, 0.5, step=0.1, steps=2.0, noise=noise), "steps >= 1"),
        (lambda: langevin(model, x, 0.5, step=math.inf, steps=1, noise=noise), "step > 0"),
        (lambda: langevin(model, x, 0.5, step=torch.ones(2, 1), steps=1, noise=noise), "step > 0"),
        (lambda: langevin(model, x, 0.5, step=torch.tensor([0.1, 0.0]), steps=1, noise=noise), "step > 0"),
        (lambda: langevin(model, x, -0.1, step=0.1, steps=1, noise=noise), "time with noise"),
        (lambda: langevin(model, x, math.nan, step=0.1, steps=1, noise=noise), "time with noise"),
        (lambda: predictor_corrector(solvers.ddim(), 1.5), "corrector_steps >= 0"),
        (lambda: predictor_corrector(solvers.ddim(), 1, math.inf), "snr > 0"),
        (lambda: annealed_langevin(True), "steps_per_level >= 1"),
        (lambda: annealed_langevin(1.5), "steps_per_level >= 1"),
        (lambda: annealed_langevin(1, 0.0), "step > 0"),
        (lambda: annealed_langevin(1, math.inf), "step > 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="expected a step > 0, a number or of shape"):
        langevin(model, x, 0.5, step="long", steps=1, noise=noise)
    for sampler in (langevin, mala):
        with pytest.raises(
            TypeError, match=r"expected a noise source, .* Noise.of\(0, batch=2\), found None"
        ):
            sampler(model, x, 0.5, step=0.1, steps=1, noise=None)
    for wrong in ("ddim", solvers.adaptive_ode()):
        with pytest.raises(TypeError, match="expected a fixed-grid solver as predictor"):
            predictor_corrector(wrong)
    without = Denoiser(torch.nn.Identity(), model.sde)
    for wrong in (without, without.given(label=0)):
        with pytest.raises(
            TypeError, match=r"expected log_prob\(x, t\), which (Denoiser|Conditioned) does not"
        ):
            mala(wrong, x, 0.5, step=0.1, steps=1, noise=noise)


def test_reprs_say_how_they_were_made():
    expected = "predictor_corrector(ddim(eta=0.0), corrector_steps=1, snr=0.16, norm='sample')"
    assert repr(predictor_corrector(solvers.ddim())) == expected
    assert repr(annealed_langevin()) == "annealed_langevin(steps_per_level=5, step=0.1)"
