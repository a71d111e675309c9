"""Exact solutions along a sampler's noise, and the distance of laws that is estimated with them."""

from __future__ import annotations

import math

import pytest
import torch

from scoresde import grids, solvers

accuracy = pytest.importorskip(
    "benchmarks.accuracy", reason="run from the root of the repository, with `python -m pytest`"
)

from benchmarks import accuracy_sde, coupled, problems  # noqa: E402

F64 = torch.float64
SDE = accuracy.SDE
GRID = grids.quadratic(SDE, 8)


def run_of(solver, grid="quadratic"):
    (run,) = [run for run in accuracy.ours([solver]) if run.grid == grid]
    return run


def way_of(solver, calls=8):
    run = run_of(solver)
    return coupled.way_of(run.solve, SDE, run.nodes(SDE, calls), calls)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(
    "solver", [solvers.sa(3, tau=0.3), solvers.sde_dpmpp(2, 0.09), solvers.exponential(2, tau=0.3)], ids=repr
)
def test_the_noise_level_is_found(solver):
    found = way_of(solver)
    tau = found.level(GRID.lam[:-1] + 0.3 * GRID.lam.diff())
    torch.testing.assert_close(tau, torch.full_like(tau, 0.3), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.grid.t, GRID.t)
    assert found.responses.shape == (8, 1) and (found.responses > 0).all()


def test_a_noise_level_that_changes_is_found():
    """A step has one level: that with which it adds as much noise."""
    found = way_of(solvers.exponential(1, tau=lambda lam: 0.3 + 0.1 * lam.tanh()))
    for k, (low, high) in enumerate(zip(GRID.lam[:-1], GRID.lam[1:], strict=True)):
        middle = torch.linspace(low, high, 20001, dtype=F64)
        area = torch.trapezoid((0.3 + 0.1 * middle.tanh()) ** 2, middle)
        assert found.A[k + 1] - found.A[k] == pytest.approx(area.item(), rel=1e-7)


def test_steps_with_two_normals():
    """Each step's normal is what both of its normals add; one that adds none has none."""
    x = normal(1, 4, 1)
    found = way_of(solvers.edm(churn=0.0), 16)
    assert found.grid.t.shape == (9,) and all(found.normal(k, lambda k: x) is None for k in range(8))
    both = coupled.way_of(  # each adds its own number as often as its step has come
        lambda model, x, calls, noise: [x := x + (k % 2 + 1) * noise(k) for k in range(16)][-1], SDE, GRID, 16
    )
    torch.testing.assert_close(both.responses, torch.tensor([[1.0, 2.0]] * 8, dtype=F64))
    two = coupled.Way(GRID, GRID.lam, torch.tensor([[3.0, 4.0]] * 8, dtype=F64))
    asked = []
    torch.testing.assert_close(two.normal(2, lambda k: asked.append(k) or k * x), (0.6 * 4 + 0.8 * 5) * x)
    assert asked == [4, 5]


def test_a_sampler_that_cannot_do_so_few_steps_has_no_way():
    assert coupled.way_of(lambda *args: None, SDE, GRID, 8) is None


def test_normals_within_a_step_are_independent_and_sum_to_its_own():
    """As a linear map of (z, eta_1, ..., eta_m), all independent and standard."""
    unit = torch.eye(5, dtype=F64)
    variances = torch.tensor([0.1, 0.5, 0.2, 1.3], dtype=F64)
    z, *etas = unit
    rows = torch.stack(coupled.shared(z, etas, variances))
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(variances.sqrt() @ rows, variances.sum().sqrt() * z, rtol=0, atol=1e-14)
    assert coupled.shared(None, etas, variances) == etas


def test_dense_nodes_hold_those_of_the_sampler():
    t = torch.tensor([1.0, 0.5, 0.4999, 1e-3], dtype=F64)
    nodes, pieces = coupled.dense(t, torch.tensor([0.0, 0.0, 1.0], dtype=F64))
    assert len(nodes) == 1 + sum(pieces) and pieces[1] == 1
    assert torch.equal(nodes[[0, pieces[0], pieces[0] + 1, -1]], t)
    steps = -nodes.sqrt().diff()
    assert (steps > 0).all() and 0.9 < steps[: pieces[0]].max() * coupled.DENSE <= 1.000001
    assert 0.45 < steps[pieces[0] + 1 :].max() * coupled.DENSE <= 0.500001  # the more noise, the closer


def followed(way, model, x, calls, noise):
    """As a sampler of its own: the first normals are those of the sampler, the others fresh."""
    own = way.responses.numel()
    return coupled.follow(way, model, x, noise, lambda k, j: noise(own + 50 * k + j))


@pytest.mark.parametrize(
    ("solver", "calls", "limit"),
    [
        (solvers.sa(3, tau=0.3), 8, 2e-5),  # measured: 0.8e-5
        (solvers.sde_dpmpp(2, 0.02), 5, 1e-5),  # 0.5e-5
        (solvers.ddpm(), 6, 2e-4),  # 0.8e-4
        (solvers.edm(), 16, 5e-4),  # 2.3e-4, levels up to 3.7
    ],
    ids=repr,
)
def test_the_solution_is_exact_in_law(solver, calls, limit, unchecked):
    """On a Gaussian, where the law of its ends is that of an affine map."""
    way, run = way_of(solver, calls), run_of(solver)
    alone = run._replace(solve=lambda model, x, n, noise: followed(way, model, x, n, noise))
    law = accuracy_sde.in_eigenbasis(problems.gaussian())
    found = accuracy_sde.exact(alone, law, 1000).error  # at most so many normals
    assert found < limit < 0.01 * accuracy_sde.exact(run, law, calls).error


def test_it_stays_near_a_good_sampler_and_needs_its_noise():
    law = problems.ring()
    model, x = law.denoiser(SDE), normal(0, 256, 2)
    solver, calls = solvers.exponential(4, corrector=5, tau=0.3), 40
    run, way = run_of(solver), way_of(solver, calls)
    fresh = lambda k, j: normal(10_000 + 100 * k + j, 256, 2)  # noqa: E731
    ends = run.solve(model, x, calls, lambda k: normal(k, 256, 2))
    near, far = (
        coupled.follow(way, model, x, noise, fresh)
        for noise in (lambda k: normal(k, 256, 2), lambda k: normal(k + 1, 256, 2))
    )
    assert (near - ends).square().mean() < 0.05 * (far - ends).square().mean()


def test_samplers_share_a_solution_if_they_add_the_same_noise():
    keys = [
        way_of(s).key() for s in (solvers.sa(3, tau=0.3), solvers.exponential(2, tau=0.3), solvers.ddpm())
    ]
    assert keys[0] == keys[1] != keys[2]


def gap(scale, shift, n=4096, dim=3, alike=1.0, seed=0):
    """Between samples of N(0, 1) and of N(shift, scale^2), of which a part `alike` is the same."""
    directions = normal(3, 32, dim)
    x, y = normal(seed, n, dim), normal(seed + 1, n, dim)
    other = alike * x + math.sqrt(1 - alike**2) * y
    distance = accuracy_sde.Sliced(directions)
    found = distance(distance.ordered(scale * x + shift), distance.ordered(other))
    units = directions / directions.norm(dim=1, keepdim=True)
    return found, math.sqrt((scale - 1) ** 2 + shift**2 * units.sum(1).square().mean().item())


def test_the_distance_of_laws_is_found_without_bias(alpha_ledger):
    found, true = gap(1.0, 0.01)  # a shift moves all order statistics alike
    assert found.error == pytest.approx(true, rel=1e-9) and found.floor < 1e-6
    alpha_ledger.spend(4e-7, "products of differences have no bias, and their floor is three standard errors")
    off, noises = [], []
    for seed in range(10, 110, 2):
        found, true = gap(1.01, 0.0, seed=seed)
        assert found.error == pytest.approx(true, rel=0.1) and found.floor < 0.5 * true  # measured: 1 % each
        chance, true = gap(1.0, 0.3, alike=0.0, n=512, seed=seed)
        off.append(chance.error**2 - true**2)
        noises.append(chance.floor**2 / 3)
        assert chance.likely**2 - chance.error**2 == pytest.approx(chance.floor**2 / 3)
        assert gap(1.0, 0.3, alike=0.999, n=512, seed=seed)[0].floor < 0.4 * chance.floor
    off, noise = torch.tensor(off), torch.tensor(noises).square().mean().sqrt()
    # Of 500 seeds: a mean of -0.03, a standard deviation of 0.98; of 50 they are 0.14 and 0.1 off by chance.
    assert abs(off.mean()) < 0.8 * noise and 0.5 * noise < off.std() < 1.7 * noise


def test_ends_that_are_not_finite_are_infinitely_far():
    distance = accuracy_sde.Sliced(torch.ones(2, 2, dtype=F64))
    x = normal(0, 64, 2)
    y = x.clone()
    y[0, 0] = math.nan
    assert distance(distance.ordered(y), distance.ordered(x)) == (math.inf, 0.0, 0.0)


def test_choices_do_not_fall_for_luck():
    sure, lucky = accuracy_sde.Distance(2e-3, 1e-4, 2.1e-3), accuracy_sde.Distance(1e-12, 9e-3, 4e-3)
    assert sure.rank() < lucky.rank()
    assert accuracy_sde.Distance(2.0).rank() == 2.0


def test_mixtures_are_measured_along_their_noise(monkeypatch, unchecked):
    """A sampler that adds 0.02 to every end is so far off and no more; stages have samples of their own."""
    monkeypatch.setattr(accuracy_sde, "SAMPLES", {"narrow": 64, "choose": 256, "report": 512})
    measure, asked = accuracy_sde.on_samples("ring", quick=False), []
    run = run_of(solvers.exponential(4, corrector=5, tau=0.1))

    def shifted(model, x, calls, noise):
        asked.append((x, noise(0), noise(1)))
        found = run.solve(model, x, calls, noise)
        return None if found is None else 1.05 * found

    wrong = run._replace(solve=shifted)
    for stage in ("narrow", "choose", "report"):
        near, far = measure(run, 50, stage), measure(wrong, 50, stage)
        true = (
            problems.ring()
            .marginal(SDE, accuracy_sde.END)
            .sample(2**14, generator=torch.Generator().manual_seed(0))
        )
        expected = 0.05 * true.square().mean().sqrt().item()
        assert far.error == pytest.approx(expected, rel=0.1 if stage == "narrow" else 0.05)
        assert near.error < 0.2 * far.error and near.floor < 0.2 * far.error
    sets = [x for x, *_ in asked if len(x) > 60 and x.shape[1] == 2]
    assert {len(x) for x in sets} == {64, 256, 512}
    assert len({values.sum().item() for part in asked if part[0].shape[1] == 2 for values in part}) == 9
    assert measure(run._replace(solve=lambda *args: None), 50, "choose") is None
    assert measure(run, 8, "screen").floor == 0.0


def test_mixtures_are_measured_from_their_law_along_noise_of_two_kinds(monkeypatch, unchecked):
    """Starts are of the law at t = 1; what is fresh in a solution is no noise of the sampler."""
    monkeypatch.setattr(accuracy_sde, "SAMPLES", {"narrow": 16, "choose": 16, "report": 16})
    seen = []

    def follow(way, model, x, noise, fresh):
        seen.append((x, [noise(k) for k in range(8)] + [fresh(k, j) for k in range(8) for j in range(8)]))
        return x

    monkeypatch.setattr(accuracy_sde, "follow", follow)
    measure, run = accuracy_sde.on_samples("ring", quick=False), run_of(solvers.ddpm())
    measure(run, 8, "choose")
    ((x, normals),) = seen
    law = problems.ring().marginal(SDE, 1.0)
    assert torch.equal(x, law.sample(16, generator=torch.Generator().manual_seed(1)))
    assert len({z.sum().item() for z in normals}) == 72


def test_samples_of_the_ring_count_with_their_images():
    """Its rotations leave the law as it is; with them modes are found equally often."""
    law, generator = problems.ring(), torch.Generator().manual_seed(0)
    turns, directions = problems.rotations(), normal(4, 16, 2)
    x = law.sample(64, generator=generator)
    for turn in turns:
        assert torch.allclose(turn @ turn.T, torch.eye(2, dtype=F64), rtol=0, atol=1e-12)
        assert torch.allclose(law.log_prob(x @ turn.T), law.log_prob(x), rtol=0, atol=1e-9)
    assert len({tuple(turn.flatten().round(decimals=6).tolist()) for turn in turns}) == 8
    one = x[:1].expand(64, 2)
    images = (one @ turns[3].T, one)  # the same with their images, and not alone
    alone, together = (accuracy_sde.Sliced(directions, group) for group in (None, turns))
    assert together(*map(together.ordered, images)).error < 1e-7
    assert alone(*map(alone.ordered, images)).error > 0.3
