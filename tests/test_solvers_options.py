"""What solvers refuse, what they accept at the edge of it, and what a run reports; without a law."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import protocol
import pytest
import torch
from protocol import VP, Wavy, regular
from torch import Tensor, nn

from scoresde import grids, solvers
from scoresde.denoiser import BaseDenoiser, Denoiser
from scoresde.grids import Grid
from scoresde.noise import Noise
from scoresde.schedules import Cosine
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified
from scoresde.solvers import base
from scoresde.solvers.base import Card, Samples, TableSolver
from scoresde.solvers.catalogue import CardTable, examples, parse
from scoresde.solvers.exponential import Exponential
from scoresde.solvers.reversible import reversible
from scoresde.solvers.singlestep import HEUN, STAGES, singlestep_table
from scoresde.solvers.weights import STORED
from scoresde.tableau import Tableau
from scoresde.testing import orders
from scoresde.testing.solver_checks import check_point_mass

pytestmark = pytest.mark.usefixtures("unchecked")

F64 = torch.float64


# Options


HIGHEST = {
    solvers.dpm: 3, solvers.dpmpp: 3, solvers.sde_dpmpp: 3, solvers.unipc: 6, solvers.deis: 4,
    solvers.adams: 4, solvers.seeds: 3, solvers.er_sde: 3, solvers.exponential: 8,
}  # fmt: skip
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    *(
        (lambda make=make, order=order: make(order), ValueError, rf"order in 1\.\.{highest}( |, found)")
        for make, highest in HIGHEST.items()
        for order in (True, 2.0, "2", 0, highest + 1)
    ),
    *((lambda c=c: solvers.exponential(2, corrector=c), ValueError, "corrector order") for c in (True, 2.0)),
    (lambda: solvers.exponential(5, rule="adams"), ValueError, "no corrector for rule 'adams', found 5, 0"),
    (lambda: solvers.exponential(2, corrector=3, rule="adams"), ValueError, "rule 'adams', found 2, 3"),
    (lambda: solvers.exponential(2, tau="1"), TypeError, "tau: expected a number"),
    (lambda: solvers.exponential(2, tau=math.nan), ValueError, "tau >= 0"),
    (lambda: solvers.sde_dpmpp(2, "1"), TypeError, "eta: expected a number"),
    (lambda: solvers.sde_dpmpp(2, math.inf), ValueError, "eta >= 0, found inf"),
    (lambda: solvers.sde_dpmpp(2, math.nan), ValueError, "eta >= 0"),
    (lambda: solvers.sde_dpmpp(2, singlestep=True, rule="bh2"), ValueError, "order 2 and 'bh2'"),
    (lambda: solvers.ddim("1"), TypeError, "eta: expected a number"),
    (lambda: solvers.ddpm("medium", "score_sde"), ValueError, "'small' or 'large'"),
    (lambda: solvers.restart(3), ValueError, r"intervals \(low, high, times, steps\), found 3"),
    (lambda: solvers.restart(((0.1, 0.3, 2),)), ValueError, r"expected intervals \(low"),
    (lambda: solvers.restart(((0.1, 0.3, 2, 4), (0.5, 0.9, 1))), ValueError, r"expected intervals \(low"),
    (lambda: solvers.restart(((0.1, 0.3, 2, 4), (0.5, 0.4, 1, 1))), ValueError, r"found \(0.5, 0.4, 1, 1\)"),
    (lambda: solvers.restart(((0.1, 0.3, 2.5, 4),)), ValueError, r"found \(0.1, 0.3, 2.5, 4\)"),
    (lambda: solvers.restart(((0.1, 0.3, 2, 4.5),)), ValueError, r"found \(0.1, 0.3, 2, 4.5\)"),
    (lambda: reversible(2, "1"), TypeError, "coupling: expected a number"),
    *((lambda c=c: reversible(2, c), ValueError, "0 < coupling <= 1") for c in (0.0, 1.001, -0.5)),
    *((lambda p=p: reversible(p), ValueError, f"order 1 or 2 .*found {p}") for p in (0, 3, 2.0, True)),
    (lambda: solvers.from_tableau(solvers.ddim()), TypeError, "expected a Tableau"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED)
def test_refused(make: Callable, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "printed"),
    [
        (lambda: solvers.exponential(8, corrector=8, tau=0), "exponential(order=8, corrector=8, "
         "stored='data', variable='lam', tau=0, rule='exact')"),
        (lambda: solvers.exponential(), "exponential(order=2, corrector=0, stored='data', variable='lam', "
         "tau=0.0, rule='exact')"),
        (lambda: solvers.exponential(4, rule="adams"), "exponential(order=4, corrector=0, stored='data', "
         "variable='lam', tau=0.0, rule='adams')"),
        (lambda: solvers.unipc(6), "unipc(order=6, rule='exact', stored='data')"),
        (lambda: solvers.sde_dpmpp(1, 0.0, True),
         "sde_dpmpp(order=1, eta=0.0, singlestep=True, rule='exact')"),
        (lambda: solvers.edm(0.0, 0.0, 0.0), "edm(churn=0.0, low=0.0, high=0.0, spread=1.003)"),
        (lambda: solvers.edm(1.0, 2.0, 2.0, 0.5), "edm(churn=1.0, low=2.0, high=2.0, spread=0.5)"),
        (lambda: solvers.restart([(0.1, 0.2, 1, 1)]), "restart(intervals=((0.1, 0.2, 1, 1),))"),
        (lambda: reversible(1, 1.0), "reversible(order=1, coupling=1.0)"),
        (lambda: solvers.ddpm(rule="score_sde"), "ddpm(rule='score_sde')"),
        (lambda: solvers.euler_maruyama(), "euler_maruyama(rule='exact')"),
        (lambda: solvers.reverse_diffusion(), "reverse_diffusion(rule='exact')"),
        (lambda: solvers.heun(), "heun()"),
        (lambda: solvers.midpoint(), "midpoint()"),
    ],
)  # fmt: skip
def test_accepted(make: Callable, printed: str) -> None:
    assert repr(make()) == printed


@pytest.mark.parametrize(
    ("solver", "least"),
    [(solvers.ddim(), 1), (solvers.heun(), 2), (reversible(1), 2), (reversible(2), 4),
     (solvers.ddpm(rule="score_sde"), 2), (solvers.restart(), 18)],
    ids=repr,
)  # fmt: skip
def test_calls_that_do_not_pay_for_a_step(solver: Any, least: int) -> None:
    for calls in (least - 1, float(least), str(least), True, None):
        with pytest.raises(ValueError, match=f"expected at least {least} calls"):
            solver.steps_for(calls)
    assert solver.steps_for(least) == 1


def test_steps_of_the_reversible_solver() -> None:
    assert [reversible(2).steps_for(calls) for calls in (4, 7, 8, 11, 12)] == [1, 1, 2, 2, 3]
    assert [reversible(1).steps_for(calls) for calls in (2, 3, 4)] == [1, 1, 2]


# Cards


def test_what_cards_and_results_leave_out() -> None:
    card, found = Card(2, None, 1, False, "here"), Samples(torch.zeros(1), 3, 0.5)
    assert (card.properties, card.final, card.memory) == (frozenset(), "data", 1)
    assert (found.status, found.path, found.end, found.seed) == ("ok", (), 0.0, None)
    assert found.companion is None and found.evaluations is None


def test_the_list_prints_as_a_table() -> None:
    cards = CardTable(
        one=Card(2, None, 1, False, "Someone 2020"),
        second=Card(None, 12, 10, True, "B", frozenset({"clock_free", "a"}), "none", memory=3),
    )
    assert repr(cards).splitlines() == str(cards).splitlines() == [
        "solver  order  weak  calls/step  memory  noise  to sigma=0  properties    reference",
        "one     2      -     1           1       -      data                      Someone 2020",
        "second  -      12    10          3       yes    none        a clock_free  B",
    ]  # fmt: skip


FAMILY = [
    # predictor, corrector, order, memory
    (1, 0, 1, 1), (3, 0, 3, 3), (1, 1, 1, 2), (2, 1, 1, 3), (3, 2, 2, 4), (2, 3, 3, 3), (2, 4, 3, 4),
    (1, 3, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize(("order", "corrector", "expected", "memory"), FAMILY)
def test_order_with_a_corrector(order: int, corrector: int, expected: int, memory: int) -> None:
    """A corrector takes back its prediction whole, of whatever orders, and is limited by that prediction."""
    solver = solvers.exponential(order, corrector=corrector)
    assert (solver.card.order, solver.card.memory) == (expected, memory)
    assert orders.order(solver, VP).order == pytest.approx(expected, abs=0.15)
    check_point_mass(solver.tableau(VP, regular(VP, 8)), VP)
    noisy = solvers.sa(order, corrector)
    assert (noisy.card.weak_order, noisy.card.order) == (min(2, expected), None)
    assert noisy.card.memory == memory and noisy.card.calls_per_step == 1
    check_point_mass(noisy.tableau(VP, regular(VP, 8)), VP)


@pytest.mark.parametrize("rule", ["half3", "backward", "adams"])
def test_published_rules_have_the_order_of_two_nodes(rule: str) -> None:
    found = [solvers.exponential(p, rule=rule).card.order for p in (1, 2, 3)]
    assert found == [1, 2, 2]
    assert solvers.exponential(4, variable="sigma/alpha", stored="noise", rule="adams").card.order == 2
    assert [solvers.exponential(p, rule="bh2").card.order for p in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("stored", ["data", "noise", "velocity", "flow"])
@pytest.mark.parametrize("tau", [0.0, 0.3, lambda lam: 0.3 + 0 * lam])
def test_who_keeps_a_point_mass(stored: str, tau: Any) -> None:
    solver = solvers.exponential(2, stored=stored, tau=tau)
    assert solver.card.stochastic == (tau != 0)
    table = solver.tableau(VP, regular(VP, 6))
    exact = stored == "data" or (stored != "velocity" and tau == 0)
    assert ("marginal_exact" in solver.card.properties) == exact
    assert ("scale_covariant" in solver.card.properties) == (stored != "velocity")
    if exact:
        check_point_mass(table, VP)
    else:
        with pytest.raises(AssertionError):
            check_point_mass(table, VP, tolerance=1e-6)


@pytest.mark.parametrize(("churn", "spread"), [(0.0, 1.003), (40.0, 1.0), (40.0, 1.003)])
def test_spread_noise_does_not_keep_a_point_mass(churn: float, spread: float) -> None:
    solver = solvers.edm(churn, spread=spread)
    exact = churn == 0 or spread == 1
    assert ("marginal_exact" in solver.card.properties) == exact
    table = solver.tableau(VP, regular(VP, 6))
    if exact:
        check_point_mass(table, VP)
    else:
        with pytest.raises(AssertionError):
            check_point_mass(table, VP, tolerance=1e-5)


def test_examples_that_are_no_tables() -> None:
    """The others are pinned by name in test_pinned.py."""
    names = [name for name, solver in examples().items() if not isinstance(solver, TableSolver)]
    assert names[:6] == [
        "reversible(order=1, coupling=0.999)",
        "reversible(order=2, coupling=0.999)",
        "predictor_corrector(reverse_diffusion(rule='exact'), corrector_steps=1, snr=0.16, norm='sample')",
        "predictor_corrector(dpmpp(order=2, singlestep=False, rule='exact'), corrector_steps=1, snr=0.16, "
        "norm='sigma')",
        "adaptive_ode(rtol=0.0001, atol=0.0001, order=6, max_calls=1000)",
        "adaptive_sde(rtol=0.05, atol=0.025, max_calls=2000)",
    ]
    assert [name.split("'")[1] for name in names[6:]] == [
        *("RK45", "DOP853", "LSODA"),
        *("euler", "milstein", "srk", "euler_heun", "heun", "midpoint", "log_ode", "reversible_heun"),
    ]


def test_every_solver_is_read_from_what_it_prints() -> None:
    for name in examples():
        assert repr(parse(name)) == name
    assert repr(parse("dpmpp")) == repr(solvers.dpmpp()) and repr(parse("heun()")) == "heun()"
    for text in ("nothing", "dpmpp(4)", "1"):
        with pytest.raises(ValueError, match="expected"):
            parse(text)
    with pytest.raises(ValueError, match=r"expected a solver from .*See: scoresde solvers"):
        parse("card()")


# Runs


class Watching(BaseDenoiser):
    """A denoiser with a part that is being trained; keeps what its parts were set to at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.sde, self.part, self.still, self.seen = VP, nn.Dropout(0.5), nn.Linear(1, 1), []
        self.still.eval()

    def forward(self, x: Tensor, t: Any) -> Tensor:
        self.seen.append((self.training, self.part.training, self.still.training))
        return x


@pytest.mark.parametrize("solver", [solvers.ddim(), reversible(1)], ids=repr)
def test_the_model_is_evaluated_and_then_as_it_was(solver: Any) -> None:
    model = Watching()
    solver.solve(model, torch.ones(1, 1, dtype=F64), regular(VP, 2))
    assert set(model.seen) == {(False, False, False)}
    assert (model.training, model.part.training, model.still.training) == (True, True, False)
    model.eval()
    solver.solve(model, torch.ones(1, 1, dtype=F64), regular(VP, 2))
    assert not model.part.training


def test_the_start_belongs_to_the_caller() -> None:
    """A network may write into its input, and always gets a dense one."""
    dense = []

    class Writing(Wavy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            dense.append(x.is_contiguous())
            return x.zero_() + 0.5

    x = torch.ones(3, 2, dtype=F64)
    for start in (x, torch.stack([x, -x], -1)[..., 0], x[:1].expand(3, 2)):
        solvers.ddim().solve(Writing(VP), start, regular(VP, 2))
    assert bool((x == 1).all()) and dense == [True] * 6


def test_results_and_cards_do_not_change() -> None:
    for value in (Samples(torch.zeros(1), 3, 0.5), solvers.ddim().card, solvers.ddim(), reversible(),
                  Exponential(2), STORED["data"]):  # fmt: skip
        first = fields(value)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(value, first, getattr(value, first))


@pytest.mark.parametrize("solver", [solvers.ddim(), reversible(1)], ids=repr)
def test_seconds_are_those_of_the_whole_run(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks whenever it is asked, and the model takes 100 s a call."""
    ticks = itertools.count(10.0)
    passed = []
    monkeypatch.setattr(base.time, "perf_counter", lambda: next(ticks) + 100 * len(passed))

    class Slow(Wavy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            passed.append(1)
            return super().forward(x, t)

    found = solver.solve(Slow(VP), torch.ones(1, 2, dtype=F64), regular(VP, 3))
    assert found.seconds == 1 + 100 * found.network_calls == 1 + 100 * len(passed)


def test_seconds_include_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(base.time, "perf_counter", lambda: now[0])

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        now[0] += 7
        return solvers.ddim().build(sde, grid)

    slow = TableSolver("slow", build, solvers.ddim().card)
    found = slow.solve(Wavy(VP), torch.ones(1, 2, dtype=F64), regular(VP, 3))
    assert found.seconds == 7 and found.end == float(regular(VP, 3).t[-1]) and found.network_calls == 3
    alone = base.execute(slow.tableau(VP, regular(VP, 3)), Wavy(VP), torch.ones(1, 2, dtype=F64))
    assert alone.seconds == 0


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_a_callback_sees_the_data_that_any_network_means(predicts: Any) -> None:
    """Whatever it predicts; what a callback returns is kept, None is not."""
    network = lambda x, t: (0.5 * x + 0.1).tanh()  # noqa: E731
    model = Denoiser(network, VP, predicts=predicts)
    x, grid = torch.linspace(-1, 1, 6, dtype=F64).view(3, 2), regular(VP, 4)
    found = solvers.dpmpp(2).solve(model, x, grid, callback=lambda step: step if step.k % 2 else None)
    assert [step.k for step in found.path] == [1, 3] and found.network_calls == 4
    for step in found.path:
        assert torch.allclose(step.denoised, model(step.x, step.t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", [VP, EDM()])
@pytest.mark.parametrize(("order", "calls"), [(1, 2), (2, 4)])
def test_what_a_run_of_the_reversible_solver_reports(order: int, calls: int, sde: LinearSDE) -> None:
    """Both ways: calls, with those for the callback; time and state of each step; end and the second copy."""
    made = []

    class Counted(Wavy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            made.append(float(t))
            return super().forward(x, t)

    solver, x, model = reversible(order, 0.9), torch.linspace(-1, 1, 6, dtype=F64).view(3, 2), Counted(sde)
    for grid in (regular(sde, 3), regular(sde, 3).reversed()):
        made.clear()
        plain = solver.solve(model, x, grid)
        assert plain.network_calls == len(made) == 3 * calls and plain.path == ()
        made.clear()
        watched = solver.solve(model, x, grid, callback=lambda step: step if step.k else None)
        assert watched.network_calls == len(made) == 3 * calls + 3
        assert [step.k for step in watched.path] == [1, 2]
        assert [step.t for step in watched.path] == grid.t[1:-1].tolist()
        for k, step in enumerate(watched.path, 1):
            upto = Grid(grid.t[: k + 1], grid.lam[: k + 1], grid.label[: k + 1])
            assert torch.allclose(solver.solve(model, x, upto).x, step.x, rtol=1e-13, atol=1e-13)
            assert torch.equal(Wavy(sde)(step.x, torch.tensor(step.t, dtype=F64)), step.denoised)
        assert torch.equal(watched.x, plain.x) and plain.end == float(grid.t[-1])
        assert plain.companion is not None and not torch.equal(plain.companion, plain.x)
        back = solver.solve(model, (plain.x, plain.companion), grid.reversed())
        assert back.companion is not None
        assert torch.allclose(back.x, x, atol=1e-12) and torch.allclose(back.companion, x, atol=1e-12)


def test_the_tables_of_a_reversible_run_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made one by one they took three times as long as the rest of a run of a small model."""
    made: list[int] = []

    def counted(sde: LinearSDE, starts: Tensor, *rest: Any, **options: Any) -> Tableau:
        made.append(len(starts))
        return singlestep_table(sde, starts, *rest, **options)

    monkeypatch.setattr(sys.modules[reversible.__module__], "singlestep_table", counted)
    reversible(2).solve(Wavy(VP), torch.ones(2, 1, dtype=F64), regular(VP, 7))
    assert made == [7, 7]


def test_the_reversible_step_is_that_of_its_docstring() -> None:
    """Order 1, two copies, an SDE whose scale is not 1, by hand."""
    sde, c = EDM(), 0.8
    t = torch.tensor([2.0, 1.0], dtype=F64)
    y, z = (torch.tensor([[v]], dtype=F64) for v in (1.5, -0.7))
    model = Wavy(sde)
    scale = (1 + t**2).sqrt()

    def increment(u: Tensor, s: int, e: int) -> Tensor:
        """An Euler step of dx = (x - D)/sigma dsigma on x = u scale."""
        x = u * scale[s]
        return (x + (t[e] - t[s]) * (x - model(x, t[s])) / t[s]) / scale[e] - u

    v, w = y / scale[0], z / scale[0]
    first = c * v + (1 - c) * w + increment(w, 0, 1)
    second = w - increment(first, 1, 0)
    found = reversible(1, c).solve(model, (y, z), t)
    assert found.companion is not None
    assert torch.allclose(found.x, first * scale[1], rtol=1e-13)
    assert torch.allclose(found.companion, second * scale[1], rtol=1e-13)


def test_the_reversible_solver_needs_signal_and_noise_and_finite_outputs() -> None:
    x = torch.ones(2, 1, dtype=F64)
    for sde, grid in ((VP, grids.karras(VP, 3, 0.0)), (Rectified(), grids.uniform(Rectified(), 3))):
        with pytest.raises(ValueError, match="signal and noise at every node"):
            reversible().solve(Wavy(sde), x, grid)

    class Broken(Wavy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, math.nan)

    with pytest.raises(
        FloatingPointError,
        match=r"reversible\(.*\): .* NaN or Inf at call 1, t = 0\.\d+; check",
    ):
        reversible().solve(Broken(VP), x, regular(VP, 2))


def test_a_run_names_the_sample_that_is_not_finite() -> None:
    class Broken(Wavy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            F = torch.ones_like(x)
            F[2] = math.nan
            return F

    with pytest.raises(FloatingPointError, match=r"ddim: .* call 1 of 3, t = 0\.\d+; found in samples 2;"):
        solvers.ddim().solve(Broken(VP), torch.ones(4, 2, dtype=F64), regular(VP, 3))
    with pytest.raises(FloatingPointError, match=r"found in samples 2;"):
        solvers.ddim().solve(Broken(VP), torch.ones(4, 2, dtype=F64), regular(VP, 3), callback=print)


# Single solvers


def test_historical_samplers_of_one_and_two_times() -> None:
    """The table of K = 1 is beta(0); of K = 2 (beta(0)/2, beta(1)/2), which has to be less than 1."""
    t = torch.tensor([0.5, 0.0], dtype=F64)
    for solver in (solvers.ddpm(rule="score_sde"), solvers.reverse_diffusion(rule="score_sde")):
        assert solver.tableau(VP, t).noise.tolist() == pytest.approx([math.sqrt(0.1)], rel=1e-14)
        steep = VPSDE(0.5, 1.9)
        table = solver.tableau(steep, torch.tensor([1.0, 0.2], dtype=F64))
        assert table.noise.square().tolist() == pytest.approx([0.95, 0.25], rel=1e-14)
        assert table.times.tolist() == [1.0, 0.2, 0.0] and table.name == f"{solver.name} (score_sde)"
        with pytest.raises(ValueError, match="needs beta < 1, found 1 for K = 2"):
            solver.tableau(VPSDE(0.5, 2.0), torch.tensor([1.0, 0.2], dtype=F64))
        assert (solver.card.weak_order, solver.card.calls_per_step, solver.card.final) == (1, 1, "none")


def test_ends_of_a_table_as_a_solver() -> None:
    t = torch.tensor([1.0, 0.5, 0.0], dtype=F64)
    solver = solvers.from_tableau(solvers.ddim().tableau(VP, t))
    card = solver.card
    assert (card.order, card.weak_order, card.calls_per_step, card.stochastic) == (None, None, 1, False)
    with pytest.raises(ValueError, match="expected at least 2 calls"):
        solver.steps_for(1)
    assert repr(solver) == "ddim()" and solver.steps_for(2) == 2 and solver.steps_for(7) == 7
    for start, end, fits in ((0.8, 0.0, False), (1 - 0.7e-9, 0.0, True), (1 - 1.5e-9, 0.0, False),
                             (1.0, 0.8e-12, True), (1.0, 1.5e-12, False)):  # fmt: skip
        times = torch.tensor([start, end], dtype=F64)
        if fits:
            assert len(solver.tableau(VP, times)) == 2
        else:
            with pytest.raises(ValueError, match=r"from t = 1\.0 to 0\.0, found a grid from"):
                solver.tableau(VP, times)


def test_restarts_hang_at_their_nodes_in_any_order() -> None:
    """Two intervals: the inner steps of each are behind its node; one above its `high` is left out, and so is
    any where no step ends with noise."""
    sde, grid = EDM(), grids.karras(EDM(), 12)
    low, high = (0.05, 0.2, 1, 2), (1.0, 4.0, 2, 1)
    tables = [solvers.restart(both).tableau(sde, grid) for both in ((low, high), (high, low))]
    assert torch.equal(tables[0].times, tables[1].times) and len(tables[0]) == 2 * (12 + 2 + 2)
    assert int((tables[0].times.diff() > 0).sum()) == 3 and int((tables[0].noise > 0).sum()) == 3
    one_by_one = [len(solvers.restart((i,)).tableau(sde, grid)) for i in (low, high)]
    assert one_by_one == [28, 28]
    coarse = Grid.of(sde, torch.tensor([80.0, 20.0], dtype=F64))  # its only node is above 0.3
    assert len(solvers.restart().tableau(sde, coarse)) == 2
    at_high = torch.tensor([2.0, 1.0], dtype=F64)  # nothing to come down from
    assert len(solvers.restart(((0.9, 1.0, 1, 1),)).tableau(sde, at_high)) == 2
    assert len(solvers.restart(((0.9, 1.001, 1, 1),)).tableau(sde, at_high)) == 4
    assert len(solvers.restart().tableau(sde, torch.tensor([80.0, 0.0], dtype=F64))) == 1
    assert solvers.restart(((0.1, 0.3, 2, 4), (0.5, 0.9, 1, 3))).calls(5) == 10 + 16 + 6


@pytest.mark.parametrize("stages", [STAGES[1], STAGES[2], HEUN])
def test_stochastic_steps_that_start_noisier_than_the_last_one_ended(stages: Any) -> None:
    """Keep the law of a point mass as they are; not if less noise is spread."""
    starts, ends = (torch.tensor(t, dtype=F64) for t in ([1.0, 0.8, 0.5], [0.6, 0.3, 0.0]))
    tables = [
        singlestep_table(VP, starts, ends, stages, stored="data", tau=0.8, spread=spread)
        for spread in (1.0, 0.9)
    ]
    check_point_mass(tables[0], VP)
    with pytest.raises(AssertionError):
        check_point_mass(tables[1], VP, tolerance=1e-4)
    assert tables[0].times[:: len(stages)].tolist() == [1.0, 0.8, 0.5] + [0.0] * (len(stages) == 1)
    assert len(tables[0]) == 2 * len(stages) + 1  # the step to sigma = 0 is one row


@pytest.mark.parametrize("sde", [VESDE(), EDM(0.002, 20.0), VPSDE(schedule=Cosine())], ids=repr)
def test_churn_stays_within_the_process(sde: LinearSDE) -> None:
    """Of VE with its defaults a network was asked at t = 1.011."""
    grid = grids.karras(sde, 20)
    table = solvers.edm(high=math.inf).tableau(sde, grid)
    assert float(table.times[2]) == sde.t_max == float(table.times.max()) and float(grid.t[1]) < sde.t_max
    rise = float(sde.transition(float(grid.t[1]), sde.t_max)[1])
    assert float(table.noise[1]) == pytest.approx(1.003 * rise, rel=1e-9)


def test_restarts_stay_within_the_process() -> None:
    """The network of a VP-SDE was asked at t = 1.66."""
    for sde in (VP, EDM(), VESDE(), VPSDE(schedule=Cosine())):
        grid, most = grids.karras(sde, 6), math.exp(-0.5 * float(sde.log_snr(sde.t_max)))
        table = solvers.restart(((0.1, most, 1, 2),)).tableau(sde, grid)
        assert float(table.times.max()) == sde.t_max
        with pytest.raises(ValueError, match=r"restart within the process.* found high="):
            solvers.restart(((0.1, 1.01 * most, 1, 2),)).tableau(sde, grid)


def test_churn_leaves_the_first_node_alone() -> None:
    """Even where its noise level is low enough."""
    grid = regular(VP, 4)
    table = solvers.edm(40.0, 0.0, 1e9).tableau(VP, grid)
    starts = (-0.5 * VP.log_snr(table.times[:-1:2])).exp() / (-grid.lam[:-1]).exp()
    assert starts.tolist() == pytest.approx([1, *[math.sqrt(2)] * 3], rel=1e-12)
    few = solvers.edm(0.4, 0.0, 1e9).tableau(VP, grid)
    starts = (-0.5 * VP.log_snr(few.times[:-1:2])).exp() / (-grid.lam[:-1]).exp()
    assert starts.tolist() == pytest.approx([1, *[1.1] * 3], rel=1e-12)
    assert solvers.edm(0.1).card.stochastic and not solvers.edm(0.0).card.stochastic
    levels = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=F64)
    table = solvers.edm(30.0, 1.0, 1.0).tableau(EDM(), levels)  # the limits are in the range
    assert table.times[::2].tolist() == pytest.approx([4.0, 2.0, math.sqrt(2), 0.5], rel=1e-12)


def test_noise_of_a_run_is_asked_for_by_row() -> None:
    """Only for rows that have some, with the shape of the state."""
    asked = []
    noise = Noise.of(0, batch=2, dtype=F64)

    def source(k: int, shape: Any) -> Tensor:
        asked.append((k, tuple(shape)))
        return noise(k, shape)

    x = torch.ones(2, 3, dtype=F64)
    solvers.ddpm().solve(Wavy(VP), x, grids.karras(VP, 3, 0.0), noise=source)
    assert asked == [(0, (2, 3)), (1, (2, 3))]


@pytest.mark.parametrize("name", protocol.table_solvers())
def test_what_is_remembered_is_used(name: str) -> None:
    """`memory` of the card is the length of a table's history on a long grid."""
    solver = protocol.table_solvers()[name]
    table = solver.tableau(VP, regular(VP, 12))
    assert table.mix.shape[1] == solver.card.memory
    assert bool(table.mix[:, -1].any())
