"""Solvers against textbook loops on the same grid, with the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mpmath as mp
import numpy as np
import pytest
import reference
import torch
from protocol import VP, Wavy, regular, spread

from scoresde import grids, solvers
from scoresde.ddpm import DDPM
from scoresde.grids import Grid
from scoresde.noise import Noise
from scoresde.sde import EDM, VPSDE, LinearSDE, Rectified, SubVPSDE
from scoresde.solvers.base import TableSolver
from scoresde.tableau import join

# Run-time type checks cost more than the solvers here; test_sampling.py runs every solver with them.
pytestmark = pytest.mark.usefixtures("unchecked")

TABLE = VPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def against_loop(
    solver: TableSolver, sde: LinearSDE, grid: Grid, loop: Callable, tolerance: float = 1e-12
) -> None:
    """The solver's run equals `loop(denoise, x, alphas, sigmas, noises)` on the nodes of its table."""
    table, model = solver.tableau(sde, grid), Wavy(sde)
    times = table.times
    noise = Noise.of(3, batch=4, dtype=torch.float64)
    x = noise.prior((4, 2)) * float(sde.alpha(times[0]) + sde.sigma(times[0]))
    noises = np.stack([noise(k, (4, 2)).numpy() for k in range(len(table))])

    def denoise(state: np.ndarray, k: int) -> np.ndarray:
        return model(torch.from_numpy(np.ascontiguousarray(state)), times[k]).numpy()

    expected = loop(denoise, x.numpy(), sde.alpha(times).numpy(), sde.sigma(times).numpy(), noises)
    found = solver.solve(model, x, grid, noise=noise).x.numpy()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(x.numpy()).max())


KAPPA = {"clock": lambda lam: mp.exp(-lam)}


R = reference


LOOPS: list[tuple[TableSolver, Callable, int]] = [
    # solver, loop, rows a step
    (solvers.ddpm("small"), partial(R.ddpm, variance="small"), 1),
    (solvers.ddpm("large"), partial(R.ddpm, variance="large"), 1),
    (solvers.ddim(0.0), R.ddim, 1),
    (solvers.ddim(0.3), partial(R.ddim, eta=0.3), 1),
    (solvers.ddim(1.0), partial(R.ddim, eta=1.0), 1),
    (solvers.heun(), R.heun, 2),
    (solvers.midpoint(), R.midpoint, 2),
    (solvers.dpm(2, rule="bh2"), R.dpm_2m, 1),
    (solvers.dpmpp(2, rule="bh2"), R.dpmpp_2m, 1),
    (solvers.dpmpp(3, rule="half3"), R.dpmpp_3m_published, 1),
    (solvers.sde_dpmpp(2, rule="bh2"), R.sde_dpmpp_2m, 1),
    (solvers.sde_dpmpp(2, eta=0.4, rule="bh2"), partial(R.sde_dpmpp_2m, eta=0.4), 1),
    (solvers.dpmpp(2), partial(R.adams, order=2), 1),
    (solvers.dpmpp(3), partial(R.adams, order=3), 1),
    (solvers.dpm(3), partial(R.adams, order=3, predicts="noise"), 1),
    (solvers.sa(3, 4, 0.6), partial(R.adams, order=3, corrector=4, tau=0.6), 1),
    (solvers.sa(2, 0, 1.0), partial(R.adams, order=2, tau=1.0), 1),
    (solvers.seeds(2), partial(R.adams, order=2, predicts="noise", tau=1.0), 1),
    (solvers.adams(3), partial(R.adams, order=3, predicts="noise", **KAPPA), 1),
    (solvers.adams(4, "adams"), R.ipndm, 1),
    *(
        (solvers.unipc(p, rule), partial(R.unipc, order=p, variant=rule), 1)
        for p in (1, 2, 3)
        for rule in ("bh1", "bh2")
    ),
    (solvers.unipc(3), partial(R.adams, order=3, corrector=4), 1),
]  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize(("solver", "loop", "stages"), LOOPS, ids=[repr(case[0]) for case in LOOPS])
def test_textbook_loops(solver: TableSolver, loop: Callable, stages: int) -> None:
    sde = VP if "variance" in dict(solver.options) or "eta" in dict(solver.options) else SubVPSDE()
    grid = regular(sde, 6)
    assert len(solver.tableau(sde, grid)) == 6 * stages
    against_loop(solver, sde, grid, loop, 1e-11 if loop is R.ipndm else 1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_is_algorithm_2(variance: str) -> None:
    """On the whole table of the chain, and for the large variance the library's own printed Algorithm 2."""
    against_loop(
        solvers.ddpm(variance), TABLE, grids.ddpm(TABLE, 1000), partial(reference.ddpm, variance=variance)
    )
    if variance == "large":
        chain, model = DDPM(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)), Wavy(TABLE)
        noise = Noise.of(3, batch=4, dtype=torch.float64)
        x = noise.prior((4, 2))
        loop = chain.sample(model, x, [noise(1000 - i, (4, 2)) for i in range(1, 1001)])
        ours = solvers.ddpm("large").solve(model, x, grids.ddpm(TABLE, 1000), noise=noise).x
        assert torch.allclose(ours, loop, rtol=1e-12, atol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["euler_maruyama", "reverse_diffusion", "ddpm"])
def test_samplers_of_score_sde(name: str) -> None:
    K = 30
    t = torch.linspace(1, 1e-3, K, dtype=torch.float64)
    betas = reference.score_sde_betas(t.numpy())
    loops = {
        "euler_maruyama": partial(reference.score_sde_euler, betas_at=VP.beta(t).numpy()),
        "reverse_diffusion": partial(reference.score_sde_reverse_diffusion, betas=betas),
        "ddpm": partial(reference.score_sde_ancestral, betas=betas),
    }

    def loop(denoise, x, alphas, sigmas, noises):
        return loops[name](denoise, x, alphas[:K], sigmas[:K], noises)

    solver = getattr(solvers, name)(rule="score_sde")
    against_loop(solver, VP, Grid.of(VP, t), loop)
    assert solver.steps_for(K) == K - 1 and len(solver.tableau(VP, t)) == K
    # a grid that ends at 0 has its last row there already
    assert len(solver.tableau(VP, torch.cat([t, torch.zeros(1, dtype=torch.float64)]))) == K


@pytest.mark.oracle
def test_euler_maruyama_and_reverse_diffusion() -> None:
    for sde in (VP, SubVPSDE(), EDM(), Rectified()):
        grid = regular(sde, 7)

        def rate(which: int, t: float, sde: LinearSDE = sde) -> float:
            return float(sde.rates(t)[which])

        loop = partial(
            reference.euler_maruyama,
            times=grid.t.tolist(),
            f=partial(rate, 0),
            g=lambda t, r=rate: math.sqrt(r(1, t)),
        )
        against_loop(solvers.euler_maruyama(), sde, grid, loop)

    def reverse(denoise, x, alphas, sigmas, noises):
        """x_t - (a - 1) x_t + V score + V^(1/2) z, with x_t = a x_s + V^(1/2) z of the VP transition."""
        for k in range(len(alphas) - 1):
            a = alphas[k] / alphas[k + 1]
            score = (alphas[k] * denoise(x, k) - x) / sigmas[k] ** 2
            x = x - (a - 1) * x + (1 - a**2) * score + np.sqrt(1 - a**2) * noises[k]
        return x

    against_loop(solvers.reverse_diffusion(), VP, regular(VP, 7), reverse)


@pytest.mark.oracle
@pytest.mark.parametrize("end", [None, 0.0])
def test_edm_samplers(end: float | None) -> None:
    sde = EDM()
    grid = grids.karras(sde, 9, end)
    loop = reference.heun

    def heun(denoise, x, alphas, sigmas, noises):
        nodes = [
            *range(0, len(alphas) - 1, 2),
            len(alphas) - 1,
        ]  # the inner points of Heun are the next nodes
        return loop(lambda state, k: denoise(state, nodes[k]), x, alphas[nodes], sigmas[nodes])

    against_loop(solvers.heun(), sde, grid, heun)


@pytest.mark.oracle
@pytest.mark.parametrize("end", [None, 0.0])
@pytest.mark.parametrize("churn", [0.0, 1.5, 40.0])
def test_churn_is_algorithm_2_of_edm(churn: float, end: float | None) -> None:
    sde, n = EDM(), 8
    grid, solver = grids.karras(sde, n, end), solvers.edm(churn, 0.05, 50.0, 1.003)
    noise = Noise.of(1, batch=3, dtype=torch.float64)
    x = noise.prior((3, 2)) * 80
    gamma, sigmas, noises = min(churn / n, math.sqrt(2) - 1), [], []
    for i, t in enumerate(grid.t[:-1].tolist()):
        sigmas += [t, t * (1 + gamma) if i > 0 and 0.05 <= t <= 50 else t]
        # the row that ends the step before carries the noise
        noises += [noise(2 * i - 1, (3, 2)).numpy() if i > 0 else np.zeros((3, 2)), np.zeros((3, 2))]
    sigmas.append(float(grid.t[-1]))
    model = Wavy(sde)

    def denoise(state: np.ndarray, k: int) -> np.ndarray:
        return model(torch.from_numpy(state), torch.tensor(sigmas[k], dtype=torch.float64)).numpy()

    expected = reference.edm(
        denoise, x.numpy(), np.ones(len(sigmas)), np.array(sigmas), noises, s_noise=1.003
    )
    found = solver.solve(model, x, grid, noise=noise)
    np.testing.assert_allclose(found.x.numpy(), expected, rtol=1e-11, atol=1e-10)
    assert solver.card.stochastic == (churn > 0)
    for wrong in ((-1.0,), (1.0, -0.1), (1.0, 2.0, 1.0), (1.0, 0.0, 1.0, 0.0)):
        with pytest.raises(ValueError, match="churn >= 0, 0 <= low <= high, spread > 0"):
            solvers.edm(*wrong)


@pytest.mark.parametrize(("times", "inner"), [(1, 1), (1, 3), (2, 4)])
def test_restart_goes_back_and_comes_down_again(times: int, inner: int) -> None:
    """Noise levels of the calls, by hand: the node nearest `low`, Karras' levels from `high` down to it."""
    sde, n, high = EDM(), 9, 0.6
    grid = grids.karras(sde, n)
    node = int((grid.lam[1:] + math.log(0.1)).abs().argmin()) + 1
    bottom = float(grid.t[node])
    levels = (high ** (1 / 7) + np.arange(inner + 1) / inner * (bottom ** (1 / 7) - high ** (1 / 7))) ** 7
    t = grid.t.tolist()
    starts = [*t[:node], *(list(levels[:-1]) * times), *t[node:-1]]
    solver = solvers.restart(((0.1, high, times, inner),))
    table = solver.tableau(sde, grid)
    np.testing.assert_allclose(table.times[:-1:2].numpy(), starts, rtol=1e-12)
    assert len(table) == solver.calls(n) == 2 * (n + times * inner) and float(table.times[-1]) == t[-1]
    # the rows that end at the bottom add forward noise up to `high`, `times` over; no others do
    noisy = [2 * (node + inner * i) - 1 for i in range(times)]
    assert table.noise.nonzero()[:, 0].tolist() == noisy
    np.testing.assert_allclose(table.noise[noisy].numpy(), math.sqrt(high**2 - bottom**2), rtol=1e-10)


WRONG = [(0.3, 0.1, 1, 1), (0.0, 0.1, 1, 1), (0.1, 0.3, 0, 1), (0.1, 0.3, 1, 0), (0.2, 0.2, 1, 1)]


@pytest.mark.parametrize("interval", WRONG)
def test_restart_refuses(interval: tuple) -> None:
    with pytest.raises(ValueError, match="0 < low < high, times >= 1, steps >= 1"):
        solvers.restart((interval,))


@pytest.mark.parametrize(
    ("calls", "orders"),
    [
        (1, [1]),
        (2, [2]),
        (3, [2, 1]),
        (4, [3, 1]),
        (5, [3, 2]),
        (6, [3, 2, 1]),
        (8, [3, 3, 2]),
        (9, [3, 3, 2, 1]),
    ],
)
def test_dpm_fast_spends_every_call(calls: int, orders: list[int]) -> None:
    grid, at, parts = regular(VP, calls), 0, []
    for order in orders:
        parts.append(solvers.dpm(order, singlestep=True).tableau(VP, grid.t[[at, at + order]]))
        at += order
    table = solvers.dpm_fast().tableau(VP, grid)
    assert len(table) == calls and spread(table, join(parts)) < 1e-13
    with pytest.raises(ValueError, match="'noise' or 'data', found 'flow'"):
        solvers.dpm_fast("flow")


def test_a_callback_sees_every_row_in_order() -> None:
    """Number, time, state and D of each call, and of no other."""
    grid, model = grids.quadratic(VP, 4), Wavy(VP)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    seen = solvers.dpmpp(2).solve(model, x, grid, callback=lambda step: step).path
    assert [step.k for step in seen] == [0, 1, 2, 3]
    assert [step.t for step in seen] == grid.t[:-1].tolist()
    assert seen[0].x.equal(x)
    for step in seen:
        assert torch.allclose(step.denoised, model(step.x, step.t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0])
def test_eta_of_sde_dpmpp_is_the_square_of_tau(eta: float) -> None:
    """What one step keeps of the state, and the variance of its noise, are the same for all orders."""
    grid = regular(VP, 1)
    expected = solvers.exponential(1, tau=math.sqrt(eta)).tableau(VP, grid).canonical()
    for order, singlestep in ((1, False), (2, False), (3, False), (1, True), (2, True)):
        found = solvers.sde_dpmpp(order, eta, singlestep).tableau(VP, grid).canonical()
        assert float(found.a[-1]) == pytest.approx(float(expected.a[-1]), rel=1e-12)
        variances = (float(form.C[-1].square().sum()) for form in (found, expected))
        assert next(variances) == pytest.approx(next(variances), rel=1e-12)
