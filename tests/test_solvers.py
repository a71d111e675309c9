"""Solvers against textbook loops, high-precision quadrature and exact laws; orders by the protocol of
scoresde.testing.orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mpmath as mp
import numpy as np
import protocol
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoresde import grids, solvers
from scoresde.ddpm import DDPM
from scoresde.denoiser import BaseDenoiser
from scoresde.grids import Grid
from scoresde.laws import Gaussian
from scoresde.noise import Noise
from scoresde.schedules import Cosine
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE
from scoresde.solvers.base import Solver, TableSolver
from scoresde.solvers.weights import step_weights
from scoresde.tableau import Tableau, join
from scoresde.testing import orders

# Run-time type checks cost more than the solvers here; test_sampling.py runs every solver with them.
pytestmark = pytest.mark.usefixtures("unchecked")

VP, TABLE = VPSDE(), VPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SDES: dict[str, LinearSDE] = {
    "vp": VP,
    "cosine": VPSDE(schedule=Cosine()),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDM(),
    "rectified": Rectified(),
}
EXAMPLES = protocol.examples()
TABLES = protocol.table_solvers()


class Wavy(BaseDenoiser):
    """Some smooth non-linear function of x and t; equality with a loop needs no more."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.sde = sde

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 + (x / (1 + self.sde.sigma(t))).tanh()


class Normal(Wavy):
    """E[x_0 | x_t] of N(0.6, 0.3), element by element."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return 0.6 + alpha * 0.3 / (alpha**2 * 0.3 + sigma**2) * (x - alpha * 0.6)


class Point(Wavy):
    """E[x_0 | x_t] of data concentrated at 1."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def regular(sde: LinearSDE, steps: int) -> Grid:
    """Nodes with signal and noise, unevenly spaced."""
    lam = torch.linspace(-2.2, 1.9, steps + 1, dtype=torch.float64)
    return Grid.of(sde, sde.time(2 * (lam + 0.1 * (3 * lam).sin())))


def spread(table: Tableau, other: Tableau) -> float:
    """The largest difference of the canonical forms of two tables."""
    assert torch.equal(table.times, other.times)
    a, b = table.canonical(), other.canonical()
    return max(float((x - y).abs().max()) for x, y in zip(a[1:], b[1:], strict=True))


# Equality with textbook loops, with the same noise


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


# Solvers that are the same


@pytest.mark.parametrize("name", SDES)
def test_first_order_solvers_are_one(name: str) -> None:
    """DDIM = DPM-Solver(++)-1 = Euler in sigma/alpha = exponential(1) of data, noise, flow."""
    sde = SDES[name]
    grid = regular(sde, 9)
    kappa, alpha = (-grid.lam).exp(), sde.alpha(grid.t)
    ratio = alpha[1:] / alpha[:-1]
    gain = alpha[1:] * kappa.diff()  # of eps = (x/alpha - D)/kappa
    euler = Tableau(
        grid.t,
        torch.zeros(9),
        torch.ones(9),
        ratio + gain / (alpha * kappa)[:-1],
        -(gain / kappa[:-1])[:, None],
        torch.zeros(9),
    )
    ddim = solvers.ddim(0.0).tableau(sde, grid)
    assert spread(ddim, euler) < 1e-12
    same = [
        solvers.dpmpp(1),
        solvers.dpm(1),
        solvers.dpmpp(1, True),
        solvers.deis(1),
        solvers.adams(1),
        solvers.adams(1, "adams"),
    ]
    for stored in ("data", "noise", "flow"):
        same += [
            solvers.exponential(1, stored=stored, variable=variable)
            for variable in ("lam", "sigma", "sigma/alpha", "t")
        ]
    for solver in same:
        assert spread(ddim, solver.tableau(sde, grid)) < 1e-12, solver
    # a frozen velocity is another method of first order: Euler's in the angle atan(sigma/alpha), if alpha^2 +
    # sigma^2 = 1
    frozen, angle = solvers.exponential(1, stored="velocity").tableau(sde, grid), kappa.atan()
    assert spread(ddim, frozen) > 0.01
    if isinstance(sde, VPSDE) and not isinstance(sde, SubVPSDE):
        assert torch.allclose(frozen.keep, torch.ones(9, dtype=torch.float64), rtol=1e-13)
        assert torch.allclose(frozen.mix[:, 0], angle.diff(), rtol=1e-12)
    ddpm = solvers.ddpm("small").tableau(sde, grid)
    for solver in (
        solvers.ddim(1.0),
        solvers.exponential(1, tau=1.0),
        solvers.sde_dpmpp(1),
        solvers.sa(1, 0, 1.0),
    ):
        assert spread(ddpm, solver.tableau(sde, grid)) < 1e-12, solver
    assert spread(ddpm, ddim) > 0.1
    # DDIM(eta) is the first-order exponential solver with tau^2 = -log(1 - eta^2 (1 - e^(-2h)))/(2h), step by
    # step
    eta, h = 0.6, grid.lam.diff()
    tau = (-torch.log(1 - eta**2 * (1 - (-2 * h).exp())) / (2 * h)).sqrt()
    keep, mix, noise = step_weights(sde, grid.t[:-1], grid.t[1:], grid.t[:-1, None], tau=tau)
    some = solvers.ddim(eta).tableau(sde, grid)
    for found, expected in ((some.keep, keep), (some.mix, mix), (some.noise, noise)):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_members_of_the_family() -> None:
    grid = regular(VP, 8)
    pairs: list[tuple[TableSolver, TableSolver]] = [
        (solvers.dpmpp(3), solvers.exponential(3)),
        (solvers.dpm(3), solvers.exponential(3, stored="noise")),
        (solvers.unipc(3), solvers.exponential(3, corrector=4)),
        (solvers.unipc(2, stored="noise"), solvers.exponential(2, corrector=3, stored="noise")),
        (solvers.unipc(2), solvers.sa(2, 3, 0.0)),
        (solvers.deis(3), solvers.exponential(3, stored="noise", variable="t")),
        (solvers.deis(4, "sigma/alpha"), solvers.adams(4)),
        (solvers.sde_dpmpp(3, eta=0.49), solvers.exponential(3, tau=0.7)),
        (solvers.sde_dpmpp(2, eta=0.0), solvers.dpmpp(2)),
        (solvers.seeds(3), solvers.exponential(3, stored="noise", tau=1.0)),
        (solvers.exponential(2, tau=0.5), solvers.exponential(2, tau=lambda lam: 0.5 + 0 * lam)),
    ]
    for a, b in pairs:
        assert spread(a.tableau(VP, grid), b.tableau(VP, grid)) < 1e-12, (a, b)


# The primitive


def oracle_weights(
    sde: LinearSDE, lam_s: float, lam_t: float, nodes: list[float], stored: str, variable: str, tau: float
):
    """A, b, C with 25 digits: closed antiderivatives of the linear rate, adaptive quadrature of the
    polynomial.
    """
    with mp.workdps(25):
        s, t, T = mp.mpf(lam_s), mp.mpf(lam_t), mp.mpf(tau) ** 2
        ratio = {
            EDM: lambda v: mp.mpf(1),
            VPSDE: lambda v: 1 / mp.sqrt(1 + mp.exp(-2 * v)),
            Rectified: lambda v: 1 / (1 + mp.exp(-v)),
        }
        alpha: Callable = ratio[type(sde)]

        def sigma(v):
            return alpha(v) * mp.exp(-v)

        rate_integral = {
            "data": lambda v: T * v,
            "noise": lambda v: -v,
            "velocity": lambda v: T * v - (1 + T) * mp.log(1 + mp.exp(2 * v)) / 2,
            "flow": lambda v: T * v - (1 + T) * mp.log(1 + mp.exp(v)),
        }[stored]
        weight = {
            "data": mp.exp,
            "noise": lambda v: mp.mpf(-1),
            "velocity": lambda v: -1 / (alpha(v) * (1 + mp.exp(-2 * v))),
            "flow": lambda v: -1 / (1 + mp.exp(-v)),
        }[stored]
        u = {
            "lam": lambda v: v,
            "sigma/alpha": lambda v: mp.exp(-v),
            "sigma": lambda v: 1 / (1 + mp.exp(v)),
            "t": lambda v: mp.exp(-v) if type(sde) is EDM else 1 / (1 + mp.exp(v)),
        }[variable]
        end = rate_integral(t)

        def propagator(v):
            return mp.exp(rate_integral(v) - end)

        at = [u(mp.mpf(v)) for v in nodes]

        def basis(j, v):
            return mp.fprod((u(v) - at[i]) / (at[j] - at[i]) for i in range(len(at)) if i != j)

        pieces = mp.linspace(s, t, 2 + int((t - s) / 3))
        A = sigma(t) / sigma(s) * propagator(s)
        b = [
            sigma(t) * mp.quad(lambda v, j=j: propagator(v) * (1 + T) * weight(v) * basis(j, v), pieces)
            for j in range(len(at))
        ]
        C = sigma(t) * mp.sqrt(mp.quad(lambda v: 2 * T * propagator(v) ** 2, pieces))
        return float(A), [float(v) for v in b], float(C)


def at_lam(sde: LinearSDE, values: list[float]) -> tuple[torch.Tensor, list[float]]:
    """Times near the given lam, and their own lam as float64 has it."""
    t = sde.time(2 * torch.tensor(values, dtype=torch.float64))
    return t, (0.5 * sde.log_snr(t)).tolist()


WIDE = EDM(1e-9, 1e9)


@pytest.mark.oracle
@pytest.mark.parametrize("stored", ["data", "noise", "velocity", "flow"])
@pytest.mark.parametrize("h", [1e-4, 1e-2, 0.3, 2.0, 10.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_step_weights_to_rounding(stored: str, h: float) -> None:
    """b relative to the largest of them: single ones may be zero."""
    cases = [(WIDE, "lam", 0.0), (WIDE, "lam", 1.0)]
    if h <= 2:
        cases += [
            (WIDE, "sigma/alpha", 0.0),
            (Rectified(), "t", 0.0),
            (WIDE, "sigma", 0.4),
            (VP, "sigma", 0.0),
        ]
    for sde, variable, tau in cases:
        if stored != "data" and h > 10 and tau:
            continue  # noise of e^h the size of the state: no one takes such a step
        base = -0.45 * h if h > 3 else -1.0
        # one or two nodes behind the base, the base, and one ahead of the target
        values = [base, base + h, base + h, base - 0.8 * h, base - 1.7 * h]
        for chosen in ([0, 3], [1, 0, 3, 4]) if h < 3 else ([1, 0, 3],):
            times, lam = at_lam(sde, values)
            A, b, C = step_weights(
                sde, times[:1], times[1:2], times[chosen][None], stored=stored, variable=variable, tau=tau
            )
            expected = oracle_weights(sde, lam[0], lam[1], [lam[i] for i in chosen], stored, variable, tau)
            # other variables than lam are functions of t, whose lam is a rounding away
            accuracy = 1e-13 * max(1, h / 3) + (1e-15 / h if variable != "lam" else 0)
            if stored in (
                "velocity",
                "flow",
            ):  # their rate has poles at a distance of pi/2 (pi) from the real line
                accuracy = max(accuracy, {10.0: 1e-6, 30.0: 5e-3}.get(h, 0))
            assert A.item() == pytest.approx(expected[0], rel=accuracy)
            size = max(map(abs, expected[1]))
            assert b[0].tolist() == pytest.approx(expected[1], rel=0, abs=accuracy * size), (
                variable,
                tau,
                chosen,
            )
            assert C.item() == pytest.approx(expected[2], rel=accuracy)


@pytest.mark.oracle
def test_step_weights_in_closed_form() -> None:
    """Order 1 and 2, data and noise: alpha_t (1 - e^(-a h)) and its next moment; sigma_t (e^h - 1)."""
    for h in (1e-4, 1e-2, 0.5, 5.0):
        (t, lam) = at_lam(WIDE, [0.3, 0.3 + h, 0.3 - h])
        with mp.workdps(40):
            step, back = mp.mpf(lam[1]) - mp.mpf(lam[0]), mp.mpf(lam[0]) - mp.mpf(lam[2])
            sigma_t = mp.exp(-mp.mpf(lam[1]))
            for tau in (0.0, 1.0, 0.3):
                a = 1 + mp.mpf(tau) ** 2
                A, b, C = step_weights(WIDE, t[:1], t[1:2], t[[0, 2]][None], tau=tau)
                zeroth, first = -mp.expm1(-a * step), step + mp.expm1(-a * step) / a
                assert A.item() == pytest.approx(float(mp.exp(-a * step)), rel=1e-13)
                assert C.item() == pytest.approx(
                    float(sigma_t * mp.sqrt(-mp.expm1(-2 * (a - 1) * step))), rel=1e-13
                )
                expected = [zeroth + first / back, -first / back]
                assert b[0].tolist() == pytest.approx([float(v) for v in expected], rel=1e-12)
            A, b, C = step_weights(WIDE, t[:1], t[1:2], t[:1, None], stored="noise", tau=1.0)
            assert A.item() == pytest.approx(1, rel=1e-14)
            assert b.item() == pytest.approx(float(-2 * sigma_t * mp.expm1(step)), rel=1e-13)
            assert C.item() == pytest.approx(float(sigma_t * mp.sqrt(mp.expm1(2 * step))), rel=1e-13)


@given(
    st.sampled_from(["data", "noise", "velocity", "flow"]),
    st.sampled_from(["lam", "sigma/alpha", "sigma", "t"]),
    st.integers(1, 5),
    st.floats(0, 1.5),
    st.integers(0, 10**6),
)
def test_polynomials_of_lower_degree_are_integrated_exactly(
    stored: str, variable: str, count: int, tau: float, seed: int
) -> None:
    """sum_j b_j u_j^k is the same for any nodes, one more included: the moment of u^k. Vectorised over steps,
    too.
    """
    rng = np.random.default_rng(seed)
    steps = 3
    s = torch.from_numpy(rng.uniform(-1.5, 0.5, steps))
    nodes = (
        s[:, None]
        + torch.from_numpy(np.sort(rng.uniform(-1.5, 1, (steps, count + 1))))
        + 0.3 * torch.arange(count + 1)
    )
    target = s + torch.from_numpy(rng.uniform(0.2, 1.2, steps))
    at, end, every = (VP.time(2 * lam) for lam in (s, target, nodes))
    options = {"stored": stored, "variable": variable, "tau": tau}
    u = {
        "lam": lambda v: v,
        "sigma/alpha": lambda v: (-v).exp(),
        "sigma": lambda v: (-v).sigmoid(),
        "t": lambda v: VP.time(2 * v),
    }[variable]
    _, few, _ = step_weights(VP, at, end, every[:, :count], **options)
    _, many, _ = step_weights(VP, at, end, every, **options)
    place = u(nodes)
    for k in range(count):
        terms, more = few * place[:, :count] ** k, many * place**k
        scale = 1 + float(terms.abs().max() + more.abs().max())
        assert torch.allclose(terms.sum(1), more.sum(1), rtol=0, atol=1e-12 * scale * 30)
    assert not torch.allclose(
        (few * place[:, :count] ** count).sum(1), (many * place**count).sum(1), rtol=1e-9, atol=0
    )
    for i in range(steps):
        alone = step_weights(VP, at[i : i + 1], end[i : i + 1], every[i : i + 1, :count], **options)[1]
        assert torch.allclose(alone[0], few[i], rtol=1e-12, atol=1e-13)


def test_noise_levels_add_up() -> None:
    """A step with tau split in two: A multiplies, variances add, for any kind of tau."""
    lam = torch.tensor([-1.0, 0.2, 1.1], dtype=torch.float64)
    t = VP.time(2 * lam)

    def tau(v: torch.Tensor) -> torch.Tensor:
        return 0.4 + 0.3 * (2 * v).sin()

    for level in (0.7, tau):
        A, _, C = step_weights(VP, t[[0, 1, 0]], t[[1, 2, 2]], t[[0, 1, 0], None], tau=level)
        assert A[2].item() == pytest.approx((A[0] * A[1]).item(), rel=1e-12)
        assert C[2].item() == pytest.approx(math.hypot(C[1].item(), (A[1] * C[0]).item()), rel=1e-12)
    numbers = step_weights(VP, t[:2], t[1:], t[:2, None], tau=torch.tensor([0.7, 0.2], dtype=torch.float64))
    for i, value in enumerate((0.7, 0.2)):
        single = step_weights(VP, t[i : i + 1], t[i + 1 : i + 2], t[i : i + 1, None], tau=value)
        for a, b in zip(numbers, single, strict=True):
            assert torch.allclose(a[i], b[0], rtol=1e-13, atol=0)


# Orders


ORDERED = {name: s for name, s in TABLES.items() if s.card.order is not None}
WEAK = {name: s for name, s in TABLES.items() if s.card.weak_order is not None}


@pytest.mark.parametrize("name", ORDERED)
def test_order(name: str) -> None:
    solver = ORDERED[name]
    assert not solver.card.stochastic
    assert orders.order(solver, VP).order == pytest.approx(solver.card.order, abs=0.15)


@pytest.mark.parametrize("name", [repr(s) for s in (
    solvers.ddim(), solvers.dpmpp(2), solvers.dpmpp(3), solvers.unipc(2), solvers.deis(3), solvers.heun(),
    solvers.midpoint(), solvers.dpmpp(3, singlestep=True), solvers.dpm(2, singlestep=True),
)])  # fmt: skip
@pytest.mark.parametrize("process", ["cosine", "edm", "rectified"])
def test_order_on_other_processes(name: str, process: str) -> None:
    solver = ORDERED[name]
    assert orders.order(solver, SDES[process]).order == pytest.approx(solver.card.order, abs=0.15)


@pytest.fixture(scope="module")
def mixture() -> orders.Problem:
    return orders.mixture()


@pytest.mark.parametrize("name", ORDERED)
def test_order_on_a_mixture(name: str, mixture: orders.Problem) -> None:
    """Not less than declared; on this one law methods of order 4 and 5 reach their order from above (4.26,
    5.23).
    """
    solver = ORDERED[name]
    found = orders.order(solver, VP, mixture).order
    assert solver.card.order is not None and -0.15 < found - solver.card.order < 0.35


@pytest.mark.parametrize("name", WEAK)
def test_weak_order(name: str) -> None:
    solver = WEAK[name]
    assert solver.card.stochastic
    assert orders.weak_order(solver, VP).order == pytest.approx(solver.card.weak_order, abs=0.15)


def test_the_protocol_can_fail() -> None:
    """Second differences halved, constant Adams weights and one flipped sign are seen for what they are."""
    assert orders.order(solvers.dpmpp(3, rule="half3"), VP).order < 2.2
    assert orders.order(solvers.adams(4, "adams"), VP).order < 2.2

    def flipped(sde: LinearSDE, grid: Grid) -> Tableau:
        table = solvers.dpmpp(3).tableau(sde, grid)
        mix = table.mix.clone()
        mix[:, 0] += 2 * mix[:, 2]
        mix[:, 2] *= -1
        return Tableau(table.times, table.skip, table.out, table.keep, mix, table.noise)

    wrong = TableSolver("wrong", flipped, solvers.dpmpp(3).card)
    assert orders.order(wrong, VP).order < 1.2

    def coarse(sde: LinearSDE, grid: Grid) -> Tableau:
        table = solvers.sde_dpmpp(2).tableau(sde, grid)
        mix = table.mix.clone()
        mix[:, 0] += 0.5 * mix[:, 1]
        mix[:, 1] *= 0.5
        return Tableau(table.times, table.skip, table.out, table.keep, mix, table.noise)

    half = TableSolver("half", coarse, solvers.sde_dpmpp(2).card)
    assert orders.weak_order(half, VP).order < 1.3


@pytest.mark.parametrize("rule", ["euler_maruyama", "reverse_diffusion", "ddpm"])
def test_weak_order_of_the_historical_samplers(rule: str) -> None:
    """They step by 1/K, so on nodes i/K from 1 to 1/K they reach 0: error of mean and variance against the
    data.
    """
    solver, errors, counts = getattr(solvers, rule)(rule="score_sde"), [], (250, 500, 1000, 2000)
    law = Gaussian(torch.tensor([0.7, -0.2, 1.0]), torch.tensor([0.25, 0.6, 1.5]))
    start = law.marginal(VP, 1.0)
    for n in counts:
        t = torch.arange(n, 0, -1, dtype=torch.float64) / n
        found = solver.tableau(VP, t).law(law, VP, start)
        errors.append(float(torch.cat([found.mean - law.mean, found.variance - law.variance]).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.15)


def test_strong_order_of_euler_maruyama() -> None:
    """Coupled noise by exact law: a coarse step gets the sum of the fine ones' noises; order 1, the noise is
    additive.

    The exact path is the one of 4096 steps: errors are root mean squares over the law of noise and start.
    """
    law, fine, counts = Gaussian(torch.tensor([0.4]), torch.tensor([0.5])), 2048, (32, 64, 128, 256)

    def path(n: int) -> np.ndarray:
        """The end state as a linear form (constant, start, fine noises)."""
        t = torch.linspace(1.0, 0.2, n + 1, dtype=torch.float64)
        table = solvers.euler_maruyama().tableau(VP, t)
        alpha, sigma = VP.alpha(t).tolist(), VP.sigma(t).tolist()
        keep, mix, noise = table.keep.tolist(), table.mix[:, 0].tolist(), table.noise.tolist()
        state, each = np.zeros(2 + fine), fine // n
        state[1] = 1
        for k in range(n):
            gain = alpha[k] * 0.5 / (alpha[k] ** 2 * 0.5 + sigma[k] ** 2)
            D = gain * state
            D[0] += 0.4 * (1 - gain * alpha[k])
            state = keep[k] * state + mix[k] * D
            state[2 + k * each : 2 + (k + 1) * each] += noise[k] / math.sqrt(each)
        return state

    exact, start = path(fine), law.marginal(VP, 1.0)
    errors = []
    for n in counts:
        gap = path(n) - exact
        mean = gap[0] + gap[1] * start.mean.item()
        errors.append(math.sqrt(mean**2 + gap[1] ** 2 * start.variance.item() + (gap[2:] ** 2).sum()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "solver",
    [solvers.ddim(0.2), solvers.ddim(0.7), solvers.sde_dpmpp(2, eta=0.3), solvers.sde_dpmpp(2, eta=2.0)],
    ids=repr,
)
def test_all_noise_levels_have_the_same_limit(solver: TableSolver) -> None:
    law = Gaussian(torch.tensor([0.3, -1.0]), torch.tensor([0.2, 2.0]))
    start, gaps = law.marginal(VP, 1.0), []
    for n in (200, 400):
        found = solver.tableau(VP, grids.log_snr(VP, n)).law(law, VP, start)
        truth = law.marginal(VP, VP.default_end)
        gaps.append(float(torch.cat([found.mean - truth.mean, found.variance - truth.variance]).abs().max()))
    order = solver.card.weak_order
    assert order is not None and gaps[1] < 0.05 and gaps[0] / gaps[1] == pytest.approx(2**order, rel=0.35)


# Ends of the schedule


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


def test_data_form_is_exact_on_a_point_mass() -> None:
    for solver in (solvers.ddim(), solvers.dpmpp(2), solvers.dpmpp(3), solvers.unipc(3)):
        for steps in (1, 2, 10):
            found = solver.solve(
                Point(VP), torch.full((1, 2), 7.0, dtype=torch.float64), grids.karras(VP, steps, 0.0)
            ).x
            assert torch.equal(found, torch.ones_like(found))


def test_deterministic_map_of_a_gaussian() -> None:
    """Normal data: the exact flow is the identity for VP; first-order steps shrink by cos of the angle
    between nodes.
    """
    grid = grids.log_snr(VP, 11)
    angle = torch.atan2(VP.sigma(grid.t), VP.alpha(grid.t))
    model = Gaussian(torch.zeros(2), 1.0).denoiser(VP)
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    found = solvers.ddim().solve(model, x, grid).x
    assert torch.allclose(found, x * angle.diff().cos().prod(), rtol=1e-12)
    # the field of the probability-flow ODE vanishes there
    assert VP.probability_flow(model)(x, 0.3).abs().max() < 1e-15


def test_gaussian_flow() -> None:
    """x_s = alpha_s m + (v_s/v_t)^(1/2) (x_t - alpha_t m), to the accuracy of 200 steps of third order."""
    m, S = 0.6, 0.3
    model, grid = Normal(VP), grids.log_snr(VP, 200)
    x = torch.tensor([[0.8], [-1.7]], dtype=torch.float64)
    a, s = VP.alpha(grid.t[[0, -1]]), VP.sigma(grid.t[[0, -1]])
    v = a**2 * S + s**2
    exact = a[1] * m + (v[1] / v[0]).sqrt() * (x - a[0] * m)
    for solver in (solvers.dpmpp(3), solvers.unipc(3), solvers.dpm(3, singlestep=True)):
        assert torch.allclose(solver.solve(model, x, grid).x, exact, atol=1e-5), solver


# Cards, calls, names


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
        assert torch.equal(table.times[[0, -1]], grid.t[[0, -1]]) or protocol.is_historical(solver)


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


@pytest.mark.parametrize(
    "solver",
    [solvers.ddim(), solvers.dpmpp(2), solvers.unipc(3), solvers.heun(), solvers.dpm(3, True)],
    ids=repr,
)
def test_encoding_is_undone_at_the_order_of_the_solver(solver: TableSolver) -> None:
    model, x = Normal(VP), torch.tensor([[0.3, -0.2], [1.1, 0.4]], dtype=torch.float64)
    gaps = []
    for n in (40, 80):
        grid = grids.log_snr(VP, n)
        latent = solver.solve(model, x, grid.reversed()).x
        gaps.append(float((solver.solve(model, latent, grid).x - x).abs().max()))
    assert gaps[1] < 0.2 and gaps[0] / gaps[1] > 1.6
