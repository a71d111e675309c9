"""Tuning: the coordinates of tables, their derivatives, the fit, and what comes out on fresh noises."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoresde import VPSDE, grids, sample, solvers
from scoresde.denoiser import BaseDenoiser, Denoiser
from scoresde.grids import Grid
from scoresde.laws import Gaussian, Mixture
from scoresde.networks import MLP
from scoresde.noise import Noise
from scoresde.sde import EDM, Rectified, SubVPSDE
from scoresde.select import tune, tune_for
from scoresde.select.tuning_fit import Best, Errors, Fit, Local, Point, importance, probes
from scoresde.select.tuning_form import Space, flat, natural
from scoresde.select.tuning_runs import Noises, _chances
from scoresde.tableau import Tableau

F64 = torch.float64
SDE = VPSDE()
fit_module = importlib.import_module("scoresde.select.tuning_fit")
tune_module = importlib.import_module("scoresde.select.tune")
search_module = importlib.import_module("scoresde.select.tuning_search")

ANGLES = 2 * math.pi * torch.arange(5, dtype=F64) / 5
RING = Mixture(torch.full((5,), 0.2, dtype=F64), torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.2**2)
GAUSSIAN = Gaussian(torch.tensor([0.5, -1.0, 0.2]), torch.tensor([0.04, 0.3, 1.5]))
DETERMINISTIC = [
    solvers.ddim(),
    solvers.dpmpp(2),
    solvers.dpmpp(3, singlestep=True),
    solvers.unipc(3),
    solvers.deis(3),
    solvers.heun(),
    solvers.exponential(2, corrector=3, stored="velocity", variable="sigma"),
]


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def noises(model, n=6, batch=1000, seed=0, event=(2,)):
    """With targets that no table reaches."""
    return Noises(model, normals(n, *event, seed=seed), normals(n, *event, seed=seed + 1), batch)


# ---- tables in the coordinates that they are tuned in


def missed(table, sde):
    """By how much the end misses the law of a point mass: the mean, and the standard deviation."""
    alpha, sigma = sde.alpha(table.ends), sde.sigma(table.ends)
    keep, weight = table.canonical().a[-1], table.canonical().B[-1].sum()
    off = [keep * alpha[0] + weight - alpha[1], keep * sigma[0] - sigma[1]]
    return float(torch.stack(off).abs().max())


@pytest.mark.parametrize("solver", DETERMINISTIC, ids=repr)
def test_the_natural_form_runs_as_the_table_does(solver):
    table = solver.tableau(SDE, grids.quadratic(SDE, 4))
    x, model = normals(8, 2), RING.denoiser(SDE)
    wanted = solvers.from_tableau(table).solve(model, x, table.ends).x
    found = Noises(model, x, x, 3).trace(natural(table)).states[-1]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sde", [SDE, SubVPSDE(), EDM(0.02, 30.0), Rectified()], ids=repr)
@pytest.mark.parametrize("end", [None, 0.0])
def test_whatever_the_parameters_a_point_mass_is_kept(sde, end):
    if end == 0 and float(sde.sigma(0.0)) > 0:
        pytest.skip("sigma does not reach 0")
    space = Space(sde, solvers.dpmpp(3), grids.karras(sde, 6, end), moves=True, free=True)
    parameters = 0.3 * normals(len(space), seed=4)
    table = space.table(parameters)
    assert len(table) == 6
    assert missed(table, sde) <= 1e-12 * max(1.0, sde.prior_std)
    own = space.solver.tableau(sde, space.grid)
    assert torch.equal(table.ends, own.ends)
    assert (table.canonical().B - own.canonical().B).abs().max() > 0.05
    # What is seen of it: an inexact weight, a scaled state.
    for change in ({"keep": table.keep + 1e-3}, {"mix": table.mix * 1.001}):
        assert missed(replace(table, **change), sde) > 1e-6


@pytest.mark.parametrize("solver", DETERMINISTIC, ids=repr)
@pytest.mark.parametrize("free", [False, True])
def test_parameters_of_zero_are_the_solver(solver, free):
    space = Space(SDE, solver, grids.quadratic(SDE, 4), True, free)
    own, found = (
        solver.tableau(SDE, space.grid).canonical(),
        space.table(torch.zeros(len(space), dtype=F64)).canonical(),
    )
    exact = "marginal_exact" in solver.card.properties
    assert torch.equal(found.times, own.times)
    if exact or not free:
        assert torch.allclose(found.B, own.B, atol=1e-12)
    else:  # what does not keep a point mass is changed so that it does
        assert not torch.allclose(found.B, own.B, atol=1e-6)


def test_a_parameter_is_the_logarithm_of_a_factor_on_a_step():
    space = Space(SDE, solvers.ddim(), grids.uniform(SDE, 4), True, False)
    place = lambda grid: (-grid.lam).sigmoid() ** 0.25  # noqa: E731
    before = place(space.grid).diff()
    after = place(space.moved(torch.tensor([0.0, math.log(2.0), 0.0, 0.0], dtype=F64))).diff()
    assert torch.allclose(after / after[0], before / before[0] * torch.tensor([1.0, 2, 1, 1], dtype=F64))
    assert torch.equal(space.moved(torch.zeros(4, dtype=F64)).t, space.grid.t)
    assert torch.allclose(space.moved(torch.full((4,), 0.7, dtype=F64)).t, space.grid.t, rtol=1e-10)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("end", [None, 0.0])
@pytest.mark.parametrize("sde", [SDE, EDM(0.02, 30.0), Rectified()], ids=repr)
def test_the_first_call_may_be_about_a_later_time(sde, end, free):
    """1 - e^{-p^2} of the way to the second node in (sigma/(alpha + sigma))^(1/4). Of a solver's own table
    nothing else changes, nor do the states of a free one."""
    space = Space(sde, solvers.unipc(2), grids.karras(sde, 3, end), True, free)
    place = lambda t: (sde.sigma(t) / (sde.alpha(t) + sde.sigma(t))) ** 0.25  # noqa: E731
    own, p = space.table(torch.zeros(len(space), dtype=F64)), torch.zeros(2, len(space), dtype=F64)
    p[:, 3] = torch.tensor([0.5, -0.5], dtype=F64)
    one, other = (space.table(row) for row in p)
    before, after = own.times, one.times
    wanted = math.exp(-0.25) * place(before[0]) + (1 - math.exp(-0.25)) * place(before[1])
    assert place(after[0]).item() == pytest.approx(wanted.item(), rel=1e-9)
    assert before[0] > after[0] > before[1] and torch.equal(after[1:], before[1:])
    assert torch.equal(after, other.times)
    assert torch.equal(one.ends, own.ends) and torch.equal(one.nodes, own.nodes) and own.start is None
    for found, kept in zip(one.canonical()[1:], own.canonical()[1:], strict=True):
        assert torch.equal(found, kept)
    assert torch.equal(space.forms(p[:1]).times[0], after)
    again = space.retimed(p[0], moves=True, free=free)
    assert torch.equal(again.table(torch.zeros(len(space), dtype=F64)).times, after)
    p[0, 3] = -0.2
    twice = again.table(p[0])
    assert place(twice.times[0]).item() == pytest.approx(
        (math.exp(-0.09) * place(before[0]) + (1 - math.exp(-0.09)) * place(before[1])).item(), rel=1e-9
    )


def test_times_go_on_from_stage_to_stage():
    """Also where the next stage moves none, and through one that moved none."""
    space = Space(SDE, solvers.unipc(2), grids.quadratic(SDE, 3), True, False)
    p = 0.3 * normals(len(space), seed=3)
    fixed = space.retimed(p, moves=False, free=True)
    zeros = torch.zeros(len(fixed), dtype=F64)
    assert torch.equal(fixed.table(zeros).times, space.table(p).times)
    later = fixed.retimed(zeros + 0.1, moves=True, free=True)
    assert torch.equal(later.table(torch.zeros(len(later), dtype=F64)).times, space.table(p).times)


@pytest.mark.parametrize("what", ["grid", "all"])
def test_the_first_call_is_worth_something(what, unchecked):
    """At t_max the model knows little more than the mean: two calls of a tuned table are both about less
    noise, and are better than any two of which the first is about t_max."""
    law = Gaussian(torch.zeros(2), torch.tensor([1.0, 0.3]))
    found = tune_for(SDE, law, solvers.dpmpp(2), 2, 20.0, what, starts=1)
    assert found.table.start == 1.0 and found.table.times[0] < 0.95
    assert found.report.tuned.rms == pytest.approx(exact_error(found.table, law), rel=1e-9)
    held = replace(found.table, times=found.table.nodes, start=None)
    assert exact_error(held, law) > 1.5 * exact_error(found.table, law)
    drawn = sample(law.denoiser(SDE), (4, 2), found.solver, grid=found.grid)
    kept = Tableau.from_json(found.table.to_json())
    assert kept.start == 1.0 and drawn.end == 1e-3
    again = sample(law.denoiser(SDE), (4, 2), solvers.from_tableau(kept), grid=kept.ends)
    assert torch.equal(drawn.x, again.x)


@pytest.mark.parametrize("moves", [False, True])
def test_parameters_of_weights(moves):
    """The j-th free parameter moves one weight below the diagonal, and the newest one against it."""
    space = Space(SDE, solvers.unipc(2), grids.quadratic(SDE, 3), moves, True)
    assert len(space) == 4 * moves + 3 + 4
    parameters = torch.zeros(2, len(space), dtype=F64)
    parameters[1, 4 * moves + 1] = 0.5  # of (1, 0), (2, 0), (2, 1)
    one, other = space.forms(parameters).weights
    change = other - one
    unit = one[2].abs().max().item()
    assert change[2, 0].item() == pytest.approx(0.5 * unit, rel=1e-12)
    assert change[2, 2].item() == pytest.approx(-0.5 * unit, rel=1e-12)
    change[2, 0] = change[2, 2] = 0
    assert not change.any()


def test_parameters_of_the_states_inside():
    """On data concentrated at x_0 = 1: means move in units of sigma, deviations by factors; the ends stay."""
    space = Space(SDE, solvers.unipc(2), grids.quadratic(SDE, 3), False, True)
    p = torch.tensor([0, 0, 0, 0.3, -0.2, 0.1, 0.4], dtype=F64)
    form = space.table(p).canonical()
    alpha, sigma = SDE.alpha(form.times), SDE.sigma(form.times)
    A, S = form.a * alpha[0] + form.B.sum(1), form.a * sigma[0]
    assert torch.allclose((A - alpha) / sigma, torch.tensor([0, 0.3, -0.2, 0], dtype=F64), atol=1e-12)
    assert torch.allclose((S / sigma).log(), torch.tensor([0, 0.1, 0.4, 0], dtype=F64), atol=1e-12)
    own = space.forms(torch.zeros(1, 7, dtype=F64)).weights.tril(-1)
    assert torch.equal(space.forms(p[None]).weights.tril(-1), own)


def test_stochastic_tables_have_no_form():
    with pytest.raises(ValueError, match="expected a deterministic solver"):
        natural(solvers.ddpm().tableau(SDE, grids.uniform(SDE, 3)))


# ---- runs, and what their ends depend on


class Steady(BaseDenoiser):
    """A model whose derivative by the state is the same at all times."""

    sde = SDE

    @property
    def dtype(self):
        return F64

    def forward(self, x, t):
        return x.tanh() + t


@pytest.mark.parametrize("model", [RING.denoiser(SDE), Steady()], ids=["ring", "steady"])
@pytest.mark.parametrize("batch", [4, 7, 1000])
def test_ends_are_differentiated_by_all_of_a_form(batch, model):
    """By central differences of the ends, one entry after the other. The model's derivatives by time are
    differences, and those by the state are of a time that little off: where these do not enter, as in the
    last row, or do not change with time, all but the times are exact. The first state is given, and the time
    of the end is no one's."""
    space = Space(SDE, solvers.unipc(3), grids.quadratic(SDE, 4), True, True)
    form = space.forms(0.05 * normals(1, len(space)))
    some, along = noises(model, batch=batch), normals(3, 6, 2, seed=9)
    found = some.pulled_back(form, some.trace(form), along)
    sizes = [part[0].numel() for part in form]
    assert found.shape == (3, 6, sum(sizes))
    for part, (name, by) in enumerate(zip(form._fields, found.split(sizes, 2), strict=True)):
        for entry in range(sizes[part]):
            row, column = divmod(entry, 4)
            if (name == "times" and entry == 4) or (name == "weights" and column > row):
                assert not by[..., entry].any()
                continue
            ends = []
            for step in (1e-5, -1e-5):
                changed = form[part].clone()
                changed[0].view(-1)[entry] += step
                ends.append(some.trace(form._replace(**{name: changed})).states[-1])
            slope = ((ends[0] - ends[1]) / 2e-5 * along).sum(2)
            last = (entry if name == "keep" else row) == 3
            exact = name != "times" and (last or isinstance(model, Steady))
            tolerance = 1e-7 if exact else 1e-6
            assert (by[..., entry] - slope).norm() <= tolerance * slope.norm().clamp_min(1e-2), (name, entry)


def test_derivatives_cost_the_same_however_many_they_are():
    """For every row a call at a time beside its own, for all but the first one with a graph."""
    space = Space(SDE, solvers.unipc(3), grids.quadratic(SDE, 5), True, True)
    some = noises(RING.denoiser(SDE), n=6, batch=4)
    form = space.forms(torch.zeros(1, len(space), dtype=F64))
    base = some.trace(form)
    assert (some.meter.calls, some.meter.samples) == (10, 30)
    some.pulled_back(form, base, normals(3, 6, 2))
    assert (some.meter.calls, some.meter.samples) == (10 + 5 * 2, 30 + 5 * 6)


def test_derivatives_know_how_finely_the_model_computes(unchecked):
    """Differences of a float32 network's outputs are as good for float64 states as for its own."""
    torch.manual_seed(0)
    network = MLP(2, hidden=16)
    for parameter in network.parameters():  # of an untrained one the last ones are 0
        torch.nn.init.normal_(parameter, std=0.1)
    form, start = natural(solvers.unipc(3).tableau(SDE, grids.quadratic(SDE, 4))), normals(5, 2)
    found = []
    for dtype, of in ((torch.float32, F64), (F64, F64)):
        some = Noises(Denoiser(network.to(dtype), SDE, "velocity"), start.to(of), start, 100)
        found.append(some.pulled_back(form, some.trace(form), normals(1, 5, 2, seed=1))[0])
    one, exact = found
    assert (one - exact)[:, :4].norm() < 0.02 * exact[:, :4].norm()  # by the times


@pytest.mark.parametrize("sde", [SDE, EDM(0.02, 30.0), Rectified()], ids=repr)
def test_derivatives_by_times_ask_for_none_beyond_the_ends(sde, unchecked):
    """Not only the first row may ask about t_max, nor does a process have times beyond it."""
    model, grid = GAUSSIAN.denoiser(sde), grids.karras(sde, 2)
    table = solvers.dpmpp(2, singlestep=True).tableau(sde, grid)
    rows = table.times.clone()
    rows[1] = rows[0]
    form = natural(table)._replace(times=rows[None])
    start = sde.prior_std * normals(5, 3)
    some = Noises(model, start, start, 100)
    along = normals(1, 5, 3, seed=1)
    found = some.pulled_back(form, some.trace(form), along)
    ends = []
    for at in (1 - 2e-6, 1 - 1e-6):
        rows = form.times.clone()
        rows[0, 1] *= at
        ends.append(some.trace(form._replace(times=rows)).states[-1])
    slope = ((ends[1] - ends[0]) * along[0]).sum(1) / (1e-6 * form.times[0, 1])
    assert torch.allclose(found[0, :, 1], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


def test_a_model_without_derivatives_is_named(unchecked):
    class Detached(BaseDenoiser):
        sde = SDE

        @property
        def dtype(self):
            return F64

        def forward(self, x, t):
            return 0.5 * x.detach()

    with pytest.raises(RuntimeError, match="expected a model that can be differentiated by its state"):
        tune(Detached(), solvers.dpmpp(2), 3, 20.0, shape=(2,), n=8, starts=1, reference=10)


class Hidden(torch.nn.Module):
    """A network of which autograd sees nothing."""

    def __init__(self, inner, wrong=0.0):
        super().__init__()
        self.inner, self.wrong = inner, wrong

    def forward(self, x, time):
        return self.inner(x.detach(), time) + self.wrong * (x - x.detach())


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "score"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_derivatives_that_lack_the_network_are_named(predicts, dtype, unchecked):
    """Whatever the graph of the skip connection is worth. With the whole graph nothing is said, nor of a
    constant."""

    class Ideal(torch.nn.Module):
        def forward(self, x, time):
            alpha, sigma = (f(time).to(x)[:, None] for f in (SDE.alpha, SDE.sigma))
            data = RING.denoiser(SDE)(x.double(), time.double()).to(x)
            noise = (x - alpha * data) / sigma
            found = {"data": data, "noise": noise, "velocity": alpha * noise - sigma * data}
            return {**found, "score": -noise / sigma}[predicts]

    def check(network):
        model = Denoiser(network, SDE, predicts).to(dtype)
        start = normals(8, 2).to(dtype)
        Noises(model, start, start, 3).check_derivatives()

    check(Ideal())
    with pytest.raises(RuntimeError, match="differentiated by its state, found derivatives that differences"):
        check(Hidden(Ideal()))


def test_a_constant_has_derivatives():
    class Constant(BaseDenoiser):
        sde = SDE

        def forward(self, x, t):
            return torch.full_like(x, 0.3)

    noises(Constant()).check_derivatives()


def test_tables_around_a_tuned_one_keep_a_point_mass():
    """Also where its first call is about another time than that of the grid's start."""
    space = Space(SDE, solvers.dpmpp(2), grids.quadratic(SDE, 5), moves=True, free=False)
    parameters = torch.zeros(len(space), dtype=F64)
    parameters[-1] = 0.8
    late = space.table(parameters)
    assert late.start is not None and missed(late, SDE) < 1e-12
    around = Space(SDE, solvers.from_tableau(late), grids.quadratic(SDE, 5), moves=False, free=True)
    own = around.table(torch.zeros(len(around), dtype=F64))
    assert torch.equal(own.times, late.times) and own.start == late.start
    assert torch.allclose(own.canonical().B, late.canonical().B, atol=1e-12)
    assert missed(around.table(0.3 * normals(len(around))), SDE) < 1e-12


@pytest.mark.parametrize("free", [False, True])
def test_forms_are_differentiated_by_their_parameters(free):
    space = Space(SDE, solvers.unipc(2), grids.quadratic(SDE, 4), True, free)
    here = 0.1 * normals(len(space))
    found = space.jacobian(here)
    for k, step in enumerate(1e-4 * torch.eye(len(space), dtype=F64)):
        ahead, behind = (flat(space.forms(here[None] + s)) for s in (step, -step))
        assert torch.allclose(found[:, k], (ahead - behind)[0] / 2e-4, rtol=1e-5, atol=1e-6)


def test_the_solution_is_asked_for_once_and_where_it_is_needed():
    asked = []

    def solved(model, x):
        asked.append(len(x))
        return 2 * x

    x = normals(12, 2)
    some = Noises(RING.denoiser(SDE), x, solved, 100)
    few, drawn = some.first(5), some.drawn(torch.ones(12), 4)
    assert asked == []
    assert torch.equal(few.target, 2 * x[:5]) and torch.equal(few.target, 2 * x[:5])
    assert torch.equal(few.first(3).target, 2 * x[:3])
    assert torch.equal(drawn.target, 2 * drawn.start)
    assert asked == [5, 4]


def test_tables_are_compared_by_their_ends():
    some, grid = noises(RING.denoiser(SDE)), grids.quadratic(SDE, 4)
    forms = [natural(s.tableau(SDE, grid)) for s in (solvers.ddim(), solvers.unipc(2), solvers.dpmpp(2))]
    ends = [some.trace(form).states[-1] for form in forms]
    wanted = [(ends[a] - ends[b]).square().mean(1).sqrt() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert all(torch.allclose(one, other) for one, other in zip(some.apart(forms), wanted, strict=True))


def test_conditions_follow_their_samples(unchecked):
    """A model that returns each sample's own point: every table that keeps point masses is exact, if each
    sample meets its own condition."""

    class Points(BaseDenoiser):
        sde = SDE

        @property
        def dtype(self):
            return F64

        def forward(self, x, t, *, point):
            assert len(x) == len(point)
            return point.expand_as(x)

    point = normals(32, 1, seed=7)
    found = tune(
        Points(), solvers.dpmpp(2), 3, 5.0, shape=(2,), n=32, batch=20, condition={"point": point}, starts=1
    )
    assert found.report.untuned.rms < 1e-12
    assert found.report.tuned.rms < 1e-12
    given = Points().given(point=point)
    sets = tune_module._sampled(given, normals(5 * 32, 2), 32, 0, None, 20, 20, None)
    for some, times in ((sets.train, 2), (sets.judge, 2), (sets.held_out, 1)):
        assert (some.target - point.repeat(times, 1)).abs().max() < 0.1


# ---- the fit


def some_fit(n=24, seconds=60.0, flip=0.5):
    model = RING.denoiser(SDE)
    train, judge = noises(model, n, seed=2), noises(model, n, seed=4)
    solver = solvers.exponential(5, corrector=6, stored="flow", variable="sigma")
    make = lambda s: Noises(model, s.start, solver.solve(model, s.start, grids.quadratic(SDE, 60)).x, 4096)  # noqa: E731
    return Fit(make(train), make(judge), flip, math.inf if seconds == 60.0 else seconds, lambda best: None)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_place_is_differentiated(weighted, unchecked):
    """The gradient is that of the loss, and the curvature of Gauss and Newton that of its residuals: of two
    numbers a sample, by which both axes are taken, exact."""
    fit = some_fit()
    if weighted:
        fit = replace(fit, train=replace(fit.train, weight=1 + torch.arange(24) % 3))
    space = Space(SDE, solvers.dpmpp(2), grids.quadratic(SDE, 4), True, True)
    here = fit._at(space, 0.05 * normals(len(space)))
    local, slopes = fit._local(space, here, 0), []
    for k in range(len(space)):
        step = 1e-5 * torch.eye(len(space), dtype=F64)[k]
        ahead, behind = (fit._at(space, here.parameters + s) for s in (step, -step))
        slope = (local.loss_at(ahead) - local.loss_at(behind)) / 2e-5
        assert 2 * local.gradient[k].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)
        slopes.append((ahead.residuals - behind.residuals) / 2e-5)
    weight = torch.ones(24, dtype=F64) if fit.train.weight is None else fit.train.weight.to(F64)
    share = weight / weight.sum() * torch.exp(-((here.errors / local.width) ** 2))
    wanted = torch.einsum("n,pnd,qnd->pq", share, torch.stack(slopes), torch.stack(slopes))
    wanted += local.ridge * torch.eye(len(space), dtype=F64)
    assert (local.curvature - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_probes_are_signs_that_stand_for_all_axes():
    """s s^T, summed over the two probes, is 1 in the mean over 4000 samples: its entries off the diagonal
    have a standard error of sqrt(1/8000), 6.5 of which are allowed (15 entries: 1.2e-9)."""
    like = torch.zeros(400, 3, 2, dtype=torch.float32)
    drawn = torch.cat([probes(like, number) for number in range(10)], 1)
    assert drawn.shape == (2, 4000, 3, 2) and drawn.dtype == torch.float32
    assert torch.allclose(drawn.abs(), torch.tensor(0.5**0.5))
    second = torch.einsum("cni,cnj->ij", drawn.flatten(2), drawn.flatten(2)) / 4000
    assert torch.allclose(second.diag(), torch.ones(6), rtol=1e-5)
    assert (second - torch.eye(6)).abs().max() < 6.5 / 8000**0.5
    assert not torch.equal(probes(like, 0), probes(like, 1)) and torch.equal(probes(like, 1), probes(like, 1))
    assert torch.equal(probes(like[:, :2, 0], 3), torch.eye(2)[:, None].expand(2, 400, 2))


def point_of(slopes, residuals, parameters):
    """Where linear residuals are at parameters."""
    at = residuals + torch.einsum("p,pnd->nd", parameters, slopes)
    return Point(parameters, None, None, at)  # type: ignore[arg-type]


def local_of(here, slopes, flip):
    """By slopes (P, n, d), with an axis for a probe."""
    pulled = torch.einsum("nd,pnd->np", here.residuals, slopes)
    return Local.of(here, pulled, slopes.permute(2, 1, 0), flip)


def test_equations_are_those_of_the_loss(unchecked):
    slopes, residuals, start = normals(3, 40, 2), normals(40, 2, seed=1), normals(3, seed=2)
    here = point_of(slopes, residuals, start)
    errors = here.residuals.norm(dim=1)
    local = local_of(here, slopes, 10 * errors.square().mean().sqrt().item())
    rms = errors.square().mean().sqrt().item()
    assert local.width == pytest.approx(0.3 * 10 * rms)
    assert local.loss == pytest.approx(
        (local.width**2 * (1 - torch.exp(-(errors**2) / local.width**2))).mean().item()
        + local.ridge * start.square().sum().item()
    )
    for k in range(3):
        step = 1e-5 * torch.eye(3, dtype=F64)[k]
        ahead, behind = (local.loss_at(point_of(slopes, residuals, start + s)) for s in (step, -step))
        assert 2 * local.gradient[k].item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


def test_a_step_solves_a_linear_problem(unchecked):
    """Residuals that are linear and small against the width: one undamped step is that of least squares."""
    slopes, wanted = normals(3, 40, 2), normals(3, seed=2)
    residuals = -torch.einsum("p,pnd->nd", wanted, slopes) + 10 * normals(40, 2, seed=5)
    here = point_of(slopes, residuals, torch.zeros(3, dtype=F64))
    local = local_of(here, slopes, 1e9)._replace(width=1e9)
    step, damped = local.step(0.0), local.step(1.0)
    before, less, there = (
        local.loss_at(point_of(slopes, residuals, s)) for s in (torch.zeros(3, dtype=F64), damped, step)
    )
    assert there < less < before and damped.norm() < step.norm()
    best = torch.linalg.lstsq(slopes.flatten(1).T, -residuals.flatten()[:, None]).solution[:, 0]
    assert torch.allclose(step, best, rtol=0.2)


@pytest.mark.parametrize(
    ("flip", "width"), [(0.5, 0.15), (math.inf, 1e3 * 0.05 / 2**0.5), (0.06, 2 * 0.05 / 2**0.5)]
)
def test_how_far_errors_count(flip, width, unchecked):
    """Up to 0.3 of a flip, but up to twice the bulk at least, and where nothing flips as in least squares."""
    residuals = torch.tensor([[0.03], [0.04]], dtype=F64)
    here = point_of(torch.ones(1, 2, 1, dtype=F64), residuals, torch.zeros(1, dtype=F64))
    assert local_of(here, torch.ones(1, 2, 1, dtype=F64), flip).width == pytest.approx(width)


def test_an_end_that_is_not_finite_is_no_gain(unchecked):
    slopes, residuals = torch.ones(1, 3, 1, dtype=F64), normals(3, 1)
    local = local_of(point_of(slopes, residuals, torch.zeros(1, dtype=F64)), slopes, 0.3)
    residuals[1] = math.inf
    assert math.isnan(local.loss_at(point_of(slopes, residuals, torch.zeros(1, dtype=F64))))


def test_flips_hardly_count(unchecked):
    """One sample in another mode moves the fit of the others by little; in plain least squares by much."""
    slopes = torch.ones(1, 20, 1, dtype=F64)
    residuals = 0.01 * normals(20, 1)
    residuals[0] = 5.0
    step = local_of(point_of(slopes, residuals, torch.zeros(1, dtype=F64)), slopes, 0.3).step(0.0)
    rest = -residuals[1:].mean()
    assert abs(step[0] - rest) < 1e-3
    assert abs(-residuals.mean() - rest) > 0.2


def test_a_fit_gains_and_keeps_its_best(unchecked):
    fit = some_fit()
    space = Space(SDE, solvers.dpmpp(2), grids.quadratic(SDE, 3), True, True)
    best = Best(space, torch.zeros(len(space), dtype=F64))
    untuned = fit._judged(best.form)
    told = []
    replace(fit, tell=lambda b: told.append(b.errors))(best)
    assert best.done and len(told) == len(best.history) > 3
    assert best.errors.rms < untuned.rms / 5
    assert fit._judged(best.form) == best.errors
    assert Errors.of(fit.judge.distances(natural(best.table)), fit.flip).rms == pytest.approx(best.errors.rms)
    assert best.errors.rms == min(judged for _, judged in best.history)
    assert best.history[-1][0] < best.history[0][0]


@pytest.mark.parametrize(("gains", "stops"), [(True, False), (False, True)])
def test_a_fit_is_stale_when_nothing_gets_better_elsewhere(gains, stops, monkeypatch, unchecked):
    ranks = iter(range(100, 0, -1) if gains else range(100))
    monkeypatch.setattr(fit_module, "STALE", 3)
    monkeypatch.setattr(Fit, "_judged", lambda self, form: Errors(float(next(ranks)), 0.0, 0.0))
    space = Space(SDE, solvers.dpmpp(2), grids.quadratic(SDE, 3), True, True)
    best = Best(space, torch.zeros(len(space), dtype=F64))
    some_fit()(best)
    assert best.done and len(best.history) >= 3
    assert (len(best.history) == 3) == stops


def test_errors():
    found = Errors.of(torch.tensor([0.1, 0.3, 0.2, 7.0, math.inf], dtype=F64), 0.3)
    assert found.rms == pytest.approx(math.sqrt(0.14 / 3))
    assert (found.flips, found.median) == (0.4, 0.3)
    assert found.rank == found.rms + 0.4
    assert Errors(0.5, 0.1, 0.0).rank == 0.5
    assert Errors.of(torch.tensor([2.0], dtype=F64), 1.0).rms == math.inf


# ---- noises that are drawn from more


@given(st.lists(st.floats(1e-3, 1e3), min_size=20, max_size=20), st.integers(1, 19))
def test_chances_are_proportional_or_certain(numbers, n):
    importance = torch.tensor(numbers, dtype=F64)
    found = _chances(importance, n)
    assert found.sum() == pytest.approx(n)
    free = found < 1
    ratio = (found / importance)[free]
    assert len(ratio) == 0 or ratio.max() / ratio.min() == pytest.approx(1)
    assert bool((found[~free] == 1).all())
    assert free.all() or not free.any() or importance[~free].min() >= importance[free].max()


def test_draws_are_unbiased_and_differ():
    """In 2000 draws each noise is met as often as it should be, so that weighted sums are those over all."""
    importance = normals(40).abs() + 0.1
    importance[7] = 50.0
    all_of_them = noises(RING.denoiser(SDE), 40)
    chance, met = _chances(importance, 10), torch.zeros(40, dtype=F64)
    for number in range(2000):
        some = all_of_them.drawn(importance, 10, number)
        assert len(some) == 10
        rows = (all_of_them.start[:, None] == some.start[None]).all(2).nonzero()[:, 0]
        assert torch.equal(some.target, all_of_them.target[rows])
        assert torch.allclose(some.weight, 1 / chance[rows])
        met[rows] += 1 / 2000
    assert (met - chance).abs().max() < 2e-3
    assert met[7] == pytest.approx(1)
    assert all_of_them.drawn(importance, 40) is all_of_them


def test_a_draw_from_a_draw_stands_for_all():
    """The mean of a sum over 3000 of them, each of 12 of 20 of 40, is within 6.5 of its standard errors."""
    values, importance = normals(40) + 2, normals(40, seed=1).abs() + 0.1
    all_of_them, found = noises(RING.denoiser(SDE), 40), []
    numbers = torch.randint(10**6, (3000, 2), generator=torch.Generator().manual_seed(0))
    for one, other in numbers.tolist():
        some = all_of_them.drawn(importance, 20, one)
        some = some.drawn(some.start[:, 0].abs() + 0.3, 12, other)
        rows = (all_of_them.start[:, None] == some.start[None]).all(2).nonzero()[:, 0]
        found.append((some.weight * values[rows]).sum())
    found = torch.stack(found)
    error = found.std() / 3000**0.5
    assert (found.mean() - values.sum()).abs() < 6.5 * error < 0.04 * values.sum()


def test_what_is_drawn_keeps_its_condition():
    class Points(BaseDenoiser):
        sde = SDE

        def forward(self, x, t, *, point):
            return point.expand_as(x)

    point = normals(20, 1, seed=7)
    model = Points().given(point=point)
    some = Noises(model, normals(20, 2), point.expand(20, 2), 8).drawn(torch.ones(20), 7)
    table = solvers.ddim().tableau(SDE, grids.quadratic(SDE, 3))
    assert some.distances(natural(table)).max() < 0.1 and len(some) == 7


def test_importance():
    """Half is the same for all, half is a noise's share of the weighted squares, in the mean over runs; of
    samples that flip or are not finite no more than that of any."""
    one, other = normals(50).abs(), 1e-3 * normals(50, seed=1).abs()
    other[3], other[4] = math.inf, 8.0
    shares = 0
    for errors, flip in ((one, 9.0), (other, 9.0)):
        width = 5 * errors[errors <= flip].square().mean().sqrt()
        squares = errors.clamp(max=1e100) ** 2 / (1 + (errors.clamp(max=1e100) / width) ** 2)
        shares = shares + squares / squares.mean() / 2
    found = importance([one, other], 9.0)
    assert torch.allclose(found, 0.5 + 0.5 * shares)
    assert found.mean() == pytest.approx(1) and found.min() >= 0.5


@pytest.mark.parametrize(
    ("errors", "flip"), [([0.0] * 4, 0.3), ([1.0, 2.0, 3.0, math.inf], 0.3), ([math.inf] * 4, 0.3)]
)
def test_what_matters_is_known_even_if_all_is_lost(errors, flip):
    found = importance([torch.tensor(errors, dtype=F64)], flip)
    assert found.isfinite().all() and found.min() >= 0.5 and found.max() <= 2


def test_few_by_importance_tell_more_than_many():
    """Where 1 % of errors are 30 times as large, the mean square of 100 drawn by the errors of another, like
    run is 5 times as near to that of all as that of 100 drawn evenly."""
    tail = torch.where(torch.arange(10_000) % 100 == 0, 30.0, 1.0)
    errors = tail * normals(10_000, seed=1).abs()
    like = errors * (0.2 * normals(10_000, seed=2)).exp()
    everything = Noises(RING.denoiser(SDE), errors[:, None], errors[:, None], 1)
    spread = {}
    for name, shares in (("even", torch.ones(10_000)), ("drawn", importance([like], math.inf))):
        found = []
        for number in range(200):
            some = everything.drawn(shares, 100, number)
            found.append((some.weight * some.start[:, 0] ** 2).sum() / 10_000)
        spread[name] = (torch.stack(found) / errors.square().mean() - 1).square().mean().sqrt()
    assert spread["drawn"] < spread["even"] / 5


@pytest.mark.parametrize("moves", [False, True])
def test_a_weight_is_a_number_of_noises(moves, unchecked):
    """A fit to noises of weights 1, 2 and 3 is the fit to so many of each: errors, equations, and the way.
    Where times move, rounding of the differences by time, 1e-8, depends on the batch and grows with the steps
    (to 3e-4)."""
    fit = some_fit(12)
    times = torch.arange(12) % 3 + 1
    repeated = torch.arange(12).repeat_interleave(times)

    def weighted(of):
        return replace(of, weight=5.0 * times.to(F64))

    def written_out(of):
        return replace(of, start=of.start[repeated], solution=of.target[repeated])

    space = Space(SDE, solvers.dpmpp(2), grids.quadratic(SDE, 3), moves, True, 0.7)
    zero = torch.zeros(len(space), dtype=F64)
    found = []
    for change in (weighted, written_out):
        changed = replace(fit, train=change(fit.train), judge=change(fit.judge))
        found.append(Best(space, zero))
        changed(found[-1])
    one, other = found
    assert list(one.errors) == pytest.approx(list(other.errors), rel=1e-5)
    assert len(one.history) > 10 and one.history[-1][0] < one.history[0][0] / (50 if moves else 30)
    ways = torch.tensor(one.history[:10]), torch.tensor(other.history[:10])
    for first, tolerance in ((1, 1e-9), (4, 1e-3 if moves else 1e-5), (10, 1e-3 if moves else 1e-4)):
        assert torch.allclose(ways[0][:first], ways[1][:first], rtol=tolerance)
    assert torch.allclose(one.parameters, other.parameters, atol=1e-3)


def test_errors_of_weights():
    errors, times = torch.tensor([0.1, 0.3, 0.2, 7.0, math.inf], dtype=F64), torch.tensor([3, 1, 2, 2, 1])
    found = Errors.of(errors, 0.3, times.to(F64))
    assert list(found) == pytest.approx(list(Errors.of(errors.repeat_interleave(times), 0.3)))
    assert found.flips == pytest.approx(3 / 9)
    assert list(Errors.of(errors, 0.3, 0.1 * times)) == pytest.approx(list(found))


# ---- the whole


def exact_error(table, law, sde=SDE):
    """2-Wasserstein distance of the table's output law to that of the probability flow, per coordinate."""
    out = table.law(law, sde)
    t = table.ends
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    gain = (
        (alpha[1] ** 2 * law.variance + sigma[1] ** 2) / (alpha[0] ** 2 * law.variance + sigma[0] ** 2)
    ).sqrt()
    mean = alpha[1] * law.mean - gain * alpha[0] * law.mean
    squares = (out.mean - mean) ** 2 + (out.variance.sqrt() - gain * sde.prior_std) ** 2
    return squares.mean().sqrt().item()


@pytest.mark.parametrize("what", ["grid", "coefficients", "all"])
def test_tuned_for_a_gaussian(what, unchecked):
    found = tune_for(SDE, GAUSSIAN, solvers.dpmpp(2), 4, 20.0, what, starts=1)
    assert found.report.tuned.rms == pytest.approx(exact_error(found.table, GAUSSIAN), rel=1e-9)
    listed = [solvers.dpmpp(2).tableau(SDE, grid(SDE, 4)) for grid in tune_module.GRIDS.values()]
    assert found.report.untuned.rms == pytest.approx(min(exact_error(t, GAUSSIAN) for t in listed), rel=1e-9)
    assert (
        found.report.tuned.rms < found.report.untuned.rms / {"grid": 5, "coefficients": 20, "all": 100}[what]
    )
    assert missed(found.table, SDE) <= 1e-12
    assert len(found.table) == 4
    assert (found.report.n, found.report.seed) == (None, None)
    changed = not torch.allclose(found.table.times, listed[0].times)
    own = torch.tensor(any(torch.equal(found.table.times, t.times) for t in listed))
    assert own == (what == "coefficients") and changed


def test_rotations_do_not_matter(unchecked):
    basis = torch.linalg.qr(normals(3, 3)).Q
    turned = Gaussian(basis @ GAUSSIAN.mean, basis * GAUSSIAN.variance @ basis.T)
    one, other = (tune_for(SDE, law, solvers.dpmpp(2), 3, 20.0, starts=1) for law in (GAUSSIAN, turned))
    assert torch.allclose(one.table.times, other.table.times, rtol=1e-3)


@pytest.fixture(scope="module")
def ring():
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    options = {"shape": (2,), "n": 128, "starts": 1, "reference": 90}
    made = tune(RING.denoiser(SDE), solvers.unipc(2), 4, 60.0, "all", **options)
    config.update("jaxtyping_disable", False)
    return made


def test_a_tuned_table_is_better_on_noises_never_seen(ring):
    fixed, tuned = ring.report.untuned, ring.report.tuned
    assert tuned.rms < fixed.rms / 5
    assert ring.report.more_flips > 0.01
    x = normals(500, 2, seed=99)
    model = RING.denoiser(SDE)
    wanted = solvers.exponential(5, corrector=6, stored="flow", variable="sigma").solve(
        model, x, grids.quadratic(SDE, 60)
    )
    found = Noises(model, x, wanted.x, 500).distances(natural(ring.table))
    assert Errors.of(found, ring.report.flip).rms < fixed.rms / 4
    assert missed(ring.table, SDE) <= 1e-12
    assert ring.report.reference_error < tuned.rms / 10


def test_the_table_goes_through_json_and_into_sample(ring):
    again = Tableau.from_json(ring.table.to_json())
    model = RING.denoiser(SDE)
    drawn = sample(model, (16, 2), solvers.from_tableau(again), grid=ring.grid, seed=3)
    assert torch.equal(drawn.x, sample(model, (16, 2), ring.solver, grid=ring.grid, seed=3).x)
    assert drawn.network_calls == 4 == ring.report.calls
    assert "4 calls; errors on 128 held-out noises" in repr(ring)
    assert "unipc tuned: 4 calls" in repr(ring)


def test_the_seed_decides(unchecked):
    model = RING.denoiser(SDE)
    options = {"shape": (2,), "n": 32, "starts": 1, "reference": 20}
    one, same, other = (tune(model, solvers.dpmpp(2), 3, 60.0, seed=s, **options) for s in (0, 0, 1))
    assert torch.equal(one.table.times, same.table.times) and one.report.history == same.report.history
    assert not torch.equal(one.table.times, other.table.times)
    assert one.report.status == "finished"


def test_states_that_are_given(unchecked):
    """The prior's own states give what the seed gives; others do not."""
    model, options = RING.denoiser(SDE), {"shape": (2,), "n": 16, "starts": 1, "reference": 20}
    own = Noise.of(5, batch=48, dtype=F64).prior((48, 2))
    options["wide"] = 1
    drawn = tune(model, solvers.dpmpp(2), 2, 60.0, seed=5, **options).report
    given, other = (
        tune(model, solvers.dpmpp(2), 2, 60.0, start=x, **options).report for x in (own, 0.5 * own)
    )
    assert given.tuned == drawn.tuned and given.history == drawn.history
    assert other.tuned != drawn.tuned


def test_several_solvers_compete(unchecked):
    model = RING.denoiser(SDE)
    found = tune(
        model,
        [solvers.ddim(), solvers.unipc(2)],
        4,
        30.0,
        shape=(2,),
        n=32,
        starts=2,
        reference=20,
        progress=True,
    )
    assert found.report.tried == 2 * len(tune_module.GRIDS)
    assert found.report.untuned_name.startswith("unipc(2)")


def test_a_float32_network(unchecked):
    torch.manual_seed(0)
    model = Denoiser(MLP(2, hidden=16), SDE, predicts="velocity")
    found = tune(model, solvers.dpmpp(2), 3, 20.0, "all", shape=(2,), n=32, starts=1, reference=30, batch=50)
    assert found.report.tuned.rms < found.report.untuned.rms
    assert model.training  # as before


# ---- falling back, stopping


class Given(Space):
    """Whatever the parameters, this table."""

    def __init__(self, table):
        object.__setattr__(self, "given", table)

    def __len__(self):
        return 1

    def forms(self, parameters):
        return natural(self.given)

    def table(self, parameters):
        return self.given


def scripted(monkeypatch, act):
    """A fit that does what it is told."""

    def call(self, best):
        best.done = True
        act(best)

    monkeypatch.setattr(Fit, "__call__", call)
    return tune(RING.denoiser(SDE), solvers.unipc(2), 4, 30.0, shape=(2,), n=64, starts=1, reference=20)


def fixed_table(found):
    name = found.report.untuned_name.removeprefix("unipc(2) on ")
    return solvers.unipc(2).tableau(SDE, tune_module.GRIDS[name](SDE, 4))


def is_fixed(found):
    own = fixed_table(found)
    return torch.equal(own.mix, found.table.mix) and torch.equal(own.times, found.table.times)


def test_without_a_better_table_the_fixed_one_is_returned(monkeypatch, unchecked):
    """Nor is another one taken that is as good."""

    def as_good(best):
        if not isinstance(best.space, Given):
            best.space = Given(best.space.solver.tableau(SDE, best.space.grid))

    monkeypatch.setattr(search_module, "BEGUN", ((0, 0.0),))
    found = scripted(monkeypatch, as_good)
    assert is_fixed(found) and found.report.start is None
    assert found.report.tuned == found.report.untuned
    assert found.report.more_flips == 1


def test_a_table_withmore_flips_is_not_taken(monkeypatch, unchecked):
    def worse(best):
        best.space = Given(solvers.ddim().tableau(SDE, grids.uniform(SDE, 1)))
        best.errors = Errors(0.0, 0.0, 0.0)

    assert is_fixed(scripted(monkeypatch, worse))


def test_an_interrupted_fit_keeps_its_best(monkeypatch, unchecked):
    better = solvers.unipc(3).tableau(SDE, grids.quadratic(SDE, 25))

    def stop(best):
        best.space = Given(better)
        raise KeyboardInterrupt

    found = scripted(monkeypatch, stop)
    assert found.report.status == "interrupted"
    assert torch.equal(found.table.times, better.times)
    assert found.report.tuned.rms < found.report.untuned.rms / 10


def test_slow_references_leave_time_for_fixed_configurations(monkeypatch, unchecked):
    """With a clock that references take half of the time by, and nothing else any."""
    now, sampled = [0.0], tune_module._sampled

    def slow(*args):
        now[0] = 5.0
        return sampled(*args)

    monkeypatch.setattr(tune_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tune_module, "_sampled", slow)
    monkeypatch.setattr(Fit, "__call__", lambda self, best: None)
    found = tune(RING.denoiser(SDE), solvers.unipc(2), 4, 10.0, shape=(2,), n=16, reference=10)
    assert found.report.tried == len(tune_module.USUAL_FIRST)


class Known:
    """In place of noises: distances of a form are what `error(form)` says, and forms asked for are kept."""

    weight = None

    def __init__(self, error):
        self.error, self.asked = error, []

    def distances(self, form):
        self.asked.append(form)
        return torch.full((4,), self.error(form), dtype=F64)


def begun(error, solver, calls, what="all", usual=None, until=math.inf):
    """(The starts of all configurations, the configurations, how many runs that took.)"""
    usual = {"quadratic": grids.quadratic} if usual is None else usual
    task = search_module.Task.of(SDE, solver, calls, what, 1.0, 0.01, usual, 1)
    search, noises = search_module.Search(task, Sets(1.0), None, until, None), Known(error)
    found = search._starts([(candidate, None) for candidate in task.candidates], noises)
    return found, task.candidates, len(noises.asked)


class Sets(NamedTuple):
    flip: float


@pytest.mark.parametrize(("skipped", "late"), search_module.BEGUN)
@pytest.mark.parametrize(
    ("solver", "calls", "steps"), [(solvers.unipc(2), 5, 5), (solvers.heun(), 7, 3), (solvers.unipc(1), 1, 1)]
)
def test_fits_begin_with_a_longer_first_step(solver, calls, steps, skipped, late, unchecked):
    """As many calls as were asked for, on a grid of more nodes without those after the first: whichever is
    best as it stands."""
    more = grids.quadratic(SDE, steps + skipped, 0.01).t
    wanted = torch.cat([more[:1], more[1 + skipped :]])
    space = Space(SDE, solver, Grid.of(SDE, wanted), moves=False, free=False, late=late)
    own = space.forms(torch.zeros(1, 0, dtype=F64))
    error = lambda form: (form.times - own.times).abs().max().item()  # noqa: E731
    (start,), _, runs = begun(error, solver, calls)
    assert torch.equal(start.space.grid.t, wanted) and start.space.late == late
    assert error(start.form) == 0 and runs == len(search_module.BEGUN)
    assert start.form.keep.shape == own.keep.shape


def refusing(sde, steps, end=None):
    if steps != 5:
        raise ValueError(f"expected 5 steps, found {steps}")
    return grids.quadratic(sde, 5, end)


@pytest.mark.parametrize("make", [refusing, lambda sde, steps, end=None: grids.quadratic(sde, 5, end)])
def test_grids_of_one_length_are_where_fits_begin(make, unchecked):
    (start,), _, _ = begun(lambda form: 0.0, solvers.unipc(2), 5, usual={"own": make})
    assert torch.equal(start.space.grid.t, grids.quadratic(SDE, 5, 0.01).t) and start.space.late == 0


def test_fits_begin_on_the_grid_where_its_times_stay(unchecked):
    usual = {"quadratic": grids.quadratic, "uniform": grids.uniform}
    found, candidates, runs = begun(None, solvers.unipc(2), 5, "coefficients", usual, 0.0)
    assert [start.candidate for start in found] == candidates and runs == 0
    for start, make in zip(found, usual.values(), strict=True):
        assert torch.equal(start.space.grid.t, make(SDE, 5, 0.01).t) and start.space.late == 0


def test_fits_begin_from_what_is_best_as_it_stands(unchecked):
    """Best first, as far as there is time, at least from one; of each solver before the next best ones."""
    usual = {f"power {p}": partial(grids.power, exponent=p) for p in (1.5, 2, 3)}
    two = [solvers.unipc(2), solvers.unipc(3)]
    error = lambda form: (form.times[0, 3] - 0.16).abs().item()  # noqa: E731
    found, candidates, _ = begun(error, two, 5, "grid", usual)
    errors = [error(start.form) for start in found]
    assert len(found) == 6 and errors == sorted(errors) and errors[0] < errors[-1]
    (first,), _, _ = begun(error, two, 5, "grid", usual, 0.0)
    assert first.candidate == candidates[0]
    spread = search_module._spread(found, 6)
    assert spread[0] is found[0] and repr(spread[0].candidate.solver) != repr(spread[1].candidate.solver)
    assert spread[2:] == [start for start in found if start not in spread[:2]]


def test_no_time_at_all(monkeypatch, unchecked):
    """A fit that has no time stays where it begins, here at the fixed table."""
    monkeypatch.setattr(search_module, "BEGUN", ((0, 0.0),))
    found = tune(RING.denoiser(SDE), solvers.unipc(2), 4, 1e-6, shape=(2,), n=16, reference=10)
    assert found.report.status == "out of time"
    assert found.report.tried == 1 and found.report.history == ()
    assert is_fixed(found)


@pytest.mark.parametrize(("new", "gone"), [(0, 0), (3, 1), (1, 3), (9, 0), (20, 12)])
def test_flips_are_compared_in_pairs(new, gone):
    from scipy.stats import binom

    before, after = torch.zeros(60, dtype=F64), torch.zeros(60, dtype=F64)
    before[:5] = after[:5] = 9.0
    after[5 : 5 + new] = 9.0
    before[40 : 40 + gone] = 9.0
    found = search_module.more_flips(before, after, 1.0)
    assert found == pytest.approx(binom.sf(new - 1, new + gone, 0.5))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": torch.nn.Identity()}, TypeError, "expected a denoiser"),
        ({"solver": "unipc"}, TypeError, "expected solvers that are tables"),
        ({"solver": solvers.adaptive_ode()}, TypeError, "expected solvers that are tables"),
        ({"solver": solvers.ddpm()}, ValueError, "expected deterministic solvers"),
        ({"solver": []}, ValueError, "expected at least one solver and one grid"),
        ({"calls": 0}, ValueError, "expected a whole number calls >= 1, found 0"),
        ({"calls": 2.0}, ValueError, "expected a whole number calls >= 1, found 2.0"),
        ({"calls": 1, "solver": solvers.heun()}, ValueError, "expected calls that pay for a step"),
        ({"seconds": 0.0}, ValueError, "expected seconds > 0"),
        ({"seconds": math.nan}, ValueError, "expected seconds > 0"),
        ({"what": "everything"}, ValueError, r"expected what to be one of \['all', 'coefficients', 'grid'\]"),
        ({"n": 0}, ValueError, "expected a whole number n >= 1"),
        ({"n": 1}, ValueError, "expected n of at least 2 noises, found 1"),
        ({"flip": 0.0}, ValueError, "expected flip > 0, found 0.0"),
        ({"flip": math.nan}, ValueError, "expected flip > 0, found nan"),
        ({"shape": 2}, ValueError, "expected the shape of one sample, such as"),
        ({"grids": grids.uniform}, TypeError, "expected a mapping from names to functions such as"),
        ({"starts": True}, ValueError, "expected a whole number starts >= 1"),
        ({"batch": 0}, ValueError, "expected a whole number batch >= 1"),
        ({"end": 2.0}, ValueError, "expected an end"),
        ({"start": torch.zeros(9, 2), "n": 3}, ValueError, r"expected start of shape \(27, 2\), found"),
        ({"wide": 0}, ValueError, "expected a whole number wide >= 1"),
        ({"grids": {}}, ValueError, "expected at least one solver and one grid"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_call(change, error, says, unchecked):
    class Untouched(BaseDenoiser):
        sde = SDE

        def forward(self, x, t):
            raise AssertionError("called")

    given = {"model": Untouched(), "solver": solvers.dpmpp(2), "calls": 4, "shape": (2,), **change}
    with pytest.raises(error, match=says):
        tune(given.pop("model"), given.pop("solver"), given.pop("calls"), **given)


def test_other_laws_are_sampled(unchecked):
    found = tune_for(SDE, RING, solvers.dpmpp(2), 3, 60.0, grids={"quadratic": grids.quadratic}, starts=1)
    assert found.report.n == 512
    assert found.report.tuned.rms < found.report.untuned.rms


def test_only_laws_are_known(unchecked):
    with pytest.raises(TypeError, match="expected a law of the data"):
        tune_for(SDE, RING.denoiser(SDE), solvers.dpmpp(2), 4)


def test_scouts_share_the_time_and_the_best_go_on_from_where_they_are(monkeypatch, unchecked):
    """By a clock that stands still: a quarter of the time for three starts, a third, half of the rest, the
    rest; of what is left of each for the grid alone a quarter. The best on all noises goes on first, for a
    third of the first half, and the others; then those that had not enough, the best one first."""
    fits, spaces = [], []
    goals = [solvers.unipc(2).tableau(SDE, grids.quadratic(SDE, k)) for k in (6, 12, 9)]
    said = {4: 1.0, 7: 0.3, 8: 0.1, 9: 0.2}

    def fit(self, best):
        fits.append((self.until - 100.0, float(best.parameters.sum())))
        spaces.append(best.space)
        if len(fits) in (2, 4, 6):
            best.space = Given(goals[len(fits) // 2 - 1])
        best.parameters = best.parameters + 0.1
        best.errors = Errors(said.get(len(fits), 0.0), 0.0, 0.0)
        best.done = len(fits) not in (2, 7, 9)

    monkeypatch.setattr(tune_module.time, "perf_counter", lambda: 100.0)
    monkeypatch.setattr(search_module, "BEGUN", ((1, 0.7),))
    monkeypatch.setattr(Fit, "__call__", fit)
    model = RING.denoiser(SDE)
    found = tune(model, solvers.unipc(2), 4, 12.0, "all", shape=(2,), n=64, starts=3, reference=20)
    limits = [0.25, 1.0, 0.375, 1.5, 0.75, 3.0, 2.0, 4.0, 6.0, 12.0, 12.0]
    assert [until for until, _ in fits] == pytest.approx(limits)
    assert [space.given for space in spaces[6:]] == [goals[k] for k in (1, 2, 0, 0, 1)]
    assert [space.late for space in spaces[:6]] == pytest.approx([0.7, 0.8] * 3)
    for again, before in ((6, 3), (7, 5), (8, 1), (9, 8), (10, 6)):
        assert fits[again][1] == pytest.approx(fits[before][1] + 0.1 * 17)
    assert torch.equal(found.table.times, goals[1].times)
    assert found.report.status == "out of time"  # not all of the fits had enough


def test_fits_are_on_noises_enough_for_their_parameters(monkeypatch, unchecked):
    """Scouts on a quarter of the first 512 noises, and judged by half of these; no two on the same ones. The
    last one on 512 of the 4 times 600."""
    seen, met = [], []

    def fit(self, best):
        met.extend((self.train.start, self.judge.start))
        seen.append((len(self.train), len(self.judge), len(best.space)))

    monkeypatch.setattr(Fit, "__call__", fit)
    tune(RING.denoiser(SDE), solvers.unipc(2), 4, 30.0, "all", shape=(2,), n=600, starts=1, reference=20)
    assert seen == [(128, 256, 5), (128, 256, 17), *[(512, 512, 17)] * 2]
    assert all(not torch.equal(one, other) for k, one in enumerate(met[:-2]) for other in met[:k])
    assert torch.equal(met[-2], met[-4]) and torch.equal(met[-1], met[-3])
    monkeypatch.setattr(search_module, "SCOUTS", (0.1, 10))
    seen.clear()
    tune(RING.denoiser(SDE), solvers.unipc(2), 4, 30.0, "all", shape=(2,), n=100, starts=1, reference=20)
    assert seen == [(20, 64, 5), (68, 64, 17), *[(100, 100, 17)] * 2]


def test_noises_that_matter_are_where_tables_differ():
    """Where two tables differ a hundred times as much as elsewhere all noises are drawn, with a weight of 1,
    and of the others what is left."""
    x = normals(90, 2)
    x = x / x.norm(dim=1, keepdim=True)
    x[::10] *= 100

    class Proportional(BaseDenoiser):
        sde = SDE

        def forward(self, x, t):
            return 0.3 * x

    model = Proportional()
    train, judge, held_out = (Noises(model, y, lambda model, x: x, 100) for y in (x, x.flip(0), x[:30]))
    sets = search_module.Sets(train, judge, held_out, math.inf, 0.0, 0)
    forms = [natural(solvers.dpmpp(p).tableau(SDE, grids.quadratic(SDE, 3))) for p in (1, 2)]
    found = sets.mattering(forms)
    for drawn in (found.train, found.judge):
        large = drawn.start.norm(dim=1) > 20
        assert len(drawn) == 30 and large.sum() == 9
        assert torch.allclose(drawn.weight[large], torch.ones(1, dtype=F64), rtol=0.2)
        assert torch.equal(drawn.target, drawn.start)
    assert found.held_out is held_out
    first = sets.first()
    assert torch.equal(first.train.start, x[:30]) and first.train.weight is None
    few = replace(train, start=x[:30])
    assert sets._replace(train=few).mattering(forms).train is few


def test_the_best_fit_on_all_noises_is_taken(monkeypatch, unchecked):
    """Whatever the fits say of the noises drawn."""
    said = [(25, 1e-3), (20, 1e-9), (22, 1e-6)]
    tables = [solvers.unipc(3).tableau(SDE, grids.quadratic(SDE, steps)) for steps, _ in said]

    def fit(self, best):
        if left:
            k = left.pop(0)
            best.space, best.errors = Given(tables[k]), Errors(said[k][1], 0.0, 0.0)

    left = [0, 1, 2, 1, 2, 1, 2]  # those that go on from the best end up worse
    monkeypatch.setattr(Fit, "__call__", fit)
    monkeypatch.setattr(search_module, "AGREED", 2)
    found = tune(RING.denoiser(SDE), solvers.unipc(2), 4, 30.0, shape=(2,), n=64, starts=3, reference=60)
    assert left == [] and torch.equal(found.table.times, tables[0].times)


def test_a_better_table_with_more_flips_is_not_taken(monkeypatch, unchecked):
    better = solvers.unipc(3).tableau(SDE, grids.quadratic(SDE, 25))
    monkeypatch.setattr(search_module, "more_flips", lambda before, after, flip: 0.04)
    assert is_fixed(scripted(monkeypatch, lambda best: setattr(best, "space", Given(better))))
    monkeypatch.setattr(search_module, "more_flips", lambda before, after, flip: 0.06)
    found = scripted(monkeypatch, lambda best: setattr(best, "space", Given(better)))
    assert torch.equal(found.table.times, better.times)


def test_the_first_noises_are_fitted_on_the_second_are_chosen_by(monkeypatch, unchecked):
    start, seen = normals(7 * 64, 2), []

    def fit(self, best):
        seen.append((self.train.start, self.judge.start))

    monkeypatch.setattr(Fit, "__call__", fit)
    options = {"shape": (2,), "n": 64, "start": start, "wide": 3, "reference": 20}
    tune(RING.denoiser(SDE), solvers.unipc(2), 4, 30.0, **options)
    assert len(seen) == 9
    for k, (train, judge) in enumerate(seen):
        of = 64 if k < 3 else 192
        assert (train[:, None] == start[None, :of]).all(2).any(1).all()
        assert (judge[:, None] == start[None, 192 : 192 + of]).all(2).any(1).all()
    assert not (train[:, None] == start[None, :64]).all(2).any(1).all()  # of the last ones


def test_ends_are_ranked_on_the_noises_that_tables_are_chosen_by(unchecked):
    train, judge, held_out = (noises(RING.denoiser(SDE), seed=k) for k in (0, 2, 4))
    table = solvers.ddim().tableau(SDE, grids.quadratic(SDE, 3))
    weight = 1 + torch.arange(6, dtype=F64)
    used = search_module.Sets(train, replace(judge, weight=weight), held_out, 1.0, 0.0, 0)
    search = search_module.Search(None, used, used, 0.0, None)
    end = search_module.Attempt(None, Best(Given(table), torch.zeros(1)))
    errors = judge.distances(natural(table))
    assert 0 < (errors > 1.0).sum() < 6
    assert search.rank(end) == Errors.of(errors, 1.0, weight).rank != Errors.of(errors, 1.0).rank
