"""Surrogates, the exact maps of tables, and what `recommend` makes of them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from work import Work

from scoresde import EDM, VPSDE, Rectified, decode, encode, grids, likelihood, sample, solvers
from scoresde.laws import Gaussian, Mixture
from scoresde.select import (
    GRIDS,
    Candidate,
    Surrogate,
    gaussian_surrogate,
    kernel_surrogate,
    mixture_surrogate,
    pool,
    recommend,
    trials,
)
from scoresde.select.reasons import _spread
from scoresde.select.surrogate import _maximised, _principal, checked_batch
from scoresde.select.tables import maps, run_stack, stack
from scoresde.select.trials import Problem, exact_solution
from scoresde.solvers.base import Card, TableSolver
from scoresde.tableau import Tableau

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of calls of small functions

MODULE = sys.modules[recommend.__module__]  # scoresde.select.recommend is the function
SDE = VPSDE()
FEW = pool()[::9]
# The comparisons of small sets of samples below hold for these 38 solvers: their number and calls decide who
# is tried on how many.
FEW_SDE = [c for c in pool(stochastic=True) if c.grid_name in GRIDS][: 38 * len(GRIDS) : 11]
HEUN = Candidate(solvers.heun(), grids.uniform, "uniform")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A reference that is exact enough for few calls, and fast under run-time checks."""
    monkeypatch.setattr(trials, "REFERENCE_STEPS", 40)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spearman(a, b):
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def errors(recommendation):
    return {r.candidate: r.error for r in recommendation.ranking}


def blobs(dim=3, modes=4, spread=1.5, std=0.15):
    weights = torch.arange(1, modes + 1, dtype=torch.float64)
    factors = std * normal(modes, dim, dim, seed=3)
    covs = factors @ factors.mT + 0.05**2 * torch.eye(dim, dtype=torch.float64)
    return Mixture(weights / weights.sum(), spread * normal(modes, dim, seed=2), covs)


def some_tables(calls=(5, 8)):
    return [table for n in calls for c in FEW[::5] + FEW_SDE[::5] if (table := c.table(SDE, n)) is not None]


# Many tables at once


def test_maps_are_the_exact_laws_of_the_tables():
    mean = torch.tensor([0.7, -1.0, 2.0, 0.3], dtype=torch.float64)
    variances = torch.tensor([0.01, 0.3, 2.0, 0.0], dtype=torch.float64)
    tables = some_tables()
    found = maps(stack(tables), SDE, variances)
    assert len({len(t) for t in tables}) > 1
    assert len({t.mix.shape[1] for t in tables}) > 2
    assert any(bool(t.noise.any()) for t in tables)
    for i, table in enumerate(tables):
        law = table.law(Gaussian(mean, variances), SDE)
        assert torch.allclose(found.constant[i] * mean, law.mean, rtol=1e-9, atol=1e-11)
        variance = found.slope[i] ** 2 + found.spread[i] ** 2
        assert torch.allclose(variance, law.variance, rtol=1e-9, atol=1e-11)


def test_shorter_tables_do_not_look_at_an_end_without_noise():
    tables = [Candidate(s, grids.quadratic, "").table(SDE, 5, 0.0) for s in (solvers.heun(), solvers.ddim())]
    assert sorted(map(len, tables)) == [3, 5]
    found = maps(stack(tables), SDE, torch.zeros(1, dtype=torch.float64))
    assert found.slope.abs().max() < 1e-12
    assert torch.allclose(found.constant, torch.ones(2, 1, dtype=torch.float64))


def test_a_stack_runs_like_its_tables(device):
    law = blobs()
    model, tables = law.denoiser(SDE), some_tables()
    x, noise = normal(5, 3), normal(8, 5, 3, seed=1)
    there = law.to(device).denoiser(SDE)
    found = run_stack(stack(tables), there, x.to(device), list(noise.to(device))).cpu()
    for i, table in enumerate(tables):
        alone = solvers.from_tableau(table).solve(model, x, table.ends, noise=lambda k, shape: noise[k])
        assert torch.allclose(found[i], alone.x, rtol=1e-9, atol=1e-10), table.name


# Errors on a Gaussian are exact


class Flow(NamedTuple):
    """x -> slope x + shift, from a start of a mean and variance."""

    slope: float
    shift: float
    mean: float
    variance: float


def found_flow(candidate, model, need, calls):
    """What a candidate does to numbers, from runs from 0 and from 1."""
    how = {"steps": candidate.steps(calls), "grid": candidate.grid}
    go = decode if need == "samples" else encode
    ends = go(model, torch.tensor([[0.0], [1.0]], dtype=torch.float64), candidate.solver, **how).x.flatten()
    return float(ends[1] - ends[0]), float(ends[0])


def exact_flow(sde, m, v, need):
    """The flow keeps (x - alpha m)/V^(1/2)."""
    times = [sde.t_max, sde.default_end][:: 1 if need == "samples" else -1]
    a, b = (float(sde.alpha(t)) for t in times)
    V, W = (float(sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2) for t in times)
    slope = math.sqrt(W / V)
    start = (0.0, sde.prior_std**2) if need == "samples" else (a * m, V)
    return Flow(slope, (b - slope * a) * m, *start)


@pytest.mark.parametrize("sde", [SDE, EDM(0.01, 10.0)])
@pytest.mark.parametrize("need", ["samples", "encode"])
def test_distances_on_a_gaussian_against_runs(need, sde):
    mean, variances = [0.8, -0.3, 0.0], [0.02, 0.5, 1.3]
    data = torch.tensor(mean, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)
    got = errors(recommend(sde, data, 7, need, candidates=FEW[::12]))
    assert len(got) > 3
    for candidate, error in got.items():
        squares = 0.0
        for m, v in zip(mean, variances, strict=True):
            slope, shift = found_flow(candidate, Gaussian([m], v).denoiser(sde), need, 7)
            exact = exact_flow(sde, m, v, need)
            off = slope - exact.slope
            squares += off**2 * exact.variance + (off * exact.mean + shift - exact.shift) ** 2
        assert error == pytest.approx(math.sqrt(squares / 3), rel=1e-6)


def test_laws_of_stochastic_solvers_on_a_gaussian():
    law = Gaussian(torch.tensor([0.8, -0.3, 0.0]), torch.tensor([0.02, 0.5, 1.3]))
    got = errors(recommend(SDE, law, 7, "diversity", candidates=FEW_SDE))
    wanted = law.marginal(SDE, float(SDE.default_end))
    for candidate, error in got.items():
        found = candidate.table(SDE, 7).law(law, SDE)
        squares = (found.mean - wanted.mean) ** 2 + (found.variance.sqrt() - wanted.variance.sqrt()) ** 2
        assert error == pytest.approx(float(squares.mean().sqrt()), rel=1e-6)


def test_a_mixture_of_one_component_is_a_gaussian():
    mean, variances = normal(6, seed=4), torch.logspace(-2, 0, 6, dtype=torch.float64)
    gaussian = errors(recommend(SDE, Gaussian(mean, variances), 6, candidates=FEW))
    mixture = errors(
        recommend(SDE, Mixture([1.0], mean[None], variances[None]), 6, candidates=FEW, noises=512)
    )
    ratios = torch.tensor([mixture[c] / gaussian[c] for c in gaussian])
    assert (
        0.7 < float(ratios.min()) < float(ratios.max()) < 1.1
    )  # the median of six squares is less than their mean
    assert spearman(list(gaussian.values()), [mixture[c] for c in gaussian]) > 0.98


# What is recommended


def test_the_error_that_was_expected_is_found_on_the_data():
    law = blobs()
    found = recommend(SDE, law.sample(2048, generator=torch.Generator().manual_seed(5)), 8, candidates=FEW)
    model, shape = law.denoiser(SDE), (256, 3)
    drawn = sample(model, shape, found.solver, steps=found.steps, grid=found.grid, seed=3)
    exact = sample(model, shape, solvers.exponential(4), steps=150, seed=3)
    error = (drawn.x - exact.x).square().mean(1).sqrt().median()
    assert drawn.network_calls <= 8
    assert found.best.error / 2 < float(error) < 2 * found.best.error
    assert drawn.x.equal(
        sample(model, shape, solvers.from_tableau(found.table), grid=found.table.times, seed=3).x
    )
    for said in (found.best.candidate.name, found.why, "8 calls for samples"):
        assert said in repr(found)


def test_the_ranking_is_that_of_the_true_law():
    law = blobs()
    data = law.sample(2048, generator=torch.Generator().manual_seed(6))
    true = errors(recommend(SDE, law, 8, candidates=FEW, noises=256, seed=1))
    by_mixture = errors(recommend(SDE, data, 8, candidates=FEW))
    by_gaussian = errors(recommend(SDE, data, 8, candidates=FEW, surrogate=gaussian_surrogate))
    mixture, gaussian = (
        spearman(list(true.values()), [d[c] for c in true]) for d in (by_mixture, by_gaussian)
    )
    assert mixture > 0.98
    assert mixture > gaussian
    assert true[min(by_mixture, key=by_mixture.__getitem__)] < 1.25 * min(true.values())


def test_stochastic_solvers_on_a_mixture():
    law = blobs()
    true = recommend(SDE, law, 6, "diversity", candidates=FEW_SDE, seed=1)
    data = law.sample(2048, generator=torch.Generator().manual_seed(6))
    found = errors(recommend(SDE, data, 6, "diversity", candidates=FEW_SDE))
    wanted = errors(true)
    assert all(c.solver.card.stochastic for c in found)
    assert spearman(list(wanted.values()), [found[c] for c in wanted]) > 0.95
    assert "principal axes" in true.why


def spoiled(solver):
    """A solver that forgets a tenth of every output."""

    def build(sde, grid):
        table = solver.tableau(sde, grid)
        return Tableau(table.times, table.skip, 0.9 * table.out, table.keep, table.mix, table.noise)

    return TableSolver("spoiled", build, Card(1, None, 1, False, "a test"))


@pytest.mark.parametrize("need", ["samples", "encode"])
@pytest.mark.parametrize("law", [blobs(), Gaussian(normal(3), torch.tensor([0.1, 0.5, 1.0]))])
def test_a_planted_bad_solver_is_last(need, law):
    good = [Candidate(s, grids.quadratic, "quadratic") for s in (solvers.unipc(2), solvers.dpmpp(2))]
    bad = Candidate(spoiled(solvers.dpmpp(2)), grids.quadratic, "quadratic")
    found = recommend(SDE, law, 12, need, candidates=[bad, *good])
    assert found.ranking[-1].candidate == bad
    assert found.ranking[-1].error > 3 * found.ranking[0].error


def test_a_rotation_changes_nothing():
    law = blobs()
    data = law.sample(1024, generator=torch.Generator().manual_seed(7))
    turned = data @ torch.linalg.qr(normal(3, 3, seed=8)).Q
    for surrogate, tolerance in ((gaussian_surrogate, 1e-9), (mixture_surrogate, 0.5)):
        before, after = (
            errors(recommend(SDE, points, 6, candidates=FEW, surrogate=surrogate))
            for points in (data, turned)
        )
        assert before.keys() == after.keys()
        assert all(after[c] == pytest.approx(before[c], rel=tolerance) for c in before)
        assert spearman(list(before.values()), [after[c] for c in before]) > 0.98


def test_the_same_call_gives_the_same_ranking_and_another_seed_other_noises():
    data = blobs().sample(256, generator=torch.Generator().manual_seed(9))
    one, two, other = (recommend(SDE, data, 5, candidates=FEW[::4], seed=s) for s in (0, 0, 1))
    assert one.ranking == two.ranking
    assert one.ranking != other.ranking
    assert {r.candidate for r in one.ranking} == {r.candidate for r in other.ranking}


def test_equal_tables_are_listed_once():
    twins = [solvers.dpmpp(2), solvers.exponential(2)]
    found = recommend(SDE, blobs(), 5, candidates=[Candidate(s, grids.uniform, "uniform") for s in twins])
    assert [r.candidate.solver for r in found.ranking] == twins[:1]


@pytest.mark.parametrize("field", ["skip", "out", "keep", "mix", "times"])
def test_tables_that_differ_in_one_field_are_both_listed(field):
    def build(sde, grid):
        table = solvers.dpmpp(2).tableau(sde, grid)
        values = {key: getattr(table, key) for key in ("times", "skip", "out", "keep", "mix", "noise")}
        values[field] = values[field] * 0.99 + 1e-3 * (values[field] != 0 if field == "mix" else 1)
        return Tableau(**values)

    other = TableSolver("other", build, Card(1, None, 1, False, "a test"))
    both = [Candidate(s, grids.uniform, "uniform") for s in (solvers.dpmpp(2), other)]
    assert len(recommend(SDE, Gaussian([0.0], 1.0), 5, candidates=both).ranking) == 2


@pytest.mark.parametrize("sde", [EDM(), Rectified()])
def test_other_processes(sde):
    found = recommend(sde, blobs(), 6, candidates=FEW)
    model = blobs().denoiser(sde)
    drawn = sample(model, (64, 3), found.solver, steps=found.steps, grid=found.grid)
    exact = sample(model, (64, 3), solvers.exponential(4, stored="flow", variable="sigma"), steps=150)
    error = float((drawn.x - exact.x).square().mean(1).sqrt().median())
    assert found.best.error / 3 < error < 3 * found.best.error
    assert found.best.error < 0.1 * found.ranking[-1].error


# Guidance


def test_guidance_mixes_the_denoisers_of_the_components():
    law, x = blobs(), normal(8, 3)
    exact, k, t = law.denoiser(SDE), torch.arange(8) % 4, torch.rand(8, dtype=torch.float64) + 1e-2
    for i in range(8):
        alone = Gaussian(law.means[k[i]], law._spectrum.dense()[k[i]]).denoiser(SDE)
        assert torch.allclose(exact.of_component(x, t, k)[i], alone(x, t)[i], rtol=1e-9, atol=1e-12)


def test_guidance_of_scale_zero_is_none_and_more_is_harder():
    plain, zero, two, eight = (
        errors(recommend(SDE, blobs(), 8, guidance=g, candidates=FEW[::3])) for g in (None, 0.0, 2.0, 8.0)
    )
    assert zero == pytest.approx(plain, rel=1e-9)
    assert min(eight.values()) > 1.5 * min(two.values())


def test_guidance_of_scale_one_is_the_component_by_itself():
    mean, variance = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[0.04, 0.3]]).double()
    far = Mixture([0.5, 0.5], torch.cat([mean, -mean]), torch.cat([variance, variance]))
    by_class = errors(recommend(SDE, far, 8, guidance=1.0, candidates=FEW[::3], noises=512))
    alone = errors(recommend(SDE, Mixture([1.0], mean, variance), 8, candidates=FEW[::3], noises=512))
    assert all(by_class[c] == pytest.approx(alone[c], rel=0.2) for c in alone)


@pytest.mark.parametrize("encode", [False, True])
def test_the_spread_counts_what_lies_outside(encode):
    """Three coordinates outside of which the law is known, at an end with much noise, or at t_max."""
    law, rest = Gaussian([0.0, 0.0], 0.5), 2.0
    problem = Problem(SDE, 0.3, Surrogate(law, rest, 3), 4096, 0, None)
    t = SDE.t_max if encode else 0.3
    alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
    variance = (2 * (0.5 * alpha**2 + sigma**2) + 3 * (rest * alpha**2 + sigma**2)) / 5
    found = _spread(problem, exact_solution(problem, 5, encode), encode)
    assert found == pytest.approx(variance**0.5, rel=0.03)  # 5 standard errors of the part inside


def test_as_many_samples_are_far_whatever_little_there_is_outside():
    """All distances are per root of all coordinates, so that what is far is too."""
    law = Mixture([0.5, 0.5], [[-3.0, 1.0], [3.0, 1.0]], 0.05)
    told = [recommend(SDE, Surrogate(law, 0.0, others), 3, candidates=[HEUN]).why for others in (0, 98)]
    assert "% of the samples end far" in told[0]
    assert told[0] == told[1]


# Likelihood


def test_how_many_latents_are_far_is_by_their_spread_and_not_the_datas():
    """Here 80: an error of 0.02 of it is none to speak of."""
    law = Mixture([0.5, 0.5], [[0.0, 0.0], [4.0, 4.0]], 1.0)
    few, enough = (
        recommend(EDM(0.002, 80.0), law, calls, "encode", candidates=pool()[::40]) for calls in (3, 12)
    )
    assert "10.2 % of the samples end far from the exact solution: more calls help" in few.why
    assert 1 < enough.best.error < 2 and "end far" not in enough.why


def test_a_likelihood_takes_the_calls_and_has_the_error_that_is_said(monkeypatch):
    few = dict(list(GRIDS.items())[::8])
    monkeypatch.setattr(MODULE, "GRIDS", few)
    monkeypatch.setattr(MODULE, "ORDERS", (1, 3))
    law = blobs(2)
    found = recommend(SDE, law, 14, "likelihood")
    rule, x = found.best.candidate, law.marginal(SDE, 1e-3).sample(64)
    got = likelihood.log_prob(law.denoiser(SDE), x, order=rule.order, grid=found.grid(SDE, found.steps))
    exact = law.marginal(SDE, 1e-3).log_prob(x)
    assert got.network_calls == 14
    error = float((got.corrected - exact).abs().median()) / 2
    assert error < 5 * found.best.error + 1e-4
    assert found.ranking[-1].error > 5 * found.best.error
    with pytest.raises(ValueError, match=r"log_prob\(model, x, order="):
        _ = found.solver


# Surrogates


def test_a_fit_finds_the_modes(alpha_ledger):
    law = blobs(2, 3, spread=3.0)
    n, sigmas = 4096, 6.7
    data = law.sample(n, generator=torch.Generator().manual_seed(11))
    alpha_ledger.spend(2e-10, "means and weights of a fit to three far modes: 9 numbers, 6.7 sigma")
    fitted = mixture_surrogate(data, components=3).law

    def off(fitted, law):
        nearest = torch.cdist(law.means, fitted.means).argmin(1)
        counts = n * law.weights
        means = (fitted.means[nearest] - law.means).abs() * counts.sqrt()[:, None]
        weights = (fitted.weights[nearest] - law.weights).abs() / (law.weights * (1 - law.weights) / n).sqrt()
        stds = torch.stack([s.diagonal().sqrt() for s in law._spectrum.dense()])
        return max(float((means / stds).max()), float(weights.max()))

    assert off(fitted, law) < sigmas
    wrong = Mixture(law.weights.flip(0), law.means, law._spectrum.dense())
    assert off(fitted, wrong) > sigmas
    covs = fitted._spectrum.dense()[torch.cdist(law.means, fitted.means).argmin(1)]
    assert torch.allclose(covs, law._spectrum.dense(), rtol=0.2, atol=0.02 * float(covs.abs().max()))
    assert 3 <= len(mixture_surrogate(data).law.means) <= 8


def test_covariances_are_shrunk_by_the_oracle_approximating_weight():
    points = normal(40, 5, seed=12) * torch.tensor([0.1, 0.3, 1.0, 2.0, 3.0], dtype=torch.float64)
    S = torch.cov(points.T, correction=0)
    p, n, t2, tr = 5, 40, float((S @ S).trace()), float(S.trace())
    rho = ((1 - 2 / p) * t2 + tr**2) / ((n + 1 - 2 / p) * (t2 - tr**2 / p))
    expected = (1 - rho) * S + rho * tr / p * torch.eye(5, dtype=torch.float64)
    assert 0.01 < rho < 0.5
    assert torch.allclose(gaussian_surrogate(points).law.cov, expected, rtol=1e-4, atol=1e-5)


def test_few_samples_are_taken_as_they_are_unless_there_is_guidance():
    few, many = normal(39, 2, seed=20), normal(40, 2, seed=20)
    how = {"calls": 5, "candidates": FEW[::9]}
    assert len(recommend(SDE, few, **how).surrogate.law.means) == 39
    assert len(recommend(SDE, many, **how).surrogate.law.means) < 8
    spread = torch.cat([few - 9, few + 9])[::2]
    assert len(recommend(SDE, spread, guidance=2.0, **how).surrogate.law.means) < 8


def test_all_samples_count_for_a_mixture_also_those_that_a_fit_does_not_look_at(monkeypatch):
    monkeypatch.setattr(MODULE, "mixture_surrogate", gaussian_surrogate)  # fast
    for n, kind in ((4199, Mixture), (4200, Gaussian)):
        found = recommend(SDE, normal(n, 210, seed=31), 5, candidates=FEW[::9])
        assert type(found.surrogate.law) is kind


def test_kernels_are_the_samples_with_a_part_of_the_spread():
    data = normal(2100, 2, seed=19) * torch.tensor([1.0, 3.0], dtype=torch.float64)
    law = kernel_surrogate(data, width=0.5).law
    own = set(map(tuple, data.tolist()))
    assert len(law.means) == len(own & set(map(tuple, law.means.tolist()))) == 1024
    assert kernel_surrogate(data[:1000]).law.means.equal(data[:1000])
    within = law.variance - law.means.var(0, correction=0)
    assert within.tolist() == pytest.approx([0.25 * float(data.var(0).mean())] * 2, rel=1e-9)
    assert kernel_surrogate(normal(40, 300)).dim == 300
    with pytest.raises(ValueError, match="expected a width"):
        kernel_surrogate(data, width=0.0)


@pytest.mark.parametrize("n", [4097, 20_000])
def test_a_fit_sees_all_classes_of_data_that_go_through_them_in_turn(n):
    angle = torch.arange(n) % 10 * (math.pi / 5)
    data = torch.stack([angle.cos(), angle.sin()], 1) + 0.01 * normal(n, 2, seed=30)
    for found in (mixture_surrogate(data, components=1), kernel_surrogate(data, width=0.01)):
        assert found.law.variance.tolist() == pytest.approx([0.5, 0.5], rel=0.1)
    spacing = torch.cdist(kernel_surrogate(data).law.means, data[:10]).amin(0)
    assert float(spacing.max()) < 0.1
    assert len(checked_batch(data)) == 4096


def test_a_component_without_samples_is_dropped():
    points, shares = normal(20, 2), torch.zeros(20, 3, dtype=torch.float64)
    shares[:12, 0], shares[12:, 2] = 1.0, 1.0
    made = _maximised(points, shares)
    assert made.weights.tolist() == [0.6, 0.4]
    assert torch.allclose(made.means, torch.stack([points[:12].mean(0), points[12:].mean(0)]))
    assert bool(made.covs.isfinite().all())


def test_data_of_many_dimensions_in_principal_coordinates():
    D, frame = 300, torch.linalg.qr(normal(300, 4, seed=13)).Q
    inside = blobs(4).sample(600, generator=torch.Generator().manual_seed(14))
    data = inside @ frame.T + 0.05 * normal(600, D, seed=15) + 0.2
    s = mixture_surrogate(data)
    assert (s.dim, s.law.dim) == (D, 64)
    total = float(data.var(0).sum())
    assert float(s.law.variance.sum()) + s.others * s.rest == pytest.approx(total, rel=0.02)
    assert float(s.law.mean.norm()) == pytest.approx(float(data.mean(0).norm()), rel=1e-6)
    assert 0.5 * 0.05**2 < s.rest < 1.1 * 0.05**2
    assert mixture_surrogate(data[:40]).law.dim == 40


@pytest.mark.parametrize("need", ["samples", "encode", "diversity"])
def test_what_is_outside_counts_as_if_it_were_inside(need):
    mean = torch.tensor([0.7, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    variances = torch.tensor([0.5, 0.1, 0.02, 0.02, 0.02], dtype=torch.float64)
    few = FEW_SDE if need == "diversity" else FEW
    whole = errors(recommend(SDE, Gaussian(mean, variances), 6, need, candidates=few))
    part = Surrogate(Gaussian(mean[:2], variances[:2]), rest=0.02, others=3)
    assert errors(recommend(SDE, part, 6, need, candidates=few)) == pytest.approx(whole, rel=1e-9)


def test_what_is_outside_counts_on_a_mixture():
    law = blobs()
    part = Surrogate(law, rest=0.02, others=500)
    alone = Gaussian(torch.zeros(1), 0.02)
    got = errors(recommend(SDE, part, 6, candidates=FEW[::3]))
    inside, outside = (errors(recommend(SDE, p, 6, candidates=FEW[::3])) for p in (law, alone))
    for c in got:
        wanted = math.sqrt((3 * inside[c] ** 2 + 500 * outside[c] ** 2) / 503)
        assert got[c] == pytest.approx(wanted, rel=1e-6)


def test_what_is_outside_counts_for_laws_on_a_mixture():
    law, few = blobs(), FEW_SDE[::4]
    got = errors(recommend(SDE, Surrogate(law, rest=0.02, others=5), 6, "diversity", candidates=few))
    alone = Gaussian(torch.zeros(1), 0.02)
    inside, outside = (errors(recommend(SDE, p, 6, "diversity", candidates=few)) for p in (law, alone))
    for c in got:
        assert got[c] == pytest.approx(math.sqrt((3 * inside[c] ** 2 + 5 * outside[c] ** 2) / 8), rel=1e-6)


@pytest.mark.parametrize("sde", [SDE, EDM(0.01, 2.0)])
def test_sampled_distances_of_laws_are_the_exact_ones(sde):
    """Where all directions are alike, the sliced distance is that of a coordinate."""
    mean = torch.zeros(1, 3, dtype=torch.float64)
    for noises, tolerance in ((64, 0.15), (512, 0.05)):
        how = {"need": "diversity", "candidates": FEW_SDE[::3], "noises": noises}
        exact = errors(recommend(sde, Gaussian(mean[0], 0.5), 5, **how))
        found = errors(recommend(sde, Mixture([1.0], mean, 0.5), 5, **how))
        far = [c for c in exact if 0.1 < exact[c] < 0.4]
        assert len(far) > 4
        assert [found[c] for c in far] == pytest.approx([exact[c] for c in far], rel=tolerance)


def test_images_and_their_laws():
    data = normal(64, 3, 2, 2, seed=16).float()
    found = recommend(SDE, data, 5, candidates=FEW[::9])
    assert found.surrogate.law.event_shape == (12,)
    law = Mixture([0.5, 0.5], normal(2, 3, 2, 2, seed=17), 0.1)
    assert recommend(SDE, law, 5, candidates=FEW[::9]).best.error > 0
    assert recommend(SDE, law, 5, "diversity", candidates=FEW_SDE[::9]).best.error > 0


@pytest.mark.parametrize(("n", "dim"), [(90, 80), (70, 100), (20, 100)])
def test_directions_of_the_largest_variances_are_those_of_an_svd(n, dim):
    points = normal(n, dim, seed=5) * torch.logspace(0, -3, dim, dtype=torch.float64)
    for repeated in (points, points[:3].repeat(n, 1)):  # and of data of lower rank than is asked for
        centred = repeated - repeated.mean(0)
        frame = _principal(centred, 10)
        assert torch.allclose(frame @ frame.T, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
        known = torch.linalg.svdvals(centred)[:10].square().sum()
        assert torch.allclose((centred @ frame.T).square().sum(), known, rtol=1e-12)


# What does not fit


@pytest.mark.parametrize(
    ("kind", "words", "how"),
    [
        (TypeError, "expected an SDE", {"sde": "vp"}),
        (ValueError, "whole number of calls", {"calls": 0}),
        (ValueError, "whole number of calls", {"calls": 2.0}),
        (ValueError, r"expected a seed, a whole number from -2\^63 to 2\^64 - 1", {"seed": 2**64}),
        (ValueError, "expected a seed", {"seed": -(2**63) - 1}),
        (ValueError, "expected a seed", {"seed": 1.5}),
        (ValueError, "whole number of noises", {"noises": 1}),
        (ValueError, "expected a need among", {"need": "speed"}),
        (TypeError, "expected a batch of data", {"data": [[1.0, 2.0]]}),
        (TypeError, "expected a batch of data", {"data": torch.zeros(20, 2, dtype=torch.long)}),
        (ValueError, "at least 8 samples", {"data": normal(7, 2)}),
        (ValueError, "at least 8 samples", {"data": normal(20)}),
        (ValueError, "finite data", {"data": normal(20, 2) / 0}),
        (ValueError, "data that differ", {"data": torch.ones(20, 2)}),
        (ValueError, "of one shape", {"data": (torch.zeros(2), torch.ones(3))}),
        (ValueError, "two tensors", {"data": (torch.zeros(2),)}),
        (ValueError, "variances >= 0", {"data": (torch.zeros(2), -torch.ones(2))}),
        (ValueError, "expected an end", {"end": 3.0}),
        (
            ValueError,
            "pay for a step",
            {"calls": 1, "candidates": [Candidate(solvers.heun(), grids.uniform, "u")]},
        ),
        (ValueError, "found stochastic", {"need": "encode", "candidates": FEW_SDE}),
        (ValueError, "found stochastic", {"guidance": 2.0, "candidates": FEW_SDE}),
        (ValueError, "law of guided samples", {"need": "diversity", "guidance": 2.0}),
        (ValueError, "stand for classes", {"guidance": 2.0, "data": Gaussian(torch.zeros(2), 1.0)}),
        (ValueError, "finite number", {"guidance": math.nan}),
        (ValueError, "at least 8 calls", {"need": "likelihood", "calls": 7}),
        (ValueError, "orders and grids of its own", {"need": "likelihood", "candidates": FEW}),
        (TypeError, "expected candidates such as", {"candidates": []}),
        (TypeError, r"expected candidates such as .* found \[dpmpp", {"candidates": [solvers.dpmpp(2)]}),
        (
            ValueError,
            "coefficients are finite; found 5 calls and end=0",
            {"need": "encode", "end": 0.0, "calls": 5},
        ),
    ],
)
def test_arguments_that_do_not_fit(kind, words, how, unchecked):
    given = {"sde": SDE, "data": blobs(), "candidates": None if "need" in how else FEW[::9], **how}
    with pytest.raises(kind, match=words):
        recommend(**given)


@pytest.mark.parametrize("components", [0, 21, 2.0, True])
def test_a_number_of_components_that_does_not_fit(components, unchecked):
    with pytest.raises(ValueError, match="number of components"):
        mixture_surrogate(normal(20, 2), components=components)


def test_few_different_samples_give_fewer_components():
    data = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).repeat(10, 1)
    fitted = mixture_surrogate(data, components=5).law
    assert len(fitted.means) == 2
    assert torch.allclose(fitted.means.sort(0).values, torch.tensor([[0.0, 0.0], [2.0, 1.0]]).double())


# The benchmark


def test_what_the_benchmark_found():
    result = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "recommend.json").read_text())
    rows = [row for row in result["rows"] if row["need"] == "samples"]
    assert len({row["number"] for row in rows}) >= 30
    assert {row["calls"] for row in rows} == {5, 10, 20, 50}
    assert (min(row["dim"] for row in rows), max(row["dim"] for row in rows)) == (2, 64)
    ratios = torch.tensor([row["mixture"]["ratio"] for row in rows])
    assert sum(row["mixture"]["spearman"] for row in rows) / len(rows) >= 0.9
    assert float(ratios.median()) <= 1.25
    assert float(ratios.quantile(0.9)) <= 2.0


def test_only_the_samples_that_a_surrogate_looks_at_are_made_float64():
    data = torch.randn(20000, 5)
    with Work() as work:
        points = checked_batch(data)
    assert points.shape == (4096, 5) and points.dtype == torch.float64
    assert max(work.made) <= data.nbytes
