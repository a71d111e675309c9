"""Our tables against the samplers of diffusers, k-diffusion and azula: same grid, same noises, same exact
denoiser.

Run, in the environment that the head of benchmarks/peers.txt describes:

    peers/bin/python -m pytest tests/test_oracles.py -m oracle

Elsewhere these tests are skipped. The law is a ring of Gaussians, with its exact denoiser; the grid is uneven
and short, so that variants of one method (UniPC's two B(h), midpoint and Heun, exact and published third
order) differ by 1e-3 to 1e-1. Limits: 1e-10 relative; DPMSolverMultistepScheduler casts its state to float32,
so 1e-6 there. Where a public sampler is wrong, a test shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from scoresde import EDM, VPSDE, grids, schedules, solvers
from scoresde.laws import Gaussian
from scoresde.sde import LinearSDE
from scoresde.solvers.singlestep import Stage, singlestep_table
from scoresde.solvers.weights import step_weights
from scoresde.tableau import Tableau, join
from scoresde.testing import check_order, check_rotation, check_sampler_exact_law, check_weak_order

peers = pytest.importorskip(
    "benchmarks.peers", reason="run from the root of the repository, with `python -m pytest`"
)
problems = pytest.importorskip("benchmarks.problems")

MISSING = [library for library in ("diffusers", "k-diffusion", "azula") if peers.missing(library)]
REASON = f"{', '.join(MISSING)} not installed here: {peers.RECIPE}"
pytestmark = [pytest.mark.oracle, pytest.mark.skipif(bool(MISSING), reason=REASON)]

EXACT, FLOAT32 = 1e-10, 1e-6
STEPS, BATCH = 11, 64
PER_STEP = 4  # noises kept ready for each step
RING = problems.ring()


def uneven(sde: LinearSDE, steps: int = STEPS, end: float | None = 1e-3) -> Tensor:
    """Times whose spacing is neither even in t nor in lam."""
    return grids.quadratic(sde, steps, end).t


class Setting:
    """One grid, one start, one set of noises."""

    def __init__(self, sde: LinearSDE, t: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sde, self.t, self.model = sde, t, RING.denoiser(sde)
        self.z = torch.randn(PER_STEP * len(t), BATCH, 2, generator=generator, dtype=torch.float64)
        self.start = float(sde.sigma(t[0])) * torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)

    def ours(self, table: Tableau) -> Tensor:
        return (
            solvers.from_tableau(table)
            .solve(self.model, self.start, self.t, noise=lambda k, shape: self.z[k])
            .x
        )

    def theirs(self, peer: Callable, noise: Callable[[int], Tensor] | None = None) -> Tensor:
        task = peers.Task(self.sde, self.t, lambda x, t: self.model(x, t), noise or (lambda k: self.z[k]))
        return peer(task, self.start)

    def difference(self, peer: Callable, table: Tableau) -> float:
        theirs, ours = self.theirs(peer), self.ours(table)
        assert ours.dtype == theirs.dtype == torch.float64
        return float((theirs - ours).abs().max() / ours.abs().max())


def difference(peer: Callable, solver: solvers.TableSolver, sde: LinearSDE, t: Tensor) -> float:
    return Setting(sde, t).difference(peer, solver.tableau(sde, t))


K, D, A = peers.k_diffusion, peers.diffusers, peers.azula

K_DIFFUSION = {
    "euler": (K("euler"), solvers.ddim()),
    "heun": (K("heun"), solvers.heun()),
    "dpm_2": (K("dpm_2"), solvers.midpoint()),
    **{f"lms {p}": (K("lms", order=p), solvers.adams(p)) for p in (1, 2, 3, 4)},
    **{
        f"euler_ancestral {eta}": (K("euler_ancestral", eta=eta), solvers.ddim(eta))
        for eta in (0.0, 0.5, 1.0)
    },
    "dpmpp_2m": (K("dpmpp_2m"), solvers.dpmpp(2, rule="bh2")),
    **{
        f"dpmpp_2m_sde midpoint {eta}": (K("dpmpp_2m_sde", eta=eta), solvers.sde_dpmpp(2, eta, rule="bh2"))
        for eta in (0.0, 0.5, 1.0)
    },
    **{
        f"dpmpp_2m_sde heun {eta}": (
            K("dpmpp_2m_sde", eta=eta, solver_type="heun"),
            solvers.sde_dpmpp(2, eta),
        )
        for eta in (0.0, 0.5, 1.0)
    },
}

AZULA = {
    "Euler": (A("EulerSampler"), solvers.ddim()),
    "Heun": (A("HeunSampler"), solvers.heun()),
    "DDPM": (A("DDPMSampler"), solvers.ddpm()),
    **{
        f"DDIM {eta}": (A("DDIMSampler", eta=eta**2), solvers.ddim(eta)) for eta in (0.0, 0.5, 1.0)
    },  # its eta multiplies the variance
    "Ito": (A("ItoSampler"), solvers.seeds(1)),
    **{f"zAB {p}": (A("zABSampler", order=p), solvers.adams(p)) for p in (1, 2, 3, 4)},
    **{
        f"vAB {p}": (A("vABSampler", order=p), solvers.exponential(p, stored="flow", variable="sigma"))
        for p in (1, 2, 3, 4)
    },
    **{f"zEAB {p}": (A("zEABSampler", order=p), solvers.dpm(p)) for p in (1, 2, 3)},
    **{f"xEAB {p}": (A("xEABSampler", order=p), solvers.dpmpp(p)) for p in (1, 2, 3)},
}

DIFFUSERS = {
    **{f"DDIM {eta}": (D("DDIMScheduler", eta=eta), solvers.ddim(eta)) for eta in (0.0, 0.5, 1.0)},
    **{f"DEIS {p}": (D("DEISMultistepScheduler", solver_order=p), solvers.deis(p, "lam")) for p in (1, 2, 3)},
    **{
        f"UniPC {p} {rule} {stored}": (
            D("UniPCMultistepScheduler", solver_order=p, solver_type=rule, predict_x0=stored == "data"),
            solvers.unipc(p, rule, stored),
        )
        for p in (1, 2, 3)
        for rule in ("bh1", "bh2")
        for stored in ("data", "noise")
    },
}

PUBLISHED = {1: "exact", 2: "bh2", 3: "half3"}
DPM = partial(D, "DPMSolverMultistepScheduler")
DPM_SOLVER = {
    **{f"++ {p}": (DPM(solver_order=p), solvers.dpmpp(p, rule=PUBLISHED[p])) for p in (1, 2, 3)},
    **{
        f"noise {p}": (DPM(solver_order=p, algorithm_type="dpmsolver"), solvers.dpm(p, rule=PUBLISHED[p]))
        for p in (1, 2, 3)
    },
    "++ 2 heun": (DPM(solver_order=2, solver_type="heun"), solvers.dpmpp(2)),
    "sde++ 1": (DPM(solver_order=1, algorithm_type="sde-dpmsolver++"), solvers.sde_dpmpp(1)),
    "sde++ 2": (DPM(solver_order=2, algorithm_type="sde-dpmsolver++"), solvers.sde_dpmpp(2, rule="bh2")),
    "sde++ 2 heun": (
        DPM(solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="heun"),
        solvers.sde_dpmpp(2),
    ),
}


def both(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("peer", "solver"), list(table.values()), ids=list(table))


@both(K_DIFFUSION)
@pytest.mark.parametrize("end", [1e-3, 0.0])
def test_k_diffusion(peer, solver, end):
    sde = VPSDE()
    if end == 0 and solver.name == "adams":
        end = None  # see test_lms_to_zero
    assert difference(peer, solver, sde, uneven(sde, end=end)) < EXACT


def test_k_diffusion_reads_any_process_in_x_over_alpha():
    sde = EDM(0.01, 20.0)
    for peer, solver in (K_DIFFUSION["dpmpp_2m"], K_DIFFUSION["heun"], K_DIFFUSION["euler_ancestral 0.5"]):
        assert difference(peer, solver, sde, grids.karras(sde, STEPS).t) < EXACT


def test_lms_to_zero():
    """sigma/alpha has a finite polynomial up to sigma = 0: k-diffusion uses it, our last step is D. The two
    differ, and only there.
    """
    sde = VPSDE()
    t = uneven(sde, end=0.0)
    peer, solver = K_DIFFUSION["lms 3"]
    assert difference(peer, solver, sde, t) > 1e-3
    assert difference(peer, solver, sde, t[:-1]) < EXACT


@both(AZULA)
def test_azula(peer, solver):
    for sde in (VPSDE(), VPSDE(schedule=schedules.Cosine())):
        assert difference(peer, solver, sde, uneven(sde)) < EXACT


@both(DIFFUSERS)
def test_diffusers(peer, solver):
    sde = VPSDE()
    assert difference(peer, solver, sde, uneven(sde)) < EXACT


@both({
    "small": (D("DDPMScheduler"), solvers.ddpm()),
    "large": (D("DDPMScheduler", variance_type="fixed_large"), solvers.ddpm("large")),
})  # fmt: skip
def test_diffusers_ddpm(peer, solver):
    """To an end with noise, as its own last step, from timestep 0, would add none."""
    sde = VPSDE()
    assert difference(peer, solver, sde, uneven(sde)) < EXACT


@both(DPM_SOLVER)
def test_diffusers_dpm_solver(peer, solver):
    sde = VPSDE()
    assert difference(peer, solver, sde, grids.log_snr(sde, 12).t) < FLOAT32


def test_the_limits_tell_neighbours_apart():
    sde = VPSDE()
    t = uneven(sde)
    for peer, wrong in (
        (K_DIFFUSION["dpmpp_2m"][0], solvers.dpmpp(2)),
        (K_DIFFUSION["dpmpp_2m_sde heun 1.0"][0], solvers.sde_dpmpp(2, rule="bh2")),
        (DIFFUSERS["UniPC 2 bh1 data"][0], solvers.unipc(2, "bh2")),
        (DIFFUSERS["DEIS 3"][0], solvers.deis(3, "t")),
        (DPM_SOLVER["++ 3"][0], solvers.dpmpp(3)),
    ):
        assert difference(peer, wrong, sde, t) > 1e-4


# Samplers that our rows can express although no preset has exactly these weights


def test_k_diffusion_dpmpp_3m_sde():
    """Published weights (half3), but exact ones in its second step, the only one from two nodes."""
    sde = VPSDE()
    t = uneven(sde)
    for eta in (0.0, 1.0):
        half, exact = (solvers.sde_dpmpp(3, eta, rule=rule).tableau(sde, t) for rule in ("half3", "exact"))
        mix = half.mix.clone()
        mix[1] = exact.mix[1]
        assert Setting(sde, t).difference(K("dpmpp_3m_sde", eta=eta), replace(half, mix=mix)) < EXACT


MIDDLE = (Stage(0.5, (0,)), Stage(1.0, (1,)))
THIRDS = (Stage(1 / 3, (0,)), Stage(2 / 3, (0, 1)), Stage(1.0, (0, 2)))
ONE = (Stage(1.0, (0,)),)


@pytest.mark.parametrize("calls", [7, 8, 9])
def test_k_diffusion_dpm_fast(calls):
    """Singlesteps of order 3, then what is left; the last stage uses the base and the newest output
    ("dpmsolver", not "taylor").
    """
    sde = VPSDE()
    ends = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    threes, rest = divmod(calls, 3)
    orders = [3] * threes + [rest] if rest else [3] * (threes - 1) + [2, 1]
    lam = 0.5 * sde.log_snr(ends)
    edges = sde.time(2 * (lam[0] + (lam[1] - lam[0]) * torch.arange(len(orders) + 1) / len(orders)))
    parts = [
        singlestep_table(
            sde, edges[k : k + 1], edges[k + 1 : k + 2], {1: ONE, 2: MIDDLE, 3: THIRDS}[order], stored="noise"
        )
        for k, order in enumerate(orders)
    ]
    setting = Setting(
        sde, torch.linspace(1.0, 1e-3, calls + 1, dtype=torch.float64)
    )  # of which theirs uses the ends and the number
    assert setting.difference(K("dpm_fast"), join(parts)) < EXACT


def test_k_diffusion_churn():
    """EDM's algorithm 2. Raising the level is forward noise at the end of the row before, so noise i of
    theirs is noise 2 i - 1 of ours.
    """
    sde = VPSDE()
    t = uneven(sde)
    level = (sde.sigma(t) / sde.alpha(t)).tolist()
    options = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 0.99 * level[0], "s_noise": 1.007}
    setting = Setting(sde, t)
    theirs = setting.theirs(K("heun", **options), lambda k: setting.z[2 * k - 1])
    table = solvers.edm(3.0, 0.05, options["s_tmax"], 1.007).tableau(sde, t)
    assert float((theirs - setting.ours(table)).abs().max() / theirs.abs().max()) < EXACT


def test_k_diffusion_dpmpp_sde():
    """DPM-Solver++ (stochastic): midpoint on the data, one noise for the stage and one for the step; equal to
    ours when both come from one path.
    """
    sde = VPSDE()
    t = uneven(sde)
    table = singlestep_table(sde, t[:-1], t[1:], MIDDLE, stored="data", tau=1.0)
    setting = Setting(sde, t)

    def noise(request: int) -> Tensor:
        k, whole = divmod(request, 2)
        if not whole:
            return setting.z[2 * k]
        A = table.keep[2 * k + 1]
        first, second = A * table.noise[2 * k], table.noise[2 * k + 1]
        return (first * setting.z[2 * k] + second * setting.z[2 * k + 1]) / torch.hypot(first, second)

    theirs = setting.theirs(K("dpmpp_sde"), noise)
    assert float((theirs - setting.ours(table)).abs().max() / theirs.abs().max()) < EXACT


def test_diffusers_pndm():
    """PLMS: the first step is done a second time with the mean of both its slopes, then Adams-Bashforth with
    constant weights, which skips the repeated output.
    """
    sde = VPSDE()
    t = uneven(sde)
    setting = Setting(sde, t)
    assert setting.difference(D("PNDMScheduler", skip_prk_steps=True), plms(sde, t)) < EXACT


def plms(sde: LinearSDE, t: Tensor) -> Tableau:
    options = {"stored": "noise", "variable": "sigma/alpha", "rule": "adams"}
    steps = len(t) - 1
    times = torch.cat([t[:2], t[1:]])
    mix, keep = torch.zeros(steps + 1, 5, dtype=torch.float64), torch.ones(steps + 1, dtype=torch.float64)
    first = step_weights(sde, t[:1], t[1:2], t[None, :1], **options)
    keep[0], mix[0, 0] = first[0][0], first[1][0, 0]
    mix[1, 0], mix[1, 1] = first[1][0, 0] / 2, -first[1][0, 0] / 2
    for k in range(1, steps):
        row, p = k + 1, min(k + 1, 4)
        A, b, _ = step_weights(
            sde, t[k : k + 1], t[k + 1 : k + 2], t[None, list(range(k, k - p, -1))], **options
        )
        keep[row] = A[0]
        for node, weight in zip(range(k, k - p, -1), b[0], strict=True):
            mix[row, row - (node + 1 if node else 0)] = (
                weight  # output of node 1 comes from row 2, that of node 0 from row 0
            )
    alpha, sigma = sde.alpha(times[:-1]), sde.sigma(times[:-1])
    return Tableau(times, 1 / sigma, -alpha / sigma, keep, mix, torch.zeros_like(keep), "plms")


# As black boxes: the exact law of their output on Gaussian data, and their order


DATA = Gaussian(torch.tensor([0.7, -0.3]), torch.tensor([[0.5, 0.2], [0.2, 1.3]]))


def box(peer: Callable, sde: LinearSDE | None = None) -> Callable:
    """A peer as scoresde.testing takes samplers."""

    def sampler(denoise, x, times, noise):
        return peer(peers.Task(sde or VPSDE(), times, denoise, lambda k: noise()), x)

    return sampler


CERTIFIED = {
    **{f"k-diffusion {name}": case for name, case in K_DIFFUSION.items()},
    **{f"azula {name}": case for name, case in AZULA.items()},
    **{f"diffusers {name}": case for name, case in DIFFUSERS.items()},
}


@both(CERTIFIED)
def test_exact_law(peer, solver):
    sde = VPSDE()
    t = uneven(sde, 8)
    check_sampler_exact_law(box(peer), solver.tableau(sde, t).law(DATA, sde), DATA, sde, t, tolerance=EXACT)


@both(DPM_SOLVER)
def test_exact_law_of_a_sampler_in_float32(peer, solver):
    sde = VPSDE()
    t = grids.log_snr(sde, 8).t
    expected = solver.tableau(sde, t).law(DATA, sde)
    check_sampler_exact_law(box(peer), expected, DATA, sde, t, tolerance=1e-5)


def test_the_exact_law_tells_neighbours_apart():
    sde = VPSDE()
    t = uneven(sde, 8)
    for peer, wrong in (
        (K_DIFFUSION["dpmpp_2m"][0], solvers.dpmpp(2)),
        (K_DIFFUSION["dpmpp_2m_sde heun 1.0"][0], solvers.sde_dpmpp(2, rule="bh2")),
        (DIFFUSERS["UniPC 2 bh1 data"][0], solvers.unipc(2, "bh2")),
    ):
        with pytest.raises(AssertionError, match=r"of the output is the expected one: measured"):
            check_sampler_exact_law(
                box(peer), wrong.tableau(sde, t).law(DATA, sde), DATA, sde, t, tolerance=1e-5
            )


@pytest.mark.parametrize(
    ("peer", "order"),
    [
        pytest.param(K("euler"), 1, id="k-diffusion euler"),
        pytest.param(K("heun"), 2, id="k-diffusion heun"),
        pytest.param(K("dpmpp_2m"), 2, id="k-diffusion dpmpp_2m"),
        pytest.param(K("lms", order=4), 4, id="k-diffusion lms 4"),
        pytest.param(D("UniPCMultistepScheduler", solver_order=2), 3, id="diffusers UniPC 2"),
        pytest.param(A("xEABSampler", order=3), 3, id="azula xEAB 3"),
    ],
)
def test_order_of_right_code(peer, order):
    """diffusers' DEIS is not among them: its closed formulas cancel on the tiny first steps by which a
    black box builds up its history (its exact law, above, is right)."""
    check_order(box(peer), order)
    check_rotation(box(peer), VPSDE())


# Where the other is wrong


@pytest.mark.parametrize(
    ("peer", "claimed", "measured"),
    [
        pytest.param(
            K("dpmpp_3m_sde", eta=0.0),
            3,
            r"(1\.9|2\.0)",
            id="k-diffusion dpmpp_3m_sde: the second difference lacks a factor 2",
        ),
        pytest.param(A("REABSampler", order=2), 2, r"(0\.9|1\.0)", id="azula REAB 2: sigma_t for sigma_s"),
        pytest.param(A("REABSampler", order=3), 3, r"(0\.9|1\.0)", id="azula REAB 3: sigma_t for sigma_s"),
    ],
)
def test_order_of_wrong_code(peer, claimed, measured):
    with pytest.raises(AssertionError, match=rf"order {claimed}, measured {measured}"):
        check_order(box(peer), claimed)


def test_weak_order_of_wrong_code():
    """diffusers' third-order sde-dpmsolver++ has the sign of its first difference wrong; its second order has
    not, and neither has k-diffusion's third."""
    sde_dpm = partial(DPM, algorithm_type="sde-dpmsolver++")
    steps = (80, 160, 320)
    check_weak_order(
        box(sde_dpm(solver_order=2, solver_type="heun")), 2, steps=steps, rounding=1e-3, tolerance=0.3
    )
    check_weak_order(box(K("dpmpp_3m_sde", eta=1.0)), 2, steps=steps, tolerance=0.3)
    with pytest.raises(AssertionError, match=r"weak order 2, measured (0\.9|1\.0)"):
        check_weak_order(box(sde_dpm(solver_order=3)), 2, steps=steps, rounding=1e-3)
