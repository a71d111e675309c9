"""Models and samplers of other libraries as ours and ours as theirs, by their conventions: with stand-ins of
the same interface, whose outputs are worked out here from those conventions. (test_interop_peers.py runs the
libraries themselves, in the environment of benchmarks/peers.txt.)
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import stand_in_diffusers
import torch
from torch import Tensor, nn

from scoresde import EDM, VESDE, VPSDE, Denoiser, Rectified, grids, laws, networks, sample, solvers
from scoresde.denoiser import BaseDenoiser
from scoresde.interop import azula, diffusers, k_diffusion, under
from scoresde.schedules import Cosine
from scoresde.solvers.base import execute

F64 = torch.float64
N = 1000
BETAS = torch.linspace(1e-4, 0.02, N, dtype=F64)
MEAN, VARIANCE = 0.7, 0.25


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def exact(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x_t] of normal data."""
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


# ---- one denoiser, another process


PROCESSES = [VPSDE(), EDM(0.01, 60.0), VESDE(0.01, 50.0), VPSDE(schedule=Cosine())]


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_a_denoiser_under_another_process_is_that_process_own(sde, device, dtype):
    law = laws.Gaussian(torch.full((3,), MEAN), VARIANCE)
    model = law.denoiser(VPSDE.from_betas(BETAS)).to(device)
    moved, own = under(model, sde), law.denoiser(sde).to(device)
    assert moved.sde is sde and (moved.device, moved.dtype) == (model.device, model.dtype)
    t = sde.time(torch.tensor([9.0, 2.0, 0.1, -6.0], dtype=F64))
    x = randn(4, 3).to(device, dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == F64 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(moved(x, t.to(device)), own(x, t.to(device)), **tolerance)
    rows = moved.rows(t, x)
    for k in range(4):
        found = rows.a[k] * x + rows.b[k] * rows.evaluate(x, k)
        torch.testing.assert_close(found, own(x, t[k]), **tolerance)


def test_a_run_under_another_process_is_the_same_run():
    """Exponential solvers depend on lam only, and commute with scaling."""
    law = laws.Mixture([0.3, 0.7], torch.tensor([[-1.0, 0.5], [1.0, 2.0]]), torch.tensor([0.1, 0.2]))
    sde = VPSDE()
    model, x = law.denoiser(sde), randn(5, 2)
    grid = grids.quadratic(sde, 8)
    level = (-grid.lam).exp()
    other = k_diffusion.model(model)
    for solver in (solvers.unipc(3), solvers.dpmpp(2), solvers.ddim()):
        ours = solver.solve(model, x, grid).x
        theirs = solver.solve(other, x / sde.alpha(grid.t[0]), level).x
        torch.testing.assert_close(theirs * sde.alpha(grid.t[-1]), ours, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_rows_of_a_network_under_another_process(predicts: str):
    model = Denoiser(networks.MLP(2, hidden=8, layers=1).double(), VPSDE(), predicts)
    moved, x, t = under(model, EDM(0.01, 60.0)), randn(4, 2), torch.tensor([50.0, 2.0, 0.02], dtype=F64)
    rows = moved.rows(t, x)
    for k in range(3):
        found = rows.a[k] * x + rows.b[k] * rows.evaluate(x, k)
        torch.testing.assert_close(found, moved(x, t[k]), rtol=1e-9, atol=1e-9)


def test_levels_that_the_model_does_not_have_are_refused(unchecked):
    model = laws.Gaussian(torch.zeros(2), 1.0).denoiser(VPSDE())  # sigma/alpha up to 152
    other = under(model, EDM(0.002, 200.0))
    other(randn(3, 2), 150.0)
    with pytest.raises(ValueError, match=r"expected noise levels .* \[0, 152.\d+\].* found 160"):
        other(randn(3, 2), torch.tensor([1.0, 160.0, 1.0]))
    with pytest.raises(ValueError, match=r"found 0\.001"):
        narrow = under(laws.Gaussian(torch.zeros(2), 1.0).denoiser(EDM()), VPSDE())
        narrow(randn(3, 2), VPSDE().time(-2 * math.log(1e-3)))
    with pytest.raises(TypeError, match="expected a denoiser"):
        under(nn.Identity(), EDM())


def test_conditions_and_their_rows_reach_the_model():
    class Shifted(BaseDenoiser):
        sde = VPSDE()

        def forward(self, x: Tensor, t: Any, shift: Any = 0.0) -> Tensor:
            return x + torch.as_tensor(shift).to(x)[:, None]

    model, x, shift = Shifted(), randn(4, 2), torch.arange(4.0, dtype=F64)
    moved = under(model, EDM()).given(shift=shift)
    factor = model.sde.alpha(model.sde.time(-2 * math.log(3.0)))
    torch.testing.assert_close(moved(x, 3.0), factor * x + shift[:, None])
    torch.testing.assert_close(moved.narrowed(slice(1, 3), 4)(x[1:3], 3.0), moved(x, 3.0)[1:3])
    torch.testing.assert_close(moved.rows(torch.tensor([3.0]), x).evaluate(x, 0), moved(x, 3.0))


# ---- diffusers: a network and the configuration of a scheduler


class Output:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class Net(nn.Module):
    """A network with diffusers' interface that knows the answer at every label."""

    def __init__(self, rule: Any, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.rule, self.weight, self.labels = rule, nn.Parameter(torch.ones((), dtype=dtype)), []

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Output:
        assert isinstance(timestep, Tensor) and x.dtype == self.weight.dtype
        self.labels += timestep.flatten().tolist()
        label = timestep.expand(len(x)).double().view(-1, *[1] * (x.ndim - 1))
        shift = 0 if class_labels is None else class_labels.view_as(label)
        return Output((self.rule(x.double(), label) + shift).to(x.dtype))


def stub(name: str, betas: Tensor | None = None, **config: Any) -> Any:
    """A scheduler as far as its configuration goes."""
    made = type(name, (), {})()
    made.config = {"num_train_timesteps": N, **config}
    if betas is not None:
        made.betas = betas
    return made


def from_table(kind: str) -> Any:
    alpha_bars = (1 - BETAS).cumprod(0)

    def rule(x: Tensor, label: Tensor) -> Tensor:
        assert (label - label.round()).abs().max() < 1e-4, label
        bar = alpha_bars[label.round().long()]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        data = exact(x, alpha, sigma)
        noise = (x - alpha * data) / sigma
        return {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data}[kind]

    return rule


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_network_of_a_table(kind: str):
    net = Net(from_table(kind))
    model = diffusers.denoiser(net, stub("DDIMScheduler", BETAS, prediction_type=kind, clip_sample=True))
    t = torch.tensor([1, 2, 37, 500, 1000], dtype=F64) / N
    x = 5 * randn(5, 1, 2, 2)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in (model.sde.alpha(t), model.sde.sigma(t)))
    torch.testing.assert_close(model(x, t), exact(x, alpha, sigma), rtol=1e-8, atol=1e-8)
    assert net.labels == [0, 1, 36, 499, 999]
    assert model.sde.betas(N).sub(BETAS).abs().max() < 1e-12
    net.rule = lambda x, label: x
    net.labels.clear()
    model(x[:3], torch.tensor([1e-5, 0.0105, 1.0], dtype=F64))
    assert net.labels == pytest.approx([0, 9.5, 999])  # no label below the first index


def test_a_network_of_flow_matching():
    net = Net(lambda x, label: (x - exact(x, 1 - label / N, label / N)) / (label / N))
    for scheduler in (
        stub("FlowMatchEulerDiscreteScheduler", shift=3.0),
        stub("DPMSolverMultistepScheduler", BETAS, prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        model = diffusers.denoiser(net, scheduler)
        assert isinstance(model.sde, Rectified)
        x, t = randn(3, 1, 2, 2), torch.tensor([0.003, 0.5, 0.999], dtype=F64)
        s = t.view(-1, 1, 1, 1)
        torch.testing.assert_close(model(x, t), exact(x, 1 - s, s), rtol=1e-5, atol=1e-5)


def test_a_network_of_edm():
    std = 0.6

    def rule(scaled: Tensor, label: Tensor) -> Tensor:
        sigma = (4 * label).exp()
        root = (sigma**2 + std**2).sqrt()
        x = scaled * root
        return (exact(x, torch.ones_like(sigma), sigma) - std**2 / root**2 * x) / (sigma * std / root)

    config = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": std, "prediction_type": "epsilon"}
    scheduler = stub("EDMEulerScheduler", **config)
    model = diffusers.denoiser(Net(rule), scheduler)
    assert model.sde == EDM(0.01, 50.0)
    x, sigma = randn(3, 1, 2, 2), torch.tensor([0.01, 1.0, 50.0], dtype=F64)
    expected = exact(x, torch.ones(()), sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(model(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_a_network_of_score_sde_ve():
    def rule(x: Tensor, sigma: Tensor) -> Tensor:
        return (exact(x, torch.ones_like(sigma), sigma) - x) / sigma**2

    model = diffusers.denoiser(Net(rule), stub("ScoreSdeVeScheduler", sigma_min=0.01, sigma_max=100.0))
    assert model.sde == VESDE(0.01, 100.0)
    x, t = randn(3, 1, 2, 2), torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    expected = exact(x, torch.ones(()), model.sde.sigma(t).view(-1, 1, 1, 1))
    torch.testing.assert_close(model(x, t), expected, rtol=1e-3, atol=1e-3)


def test_labels_dtypes_outputs_and_learned_variances():
    net = Net(lambda x, label: torch.zeros_like(x), torch.float32)
    model = diffusers.denoiser(net, stub("DDPMScheduler", BETAS, prediction_type="sample"))
    x, label = randn(3, 2, 2, 2), torch.tensor([1, 2, 3])
    for name in ("label", "class_labels"):
        found = model(x, 0.5, **{name: label})  # float64 in and out, a float32 network
        assert found.dtype == F64 and found[:, 0, 0, 0].tolist() == [1, 2, 3]
    drawn = sample(model, (3, 2, 2, 2), solvers.ddim(), steps=3, condition={"label": label})
    assert drawn.x.dtype == torch.float32

    class Pair(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (torch.cat([x, 100 + x], 1),)

    model = diffusers.denoiser(Pair(), stub("DDPMScheduler", BETAS, prediction_type="sample"))
    torch.testing.assert_close(model(x.float(), 0.5), x.float())


def test_products_that_are_not_those_of_the_betas_count():
    """Some schedulers shift the signal-to-noise ratio there, or take the last signal away."""
    bars = (1 - BETAS.double()).cumprod(0)
    shifted = bars / (3 + (1 - 3) * bars)
    scheduler = stub("CogVideoXDDIMScheduler", BETAS)
    scheduler.alphas_cumprod = bars.float()
    wanted = VPSDE.from_betas(BETAS.double())
    t = torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(
        diffusers.convention(scheduler).sde.alpha(t), wanted.alpha(t), rtol=1e-12, atol=0
    )
    scheduler.alphas_cumprod = shifted.float()
    k = (t * len(BETAS)).round().long() - 1
    found = diffusers.convention(scheduler).sde.alpha((k + 1) / len(BETAS)) ** 2
    torch.testing.assert_close(found, shifted[k], rtol=1e-5, atol=0)
    scheduler.alphas_cumprod[-1] = 0
    with pytest.raises(ValueError, match="rescale_betas_zero_snr no signal is left"):
        diffusers.convention(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (stub("LCMScheduler", BETAS, prediction_type="other"), "LCMScheduler with prediction_type='other'"),
        (stub("RePaintScheduler"), "expected a scheduler with betas"),
        (stub("EulerDiscreteScheduler", BETAS, timestep_type="continuous"), "wrap the network by hand"),
        (stub("DDIMScheduler", torch.tensor([0.1, 1.0])), "rescale_betas_zero_snr"),
        (stub("EDMEulerScheduler", prediction_type="v_prediction"), "prediction_type='v_prediction'"),
        (
            stub("FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
            "fall with the timesteps, found invert",
        ),
    ],
)
def test_other_conventions_are_refused(scheduler, words: str):
    with pytest.raises(ValueError, match=words):
        diffusers.denoiser(Net(lambda x, label: x), scheduler)


# ---- diffusers: our solvers as a scheduler


@pytest.fixture(scope="module")
def scheduling():
    """The module scoresde.interop.scheduler, on diffusers or on the stand-in."""
    absent = importlib.util.find_spec("diffusers") is None
    made = stand_in_diffusers.modules() if absent else {}
    sys.modules.update(made)
    import scoresde.interop.scheduler as module

    yield module
    if absent:
        for name in (*made, module.__name__):
            del sys.modules[name]
        del sys.modules["scoresde.interop"].scheduler


class Smooth(nn.Module):
    """A nonlinear network with diffusers' interface."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.8, dtype=dtype))

    def forward(self, x: Tensor, timestep: Tensor) -> Output:
        label = timestep.expand(len(x)).view(-1, *[1] * (x.ndim - 1)).to(x)
        return Output(self.weight * torch.tanh(x + torch.cos(label / 300)))


def through(scheduler: Any, net: nn.Module, x: Tensor, steps: int, generator: Any = None) -> Tensor:
    """What a pipeline does."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


FIXED = [
    solvers.ddim(),
    solvers.ddpm(),
    solvers.euler_maruyama(),
    solvers.dpmpp(3),
    solvers.unipc(3),
    solvers.heun(),
    solvers.dpm(3, singlestep=True),
    solvers.sa(2, 3),
    solvers.edm(),
    solvers.restart(),
]


# Flow matching starts without signal, where rates in t are infinite and noise says nothing of the data.
KINDS = {"epsilon": FIXED, "flow_prediction": FIXED[:2] + FIXED[3:5] + [solvers.sa(2, 3)]}


@pytest.mark.parametrize(("kind", "solver"), [(kind, s) for kind, listed in KINDS.items() for s in listed])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_scheduler_does_what_the_solver_does(scheduling, solver, kind: str, dtype, unchecked):
    like = stub("DDPMScheduler", BETAS.float(), prediction_type=kind, beta_start=1e-4, beta_end=0.02)
    scheduler = diffusers.scheduler(solver, like, partial(grids.karras, rho=5.0))
    net = Smooth(dtype)
    x, generator = randn(3, 2, 2, 2, dtype=dtype), torch.Generator()
    found = through(scheduler, net, x, 6, generator.manual_seed(1))
    table = solver.tableau(scheduler.sde, scheduler._times(6))
    assert len(scheduler.timesteps) == len(table) == scheduler.step_index
    wide = torch.promote_types(dtype, torch.float32)
    generator.manual_seed(1)
    expected = execute(
        table,
        diffusers.denoiser(net, scheduler),
        x.to(wide),
        noise=lambda k, shape: torch.randn(shape, generator=generator, dtype=wide),
    )
    assert found.dtype == dtype
    # Labels are float32 in diffusers.
    tolerance = 0 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(found, expected.x, rtol=tolerance, atol=tolerance)


def test_a_run_begins_with_set_timesteps_and_ends(scheduling, unchecked):
    scheduler = scheduling.TableauScheduler(solver="dpmpp(order=3)")
    net, x = Smooth(F64), randn(2, 1, 2, 2)
    assert scheduler.step_index is None and len(scheduler) == len(scheduler.timesteps) == N
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(x, 999, x)
    first = through(scheduler, net, x, 5)
    with pytest.raises(ValueError, match="expected at most 5 steps, the calls of dpmpp"):
        scheduler.step(x, 0, x)
    through(scheduler, net, 2 * x, 3)
    assert through(scheduler, net, x, 5).equal(first)  # nothing is left of other runs
    scheduler.set_timesteps(5)
    (after,) = scheduler.step(net(x, scheduler.timesteps[0]).sample, None, x, return_dict=False)
    assert after.shape == x.shape and scheduler.step_index == 1


def test_grids_of_the_scheduler_end_with_the_data(scheduling, unchecked):
    scheduler = scheduling.TableauScheduler(grid="log_snr", num_train_timesteps=500)
    t = scheduler._times(4)
    inner = grids.log_snr(scheduler.sde, 3, 1 / 500).t
    assert t[:-1].equal(inner) and t[-1] == 0
    assert scheduler._times(1).tolist() == [1, 0]
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps[[0, -1]].tolist() == [499, 0]
    chain = scheduling.TableauScheduler(grid="ddpm(spacing='leading')")
    chain.set_timesteps(10)
    assert chain.timesteps.tolist() == list(range(900, -1, -100))
    flow = scheduling.TableauScheduler(prediction_type="flow_prediction")
    flow.set_timesteps(4)
    assert flow.timesteps[[0, -1]].tolist() == [1000, 1]


def test_samples_in_half_precision_keep_an_exact_state(scheduling, unchecked):
    scheduler = scheduling.TableauScheduler(solver="ddim()", prediction_type="sample")
    x = randn(64, 1, 2, 2, dtype=torch.bfloat16)
    net = Smooth(F64)

    class Cast(nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Output:
            return Output(net(y.double(), t).sample)

    precise = through(scheduler, Cast(), x.double(), 50)
    half = through(scheduler, Cast(), x, 50)
    assert half.dtype == torch.bfloat16
    # The network sees rounded states; they are not rounded on top of one another.
    assert (half.double() - precise).abs().max() < 0.02
    scaled = []
    for state in (x, x.double()):
        scheduler.set_timesteps(50)
        for _ in range(40):
            state = scheduler.step(torch.zeros_like(state), None, state).prev_sample
        scaled.append(state.double())
    torch.testing.assert_close(*scaled, rtol=2**-8, atol=0)  # rounded once, and not 40 times
    after = []
    for change in (0, 1, 2):  # a state that the pipeline has changed counts
        scheduler.set_timesteps(4)
        first = scheduler.step(torch.zeros_like(x), None, x).prev_sample
        first = first + 1 if change == 1 else first.add_(change)  # another tensor, or in place
        after.append(scheduler.step(torch.zeros_like(x), None, first).prev_sample)
    keep = scheduler._run.numbers.rows[1].keep
    for change in (1, 2):
        moved = torch.full_like(x, change * keep)
        torch.testing.assert_close(after[change] - after[0], moved, rtol=0.02, atol=0.03)
    scheduler.set_timesteps(np.int64(4))
    for steps in (0, -3, 2.0):
        with pytest.raises(ValueError, match="whole number of steps >= 1 as num_inference_steps"):
            scheduler.set_timesteps(steps)


def test_a_table_as_a_scheduler(scheduling, tmp_path, unchecked):
    sde = VPSDE.from_betas(BETAS)
    table = solvers.unipc(2).tableau(sde, grids.quadratic(sde, 6))
    times = table.times.clone()
    times[0] = 0.9
    table = replace(table, times=times, start=sde.t_max)
    like = stub("DDPMScheduler", BETAS, prediction_type="epsilon", trained_betas=BETAS.tolist())
    scheduler = diffusers.scheduler(table, like)
    net, x = Smooth(F64), randn(2, 1, 2, 2)
    found = through(scheduler, net, x, 6)
    expected = execute(table, diffusers.denoiser(net, scheduler), x).x
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected num_inference_steps=6, the calls of the table unipc"):
        scheduler.set_timesteps(7)
    scheduler.save_pretrained(tmp_path)
    again = scheduling.TableauScheduler.from_pretrained(tmp_path)
    assert through(again, net, x, 6).equal(found)
    with pytest.raises(ValueError, match="expected a solver of one call a step to begin at entry 2"):
        again.set_begin_index(2)


def test_the_table_of_betas_is_taken_over(scheduling, unchecked):
    betas = torch.linspace(2e-4, 0.04, 500).tolist()
    like = stub("DDPMScheduler", torch.tensor(betas), trained_betas=betas, prediction_type="epsilon")
    like.config["num_train_timesteps"] = 500
    scheduler = diffusers.scheduler(solvers.ddim(), like)
    assert len(scheduler) == 500 and scheduler.betas.tolist() == pytest.approx(betas)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[[0, -1]].tolist() == [499, 0]


def test_a_scheduler_is_saved_by_name(scheduling, tmp_path, unchecked):
    grid = partial(grids.blend, one=grids.karras, other=partial(grids.power, exponent=3.0), weight=0.2)
    like = stub("DDPMScheduler", BETAS, prediction_type="v_prediction", beta_end=0.03)
    scheduler = diffusers.scheduler(solvers.exponential(4, corrector=5), like, grid)
    scheduler.save_pretrained(tmp_path)
    again = scheduling.TableauScheduler.from_pretrained(tmp_path)
    assert again.predicts.name == "velocity" and float(again.betas[-1]) == pytest.approx(0.03)
    net, x = Smooth(F64), randn(2, 1, 2, 2)
    assert through(again, net, x, 7).equal(through(scheduler, net, x, 7))


def test_beginning_in_the_middle(scheduling, unchecked):
    scheduler = scheduling.TableauScheduler(solver="dpmpp(order=2)")
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    scheduler.set_begin_index(5)
    x, eps, net = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1), Smooth(F64)
    start = scheduler.add_noise(x, eps, scheduler.timesteps[5].expand(2))
    t = scheduler._times(8)[5:]
    sde = scheduler.sde
    torch.testing.assert_close(start, sde.alpha(t[0]) * x + sde.sigma(t[0]) * eps, rtol=1e-6, atol=1e-6)
    y = start
    for label in scheduler.timesteps[5:]:
        y = scheduler.step(net(y, label).sample, label, y).prev_sample
    expected = execute(solvers.dpmpp(2).tableau(sde, t), diffusers.denoiser(net, scheduler), start).x
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    heun = scheduling.TableauScheduler(solver="heun()")
    heun.set_timesteps(4)
    with pytest.raises(ValueError, match="one call a step"):
        heun.set_begin_index(2)


def test_what_no_scheduler_can_be_made_of(scheduling, unchecked):
    like = stub("DDPMScheduler", BETAS, prediction_type="epsilon")
    for solver in (solvers.adaptive_ode(), solvers.predictor_corrector(solvers.ddpm()), solvers.scipy_ode()):
        with pytest.raises(ValueError, match=r"expected a fixed-grid solver, found .*timesteps in advance"):
            diffusers.scheduler(solver, like)
    made = solvers.sa(2, 3, tau=lambda lam: torch.ones_like(lam))
    with pytest.raises(ValueError, match=r"that a configuration can name.*pass the table"):
        diffusers.scheduler(made, like)
    with pytest.raises(ValueError, match="that a configuration can name"):
        diffusers.scheduler(solvers.ddim(), like, lambda sde, steps, end=None: grids.uniform(sde, steps, end))
    with pytest.raises(ValueError, match="expected a scheduler with betas, or of flow matching"):
        diffusers.scheduler(solvers.ddim(), stub("ScoreSdeVeScheduler", sigma_min=0.01, sigma_max=9.0))
    with pytest.raises(ValueError, match="expected a solver from"):
        scheduling.TableauScheduler(solver="os")


# ---- k-diffusion


def test_a_k_diffusion_model_is_a_denoiser_of_edm():
    seen = []

    def model(x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
        seen.append(sigma)
        return exact(x, torch.ones(()), sigma[:, None]) + shift

    ours = k_diffusion.denoiser(model, 0.01, 80.0)
    assert ours.sde == EDM(0.01, 80.0)
    x = randn(3, 2, dtype=torch.float32)
    torch.testing.assert_close(ours(x, 2.0, shift=1.0), exact(x, torch.ones(()), torch.tensor(2.0)) + 1)
    assert seen[0].tolist() == [2, 2, 2]
    model.sigma_min, model.sigma_max = torch.tensor(0.03), 14.0
    assert k_diffusion.denoiser(model).sde == EDM(float(torch.tensor(0.03)), 14.0)
    del model.sigma_max
    with pytest.raises(ValueError, match="expected a model with sigma_min and sigma_max"):
        k_diffusion.denoiser(model)


def test_there_and_back():
    sde = VPSDE()
    model = Denoiser(networks.MLP(2, hidden=8, layers=1).double(), sde, "velocity")
    theirs = k_diffusion.model(model)
    back = under(k_diffusion.denoiser(theirs, theirs.sde.sigma_min, theirs.sde.sigma_max), sde)
    x, t = randn(4, 2), torch.tensor([0.01, 0.3, 0.7, 1.0], dtype=F64)
    torch.testing.assert_close(back(x, t), model(x, t), rtol=1e-10, atol=1e-10)
    assert theirs.sde.sigma_max == pytest.approx(float(sde.sigma(1.0) / sde.alpha(1.0)))
    assert theirs.sde.sigma_min == pytest.approx(float(sde.sigma(1e-3) / sde.alpha(1e-3)))
    with pytest.raises(ValueError, match="found none at t = 1"):
        k_diffusion.model(Denoiser(networks.MLP(2, hidden=8, layers=1), Rectified(), "flow"))


@pytest.mark.parametrize(
    "sde", [VPSDE(0.1, most) for most in (15.0, 18.0, 20.0)] + [EDM(0.002, 80.0)], ids=repr
)
def test_levels_in_float32_are_within_the_range(sde):
    """As `get_sigmas_karras` makes them of `sigma_min` and `sigma_max`, a rounding beyond."""
    theirs = k_diffusion.model(laws.Gaussian(torch.zeros(2), 1.0).denoiser(sde))
    for end in (theirs.sde.sigma_min, theirs.sde.sigma_max):
        for factor in (1 - 1.2e-7, 1 + 1.2e-7):
            assert theirs(randn(3, 2), torch.full((3,), end * factor, dtype=F64)).isfinite().all()
    if sde != theirs.sde:
        with pytest.raises(ValueError, match="expected noise levels"):
            theirs(randn(3, 2), theirs.sde.sigma_max * (1 + 1e-5))


# ---- azula


class Cosines:
    """azula's interface of a schedule."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.cos(math.acos(1e-3) * t)
        return alpha, torch.sqrt(1 - alpha**2 + 1e-6)


class Posterior(types.SimpleNamespace):
    mean: Tensor


class Model(nn.Module):
    """azula's interface of a denoiser, on normal data."""

    schedule = Cosines()

    def forward(self, x_t: Tensor, t: Tensor, shift: float = 0.0) -> Posterior:
        alpha, sigma = (v.view(-1, *[1] * (x_t.ndim - 1)) for v in self.schedule(t))
        return Posterior(mean=exact(x_t, alpha, sigma) + shift)


def test_an_azula_denoiser_is_one_on_its_own_clock():
    ours, x = azula.denoiser(Model()), randn(3, 2)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    alpha, sigma = Cosines()(t)
    torch.testing.assert_close(ours(x, t, shift=2.0), exact(x, alpha[:, None], sigma[:, None]) + 2)
    assert ours(x.float(), 0.5).dtype == torch.float32
    with pytest.raises(TypeError, match="azula denoiser with a schedule"):
        azula.denoiser(nn.Identity())
    law = laws.Gaussian(torch.full((2,), MEAN), VARIANCE)
    x = randn(4, 2)
    grid = grids.log_snr(VPSDE(), 6, 1e-3)
    found = solvers.unipc(2).solve(under(ours, VPSDE()), x, grid).x
    expected = solvers.unipc(2).solve(law.denoiser(VPSDE()), x, grid).x
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_process_of_a_schedule():
    sde = azula.Scheduled(Cosines())
    t = torch.tensor([0.0, 1e-3, 0.4, 0.999, 1.0], dtype=F64)
    # At t = 0 the digits are lost in the schedule: sigma^2 = 1 - alpha^2 + 1e-6.
    torch.testing.assert_close(sde.time(sde.log_snr(t)), t, rtol=0, atol=1e-7)
    with torch.no_grad():
        f, g2 = sde.rates(t[1:-1])
    h, inner = 1e-6, t[1:-1]
    slope = (sde.alpha(inner + h).log() - sde.alpha(inner - h).log()) / (2 * h)
    variance = (sde.sigma(inner + h) ** 2 - sde.sigma(inner - h) ** 2) / (2 * h)
    torch.testing.assert_close(f, slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(g2, variance - 2 * slope * sde.sigma(inner) ** 2, rtol=1e-6, atol=1e-6)
    assert sde.prior_std == float(sde.sigma(1.0)) and sde.default_end == 0
    exploding = azula.Scheduled(lambda t: (torch.ones_like(t), 0.01 * 5000**t))
    assert exploding.prior_std == pytest.approx(50.0)
    a, std = sde.transition(0.2, 0.7)
    torch.testing.assert_close(std**2, sde.sigma(0.7) ** 2 - a**2 * sde.sigma(0.2) ** 2)
    with pytest.raises(ValueError, match=r"expected a schedule with 0 <= sigma\(0\) < sigma\(1\)"):
        azula.Scheduled(lambda t: (t, 1 - t))


def test_ours_on_azula_s_clock(monkeypatch):
    package, module = types.ModuleType("azula"), types.ModuleType("azula.denoise")
    module.DiracPosterior = Posterior
    monkeypatch.setitem(sys.modules, "azula", package)
    monkeypatch.setitem(sys.modules, "azula.denoise", module)
    sde = EDM(0.01, 20.0)
    model = laws.Gaussian(torch.full((2,), MEAN), VARIANCE).denoiser(sde)
    theirs, x = azula.model(model, end=0.02), randn(3, 2)
    for t, sigma in ((0.0, 0.02), (0.5, 10.01), (1.0, 20.0)):
        alpha, found = theirs.schedule(torch.tensor(t))
        assert (alpha.item(), found.item(), found.dtype) == (1, pytest.approx(sigma), torch.float32)
        torch.testing.assert_close(theirs(x, torch.tensor(t, dtype=F64)).mean, model(x, sigma))
    back = azula.denoiser(theirs)
    assert float(back.sde.sigma(1.0)) == 20.0
    torch.testing.assert_close(back(x, 0.5), model(x, 10.01))
    flow = laws.Gaussian(torch.full((2,), MEAN), VARIANCE).denoiser(Rectified())
    with pytest.raises(ValueError, match=r"signal at the start, found none at t = 1\.0; pass start"):
        azula.model(flow)
    later = azula.model(flow, end=0.25, start=0.75)
    for t, own in ((0.0, 0.25), (1.0, 0.75)):
        torch.testing.assert_close(later(x, torch.tensor(t, dtype=F64)).mean, flow(x, own))
