"""What a solver says of itself is true: calls, properties, ends of the schedule, names, options."""

from __future__ import annotations

import math
from collections.abc import Callable

import protocol
import pytest
import torch
from protocol import SDES, VP, Point, Wavy, regular

from scoresde import grids, solvers
from scoresde.noise import Noise
from scoresde.sde import EDM, LinearSDE, Rectified, SubVPSDE
from scoresde.solvers.base import Solver, TableSolver
from scoresde.solvers.exponential import er_noise_level

# Run-time type checks cost more than the solvers here; test_sampling.py runs every solver with them.
pytestmark = pytest.mark.usefixtures("unchecked")

EXAMPLES = protocol.examples()
TABLES = protocol.table_solvers()


@pytest.mark.parametrize("name", TABLES)
def test_steps_to_zero_noise_and_from_zero_signal(name: str) -> None:
    """Finite at any number of steps; `final="data"` ends in D, whatever the solver remembers."""
    solver = TABLES[name]
    for sde in (VP, EDM(), Rectified()):
        for steps in (1, 2, 3, 4, 6):
            grid = grids.karras(sde, steps, 0.0)
            if not math.isfinite(grid.lam[0]):
                try:
                    solver.tableau(sde, grid)
                except ValueError as error:  # refused, with the reason
                    assert "signal" in str(error) or "determined" in str(error) or "finite" in str(error)
                    continue
            table = solver.tableau(sde, grid)
            assert len(table) <= solver.calls(steps)
            x = Noise.of(0, batch=3, dtype=torch.float64).prior((3, 2)) * sde.prior_std
            found = solver.solve(Point(sde), x, grid, noise=Noise.of(1, batch=3, dtype=torch.float64))
            assert found.x.isfinite().all()
            if solver.card.final == "data" and "marginal_exact" in solver.card.properties:
                # a rounding of the state is all that is left of the noise
                assert torch.allclose(found.x, torch.ones_like(x), atol=1e-9 * sde.prior_std)


@pytest.mark.parametrize("name", EXAMPLES)
def test_calls(name: str) -> None:
    """steps_for gives the largest number of steps within a budget, and a table has the calls it says."""
    solver = EXAMPLES[name]
    assert isinstance(solver, Solver) and repr(solver) == name and hash(solver) is not None
    if not isinstance(solver, TableSolver):
        return
    for calls in range(solver.calls(1), solver.calls(1) + 25):
        steps = solver.steps_for(calls)
        assert (
            isinstance(steps, int) and steps >= 1 and solver.calls(steps) <= calls < solver.calls(steps + 1)
        )
    for calls in (0, -3, solver.calls(1) - 1):
        with pytest.raises(ValueError, match=f"expected at least {solver.calls(1)} calls"):
            solver.steps_for(calls)
    for steps in (1, 2, 5, 8):
        grid = grids.karras(VP, steps)
        table = solver.tableau(VP, grid)
        assert len(table) <= solver.calls(steps)
        if "restart" not in name:
            assert len(table) == solver.calls(steps)
        assert solver.card.stochastic == bool(table.noise.any()) or steps == 1
        assert torch.equal(table.ends, grid.t[[0, -1]]) or protocol.is_historical(solver)


def test_card_lists_every_example() -> None:
    card = solvers.card()
    assert set(card) == set(solvers.examples()) and len(card) > 30
    lines = repr(card).splitlines()
    assert len(lines) == len(card) + 1 and str(card) == repr(card)
    assert lines[0].split()[:4] == ["solver", "order", "weak", "calls/step"]
    for (name, entry), line in zip(card.items(), lines[1:], strict=True):
        assert line.startswith(name) and entry.reference in line
        assert (entry.order is None) or not entry.stochastic


class Scaled(LinearSDE):
    """The process of x/alpha, on the same clock."""

    def __init__(self, sde: LinearSDE) -> None:
        self.inner = sde
        self.t_min, self.t_max, self.default_end = sde.t_min, sde.t_max, sde.default_end
        self.prior_std = float(sde.sigma(sde.t_max) / sde.alpha(sde.t_max))

    def alpha(self, t):
        return torch.ones_like(self.inner.alpha(t))

    def sigma(self, t):
        return self.inner.sigma(t) / self.inner.alpha(t)

    def log_snr(self, t):
        return self.inner.log_snr(t)

    def time(self, log_snr):
        return self.inner.time(log_snr)

    def rates(self, t):
        f, g2 = self.inner.rates(t)
        return torch.zeros_like(f), g2 / self.inner.alpha(t) ** 2

    def innovation(self, s, t):
        return self.sigma(t) ** 2 - self.sigma(s) ** 2


def scaled_spread(solver: TableSolver, sde: LinearSDE, times: torch.Tensor) -> float:
    """How far the canonical forms of x/alpha and of x differ, after scaling."""
    table, other = solver.tableau(sde, times), solver.tableau(Scaled(sde), times)
    alpha, form, image = sde.alpha(table.times), table.canonical(), other.canonical()
    gaps = [
        form.a * alpha[0] / alpha - image.a,
        form.B / alpha[:, None] - image.B,
        form.C / alpha[:, None] - image.C,
    ]
    scale = max(1.0, float(image.B.abs().max()))
    return max(float(gap.abs().max()) for gap in gaps) / scale


def clock_spread(solver: TableSolver) -> float:
    """How far the tables of two VP schedules differ on nodes of the same lam."""
    one, two = VP, SDES["cosine"]
    lam = torch.linspace(-2, 2, 8, dtype=torch.float64)
    forms = [solver.tableau(sde, sde.time(2 * lam)).canonical() for sde in (one, two)]
    if forms[0].a.shape != forms[1].a.shape:
        return math.inf
    return max(float((a - b).abs().max()) for a, b in zip(forms[0][1:], forms[1][1:], strict=True))


@pytest.mark.parametrize("name", TABLES)
def test_declared_properties_hold_and_others_do_not(name: str) -> None:
    solver = TABLES[name]
    times = regular(VP, 7).t
    trivial = solver.card.memory == 1 and solver.card.order == 1  # one node: no polynomial to have a variable
    gap = scaled_spread(solver, VP, times)
    assert gap < 1e-10 if "scale_covariant" in solver.card.properties else gap > 1e-4
    gap = clock_spread(solver)
    assert gap < 1e-9 if "clock_free" in solver.card.properties else (gap > 1e-4 or trivial)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.ddpm("medium"), "'small' or 'large'"),
        (lambda: solvers.ddpm(rule="fast"), "'exact' or 'score_sde'"),
        (lambda: solvers.ddim(-0.1), r"eta in \[0, 1\], found -0.1"),
        (lambda: solvers.ddim(1.1), r"eta in \[0, 1\]"),
        (lambda: solvers.ddim(math.nan), r"eta in \[0, 1\]"),
        (lambda: solvers.euler_maruyama("fast"), "'exact' or 'score_sde'"),
        (lambda: solvers.reverse_diffusion("fast"), "'exact' or 'score_sde'"),
        (lambda: solvers.dpmpp(0), r"1\.\.3, found 0"),
        (lambda: solvers.dpmpp(4), r"1\.\.3, found 4"),
        (lambda: solvers.dpmpp(3, singlestep=True, rule="half3"), "rule='exact'"),
        (lambda: solvers.exponential(0), r"1\.\.8"),
        (lambda: solvers.exponential(9), r"1\.\.8"),
        (lambda: solvers.exponential(2, corrector=9), r"0\.\.8"),
        (lambda: solvers.exponential(2, corrector=-1), r"0\.\.8"),
        (lambda: solvers.exponential(2, stored="score"), "found 'score'"),
        (lambda: solvers.exponential(2, variable="s"), "found 's'"),
        (lambda: solvers.exponential(2, rule="quick"), "found 'quick'"),
        (lambda: solvers.exponential(2, tau=-1.0), "tau >= 0"),
        (lambda: solvers.exponential(2, tau=math.inf), "tau >= 0"),
        (lambda: solvers.sde_dpmpp(2, eta=-1.0), "eta >= 0"),
        (lambda: solvers.sde_dpmpp(3, singlestep=True), "order 1 or 2"),
        (lambda: solvers.unipc(2, rule="half3"), "'bh1' or 'bh2'"),
        (lambda: solvers.unipc(7), r"1\.\.6"),
        (lambda: solvers.deis(5), r"1\.\.4"),
        (lambda: solvers.adams(5), r"1\.\.4"),
        (lambda: solvers.adams(2, "bh1"), "'exact' or 'adams'"),
        (lambda: solvers.seeds(4), r"1\.\.3"),
        (lambda: solvers.er_sde(3, "adams"), "'exact' or 'backward'"),
    ],
)
def test_options_that_do_not_exist(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_historical_rules_are_for_vp_and_enough_steps() -> None:
    for make in (solvers.ddpm, solvers.reverse_diffusion):
        solver = make(rule="score_sde")
        for sde in (SubVPSDE(), EDM()):
            with pytest.raises(TypeError, match="belongs to the VP-SDE"):
                solver.tableau(sde, grids.uniform(sde, 50))
        with pytest.raises(ValueError, match=r"needs beta < 1, found 1\.33\d* for K = 15"):
            solver.tableau(VP, grids.uniform(VP, 14))


def test_solvers_are_values() -> None:
    """Immutable, printable, without state of a run."""
    solver = solvers.exponential(3, corrector=4, tau=0.5)
    assert (
        repr(solver)
        == "exponential(order=3, corrector=4, stored='data', variable='lam', tau=0.5, rule='exact')"
    )
    assert repr(solvers.ddim(0.5)) == "ddim(eta=0.5)" and repr(solvers.heun()) == "heun()"
    with pytest.raises(AttributeError):
        solver.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_stochastic_solvers_do_not_encode() -> None:
    for steps in (1, 5):
        grid = grids.uniform(VP, steps).reversed()
        for solver in (solvers.ddpm(), solvers.ddim(0.5), solvers.euler_maruyama(), solvers.sa()):
            with pytest.raises(ValueError, match="stochastic and cannot run from data to noise"):
                solver.tableau(VP, grid)
        solvers.ddim().tableau(VP, grid)


DEFAULTS = """
    dpm(order=2, singlestep=False, rule='exact')  dpmpp(order=2, singlestep=False, rule='exact')
    unipc(order=2, rule='exact', stored='data')  deis(order=3, variable='t')  adams(order=4, rule='exact')
    sa(order=3, corrector=4, tau=1.0, stored='data')  seeds(order=1)  er_sde(order=3, rule='exact')
    sde_dpmpp(order=2, eta=1.0, singlestep=False, rule='exact')  reversible(order=2, coupling=0.999)
    edm(churn=40.0, low=0.05, high=50.0, spread=1.003)  restart(intervals=((0.1, 0.3, 2, 4),))
    annealed_langevin(steps_per_level=5, step=0.1)  adaptive_sde(rtol=0.05, atol=0.025, max_calls=2000)
    adaptive_ode(rtol=0.0001, atol=0.0001, order=6, max_calls=1000)  dpm_fast(stored='noise')
    ddim(eta=0.0)  ddpm(variance='small', rule='exact')
"""


@pytest.mark.parametrize(
    "printed", [p for line in DEFAULTS.split("\n") for p in line.strip().split("  ") if p]
)
def test_defaults(printed: str) -> None:
    """What a solver is without options is part of its contract."""
    assert repr(getattr(solvers, printed.split("(")[0])()) == printed


@pytest.mark.parametrize("order", [1, 2])
def test_a_callback_of_the_reversible_solver_sees_every_step(order: int) -> None:
    grid, x = regular(VP, 4), torch.ones(2, 3, dtype=torch.float64)
    seen = solvers.reversible(order).solve(Wavy(VP), x, grid, callback=lambda step: step).path
    assert [step.k for step in seen] == [0, 1, 2, 3] and [step.t for step in seen] == grid.t[:-1].tolist()
    assert torch.allclose(seen[0].x, x, rtol=1e-14, atol=0)
    assert torch.equal(seen[0].denoised, Wavy(VP)(seen[0].x, grid.t[0]))


def test_noise_level_of_er_sde_is_that_of_its_noise_function() -> None:
    """`tau^2 = k phi'/phi - 1` with phi(k) = k (exp(k^0.3) + 10), by central differences."""

    def phi(k: float) -> float:
        return k * (math.exp(k**0.3) + 10)

    for lam in (-3.0, -0.5, 0.0, 1.0, 4.0):
        k, h = math.exp(-lam), 1e-5
        slope = (math.log(phi(k * (1 + h))) - math.log(phi(k * (1 - h)))) / (2 * h)
        tau = float(er_noise_level(torch.tensor(lam, dtype=torch.float64)))
        assert tau == pytest.approx(math.sqrt(slope - 1), rel=1e-6)
