"""The accuracy benchmark: what it measures, and that its committed results still hold."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from scoresde import grids, solvers
from scoresde.select.coupling import law_distances
from scoresde.tableau import Tableau

accuracy = pytest.importorskip(
    "benchmarks.accuracy", reason="run from the root of the repository, with `python -m pytest`"
)

from benchmarks import (  # noqa: E402
    accuracy_sde,
    adaptive,
    likelihood,
    peers,
    problems,
    recommend,
    reliability,
    sde_default,
    tuning,
    tuning_grid,
)

F64 = torch.float64
SDE = accuracy.SDE
LAW = accuracy_sde.in_eigenbasis(problems.gaussian())
NODES = grids.quadratic  # of runs that are only asked for their errors


def cells(stem, listed, grids=accuracy.MORE_GRIDS, calls=(8, 20)):
    """(calls, run, error on the first noises) of the configurations that the results chose for us."""
    runs = {(run.solver, run.grid): run for run in accuracy.ours(listed, grids)}
    rows = json.loads((accuracy.RESULTS / f"{stem}.json").read_text())["rows"]
    for row in rows:
        for side in ("ours", "default"):
            if row["calls"] in calls:
                yield row["calls"], runs[row[side]["solver"], row[side]["grid"]], row[side]["first"]


@pytest.mark.parametrize("name", ["gaussian", "ring", "anisotropic", "subspace"])
def test_deterministic_results_hold(name, unchecked):
    measure = accuracy.deterministic(name, False)
    for calls, run, error in cells(f"accuracy_{name}", accuracy.candidates()):
        assert measure(run, calls, "screen").error <= error * (1 + 1e-6), (run, calls)


def test_stochastic_results_hold(unchecked):
    measure = accuracy_sde.on_gaussian(problems.gaussian(seed=0), problems.gaussian(seed=1))
    for calls, run, error in cells("accuracy_sde_gaussian", accuracy_sde.candidates(), accuracy_sde.MORE):
        assert measure(run, calls, "screen").error <= error * (1 + 1e-6), (run, calls)


@pytest.mark.parametrize("solver", [solvers.ddim(0.5), solvers.sa(2, 3), solvers.edm()], ids=repr)
def test_unit_noises_give_the_law_of_the_table(solver):
    (run,) = [run for run in accuracy.ours([solver]) if run.grid == "quadratic"]
    found = accuracy_sde.exact(run, LAW, 10)
    table = solver.tableau(SDE, grids.quadratic(SDE, solver.steps_for(10)))
    law, target = table.law(LAW, SDE, LAW.marginal(SDE, 1.0)), LAW.marginal(SDE, accuracy_sde.END)
    squares = (law.mean - target.mean) ** 2 + (law.variance.sqrt() - target.variance.sqrt()) ** 2
    assert found.error == pytest.approx(squares.mean().sqrt().item(), rel=1e-10)


@pytest.mark.parametrize("solver", [solvers.heun(), solvers.euler_maruyama(), solvers.unipc(3)], ids=repr)
def test_the_subspace_in_few_coordinates(solver):
    generator = torch.Generator().manual_seed(0)
    frame = problems.directions().frame
    x, *z = torch.randn(6, 4, 3072, generator=generator, dtype=F64)
    model, small = problems.subspace().denoiser(SDE), problems.inside().denoiser(SDE)
    grid = grids.quadratic(SDE, 5)
    # Outside, noise would turn every sample's direction from step to step.
    z = [noise @ frame @ frame.T for noise in z]
    full = solver.solve(model, x, grid, noise=lambda k, shape: z[k]).x
    few = solver.solve(small, problems.to_inside(x), grid, noise=lambda k, shape: problems.to_inside(z[k])).x
    torch.testing.assert_close(few.abs(), problems.to_inside(full).abs(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(few.norm(dim=1), full.norm(dim=1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1, 0.01, 1e-3])
def test_the_fast_denoiser_inside_is_that_of_the_law(t):
    law, time = problems.inside(), torch.tensor(t, dtype=F64)
    x = law.marginal(SDE, t).sample(64, generator=torch.Generator().manual_seed(1))
    found = problems.Inside(SDE)(x, time)
    torch.testing.assert_close(found, law.denoiser(SDE)(x, time), rtol=1e-9, atol=1e-11)


def test_score_leaves_flips_out():
    found = torch.tensor([[0.0, 0.0], [0.1, 0.1], [3.0, 4.0], [math.nan, 0.0]], dtype=F64)
    score = accuracy.score(found, torch.zeros(4, 2, dtype=F64), 2)
    assert score.flips == 0.5
    assert score.error == pytest.approx(math.sqrt(0.1**2 / 2))
    assert score.rank() == pytest.approx(score.error + 0.5)


def test_equal_tables_count_once():
    same = [solvers.ddim(), solvers.dpm(1), solvers.dpmpp(1), solvers.deis(1, "t"), solvers.dpmpp(2)]
    assert accuracy.distinct(same) == [same[0], same[-1]]
    noisy = [solvers.ddpm(), solvers.sde_dpmpp(1), solvers.ddim(0.5)]
    assert accuracy.distinct(noisy) == [noisy[0], noisy[-1]]


def test_what_is_at_the_floor_has_no_ratio():
    one, other = {"error": 4.0, "floor": 1.5}, {"error": 1.4, "floor": 1.5}
    assert accuracy.ratio(one, {"error": 2.0}) == 2.0
    assert accuracy.ratio(other, other) is None
    assert accuracy.ratio(one, other) == pytest.approx(4 / 1.5)  # the floor at least
    assert accuracy.ratio(other, one) == pytest.approx(1.5 / 4)
    assert accuracy._ratio(other, one) == "<= 0.38" and accuracy._ratio(one, other) == "2.67"
    assert accuracy._ratio(other, other) == "at the floor"


def test_a_board_narrows_down_and_keeps_what_was_measured_last():
    """20 runs of each side, of which the first 16, by what is screened, are tried again; of these 4 by the
    next measure are chosen from, by the last one, which the others would have won."""
    runs = [
        accuracy.Run(side, f"{side}{k}", "grid", lambda *args: None, NODES)
        for side in accuracy.SIDES
        for k in range(20)
    ]
    asked = []

    def measure(run, calls, stage):
        asked.append((stage, run.solver))
        k = int(run.solver.removeprefix(run.side))
        error = {
            "screen": k,
            "narrow": 20 - k,
            "shortlist": abs(k - 10.4),
            "choose": abs(k - 9.6),
            "report": 1,
        }
        return accuracy_sde.Distance(1.0 + error[stage])

    stages = ("screen", accuracy.best_of_all), ("shortlist", partial(accuracy.best_of_all, kept=4))
    result = accuracy.board("gaussian", runs, [5], measure, ("ours3", "grid"), stages)
    ours = [name for stage, name in asked if stage == "shortlist" and name.startswith("ours")]
    assert ours == [f"ours{k}" for k in range(16)]
    assert {name for stage, name in asked if stage == "choose"} == {
        f"{side}{k}" for side in accuracy.SIDES for k in (9, 10, 11, 12)
    }
    (row,) = result["rows"]
    assert [row[side]["solver"] for side in (*accuracy.SIDES, "default")] == ["ours10", "theirs10", "ours3"]
    kept = {name: errors["grid"] for name, errors in result["all"]["ours"].items()}
    assert sorted(kept) == sorted(ours) and kept["ours10"] == [1.4] and kept["ours8"] == [3.4]


def test_a_board_gives_up_what_is_far_off_the_best_of_its_own_side():
    runs = [accuracy.Run(*about, "grid", lambda *args: None, NODES) for about in FAR]
    asked = []

    def measure(run, calls, stage):
        asked.append((run.solver, calls))
        return accuracy_sde.Distance(FAR[run.side, run.solver])

    accuracy.board("gaussian", runs, [15, 10, 8, 5], measure, ("none", "grid"))
    assert {calls for name, calls in asked if name == "hopeless"} == {5, 8, 10}
    for name in ("good", "fair", "worse than ours"):
        assert {calls for who, calls in asked if who == name} == {5, 8, 10, 15}


FAR = {
    ("ours", "good"): 1.0,
    ("ours", "fair"): 14.9,
    ("ours", "hopeless"): 15.1,
    ("theirs", "worse than ours"): 100.0,
}


def test_ratios_are_averaged_in_the_logarithm():
    rows = [{"default": {"error": error}, "theirs": {"error": 2.0}} for error in (2.0, 8.0)]
    rows += [{"theirs": {"error": 1.0}}]
    assert accuracy.mean_ratio([{"rows": rows[:1]}, {"rows": rows[1:]}]) == pytest.approx(2.0)
    assert math.isnan(accuracy.mean_ratio([{"rows": rows[2:]}]))


def test_a_default_is_the_best_over_problems_and_calls():
    """Each problem counts alike, however large its errors are, and what is below the floor is no better than
    that; who falls behind as calls grow is not tried with more."""
    errors = {"steady": (0.1, 1.0), "first": (0.001, 9.0), "second": (9.0, 0.9), "unfit": (None, 1.0)}
    runs = [accuracy.Run("ours", name, "grid", lambda *args: None, NODES) for name in errors]
    tried = []

    def measure(problem, run, calls, stage):
        tried.append((run.solver, calls))
        error = errors[run.solver][problem]
        return None if error is None else accuracy_sde.Distance(error, floor=0.05 * (1 - problem))

    both = [partial(measure, 0), partial(measure, 1)]
    ranks = sde_default.ranked(both, runs, "narrow", 3)
    assert [run.solver for run in sde_default.best(ranks, 3)] == ["steady", "first", "second"]
    assert ranks[runs[0]] == pytest.approx((math.log(0.1) / 2, 0.0))
    assert ranks[runs[1]] == pytest.approx(((math.log(0.05) + math.log(9.0)) / 2, math.log(9.0)))
    assert ("unfit", accuracy.CALLS[0]) in tried and ("unfit", accuracy.CALLS[1]) not in tried
    near = dict(zip(runs[:3], map(sde_default.Rank, (0, 0.09, 0.1), (2, 1.5, 1)), strict=True))
    assert sde_default.chosen(near).solver == "first"


def test_one_path_shares_the_noise_of_a_step():
    normals = iter(torch.eye(3, dtype=F64))
    increment = peers.one_path(lambda: next(normals))
    a, m, b = (torch.tensor(level, dtype=F64) for level in (5.0, 4.0, 1.0))
    first, whole, later = increment(a, m), increment(a, b), increment(b, b / 2)
    assert float(whole @ whole) == pytest.approx(1)
    assert float(first @ whole) == pytest.approx(0.5)  # sqrt(1/4): a quarter of the variance is common
    assert float(later @ whole) == 0


def test_torchsde_euler_is_euler_maruyama():
    grid = grids.uniform(SDE, 7)
    z = torch.randn(7, 5, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    model = LAW.denoiser(SDE)
    task = peers.Task(SDE, grid.t, model, lambda k: z[k])
    ours = solvers.euler_maruyama().solve(model, z[0], grid, noise=lambda k, shape: z[k]).x
    torch.testing.assert_close(peers.torchsde("euler")(task, z[0]), ours, rtol=1e-10, atol=1e-10)


def test_torchdiffeq_steps_from_node_to_node():
    pytest.importorskip("torchdiffeq", reason=peers.RECIPE)
    grid, model = grids.quadratic(SDE, 6), LAW.denoiser(SDE)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    seen = []
    task = peers.Task(SDE, grid.t, lambda y, t: seen.append(float(t)) or model(y, t))
    found = peers.torchdiffeq("midpoint")(task, x)
    velocity, y = SDE.probability_flow(model), x
    for t, s in zip(grid.t[:-1], grid.t[1:], strict=True):
        y = y + (s - t) * velocity(y + (s - t) / 2 * velocity(y, t), (s + t) / 2)
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)
    assert len(seen) == 12 and seen[::2] == grid.t[:-1].tolist()


@pytest.mark.parametrize("library", ["diffusers", "azula"])
@pytest.mark.parametrize("steps", [1, 6])
def test_public_ancestral_sampling_adds_noise_in_every_step(library, steps):
    """The last one included: here it ends where there is noise left."""
    if reason := peers.missing(library):
        pytest.skip(reason)
    grid, model = grids.quadratic(SDE, steps), LAW.denoiser(SDE)
    x, *z = torch.randn(steps + 1, 5, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = peers.SDE[f"{library} DDPM"].run(peers.Task(SDE, grid.t, model, lambda k: z[k]), x)
    alpha, sigma, y = SDE.alpha(grid.t), SDE.sigma(grid.t), x
    for k in range(steps):  # the posterior of Ho et al.
        beta = 1 - (alpha[k] / alpha[k + 1]) ** 2
        to_data, to_x = alpha[k + 1] * beta, alpha[k] / alpha[k + 1] * sigma[k + 1] ** 2
        mean = (to_data * model(y, grid.t[k]) + to_x * y) / sigma[k] ** 2
        y = mean + beta.sqrt() * sigma[k + 1] / sigma[k] * z[k]
    torch.testing.assert_close(found, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", peers.ODE)
def test_public_samplers_use_all_calls_that_they_are_given(name):
    """A number of steps that leaves enough calls for one more would compare them at fewer."""
    if reason := peers.missing(name.split()[0]):
        pytest.skip(reason)
    public, model, made = peers.ODE[name], LAW.denoiser(SDE), 0

    def denoise(x, t):
        nonlocal made
        made += 1
        return model(x, t)

    grid = grids.quadratic(SDE, public.steps_for(20))
    public.run(peers.Task(SDE, grid.t, denoise), torch.ones(2, 16, dtype=F64))
    assert 20 - public.each < made <= 20


def test_calls_are_counted():
    greedy = peers.Public(lambda task, x: task.denoise(task.denoise(x, task.t[0]), task.t[0]))
    with pytest.raises(RuntimeError, match="expected at most 1 calls"):
        accuracy._theirs(greedy, grids.uniform, LAW.denoiser(SDE), torch.zeros(2, 16, dtype=F64), 1, None)


def committed(stem, *path):
    """Runs at tolerances near the target, from the results of a benchmark of adaptive methods."""
    found = json.loads((accuracy.RESULTS / f"{stem}.json").read_text())
    for key in path:
        found = found[key]
    return [run for run in found if 1e-5 < run["error"] < 1e-2][:3]


def test_adaptive_results_hold(unchecked):
    model, n = problems.problem("ring").denoiser(adaptive.SDE), adaptive.NOISES["ring"]
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    exact = solvers.adaptive_ode(1e-9, 1e-9, order=6, max_calls=10_000).solve(model, x, adaptive.ENDS).x
    for run in committed("adaptive", "ring", "adaptive_ode(order=6)"):
        found, mean, largest = adaptive.ours(6)(model, x, run["tolerance"])
        assert mean <= run["mean"] * 1.001 and largest <= run["largest"]
        assert float((found - exact).square().mean().sqrt()) <= run["error"] * 1.01


@pytest.mark.parametrize("bench", [adaptive, likelihood])
def test_calls_at_an_error_lie_between_the_best_runs_around_it(bench):
    runs = [bench.Run(0.1, *rest) for rest in ((1e-3, 20.0, 30), (5e-4, 60.0, 70), (1e-5, 40.0, 52))]
    assert bench.calls_at(runs, 1e-4) == pytest.approx((30.0, 41.0))
    assert bench.calls_at(runs, 1e-3) == (20.0, 30.0)
    assert all(map(math.isnan, (*bench.calls_at(runs, 9e-6), *bench.calls_at(runs, 1.1e-3))))


def test_the_usual_likelihood_is_the_same_number(unchecked):
    model, x = likelihood.subject("ring", 1e-3, True)
    value, calls = likelihood.usual(model, x[:4], 1e-3, 1e-8)
    assert calls > 50
    torch.testing.assert_close(value, likelihood.ours(model, x[:4], 1e-3, 1e-9)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("bench", "problem", "told"),
    [(adaptive, "ring", "64 samples of ring"), (likelihood, "gaussian", "gaussian, end 0.001, 8 samples")],
)
def test_quick_runs_say_how_many_samples_they_took(bench, problem, told, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda *args: {})
    monkeypatch.setattr(bench, "summary", lambda title, table: [title])
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick", "--problems", problem])
    bench.main()
    printed = capsys.readouterr().out
    assert told in printed and f"{bench.__name__} --quick`" in printed
    assert bench.samples(problem, True) == (64 if bench is adaptive else 8)


def test_quick_reliability_says_how_many_scores_it_tried(monkeypatch, unchecked):
    monkeypatch.setattr(reliability, "ADAPTIVE", {"adaptive_ode": solvers.adaptive_ode()})
    few = list(reliability.HOSTILE.items())[:6]
    monkeypatch.setattr(reliability, "HOSTILE", dict(few))
    line, _ = reliability.terminating(True)  # every fourth of these and of three errors, and no samples
    assert (
        line.passed and line.what.startswith("4 hostile scores x 1") and line.measured.startswith("4 of 4,")
    )


def test_likelihood_results_hold(unchecked):
    model, x = likelihood.subject("gaussian", 1e-3, False)
    exact = likelihood.ours(model, x, 1e-3, 1e-9)[0]
    for run in committed("likelihood", "calls", "gaussian, end 0.001, 32 samples", "likelihood.log_prob"):
        value, found = likelihood.ours(model, x, 1e-3, run["tolerance"])
        assert float(found.evaluations.double().mean()) <= run["mean"] * 1.001
        assert float((value - exact).square().mean().sqrt()) <= run["error"] * 1.01


def test_tuned_tables_hold(unchecked):
    rows = json.loads((accuracy.RESULTS / "tuning.json").read_text())
    for row in [row for row in rows if row["problem"] != "digits"]:
        board, table = tuning.board(row["problem"]), Tableau.from_json(json.dumps(row["tuned"]["table"]))
        x = board.noise(board.held_out, tuning.HELD_OUT)[: tuning.FIRST]
        found = tuning.scored(board, tuning.ends_of(board, table, x), tuning.reference(board, x))
        assert found.error <= row["first"] * (1 + 1e-6), (row["problem"], row["calls"])
        assert tuning.defect(table) <= 1e-12
        assert row["more_flips"] > 0.01 or "missed" in tuning.line(row)


def test_recommend_judges_stochastic_solvers_by_their_laws(monkeypatch):
    """Fifty steps are nearer to the law than three; what chance decides counts as its standard error."""
    monkeypatch.setattr(recommend, "NUMBERS", 0)
    law = recommend.random_mixture(torch.Generator().manual_seed(0), 2)
    tables = [solvers.ddpm().tableau(SDE, grids.quadratic(SDE, n)) for n in (3, 50)]
    far, near = recommend.true_laws(law, tables, torch.Generator().manual_seed(1)).distances()
    assert far > 5 * near > 0
    squares, errors = torch.tensor([-1.0, 4.0, 0.2, math.nan]), torch.tensor([0.3, 0.1, 0.5, math.nan])
    truth = recommend.Truth(recommend.Distances(squares, errors), recommend.Distances(squares, errors))
    floor = math.sqrt(0.3 / math.sqrt(2))
    assert truth.distances() == pytest.approx([floor, 2.0, floor, math.inf], rel=1e-6)
    assert truth.ceiling() == pytest.approx(1.0)
    assert recommend.outcome([1.0, 3.0, 2.0, 4.0], truth.distances()).ratio == 1.0
    assert truth.floor() == pytest.approx(floor, rel=1e-6)


def test_recommend_ranks_nothing_below_what_chance_can_tell():
    """The two least predictions are one to the ranks, but the less is chosen."""
    predicted, true = [0.2, 0.1, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]
    assert recommend.outcome(predicted, true) == pytest.approx((0.8, 2.0))
    assert recommend.outcome(predicted, true, floor=0.5) == pytest.approx((math.sqrt(0.9), 2.0))
    assert recommend.outcome(predicted, true, floor=5.0).spearman == 0


def test_recommend_measures_laws_by_more_samples_on_a_device(monkeypatch, device):
    law = recommend.random_mixture(torch.Generator().manual_seed(0), 2)
    tables = [solvers.ddpm().tableau(SDE, grids.quadratic(SDE, 5))]
    counts = []

    def counted(sde, law, tables, n, generator):
        counts.append(n)
        assert law.device.type == generator.device.type == device.type
        return law_distances(sde, law, tables, 64, generator)

    monkeypatch.setattr(recommend, "law_distances", counted)
    for more in (1, 4):
        found = recommend.true_laws(law, tables, torch.Generator().manual_seed(1), str(device), more)
        assert 0 < found.distances()[0] < 1
    assert counts == [8192] * 2 + [32768] * 2


def test_a_tuned_grid_beside_the_best_fixed_one(monkeypatch):
    monkeypatch.setattr(
        tuning_grid, "GRIDS", {name: tuning_grid.GRIDS[name] for name in ("uniform", "log_snr")}
    )
    few = tuning.board("ring")._replace(n=64, held_out=256)
    row = tuning_grid.measure("ring", few, solvers.dpmpp(2), 6, 20.0)
    assert row["grid"] in ("uniform", "log_snr")
    assert row["ratio"] == row["tuned"]["error"] / row["fixed"]["error"] < 0.7  # better grids are known
    assert not row["fell_back"] and "ring" in tuning_grid.report([row], 20.0)
