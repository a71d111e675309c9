"""Every fault that was found in other libraries, as a test that this one does not have it.

The names carry the row of the fault catalogue: A the ends of the schedule, B batch and randomness, C state
and threads, D solvers that do not end, E wrong inputs, F checkpoints and training, G and H the rest.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bad_inputs
from benchmarks.bad_inputs import NOT_FINITE, OUTPUTS, Case, judge
from benchmarks.damage import (
    X,
    differing,
    flipped_bits,
    foreign_files,
    full_disk,
    kill_9,
    losses_of,
    new_fit,
    new_model,
    random_model,
    resigned,
    same_tensors,
    stopped_and_resumed,
    truncations,
    unnoticed,
)
from scoresde import (
    DDPM,
    EDM,
    VPSDE,
    Denoiser,
    Grid,
    Rectified,
    checkpoint,
    decode,
    discretize,
    encode,
    grids,
    guidance,
    sample,
    schedules,
    solvers,
    train,
)
from scoresde.checkpoint import CheckpointError
from scoresde.denoiser import BaseDenoiser
from scoresde.laws import Gaussian
from scoresde.losses import denoising
from scoresde.networks import MLP, UNet
from scoresde.noise import BrownianPath, Noise
from scoresde.sde import LinearSDE
from scoresde.solvers.base import TableSolver
from scoresde.testing import check_order

pytestmark = pytest.mark.usefixtures("unchecked")  # it is the library's own checks that are wanted

VP = VPSDE()
F64 = torch.float64
HO = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
HO_SDE = VPSDE.from_betas(HO)


class Model(BaseDenoiser):
    """D(x, t) = function(x, t), with t shaped to x; it has no parameters and counts its calls."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], sde: LinearSDE = VP) -> None:
        super().__init__()
        self.function, self.sde, self.calls = function, sde, 0

    def forward(self, x, t):
        self.calls += 1
        return self.function(x, torch.as_tensor(t).expand(len(x)).view(-1, *[1] * (x.ndim - 1)))


def elementwise() -> Model:
    """Not linear, and made of operations that give an element the same bits in any batch."""
    return Model(lambda x, t: 0.8 * x / (1 + 0.1 * x * x))


def nan_below(time: float) -> Model:
    return Model(lambda x, t: torch.where(t < time, math.nan, 0.5 * x))


def start(batch: int, *event: int, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Noise]:
    noise = Noise.of(seed, batch=batch, dtype=dtype)
    return noise.prior((batch, *(event or (2,)))), noise


def ends(first: float = 1.0, last: float = 1e-3) -> Tensor:
    return torch.tensor([first, last], dtype=F64)


ADAPTIVE = [solvers.adaptive_ode(), solvers.adaptive_sde()]
adaptive = pytest.mark.parametrize("solver", ADAPTIVE, ids=["ode", "sde"])
TABLES = [solver for solver in solvers.examples().values() if isinstance(solver, TableSolver)]


# ---- A: numbers at the ends of the schedule


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a1_noise_of_half_precision_images_has_the_right_size(half):
    eps = torch.finfo(half).eps
    t = torch.arange(1, 1001, dtype=F64) / 1000
    _, std = HO_SDE.marginal(torch.zeros(1000, 1, dtype=half), t)
    exact = (-torch.expm1(torch.log1p(-HO).cumsum(0))).sqrt()
    assert std.dtype == half and float((std[:, 0].double() / exact - 1).abs().max()) <= 2 * eps
    wrong = (1 - torch.cumprod(1 - HO, 0).to(half)).sqrt()  # the peers' way
    assert float((wrong.double() / exact - 1).abs().max()) > 2 * eps


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a2_a_half_precision_network_does_not_round_the_tables(half):
    networks = Scaled(0.3), Scaled(0.3).to(half)
    models = [Denoiser(network, HO_SDE, "velocity", "index") for network in networks]
    full, narrow = (sample(m, (2, 3), solvers.ddim(), grid=grids.ddpm, steps=1000).x for m in models)
    assert narrow.dtype == torch.float32 and bool(narrow.isfinite().all())
    assert float((full - narrow).abs().max()) < 20 * torch.finfo(half).eps


class Scaled(nn.Module):
    """weight * x, a network of one number."""

    def __init__(self, weight: float = 0.5, change: Callable[[Tensor], object] = lambda x: x) -> None:
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.tensor(weight)), change

    def forward(self, x, time, **cond):
        return self.change(self.weight * x)


@pytest.mark.parametrize("n", range(10, 24))
def test_a3_singlestep_of_any_length_ends_at_the_data(n):
    law = Gaussian([0.7], 0.0)
    for solver in (solvers.dpm_fast(), solvers.dpm(3, True), solvers.dpmpp(3, True)):
        out = solver.tableau(VP, grids.karras(VP, n, 0.0)).law(law, VP)
        assert abs(float(out.mean) - 0.7) < 1e-12 and float(out.variance) < 1e-20


def test_a4_the_inverse_is_the_same_code_on_the_reversed_grid():
    law = Gaussian([0.5, -0.2], [0.25, 0.04])
    x = law.sample(3, generator=torch.Generator().manual_seed(0))
    for solver in (solvers.dpmpp(2), solvers.unipc(2), solvers.ddim(), solvers.heun()):
        options = {"steps": 100, "grid": grids.karras, "end": 1e-2}
        latent = encode(law.denoiser(VP), x, solver, **options)
        back = decode(law.denoiser(VP), latent, solver, **options)
        assert float((back.x - x).abs().max()) < 0.1 and float((latent.x - x).abs().max()) > 0.5
    for solver in (solvers.sde_dpmpp(2), solvers.ddpm(), solvers.adaptive_sde()):
        with pytest.raises(ValueError, match="cannot run from data to noise"):
            encode(law.denoiser(VP), x, solver, grid=grids.karras)


def test_a5_steps_are_told_apart_where_integer_timesteps_are_not():
    alpha_bar = torch.cos((torch.arange(1001, dtype=F64) / 1000 + 0.008) / 1.008 * math.pi / 2).square()
    sde = VPSDE.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))
    grid = grids.karras(sde, 20, 0.0)
    labels = (grid.t * 1000).round()
    assert len(labels.unique()) < 21 and len(grid.t.unique()) == 21  # the fault's setting, and ours
    table, law = solvers.dpmpp(2).tableau(sde, grid), Gaussian([0.3], 0.5)
    assert len(table) == 20 and float(table.law(law, sde).variance) < 1
    out = solvers.dpmpp(2).tableau(sde, grids.karras(sde, 300, 0.0)).law(law, sde)
    assert abs(float(out.mean) - 0.3) < 1e-3 and abs(float(out.variance) / 0.5 - 1) < 0.02


@pytest.mark.parametrize("spacing", [grids.karras, grids.log_snr, grids.uniform, grids.quadratic])
def test_a5b_no_two_nodes_have_the_same_noise(spacing):
    law = Gaussian([0.3], 0.5)
    for steps, end in itertools.product((15, 20, 30, 50), (None, 0.0, 1e-5)):
        grid = spacing(VP, steps, end)
        assert bool((grid.lam.diff() > 0).all())
        for solver in (solvers.dpmpp(3), solvers.sde_dpmpp(3), solvers.dpmpp(3, rule="half3")):
            out = solver.tableau(VP, grid).law(law, VP)
            assert bool(out.mean.isfinite() & out.variance.isfinite())
    with pytest.raises(ValueError, match="strictly decreasing"):
        Grid.of(VP, torch.cat([grids.karras(VP, 15).t, torch.tensor([1e-3], dtype=F64)]))


def test_a6_zero_terminal_snr():
    sde, law = Rectified(), Gaussian([0.5], 0.25)  # alpha = 0 at t = 1
    with pytest.raises(ValueError, match=r"determined.*without signal"):
        sample(Denoiser(Scaled(), sde, "noise"), (2, 3), solvers.ddim(), steps=4)
    for predicts in ("velocity", "flow", "data"):
        drawn = sample(Denoiser(Scaled(), sde, predicts), (2, 3), solvers.ddim(), steps=4)
        assert bool(drawn.x.isfinite().all())
    for solver in (solvers.ddim(), solvers.ddpm(), solvers.dpmpp(2)):
        out = solver.tableau(sde, grids.log_snr(sde, 200)).law(law, sde)
        assert abs(float(out.mean) - 0.5) < 0.01 and abs(float(out.variance) / 0.25 - 1) < 0.1
    with pytest.raises(ValueError, match="strictly between 0 and 1"):  # alpha_bar_T = 0 in a table
        VPSDE.from_betas([*HO[:-1].tolist(), 1.0])


def test_a7_sigma_keeps_its_digits():
    worst, naive = 0.0, 0.0
    for t in torch.logspace(-8, 0, 200, dtype=F64).tolist():
        B = 0.1 * t + 0.5 * 19.9 * t * t
        exact = math.sqrt(-math.expm1(-B))
        worst = max(worst, abs(float(VP.sigma(t)) / exact - 1))
        narrow = torch.tensor(-B, dtype=torch.float32).exp()
        naive = max(naive, abs(float((1 - narrow).sqrt()) / exact - 1) if t > 1e-5 else 0.0)
        assert float(VP.sigma(torch.tensor(t, dtype=torch.float32))) == float(
            VP.sigma(float(torch.tensor(t).float()))
        )
    assert worst < 4 * torch.finfo(F64).eps and naive > 1e-3


def test_a8_betas_never_exceed_one():
    for n in (*range(1, 21), 1000):
        chain = discretize(VP, n)
        assert bool(((chain.betas > 0) & (chain.betas < 1)).all())
        assert abs(float(chain.alpha_bars[-1] / VP.alpha(1.0) ** 2) - 1) < 1e-12
    for n in (1, 10, 19):
        with pytest.raises(ValueError, match=r"beta\(t\)/n < 1 .* take more steps"):
            VP.betas(n, "euler")


def test_a9_the_prior_fits_for_every_number_of_steps_or_there_is_a_warning():
    for n in (1, 10, 50, 1000):
        assert float(discretize(VP, n).alpha_bars[-1]) < 5e-5
    for n, alpha_bar in ((10, 0.90), (50, 0.60), (100, 0.36)):
        short = DDPM(torch.linspace(1e-4, 0.02, n)).sde()
        assert abs(float(short.alpha(1.0) ** 2) - alpha_bar) < 0.01
        with pytest.warns(UserWarning, match="still holds data"):
            sample(Gaussian([0.0], 1.0).denoiser(short), (1, 1), solvers.ddim(), steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sde in (VP, HO_SDE, EDM(), Rectified(), VPSDE(schedule=schedules.Cosine())):
            sample(Gaussian([0.0], 1.0).denoiser(sde), (1, 1), solvers.ddim(), steps=2)


@pytest.mark.parametrize("times", [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.5, 0.5], [1.0, 0.5, 0.7, 0.0]])
def test_a10_grids_that_do_not_fall_are_refused(times):
    model = elementwise()
    x, noise = start(2)
    for solver in (solvers.euler_maruyama(), solvers.heun(), solvers.dpmpp(2), solvers.adams(4), *ADAPTIVE):
        with pytest.raises(ValueError, match="expected strictly decreasing times"):
            solver.solve(model, x, torch.tensor(times), noise=noise)
    assert model.calls == 0


@pytest.mark.parametrize("steps", [4, 5, 9, 10, 19, 20, 49, 50])
def test_g3_every_step_ends_where_the_next_one_starts(steps):
    grid = grids.ddpm(HO_SDE, steps, spacing="linspace")
    model = replace_sde(elementwise(), HO_SDE)
    x, noise = start(2)
    for solver in (solvers.ddim(), solvers.ddim(0.7), solvers.ddpm()):
        table = solver.tableau(HO_SDE, grid)
        assert torch.equal(table.times, grid.t) and len(table) == steps
        middle = steps // 2
        first = solver.solve(model, x, grid.t[: middle + 1], noise=noise)
        second = solver.solve(model, first.x, grid.t[middle:], noise=noise.shift(middle))
        assert torch.equal(second.x, solver.solve(model, x, grid, noise=noise).x)


def replace_sde(model: Model, sde: LinearSDE) -> Model:
    model.sde = sde
    return model


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_off_by_one_n_steps_are_n_intervals(steps):
    grid = grids.uniform(VP, steps)
    assert len(grid) == steps and len(grid.t) == steps + 1
    table = solvers.euler_maruyama().tableau(VP, grid)
    dt = grid.t[:-1] - grid.t[1:]
    assert len(table) == steps and abs(float(dt.sum()) - (1 - 1e-3)) < 1e-12
    torch.testing.assert_close(table.noise, VP.diffusion(grid.t[:-1]) * dt.sqrt(), rtol=1e-13, atol=0)


def test_g1_declared_orders_are_measured_orders():
    for solver in (
        solvers.dpmpp(2),
        solvers.adams(2),
        solvers.deis(2, "lam"),
        solvers.dpmpp(3),
        solvers.heun(),
    ):
        check_order(solver)
    with pytest.raises(AssertionError):
        check_order(solvers.dpmpp(3, rule="half3"), 3)  # as published: 2


# ---- B: batch, randomness, memory format


@adaptive
def test_b1_adaptive_steps_of_a_sample_do_not_depend_on_its_mates(solver):
    x, _ = start(16, 3)
    x[1:] *= 5
    alone = solver.solve(elementwise(), x[:1], ends(), noise=Noise.of(0, [0], dtype=F64))
    together = solver.solve(elementwise(), x, ends(), noise=Noise.of(0, batch=16, dtype=F64))
    assert torch.equal(alone.x, together.x[:1])
    assert len(together.evaluations.unique()) > 1 and alone.evaluations[0] == together.evaluations[0]


def test_b2_langevin_steps_of_a_sample_do_not_depend_on_its_mates():
    solver = solvers.predictor_corrector(solvers.reverse_diffusion())
    x, noise = start(4, 3)
    large = torch.cat([x[:1], 20 * x[1:]])
    grid = grids.uniform(VP, 10)
    alone = solver.solve(elementwise(), x[:1], grid, noise=Noise.of(0, [0], dtype=F64)).x
    assert torch.equal(solver.solve(elementwise(), large, grid, noise=noise).x[:1], alone)
    coupled = solvers.predictor_corrector(solvers.reverse_diffusion(), norm="batch")
    assert not torch.equal(coupled.solve(elementwise(), large, grid, noise=noise).x[:1], alone)
    flat = Model(lambda x, t: x / VP.alpha(t))  # a score of exactly 0
    assert bool(solver.solve(flat, x, grid, noise=noise).x.isfinite().all())
    assert solver.solve(elementwise(), x[:0], grid, noise=Noise.of(0, [], dtype=F64)).x.shape == (0, 3)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "sde_dpmpp", "euler_maruyama"])
def test_b3_sample_i_is_the_same_in_every_batch(name):
    solver, model = getattr(solvers, name)(), elementwise()
    whole = sample(model, (4, 3), solver, seed=7).x
    for ids in ([0], [3, 1], [2, 2, 0], [1, 0, 3, 2]):
        assert torch.equal(sample(model, (len(ids), 3), solver, seed=7, ids=ids).x, whole[ids])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("ids", [[0, 1, 2], [0, 1, 2, 3, 4], [0]])
def test_b3b_one_id_for_each_sample(ids):
    model = elementwise()
    with pytest.raises(ValueError, match=f"expected 4 ids for batch=4, found {len(ids)}"):
        sample(model, (4, 2), solvers.ddpm(), ids=ids)
    assert model.calls == 0


def test_b4_global_randomness_is_neither_used_nor_moved():
    def no_noise(row, shape):
        raise AssertionError("a deterministic solver asked for noise")

    x, _ = start(2)
    solvers.ddim().solve(elementwise(), x, grids.uniform(VP, 5), noise=no_noise)
    torch.manual_seed(1)
    first, state = sample(elementwise(), (1, 2), solvers.ddpm()).x, torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(sample(elementwise(), (4, 2), solvers.ddpm()).x[:1], first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("few, many", [(1, 2), (15, 16), (16, 17), (1000, 1001), (3, 1000)])
def test_b5_noise_of_the_small_is_the_beginning_of_that_of_the_large(few, many):
    noise = Noise.of(3, batch=2, dtype=F64)
    small, large = noise(0, (2, few)), noise(0, (2, many))
    assert torch.equal(small, large[:, :few])
    assert torch.equal(
        Noise.of(3, batch=many, dtype=F64)(0, (many, 2))[:few], Noise.of(3, batch=few, dtype=F64)(0, (few, 2))
    )
    assert torch.equal(Noise.of(3, batch=2, dtype=torch.float32)(0, (2, many)), large.float())


def test_b6_a_brownian_path_does_not_depend_on_the_batch():
    def path(batch: int) -> BrownianPath:
        return BrownianPath(Noise.of(5, batch=batch, dtype=F64), (batch, 3), 0.0, 1.0)

    for c in (0.1, 0.7, 1.0):
        assert torch.equal(path(1)(c), path(4)(c)[:1])
    assert torch.equal(path(4)(0.7), path(4)(0.7))


@pytest.mark.parametrize(
    "make", [lambda: MLP(2, hidden=32, layers=2), lambda: UNet(1, base=8, multipliers=(1, 2), blocks=1)]
)
def test_b7_batches_of_networks_differ_by_rounding_only(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make()
        for p in network.parameters():
            p.data.normal_(0, 0.2)
    model = Denoiser(network, VP, "velocity")
    event = (2,) if isinstance(network, MLP) else (1, 8, 8)
    whole = sample(model, (64, *event), solvers.dpmpp(2), steps=5).x
    for batch in (1, 2, 3, 7, 16):
        part = sample(model, (batch, *event), solvers.dpmpp(2), steps=5).x
        assert float((part - whole[:batch]).abs().max() / whole.abs().max()) < 1e-5


def quadratic(x: Tensor, t: Tensor) -> Tensor:
    """log p(y | x) for every sample by itself, elementwise."""
    return -0.5 * (x - 1).square()[:, 0]


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.ddpm(), solvers.adaptive_ode()], ids=repr)
def test_b2b_guidance_of_a_sample_does_not_depend_on_its_mates(solver):
    model = guidance.classifier(elementwise(), quadratic, 2.0)
    x, noise = start(4, 3)
    large = torch.cat([x[:1], 20 * x[1:]])
    whole = solver.solve(model, large, grids.uniform(VP, 10), noise=noise).x
    alone = solver.solve(model, x[:1], grids.uniform(VP, 10), noise=Noise.of(0, [0], dtype=F64)).x
    assert torch.equal(alone, whole[:1])


def test_e6_memory_format_does_not_change_the_noise():
    x, noise = start(2, 3, 4, 4, dtype=torch.float32)
    grid = grids.uniform(VP, 5)
    one = solvers.ddpm().solve(elementwise(), x, grid, noise=noise).x
    other = solvers.ddpm().solve(elementwise(), x.to(memory_format=torch.channels_last), grid, noise=noise).x
    assert torch.equal(one, other)


# ---- C: state, threads, modes


@pytest.mark.parametrize(
    "name", [repr(s) for s in TABLES if s.name in ("unipc", "dpmpp", "deis", "adams", "heun")]
)
def test_c1_a_solver_runs_again_also_after_an_abort(name):
    solver, model = solvers.examples()[name], elementwise()
    first = sample(model, (2, 3), solver, steps=6).x

    def abort(step):
        if step.k == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # C1b
        sample(model, (2, 3), solver, steps=6, callback=abort)
    assert torch.equal(sample(model, (2, 3), solver, steps=6).x, first)
    assert torch.equal(sample(model, (2, 3), solver, steps=9).x, sample(model, (2, 3), solver, steps=9).x)


def test_c3_threads_share_a_solver():
    model, made = elementwise(), [solvers.unipc(), solvers.ddpm(), solvers.adaptive_ode(1e-3, 1e-3)]
    serial = [sample(model, (2, 3), solver, steps=20, seed=s).x for s, solver in enumerate(made)]
    found: list[bool] = []

    def work() -> None:
        for s, solver in enumerate(made * 3):
            drawn = sample(model, (2, 3), solver, steps=20, seed=s % len(made)).x
            found.append(torch.equal(drawn, serial[s % len(made)]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 36


def test_c5_dropout_is_off_while_sampling_and_the_modes_come_back():
    network = MLP(2, hidden=16, dropout=0.5)
    nn.init.normal_(network.out.weight)
    for layer in network.layers:
        nn.init.normal_(layer.linear2.weight)
    network.layers[1].eval()
    model = Denoiser(network, VP)
    modes = [m.training for m in model.modules()]
    draws = [sample(model, (2, 2), solvers.ddim(), steps=3).x for _ in range(2)]
    assert torch.equal(*draws) and [m.training for m in model.modules()] == modes and model.training
    with pytest.raises(FloatingPointError):
        sample(Denoiser(Scaled(math.nan).train(), VP), (2, 2), solvers.ddim(), steps=3)
    assert model.training


def test_e8_sampling_keeps_no_graph():
    model = Denoiser(Scaled(), VP)
    for solver in (solvers.dpmpp(2), solvers.ddpm(), *ADAPTIVE):
        assert torch.is_grad_enabled()
        drawn = sample(model, (2, 3), solver, steps=50)
        assert not drawn.x.requires_grad and drawn.x.grad_fn is None and torch.is_grad_enabled()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_e9_guidance_has_its_gradient_in_every_mode(around):
    model = guidance.classifier(elementwise(), quadratic, 2.0)
    expected = sample(model, (2, 3), solvers.ddim(), steps=4).x
    with around():
        drawn = sample(model, (2, 3), solvers.ddim(), steps=4).x
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, sample(elementwise(), (2, 3), solvers.ddim(), steps=4).x)


# ---- D: solvers that do not end, or hide that they failed


@pytest.mark.parametrize("what", NOT_FINITE)
def test_d1_nan_and_inf_are_named_at_the_call_they_come_from(what):
    model = Denoiser(Scaled(0.5, NOT_FINITE[what]), VP)
    for solver in (
        solvers.ddim(),
        solvers.heun(),
        solvers.dpmpp(3),
        solvers.predictor_corrector(solvers.ddim()),
    ):
        with pytest.raises(FloatingPointError, match=r"NaN or Inf at call 1.*t = 1"):
            sample(model, (2, 3), solver, steps=5)
    with pytest.raises(FloatingPointError, match=r"call 3 of 4, t = 0\.4"):
        grid = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.1], dtype=F64)
        solvers.ddim().solve(nan_below(0.45), start(2)[0], grid)

    x, _ = start(4)
    third = Model(lambda x, t: torch.where(torch.arange(4)[:, None] == 2, math.nan, x))
    with pytest.raises(FloatingPointError, match=r"call 1 of 5, t = 1; found in samples 2; check"):
        solvers.ddim().solve(third, x, grids.uniform(VP, 5))


@adaptive
def test_d2_a_score_with_noise_ends_at_the_limit(solver):
    generator = torch.Generator().manual_seed(0)
    noisy = Model(lambda x, t: 0.5 * x + torch.randn(x.shape, generator=generator, dtype=x.dtype))
    limited = replace(solver, control=replace(solver.control, rtol=1e-5, atol=1e-5, max_calls=300))
    x, noise = start(2)
    drawn = limited.solve(noisy, x, ends(), noise=noise)
    assert drawn.network_calls <= 300 and drawn.status != "ok"
    assert solver.control.max_calls <= 2000  # a limit by default


def test_d3_singular_at_the_noiseless_end():
    law = Gaussian([0.5], 0.25)
    with pytest.raises(ValueError, match=r"t=0\.0: .*without noise"):
        Denoiser(Scaled(), VP).score(torch.zeros(1, 3), 0.0)
    x, noise = start(3, 1)
    for solver in (*ADAPTIVE, solvers.scipy_ode()):
        drawn = solver.solve(law.denoiser(VP), x, ends(1.0, 0.0), noise=noise)
        assert drawn.status == "ok" and drawn.network_calls < 300 and bool(drawn.x.isfinite().all())


ENDLESS = {
    "d4 adaptive_ode": solvers.adaptive_ode(),
    "d5 adaptive_sde": solvers.adaptive_sde(),
    "d6 RK45": solvers.scipy_ode("RK45"),
    "d6 DOP853": solvers.scipy_ode("DOP853"),
    "d7 torchsde": solvers.torchsde_solver("heun", True),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_d4_d5_d6_d7_nan_ends_an_adaptive_run_at_once(name):
    x, noise = start(2)
    model = Model(lambda x, t: x * math.nan)
    drawn = ENDLESS[name].solve(model, x, ends(), noise=noise)
    assert model.calls <= 2 and "NaN" in drawn.status


@pytest.mark.parametrize("name", ENDLESS)
def test_d6b_a_run_that_got_stuck_half_way_says_so(name):
    x, noise = start(2)
    drawn = ENDLESS[name].solve(nan_below(0.6), x, ends(), noise=noise)
    assert "NaN" in drawn.status


def test_d7_nan_ends_a_fixed_run_of_torchsde():
    x, noise = start(2)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        solvers.torchsde_solver("heun").solve(nan_below(0.6), x, grids.uniform(VP, 10), noise=noise)


def test_d8_steps_below_the_resolution_of_the_clock():
    sde, law = EDM(0.002, 1000.01), Gaussian([0.0], 1.0)
    x, noise = start(2, 1, dtype=torch.float32)
    for solver in (*ADAPTIVE, solvers.euler_maruyama()):
        drawn = solver.solve(law.denoiser(sde), 1000 * x, ends(1000.01, 1000.0), noise=noise)
        assert drawn.status == "ok" and drawn.network_calls < 50
    below = 1000.0 * (1 - 2**-53)
    with pytest.raises(ValueError, match=r"float64 tells apart|strictly decreasing"):
        Grid.of(sde, torch.tensor([1000.0, below, below], dtype=F64))
    wild = Model(lambda x, t: 1e120 * x)
    assert solvers.adaptive_ode().solve(wild, x.double(), ends()).status == "step underflow"


@pytest.mark.parametrize("steps", [0, -1, math.nan])
def test_d8b_steps_of_length_zero_or_backwards(steps):
    with pytest.raises(ValueError, match="whole number of steps >= 1"):
        grids.uniform(VP, steps)
    with pytest.raises(ValueError, match="strictly decreasing"):
        solvers.torchsde_solver().solve(
            elementwise(), start(2)[0], torch.tensor([0.5, 0.5 - steps]), noise=start(2)[1]
        )


def test_d10_tolerances_and_states_that_cannot_be():
    for make in (solvers.adaptive_ode, solvers.adaptive_sde, solvers.scipy_ode):
        for rtol, atol in ((0, 0), (math.nan, 1e-3), (-1e-3, 1e-3), (1e-3, -1e-3)):
            with pytest.raises(ValueError, match="rtol"):
                make(rtol=rtol, atol=atol)
    for half in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match="float32 or float64"):
            sample(elementwise(), (2, 2), solvers.adaptive_ode(), dtype=half)


@adaptive
def test_d11_a_tolerance_that_was_not_met_is_reported(solver):
    x, noise = start(2)
    limited = replace(solver, control=replace(solver.control, max_calls=3))
    assert limited.solve(elementwise(), x, ends(), noise=noise).status == "call limit reached"


def test_h1_noise_needs_no_stack():
    path = BrownianPath(Noise.of(0, batch=1), (1, 1), 0.0, 1.0)
    x, noise = start(1, 1)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        for k in range(1, 2000):
            path(k / 2000)
        solvers.euler_maruyama().solve(elementwise(), x, grids.uniform(VP, 2000), noise=noise)
    finally:
        sys.setrecursionlimit(before)


@adaptive
def test_e12_one_bad_row_leaves_the_others_alone(solver):
    x, noise = start(4)
    x[2] = 9.0
    bad = Model(lambda x, t: torch.where(x > 5, math.nan, 0.8 * x / (1 + 0.1 * x * x)))
    drawn = solver.solve(bad, x, ends(), noise=noise)
    good = solver.solve(elementwise(), x, ends(), noise=noise)
    assert [s == "ok" for s in drawn.status] == [True, True, False, True]
    assert torch.equal(drawn.x[[0, 1, 3]], good.x[[0, 1, 3]])


def test_e4_no_samples_are_no_trouble():
    model = elementwise()
    for name, solver in solvers.examples().items():
        drawn = sample(model, (0, 3), solver, steps=4)
        assert drawn.x.shape == (0, 3) and drawn.status == "ok", name


# ---- E: wrong inputs


def test_bad_inputs_end_in_an_error_that_says_what_was_expected():
    outcomes = [judge(case) for case in bad_inputs.cases()]
    assert len(outcomes) >= 400
    unclear = [outcome for outcome in outcomes if outcome.kind != "clear"]
    assert not unclear


def test_what_is_silent_obscure_or_endless_is_not_called_clear(monkeypatch):
    monkeypatch.setattr(bad_inputs, "LIMIT", 0.05)

    def late(x):
        for _ in range(2):
            bad_inputs.Linear()(x, x)
        return VPSDE().alpha(-1.0)

    planted = {
        "silent": lambda: VPSDE().alpha(0.5),
        "hang": lambda: [None for _ in iter(int, 1)],  # without end
        "clear": lambda: VPSDE().alpha(-1.0),
    }
    assert {judge(Case(kind, call)).kind for kind, call in planted.items()} == set(planted)
    for call in (
        lambda: torch.zeros(2) @ torch.zeros(3),  # torch's own error
        lambda: math.sqrt(-1),  # a ValueError, but not ours
        lambda: late(torch.zeros(1)),  # clear, but after two network calls
    ):
        assert judge(Case("planted", call)).kind == "obscure"


@pytest.mark.parametrize(
    "what", [w for w in OUTPUTS if w not in ("a tuple", "an object", "None", "an array")]
)
def test_e1_outputs_of_another_shape_do_not_broadcast(what):
    model = Denoiser(Scaled(0.5, OUTPUTS[what]), VP)
    for solver in (solvers.ddim(), solvers.ddpm(), solvers.dpmpp(2), solvers.adaptive_ode()):
        with pytest.raises(ValueError, match=r"expected .* \(2, 3, 4, 4\), found"):
            sample(model, (2, 3, 4, 4), solver, steps=3)
    wide = Denoiser(Scaled(0.5, lambda x: x.double()), VP)
    assert sample(wide, (2, 3), solvers.dpmpp(2), steps=3).x.dtype == torch.float32


@pytest.mark.parametrize("t", [-1, -5, -1.0, -5.0])
def test_e5_negative_times_are_no_index(t):
    for sde in (VP, HO_SDE, EDM(), Rectified()):
        with pytest.raises(ValueError, match="expected times t >= 0"):
            sde.marginal(torch.zeros(2, 3), float(t))
    for i in (int(t), 0, 1001):
        with pytest.raises(ValueError, match=r"expected chain indices 1\.\.1000"):
            DDPM(HO).marginal(torch.zeros(2, 3), i)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_e5b_times_that_count_are_no_mask(dtype):
    t = torch.ones(2, dtype=dtype)
    with pytest.raises(TypeError, match="expected floating times"):
        VP.marginal(torch.zeros(2, 3), t)
    if dtype == torch.uint8:
        mean, _ = DDPM(HO).marginal(torch.ones(2, 3), t)  # an index, of any integer type
        assert mean.shape == (2, 3) and abs(float(mean[0, 0]) - math.sqrt(1 - 1e-4)) < 1e-6


@pytest.mark.parametrize("scale", [1e3, 1e38])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float32])
def test_e7_guidance_that_overflows_is_named_and_the_large_one_of_half_networks_is_finite(scale, half):
    network = Shifted().to(half)
    model = guidance.classifier_free(Denoiser(network, VP, "data"), scale, null={"shift": torch.zeros(2, 1)})
    try:
        drawn = sample(model, (2, 3), solvers.ddim(), steps=4, condition={"shift": torch.ones(2, 1)})
    except FloatingPointError as error:
        assert scale == 1e38 and "NaN or Inf" in str(error)
    else:
        assert bool(drawn.x.isfinite().all()) and drawn.x.dtype == torch.float32


class Shifted(Scaled):
    def forward(self, x, time, shift):
        return self.weight * (x + shift.to(x.dtype))


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_e10_numbers_of_steps(steps):
    model = elementwise()
    for solver in (solvers.ddim(), solvers.dpmpp(2), solvers.unipc(), solvers.adams(4)):
        with pytest.raises(ValueError, match="whole number of steps >= 1"):
            sample(model, (2, 2), solver, steps=steps)
        assert model.calls == 0
    for solver in TABLES:
        assert len(solver.tableau(VP, grids.uniform(VP, 1))) >= 1
    with pytest.raises(ValueError, match="at most 1000 steps"):
        grids.ddpm(HO_SDE, 1001)


def test_e11_integer_images_are_not_erased():
    image = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    for call in (
        lambda: VP.marginal(image, 0.5),
        lambda: DDPM(HO).marginal(image, 5),
        lambda: encode(elementwise(), image, solvers.ddim()),
        lambda: train.fit(new_model(), image.flatten(1), steps=1),
    ):
        with pytest.raises(TypeError, match=r"expected a floating|expected floating"):
            call()


def test_f10_misspelled_and_impossible_settings():
    for call in (
        lambda: VPSDE(beta_mim=0.1),  # pyright: ignore[reportCallIssue]
        lambda: solvers.dpmpp(odrer=2),  # pyright: ignore[reportCallIssue]
        lambda: train.fit(new_model(), X.float(), steps=1, learning_rate=1.0),
    ):
        with pytest.raises(TypeError, match=r"unexpected keyword argument|learning_rate"):
            call()
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            DDPM([0.1, beta])
    with pytest.raises(ValueError, match=r"beta_min|found -0\.1"):
        VPSDE(-0.1, 20.0)
    with pytest.raises(ValueError, match="expected predicts in"):
        Denoiser(Scaled(), VP, "epsilon")
    with pytest.raises(ValueError, match="expected rule"):
        VP.betas(10, "linear")


def test_a_args_ends_of_a_run_that_make_no_sense():
    for times in ([0.1, 1.0], [math.nan, 0.1], [2.0, 0.1]):
        with pytest.raises(ValueError, match="expected"):
            sample(elementwise(), (2, 2), solvers.ddim(), grid=torch.tensor(times))
    for end in (math.nan, 1.0, 2.0, -0.5):
        with pytest.raises(ValueError, match=r"expected (an end in|times t >= 0)"):
            sample(elementwise(), (2, 2), solvers.ddim(), end=end)


# ---- F: checkpoints and training


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, random_model(classes=4), ema=random_model(seed=1, classes=4))
    return path


def test_f1_a_missing_file_is_an_error_and_makes_nothing(tmp_path):
    missing = tmp_path / "no" / "such" / "file"
    for call in (
        lambda: checkpoint.load(missing),
        lambda: checkpoint.restore(missing, random_model(), random_model()),
        lambda: new_fit(resume=missing),
    ):
        with pytest.raises(CheckpointError, match=r"file: expected a checkpoint file, found none"):
            call()
    assert not list(tmp_path.iterdir())


def test_f2_renamed_keys_are_listed(saved):
    def rename(description, tensors):
        for key in list(tensors):
            kind, _, name = key.partition(".")
            tensors[f"{kind}.module.{name}"] = tensors.pop(key)

    resigned(saved, rename)
    with pytest.raises(CheckpointError, match=r"missing .*bias.* not expected module\."):
        checkpoint.load(saved)


def test_f3_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path):
    whole = new_fit(log=tmp_path / "whole")
    list(whole)
    resumed = stopped_and_resumed(tmp_path, (7, 22), tmp_path / "log")
    assert not differing(resumed, whole)
    assert losses_of(tmp_path / "log") == losses_of(tmp_path / "whole")
    assert differing(new_fit(seed=1), new_fit())


def test_f3b_a_file_without_the_state_of_training_is_not_resumed(saved):
    fresh = random_model(classes=4)
    with pytest.raises(CheckpointError, match="expected the state of a training run, found weights only"):
        checkpoint.restore(saved, fresh, fresh)
    assert same_tensors(fresh, random_model(classes=4))  # all or nothing


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_f4_a_killed_process_leaves_a_whole_file(tmp_path):
    good, files = kill_9(tmp_path / "model", 5)
    assert good == 5 and files <= 2
    checkpoint.save(tmp_path / "model", random_model())
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(os.name != "posix", reason="resource limits are POSIX")
def test_f5_a_full_disk_keeps_the_old_file(saved):
    content = saved.read_bytes()
    (line,) = full_disk(saved, (1000,))
    assert "unchanged. Free some space" in line
    assert saved.read_bytes() == content and os.listdir(saved.parent) == [saved.name]


def test_f6_damaged_and_foreign_weights_are_not_loaded(saved):
    content = saved.read_bytes()
    assert not unnoticed(saved, [b"", *truncations(content, 20)])

    def drop(description, tensors):
        tensors.pop("ema.out.bias")

    def nan(description, tensors):
        tensors["ema.out.weight"][0, 0] = math.nan

    def other(description, tensors):
        description["sde"]["schedule"]["beta_max"] = 19.0

    for change, message in ((drop, "missing out.bias"), (nan, "NaN or infinity")):
        saved.write_bytes(content)
        resigned(saved, change)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(saved)
    saved.write_bytes(content)
    resigned(saved, other)  # a change of the same shape is seen where a model is given
    assert checkpoint.load(saved).sde.schedule.beta_max == 19.0
    with pytest.raises(CheckpointError, match="expected sde"):
        checkpoint.restore(saved, random_model(classes=4), random_model(classes=4))


def test_f7_code_in_a_file_is_not_run(tmp_path):
    for file in foreign_files(tmp_path):
        with pytest.raises(CheckpointError, match="expected"):
            checkpoint.load(file)
    assert not (tmp_path / "executed").exists()
    os.system(f"touch {tmp_path / 'executed'}")  # what the trap would have done
    assert (tmp_path / "executed").exists()


def test_f8_one_flipped_bit_is_found(saved):
    assert not unnoticed(saved, flipped_bits(saved.read_bytes(), 40))
    assert unnoticed(saved, [saved.read_bytes()]) == [0]  # the good file is none of them


def test_f9_training_on_nan_ends():
    class Rotten(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, time):
            return self.linear(x) * math.nan

    run = train.fit(Denoiser(Rotten(), VP), X.float(), steps=50, batch_size=8, patience=5, every=1)
    with pytest.raises(FloatingPointError, match="5 steps in a row"):
        list(run)
    assert run.step == 5 and all(bool(p.isfinite().all()) for p in run.model.parameters())
    x0, t = torch.zeros(2, 2), torch.full((2,), math.nan)
    with pytest.raises(ValueError, match="expected times"):
        denoising(run.model, x0, x0, t)
