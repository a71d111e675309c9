"""Properties 25 to 44 of the solvers, each by its number, over drawn processes, grids, laws and solvers;
and the solvers that are the same under two names.

Orders are measured as in scoresde.testing.orders, laws are exact: nothing here is Monte Carlo."""

from __future__ import annotations

import itertools
import math
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import protocol
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from protocol import SDES, VP, spread
from torch import Tensor

from scoresde import grids, solvers
from scoresde.grids import Grid
from scoresde.laws import Gaussian
from scoresde.noise import Noise
from scoresde.sampling import decode, encode, sample
from scoresde.sde import EDM, VPSDE, LinearSDE, Rectified
from scoresde.solvers.base import TableSolver
from scoresde.solvers.langevin import langevin
from scoresde.solvers.onestep import posterior
from scoresde.solvers.weights import step_weights
from scoresde.tableau import FIELDS, Tableau, join
from scoresde.testing import (
    check_batch,
    check_rotation,
    check_row_order,
    check_scaling,
    check_strong_order,
    check_tableau,
    check_time_change,
    check_weak_order,
    orders,
    strategies,
)
from scoresde.testing.solver_checks import half_log_snr

pytestmark = pytest.mark.usefixtures("unchecked")

EXAMPLES = protocol.examples()
TABLES = protocol.table_solvers()
PROPERTIES = {name: solver.card.properties for name, solver in TABLES.items()}
EXACT = [name for name in TABLES if "marginal_exact" in PROPERTIES[name]]
STEPPING_BY_ITSELF = [n for n, s in TABLES.items() if s.card.memory == 1 and s.card.calls_per_step == 1]

lams = st.lists(st.floats(0.02, 1.5), min_size=2, max_size=8)


def grid_of(sde: LinearSDE, steps: list[float]) -> Grid:
    """The grid with these steps in lam, from lam = -2.5 on, as far as the process goes."""
    lam = torch.tensor([-2.5, *steps], dtype=torch.float64).cumsum(0)
    lam = torch.cat([lam[:2], lam[2:][lam[2:] < 4.5]])
    return Grid.of(sde, sde.time(2 * lam))


def drawn(batch: int, dim: int, sde: LinearSDE = VP, seed: int = 0) -> tuple[Tensor, Noise]:
    noise = Noise.of(seed, batch=batch, dtype=torch.float64)
    return noise.prior((batch, dim)) * sde.prior_std, noise


def diagonal(dim: int = 3) -> Gaussian:
    return Gaussian(torch.linspace(-0.5, 0.8, dim), torch.linspace(0.1, 1.4, dim))


# 25 to 27: a point mass


FORMS = {
    "data": [solvers.ddim(), *(solvers.dpmpp(p) for p in (1, 2, 3)), solvers.dpmpp(3, True), solvers.unipc(3),
             solvers.exponential(3, variable="sigma"), solvers.exponential(2, corrector=3)],
    "noise": [solvers.dpm(2), solvers.dpm(3, True), solvers.deis(3, "sigma/alpha"), solvers.heun(),
              solvers.adams(4), solvers.unipc(2, stored="noise")],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@given(case=st.data())
def test_p25_a_point_mass_is_solved_exactly(form: str, case) -> None:
    """`x_end = alpha_end c + sigma_end/sigma_start (x - alpha_start c)` for any grid, one step, any order,
    and with no noise at the end; float64 and float32. For steps that the quadrature of the weights is for."""
    sde = case.draw(strategies.sdes())
    grid = case.draw(strategies.grids(sde, 8))
    solver = case.draw(st.sampled_from(FORMS[form]))
    assume(float(sde.alpha(grid.t[0])) > (0 if form == "data" else 1e-6))
    steps = grid.lam.diff()
    assume(float(steps[steps.isfinite()].amax() if bool(steps.isfinite().any()) else 0) <= 30)
    point = Gaussian(torch.tensor([1.3, -0.4]), 0.0)
    alpha, sigma = sde.alpha(grid.t[[0, -1]]), sde.sigma(grid.t[[0, -1]])
    start, _ = drawn(3, 2, sde)
    expected = alpha[1] * point.mean + sigma[1] / sigma[0] * (start - alpha[0] * point.mean)
    size = terms(solver.tableau(sde, grid), sde)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 5e-7)):
        found = solver.solve(point.denoiser(sde), start.to(dtype), grid).x.double()
        assert float((found - expected).abs().max()) <= tolerance * size


def terms(table: Tableau, sde: LinearSDE) -> float:
    """What a run may lose to rounding, in units of it: that of every term of every row, carried along by the
    rows after it (running error analysis: Higham 2002, section 3.3). For data up to 1.3, and noise up to 4 of
    its standard deviations."""
    alpha, sigma = sde.alpha(table.times[:-1]), sde.sigma(table.times[:-1])
    size, lost = (1.3 * alpha + 4 * sigma).tolist(), 0.0
    outputs: list[tuple[float, float]] = []  # size and error of what is remembered
    skip, out, keep = (part.abs().tolist() for part in (table.skip, table.out, table.keep))
    for k, weights in enumerate(table.mix.abs().tolist()):
        terms_of = skip[k] * size[k] + out[k] * 1.3
        outputs.insert(0, (terms_of, skip[k] * lost + terms_of))
        used = list(zip(weights, outputs, strict=False))
        lost = keep[k] * (lost + size[k]) + sum(w * (m + error) for w, (m, error) in used)
    return max(1.0, lost)


def test_p25_ends_without_noise_are_the_data_bit_by_bit() -> None:
    """In float32 too, whatever the sizes of the coefficients before the last row, which a uniform grid makes
    large."""
    chosen = *(solvers.dpmpp(p) for p in (2, 3)), solvers.exponential(3, variable="sigma")
    cases = itertools.product(
        (solvers.ddim(), solvers.unipc(3), *chosen),
        (VP, EDM(0.1, 100.0), Rectified()),
        (grids.karras, grids.uniform),
        (1, 2, 4, 10),
        (torch.float32, torch.float64),
    )
    for solver, sde, grid, steps, dtype in cases:
        model, x = Gaussian(torch.ones(2), 0.0).denoiser(sde), torch.full((1, 2), 7.0, dtype=dtype)
        found = solver.solve(model, x, grid(sde, steps, 0.0))
        assert torch.equal(found.x, torch.ones(1, 2, dtype=dtype)), (solver, sde, grid, steps, dtype)


@given(st.sampled_from(EXACT), strategies.sdes(), lams)
def test_p26_the_law_of_a_point_mass_is_kept_step_by_step(
    name: str, sde: LinearSDE, steps: list[float]
) -> None:
    grid = _reachable(sde, steps)
    solver = TABLES[name]
    check_tableau(solver.tableau(sde, grid), sde)


def _reachable(sde: LinearSDE, steps: list[float]) -> Grid:
    """The grid with these steps in lam, where the process has such noise levels."""
    top = 0.5 * float(sde.log_snr(sde.t_max))
    low = 0.5 * float(sde.log_snr(max(float(sde.default_end), sde.t_min)))
    assume(top < 1.5)
    lam = torch.tensor([max(top, -4.0), *steps], dtype=torch.float64).cumsum(0)
    lam = lam[lam <= low]
    assume(len(lam) >= 2)
    try:
        return Grid.of(sde, sde.time(2 * lam).clamp(max=sde.t_max))
    except ValueError:  # nodes that float64 cannot tell apart
        assume(False)
        raise


@given(st.floats(0, 1), st.sampled_from(sorted(SDES)), lams)
def test_p26_ddim_keeps_it_for_every_eta(eta: float, process: str, steps: list[float]) -> None:
    sde = SDES[process]
    check_tableau(solvers.ddim(eta).tableau(sde, grid_of(sde, steps)), sde)


@given(strategies.sdes(), strategies.shares(2))
def test_p27_a_step_of_ddpm_is_the_posterior(sde: LinearSDE, shares: list[float]) -> None:
    s, t = (torch.tensor([strategies.at(sde, u)], dtype=torch.float64) for u in shares)
    assume(float(sde.log_snr(s) - sde.log_snr(t)) > 1e-9)
    table = solvers.ddpm().tableau(sde, torch.cat([t, s]))
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    from_x, std = sde.bridge(zero, one, s, t)
    from_data, _ = sde.bridge(one, zero, s, t)
    for found, expected in ((table.keep, from_x), (table.mix[:, 0], from_data), (table.noise, std)):
        assert torch.allclose(found, expected.flatten(), rtol=1e-13, atol=1e-300)
    # no time, no change
    assert [float(v) for v in posterior(sde, t, t)] == [1, 0, 0]


# 28, 29: the flow of a Gaussian


@given(strategies.linears(), st.integers(1, 12), st.floats(1e-3, 1.0))
def test_p28_normal_data_do_not_move(schedule, steps: int, t: float) -> None:
    """The field of the probability-flow ODE is 0, so that solvers in t change no bit; DDIM shrinks by the
    cosine of the angle between nodes, which tends to 1."""
    sde = VPSDE(schedule=schedule)
    model = Gaussian(torch.zeros(2), 1.0).denoiser(sde)
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    rate = max(1.0, float(sde.beta(t)))
    assert float(sde.probability_flow(model)(x, t).abs().max()) < 1e-14 * rate
    grid = grids.uniform(sde, steps, 0.05)
    angle = torch.atan2(sde.sigma(grid.t), sde.alpha(grid.t))
    found = solvers.ddim().solve(model, x, grid).x
    assert torch.allclose(found, x * angle.diff().cos().prod(), rtol=1e-11)
    even = torch.linspace(1.4, 0.2, 65, dtype=torch.float64)
    losses = [1 - float(even[::k].diff().cos().prod()) for k in (1, 2, 4)]
    assert losses[1] / losses[0] == pytest.approx(2, rel=0.02) == losses[2] / losses[1]


def test_p28_solvers_in_t_return_the_start() -> None:
    x, _ = drawn(3, 2)
    model = Gaussian(torch.zeros(2), 1.0).denoiser(VP)
    assert torch.allclose(solvers.scipy_ode("RK45").solve(model, x, grids.uniform(VP, 1)).x, x, rtol=1e-12)


ORDERED = {name: s for name, s in TABLES.items() if s.card.order is not None}


@given(st.sampled_from(sorted(ORDERED)), st.floats(-1, 1), st.floats(0.05, 3), st.floats(-1.5, 1.5))
def test_p29_the_flow_of_a_gaussian(name: str, mean: float, variance: float, z: float) -> None:
    """`x = alpha m + (alpha^2 S + sigma^2)^(1/2) z` keeps z. On one law the order may be higher than
    declared, never lower; all laws together, in test_solvers_orders.py, have it. Beside each variance stands
    another one: the leading term of the error can pass through zero at one of them."""
    S = variance * np.array([1.0, 0.6])
    problem = orders.Problem(
        lambda y, lam: mean + S / (S + math.exp(-2 * lam)) * (y - mean),
        lambda lam: mean + np.sqrt(S + math.exp(-2 * lam)) * z,
        [f"N({mean}, {v}) from {z}" for v in S],
    )
    found = orders.order(ORDERED[name], VP, problem, steps=(160, 320))
    declared = ORDERED[name].card.order
    assert declared is not None
    rounding = found.errors[-1] < 1e-11
    vanishing = found.errors[-1] < 0.01 * 320.0**-declared  # where the leading term passes through zero
    assert rounding or vanishing or found.order > declared - 0.5


# 30, 31: conditions of order


VARIABLES = {
    "lam": half_log_snr,
    "sigma/alpha": lambda sde, t: (-half_log_snr(sde, t)).exp(),
    "sigma": lambda sde, t: (-half_log_snr(sde, t)).sigmoid(),
    "t": lambda sde, t: t,
}


@given(
    st.sampled_from([
        *((solvers.dpm(p, True), p, "lam") for p in (1, 2, 3)),
        *((solvers.dpmpp(p, True), p, "lam") for p in (1, 2, 3)),
        (solvers.heun(), 2, "sigma/alpha"),
    ]),
    st.sampled_from(sorted(SDES)),
    lams,
)  # fmt: skip
def test_p30_stages_integrate_polynomials_exactly(case: tuple, process: str, steps: list[float]) -> None:
    """The exponential order conditions of the singlestep solvers; order + 1 is not reached."""
    solver, order, variable = case
    sde, grid = SDES[process], grid_of(SDES[process], steps)
    assume(len(grid) > 1)
    table = solver.tableau(sde, grid)
    check_row_order(table, sde, order, VARIABLES[variable], tolerance=1e-11)
    if min(steps) > 0.2:
        with pytest.raises(AssertionError, match=f"polynomials of degree {order} are integrated"):
            check_row_order(table, sde, order + 1, VARIABLES[variable])


@given(
    st.sampled_from(["data", "noise", "velocity", "flow"]),
    st.sampled_from(sorted(VARIABLES)),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(sorted(SDES)),
    st.lists(st.floats(0.1, 0.8), min_size=7, max_size=10),
)
def test_p31_multistep_weights_integrate_polynomials_exactly(
    stored: str, variable: str, order: int, corrected: bool, process: str, steps: list[float]
) -> None:
    sde = SDES[process]
    corrector = order + 1 if corrected else 0
    solver = solvers.exponential(order, corrector=corrector, stored=stored, variable=variable)
    table = solver.tableau(sde, grid_of(sde, steps))
    check_row_order(table, sde, order, VARIABLES[variable], tolerance=1e-10)


# 32 to 34: stochastic solvers


@pytest.mark.parametrize("process", ["cosine", "edm", "rectified"])
def test_p32_weak_order(process: str) -> None:
    for solver in (solvers.euler_maruyama(), solvers.ddpm(), solvers.sde_dpmpp(2)):
        if process != "rectified" or solver.name != "euler_maruyama":  # whose rates are steep there
            check_weak_order(solver, sde=SDES[process])


def test_p33_strong_order() -> None:
    """On one Brownian path for all step counts; the noise is additive, so Euler-Maruyama has order 1."""
    few = {"steps": (16, 32, 64, 128), "paths": 256}
    check_strong_order(solvers.euler_maruyama(), clock=lambda sde, t: t, **few)
    check_strong_order(solvers.ddpm(), clock=orders.snr, **few)


@given(st.floats(0, 1), st.floats(-1, 1), st.floats(0.05, 3))
def test_p34_all_noise_levels_have_the_same_limit(eta: float, mean: float, variance: float) -> None:
    """The variance of DDIM(eta) tends to the marginal's, at first order."""
    law = Gaussian(torch.tensor([mean]), torch.tensor([variance]))
    gaps = []
    for n in (100, 200, 400):
        grid = orders.even_grid(VP, n)
        start, truth = law.marginal(VP, grid.t[0]), law.marginal(VP, grid.t[-1])
        found = solvers.ddim(eta).tableau(VP, grid).law(law, VP, start)
        gaps.append(abs(float(found.variance - truth.variance)))
    assert gaps[2] < 0.02
    # the leading term may be small, and change sign or fade faster: what is left of first order is compared
    assert abs(gaps[1] - 2 * gaps[2]) <= 0.1 * gaps[0] + 2e-5


# 35 to 37: splits, batches, layouts


CLOSED = [solvers.ddpm(), solvers.ddpm("large"), solvers.ddim(), solvers.ddim(0.4), solvers.euler_maruyama(),
          solvers.reverse_diffusion()]  # fmt: skip


@given(st.sampled_from(CLOSED), strategies.sdes(), st.data())
def test_p35_split_runs_are_the_whole_run_bit_by_bit(solver: TableSolver, sde: LinearSDE, case) -> None:
    """One-step methods with closed coefficients: tables split at any node concatenate to the whole table,
    and runs with the noise's row offset to the whole run."""
    grid = case.draw(strategies.grids(sde, 8))
    assume(len(grid) > 1)
    try:
        whole_table = solver.tableau(sde, grid)
    except ValueError:  # infinite rates where no signal is left
        assume(False)
        raise
    cut = case.draw(st.integers(1, len(grid) - 1))
    model = diagonal().denoiser(sde)
    x, noise = drawn(2, 3, sde)
    parts = [solver.tableau(sde, t) for t in (grid.t[: cut + 1], grid.t[cut:])]
    joined = parts[0] + parts[1]
    for key in FIELDS:
        assert torch.equal(getattr(joined, key), getattr(whole_table, key)), key
    whole = solver.solve(model, x, grid, noise=noise).x
    half = solver.solve(model, x, grid.t[: cut + 1], noise=noise).x
    rest = solver.solve(model, half, grid.t[cut:], noise=noise.shift(cut)).x
    assert torch.equal(rest, whole)


@given(st.lists(st.sampled_from(sorted(TABLES)), min_size=1, max_size=3), st.sampled_from(sorted(SDES)), lams)
def test_p35_concatenated_tables_are_runs_one_after_the_other(
    names: list[str], process: str, steps: list[float]
) -> None:
    """Of any solvers: the table of their sum is bit by bit their runs, each with the rows after the last
    one's."""
    sde = SDES[process]
    grid = grid_of(sde, steps * len(names))
    cuts = [round(i * len(grid) / len(names)) for i in range(len(names) + 1)]
    assume(all(b > a for a, b in pairwise(cuts)))
    tables = [
        TABLES[name].tableau(sde, grid.t[a : b + 1])
        for name, a, b in zip(names, cuts, cuts[1:], strict=False)
    ]
    model, (x, noise), rows = diagonal().denoiser(sde), drawn(2, 3, sde), 0
    whole = solvers.from_tableau(join(tables)).solve(model, x, grid, noise=noise).x
    for table in tables:
        ends = table.ends
        x = solvers.from_tableau(table).solve(model, x, ends, noise=noise.shift(rows)).x
        rows += len(table)
    assert torch.allclose(x, whole, rtol=1e-12, atol=1e-12 * float(whole.abs().max()))


SHORT = torch.tensor([0.8, 0.65, 0.5], dtype=torch.float64)
COUPLED = {
    n for n in EXAMPLES if n.startswith("scipy_ode")
}  # one step for the whole batch, unless per_sample
OWN_CLOCK = {n for n in EXAMPLES if n.startswith("torchsde_solver")}  # test_external.py has their batches


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n not in COUPLED | OWN_CLOCK])
def test_p36_a_sample_is_the_same_in_every_batch(name: str) -> None:
    check_batch(EXAMPLES[name], VP, times=SHORT)


def test_p36_scipy_couples_a_batch_unless_told_otherwise() -> None:
    with pytest.raises(AssertionError, match="a sample is the same in every batch"):
        check_batch(solvers.scipy_ode("RK45"), VP, times=SHORT)
    check_batch(solvers.scipy_ode("RK45", per_sample=True), VP, times=SHORT)


@given(
    st.sampled_from(sorted(TABLES)), st.permutations(range(4)), st.sampled_from([(), (1,), (3, 2), (2, 3, 2)])
)
def test_p37_layout_and_order_do_not_matter(name: str, order: list[int], sizes: tuple[int, ...]) -> None:
    """Permuted, strided, expanded and empty batches have the bits of contiguous ones."""
    solver, grid = TABLES[name], grids.quadratic(VP, 3)
    shape = (4, *sizes)
    model = Gaussian(torch.full(sizes, 0.3), 0.5).denoiser(VP) if sizes else None
    assume(model is not None)
    assert model is not None
    noise = Noise.of(1, batch=4, dtype=torch.float64)
    x = noise.prior(shape)
    whole = solver.solve(model, x, grid, noise=noise).x
    turned = Noise.of(1, order, dtype=torch.float64)
    assert torch.equal(solver.solve(model, x[order], grid, noise=turned).x, whole[order])
    strided = torch.stack([x, -x], -1)[..., 0]
    backwards = x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1])
    for other in (strided, backwards):
        assert torch.equal(solver.solve(model, other, grid, noise=noise).x, whole)
    row = x[:1].expand(shape)
    assert torch.equal(
        solver.solve(model, row, grid, noise=noise).x,
        solver.solve(model, row.contiguous(), grid, noise=noise).x,
    )
    before = x.clone()
    found = solver.solve(model, x.clone().requires_grad_(), grid, noise=noise).x
    assert torch.equal(found, whole) and not found.requires_grad and torch.equal(x, before)
    none = Noise.of(1, [], dtype=torch.float64)
    assert solver.solve(model, x[:0], grid, noise=none).x.shape == (0, *sizes)


# 38 to 40: symmetries and side effects


@pytest.mark.parametrize("name", TABLES)
def test_p38_rotations_commute_with_sampling(name: str) -> None:
    check_rotation(TABLES[name], VP, tolerance=1e-11)


@pytest.mark.parametrize("name", [
    n for n in TABLES
    if not n.startswith(("er_sde", "restart", "edm")) and "'velocity'" not in n and "'flow'" not in n
    and "variable='sigma'" not in n
])  # fmt: skip
def test_p39_scaling_commutes_with_sampling(name: str) -> None:
    check_scaling(TABLES[name])


@pytest.mark.parametrize("solver", [
    solvers.er_sde(2), solvers.restart(), solvers.exponential(2, stored="flow"),
    solvers.exponential(2, variable="sigma"),
], ids=repr)  # fmt: skip
def test_p39_solvers_that_know_a_scale_do_not(solver: TableSolver) -> None:
    with pytest.raises(AssertionError, match="scaling and shifts commute"):
        check_scaling(solver)


@pytest.mark.parametrize("name", [n for n in TABLES if "clock_free" in PROPERTIES[n]])
def test_p39_only_the_log_snr_counts(name: str) -> None:
    """The time may be reparametrised: property 10, on whole runs."""
    check_time_change(TABLES[name])


@given(st.sampled_from(sorted(TABLES)), st.sampled_from(sorted(TABLES)), st.integers(0, 2**64 - 1))
def test_p40_sampling_is_a_function_of_its_arguments(name: str, other: str, seed: int) -> None:
    """The same bits again, after another solver ran and in threads; global state is as it was."""
    model = diagonal().denoiser(VP)
    model.train()
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()

    def run(solver: TableSolver) -> Tensor:
        return sample(model, (2, 3), solver, steps=3, seed=seed).x

    first = run(TABLES[name])
    run(TABLES[other])
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(run(TABLES[name]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(x, first) for x in found)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled() and model.training


# 41, 42: correctors


@given(st.floats(0.05, 3), st.floats(0.01, 1.9), st.floats(0.02, 1.0))
def test_p41_the_stationary_law_of_langevin(variance: float, share: float, t: float) -> None:
    """A step is `a x + b z + const` with `b^2/(1 - a^2) = v/(1 - step/(2 v))`, v the marginal's variance."""
    law = Gaussian(torch.tensor([0.4]), torch.tensor([variance]))
    marginal = law.marginal(VP, t)
    v = float(marginal.variance)
    start = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    unit = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    out = langevin(
        law.denoiser(VP), start, t, step=share * v, steps=1, noise=lambda k, shape: unit
    ).x.flatten()
    a, b = float(out[1] - out[0]), float(out[2] - out[0])
    assert b**2 / (1 - a**2) == pytest.approx(v / (1 - share / 2), rel=1e-11)
    assert float(out[0]) / (1 - a) == pytest.approx(float(marginal.mean), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(
    "name", [n for n in TABLES if n.startswith(("ddpm", "ddim", "dpmpp", "sde_", "unipc", "sa("))]
)
def test_p42_no_corrections_are_the_predictor_bit_by_bit(name: str) -> None:
    solver, model = TABLES[name], diagonal().denoiser(VP)
    if solver.card.calls_per_step > 1:
        pytest.skip("a predictor whose rows are not the grid's steps is another matter: test_langevin.py")
    x, noise = drawn(3, 3)
    grid = grids.quadratic(VP, 4)
    alone = solver.solve(model, x, grid, noise=noise).x
    assert torch.equal(solvers.predictor_corrector(solver, 0).solve(model, x, grid, noise=noise).x, alone)
    assert not torch.equal(solvers.predictor_corrector(solver, 1).solve(model, x, grid, noise=noise).x, alone)


# 43, 44: adaptive and reversible solvers


def exact_flow(law: Gaussian, sde: LinearSDE, x: Tensor, first: float, last: float) -> Tensor:
    start, stop = law.marginal(sde, first), law.marginal(sde, last)
    return stop.mean + (stop.variance / start.variance).sqrt() * (x - start.mean)


@given(
    st.sampled_from(sorted(set(SDES) - {"rectified"})), st.lists(st.floats(0.05, 3), min_size=3, max_size=3)
)
@settings(max_examples=4)
def test_p43_adaptive_errors_follow_the_tolerance(process: str, variances: list[float]) -> None:
    """At most 10 tol, fewer calls for a larger tol, and the same result whatever the limit on calls."""
    sde, law = SDES[process], Gaussian(torch.tensor([0.3, -0.6, 0.1]), torch.tensor(variances))
    x, _ = drawn(2, 3, sde)
    model, grid = law.denoiser(sde), grids.uniform(sde, 1)
    exact = exact_flow(law, sde, x, sde.t_max, sde.default_end)
    errors, calls = [], []
    for tol in (1e-3, 1e-5, 1e-7):
        run = solvers.adaptive_ode(tol, tol).solve(model, x, grid)
        errors.append(float((run.x - exact).abs().max()))
        calls.append(run.network_calls)
        assert run.status == "ok" and errors[-1] <= 10 * tol * max(1.0, float(exact.abs().max()))
    assert calls == sorted(calls) and calls[-1] <= 200
    limited = solvers.adaptive_ode(1e-5, 1e-5, max_calls=calls[1]).solve(model, x, grid)
    free = solvers.adaptive_ode(1e-5, 1e-5).solve(model, x, grid)
    assert limited.status == "ok" and torch.equal(limited.x, free.x)


@pytest.mark.parametrize(("solver", "steps", "bound"), [
    (solvers.reversible(1), 12, 1e-12), (solvers.reversible(2), 12, 1e-12),
    (solvers.adaptive_ode(1e-7, 1e-7), 1, 1e-5), (solvers.unipc(3), 200, 1e-4),
    (solvers.dpm(3, True), 80, 1e-4),
], ids=repr)  # fmt: skip
def test_p44_decoding_undoes_encoding(solver: Any, steps: int, bound: float) -> None:
    """To rounding where the solver is reversible, to the tolerance where adaptive, else at its order."""
    law, generator = diagonal(), torch.Generator().manual_seed(0)
    x = law.sample(4, generator=generator)
    grid = grids.log_snr(VP, steps)
    latent = encode(law.denoiser(VP), x, solver, grid=grid)
    back = decode(law.denoiser(VP), latent, solver, grid=grid)
    assert float((back.x - x).abs().max()) < bound
    assert float((latent.x - x).abs().max()) > 0.1


# Solvers that are the same


def same(a: TableSolver, b: TableSolver, sde: LinearSDE, grid: Grid, tolerance: float = 1e-12) -> None:
    assert spread(a.tableau(sde, grid), b.tableau(sde, grid)) < tolerance, (a, b)


@given(st.sampled_from(sorted(SDES)), lams)
def test_first_order_solvers_are_one(process: str, steps: list[float]) -> None:
    """DDIM(0) = DPM-Solver(++)-1 = Euler in sigma/alpha = the first-order exponential solver of data, noise
    and flow in any variable; a frozen velocity is Euler in the angle atan(sigma/alpha), where alpha^2 +
    sigma^2 = 1."""
    sde = SDES[process]
    grid = grid_of(sde, steps)
    n, kappa, alpha = len(grid), (-grid.lam).exp(), sde.alpha(grid.t)
    gain = alpha[1:] * kappa.diff()  # of eps = (x/alpha - D)/kappa
    keep = alpha[1:] / alpha[:-1] + gain / (alpha * kappa)[:-1]
    zero, one = torch.zeros(n), torch.ones(n)
    euler = Tableau(grid.t, zero, one, keep, -(gain / kappa[:-1])[:, None], zero)
    ddim = solvers.ddim(0.0)
    assert spread(ddim.tableau(sde, grid), euler) < 1e-12
    others = [solvers.dpmpp(1), solvers.dpm(1), solvers.dpmpp(1, True), solvers.deis(1), solvers.adams(1),
              solvers.adams(1, "adams")]  # fmt: skip
    for stored in ("data", "noise", "flow"):
        others += [
            solvers.exponential(1, stored=stored, variable=variable)
            for variable in ("lam", "sigma", "sigma/alpha", "t")
        ]
    for solver in others:
        same(ddim, solver, sde, grid)
    frozen, angle = solvers.exponential(1, stored="velocity").tableau(sde, grid), kappa.atan()
    if process in ("vp", "cosine"):
        assert torch.allclose(frozen.keep, one.double(), rtol=1e-13)
        assert torch.allclose(frozen.mix[:, 0], angle.diff(), rtol=1e-11)
    if max(steps[:n]) > 0.5:
        assert spread(ddim.tableau(sde, grid), frozen) > 1e-3


@given(st.sampled_from(sorted(SDES)), lams, st.floats(0.02, 0.98))
def test_ancestral_solvers_are_one(process: str, steps: list[float], eta: float) -> None:
    """DDIM(1) = DDPM = the first-order exponential solver of the reverse SDE; DDIM(eta) is that with
    `tau^2 = -log(1 - eta^2 (1 - e^(-2h)))/(2h)`, step by step."""
    sde = SDES[process]
    grid = grid_of(sde, steps)
    ddpm, h = solvers.ddpm(), grid.lam.diff()
    for solver in (
        solvers.ddim(1.0),
        solvers.exponential(1, tau=1.0),
        solvers.sde_dpmpp(1),
        solvers.sa(1, 0, 1.0),
        solvers.er_sde(1, tau=1.0),
        solvers.sde_dpmpp(1, singlestep=True),
    ):
        same(ddpm, solver, sde, grid)
    assert spread(ddpm.tableau(sde, grid), solvers.ddim().tableau(sde, grid)) > 1e-3
    tau = (-torch.log(1 - eta**2 * (1 - (-2 * h).exp())) / (2 * h)).sqrt()
    some = solvers.ddim(eta).tableau(sde, grid)
    keep, mix, noise = step_weights(sde, grid.t[:-1], grid.t[1:], grid.t[:-1, None], tau=tau)
    for found, expected in ((some.keep, keep), (some.mix, mix), (some.noise, noise)):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)


@given(st.sampled_from(sorted(SDES)), lams)
def test_members_of_the_family(process: str, steps: list[float]) -> None:
    """Presets are arguments of one family; an SDE without noise is the ODE; a corrector of order 2 behind
    Euler is UniPC-1."""
    sde = SDES[process]
    grid = grid_of(sde, steps)
    for a, b in (
        (solvers.dpmpp(3), solvers.exponential(3)),
        (solvers.dpm(3), solvers.exponential(3, stored="noise")),
        (solvers.unipc(3), solvers.exponential(3, corrector=4)),
        (solvers.unipc(2, stored="noise"), solvers.exponential(2, corrector=3, stored="noise")),
        (solvers.unipc(2), solvers.sa(2, 3, 0.0)),
        (solvers.unipc(1), solvers.exponential(1, corrector=2)),
        (solvers.deis(3), solvers.exponential(3, stored="noise", variable="t")),
        (solvers.deis(4, "sigma/alpha"), solvers.adams(4)),
        (solvers.sde_dpmpp(3, eta=0.49), solvers.exponential(3, tau=0.7)),
        (solvers.seeds(3), solvers.exponential(3, stored="noise", tau=1.0)),
        *((solvers.sde_dpmpp(p, eta=0.0), solvers.dpmpp(p)) for p in (1, 2, 3)),
        (solvers.sde_dpmpp(2, eta=0.0, singlestep=True), solvers.dpmpp(2, True)),
        (solvers.er_sde(2, tau=0.0), solvers.exponential(2, variable="sigma/alpha")),
        (solvers.edm(0.0), solvers.heun()),
        (solvers.exponential(2, tau=0.5), solvers.exponential(2, tau=lambda lam: 0.5 + 0 * lam)),
    ):
        same(a, b, sde, grid)


@given(st.sampled_from(sorted(SDES)), lams)
def test_a_corrector_behind_euler_by_hand(process: str, steps: list[float]) -> None:
    """UniPC-1 row by row: Euler in the data, then the same step again with the line through both outputs."""
    sde = SDES[process]
    grid = grid_of(sde, steps)
    table = solvers.unipc(1).tableau(sde, grid)
    lam, alpha, sigma = grid.lam, sde.alpha(grid.t), sde.sigma(grid.t)
    for k in range(1, len(grid)):
        h_before, h = lam[k] - lam[k - 1], lam[k + 1] - lam[k]
        mean = h_before - 1 + (-h_before).exp()  # int (lam - lam_{k-1}) e^(lam - lam_k)
        shift = alpha[k] * mean / h_before  # weight that moves from the old output to the new one
        keep = sigma[k + 1] / sigma[k]
        expected = torch.stack([keep * shift - alpha[k + 1] * torch.expm1(-h), -keep * shift])
        scale = max(1.0, float(keep * alpha[k]))
        assert torch.allclose(table.mix[k], expected, rtol=1e-9, atol=1e-11 * scale)
        assert float(table.keep[k]) == pytest.approx(float(keep), rel=1e-13)


@given(st.sampled_from([n for n in EXACT if n in STEPPING_BY_ITSELF]), lams, st.sampled_from(sorted(SDES)))
def test_refining_the_grid_does_not_change_an_exact_law(name: str, steps: list[float], process: str) -> None:
    """Of a point mass: on the grid and on one of half its steps the last state has the same law; and the
    noises of two half steps are, added up, that of the whole."""
    sde, solver = SDES[process], TABLES[name]
    grid = grid_of(sde, steps)
    middle = sde.time(grid.lam[1:] + grid.lam[:-1])
    fine = torch.cat([grid.t, middle]).sort(descending=True).values
    point = Gaussian(torch.tensor([1.0]), 0.0)
    start = point.marginal(sde, grid.t[0])
    coarse, refined = (solver.tableau(sde, t).law(point, sde, start) for t in (grid.t, fine))
    scale = max(1.0, float(start.variance))
    assert float((coarse.mean - refined.mean).abs()) < 1e-11 * scale
    assert float((coarse.variance - refined.variance).abs()) < 1e-11 * scale
