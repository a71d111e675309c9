"""Round trips against the libraries themselves: what one side's sampler does with the other side's model is
what its own side does. They need the environment of benchmarks/peers.txt:

    peers/bin/python -m pytest tests/test_interop_peers.py
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from scoresde import EDM, VPSDE, Denoiser, grids, laws, networks, sample, solvers
from scoresde.interop import azula, diffusers, k_diffusion, under

peers = pytest.importorskip("benchmarks.peers", reason="run from the root of the repository")

F64 = torch.float64
SDE = VPSDE()
LAW = laws.Mixture([0.3, 0.7], torch.tensor([[-1.0, 0.5], [1.0, 2.0]]), torch.tensor([0.1, 0.2]))
needs_diffusers, needs_k_diffusion, needs_azula = (
    pytest.mark.skipif(peers.missing(name) is not None, reason=str(peers.missing(name)))
    for name in ("diffusers", "k-diffusion", "azula")
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- diffusers


def unet(**config: Any) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    made = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    )
    return made.eval()


@needs_diffusers
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_our_ddim_on_their_network_is_their_ddim(kind: str, schedule: str):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule=schedule, prediction_type=kind, clip_sample=False, timestep_spacing="leading"
    )
    net, x = unet(), randn(2, 1, 8, 8, dtype=torch.float32)
    model = diffusers.denoiser(net, scheduler)
    grid = grids.ddpm(model.sde, 10, spacing="leading")
    # A table of float32 betas has, in float32, another product than in float64.
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0).float()
    theirs = x
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(net(theirs, t).sample, t, theirs).prev_sample
    ours = solvers.ddim().solve(model, x, grid).x
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert grid.label[:-1].tolist() == scheduler.timesteps.tolist()
    # The configuration alone, as it stands in scheduler_config.json, is enough.
    again = diffusers.denoiser(net, dict(scheduler.config, _class_name="DDIMScheduler"))
    assert solvers.ddim().solve(again, x, grid).x.equal(ours)


@needs_diffusers
def test_our_ddim_on_their_flow_network_is_their_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    net, x = unet(), randn(2, 1, 8, 8, dtype=torch.float32)
    scheduler.set_timesteps(12)
    model = diffusers.denoiser(net, scheduler)
    theirs = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(net(theirs, t).sample, t, theirs).prev_sample
    ours = solvers.ddim().solve(model, x, scheduler.sigmas.double()).x
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_diffusers
def test_our_euler_on_their_edm_network_is_their_euler():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(12)
    net, x = unet(), 50 * randn(2, 1, 8, 8, dtype=torch.float32)
    model = diffusers.denoiser(net, scheduler)
    theirs = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(theirs, t)
            theirs = scheduler.step(net(scaled, t).sample, t, theirs).prev_sample
    sigmas = scheduler.sigmas.double()
    ours = solvers.ddim().solve(model, x, torch.cat([sigmas[:-1].clamp(0.01, 50.0), sigmas[-1:]])).x
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_diffusers
def test_class_labels_reach_their_network():
    from diffusers import DDPMScheduler

    net, label = unet(num_class_embeds=3), torch.tensor([0, 2])
    model = diffusers.denoiser(net, DDPMScheduler())
    x, t = randn(2, 1, 8, 8), torch.tensor([0.2, 0.2], dtype=F64)
    with torch.no_grad():
        expected = net(x.float(), torch.tensor([199.0, 199.0]), class_labels=label).sample
        found = model.noise(x, t, label=label)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
    drawn = sample(model, (2, 1, 8, 8), solvers.dpmpp(2), steps=3, condition={"label": label})
    assert drawn.x.isfinite().all()


def pipeline(net: Any, scheduler: Any) -> Any:
    from diffusers import DDPMPipeline

    made = DDPMPipeline(net, scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe: Any, steps: int) -> Tensor:
    drawn = pipe(batch_size=2, num_inference_steps=steps, output_type="np", generator=generator()).images
    return torch.from_numpy(drawn)


@needs_diffusers
def test_ancestral_sampling_in_their_pipeline_is_theirs():
    from diffusers import DDPMScheduler

    net, theirs = unet(), DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    ours = diffusers.scheduler(solvers.ddpm(), theirs, partial(grids.ddpm, spacing="trailing"))
    torch.testing.assert_close(
        images(pipeline(net, ours), 20), images(pipeline(net, theirs), 20), rtol=0, atol=2e-5
    )


@needs_diffusers
def test_multistep_in_their_pipeline_is_theirs():
    from diffusers import DPMSolverMultistepScheduler

    net = unet()
    theirs = DPMSolverMultistepScheduler(
        timestep_spacing="leading", final_sigmas_type="zero", lower_order_final=False, steps_offset=0
    )
    # Their grid, given as a table of ours.
    theirs.set_timesteps(12)
    t = torch.cat([(theirs.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=F64)])
    sde = VPSDE.from_betas(theirs.betas)
    ours = diffusers.scheduler(solvers.dpmpp(2, rule="bh2").tableau(sde, t), theirs)
    assert ours.sde.betas(1000).equal(sde.betas(1000))
    found = images(pipeline(net, ours), 12)
    assert ours.timesteps.long().tolist() == theirs.timesteps.tolist()
    torch.testing.assert_close(found, images(pipeline(net, theirs), 12), rtol=0, atol=2e-5)


@needs_diffusers
@pytest.mark.parametrize(
    "solver",
    [
        solvers.unipc(3),
        solvers.heun(),
        solvers.sa(2, 3),
        solvers.dpmpp(3, singlestep=True),
        solvers.restart(),
    ],
    ids=repr,
)
def test_a_saved_pipeline_keeps_the_solver(solver, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    base = DDPMScheduler(clip_sample=False)
    scheduler = diffusers.scheduler(solver, base, partial(grids.karras, rho=5.0))
    pipe = pipeline(unet(), scheduler)
    found = images(pipe, 6)
    assert 6 <= len(scheduler.timesteps) <= solver.calls(5) + 1
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert repr(again.scheduler.solver) == repr(solver)
    assert images(again, 6).equal(found)
    # Another scheduler's configuration gives ours, and ours gives another's.
    ours = type(scheduler).from_config(base.config, solver=repr(solver))
    assert repr(ours.solver) == repr(solver)
    assert DDPMScheduler.from_config(scheduler.config).betas.equal(base.betas)


@needs_diffusers
def test_it_does_in_their_pipeline_what_ddim_does():
    from diffusers import DDIMPipeline, DDIMScheduler

    net, base = unet(), DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler = diffusers.scheduler(solvers.ddim(), base, partial(grids.ddpm, spacing="leading"))
    reference = DDIMPipeline(net, base)
    reference.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(pipeline(net, scheduler), 10), images(reference, 10), rtol=0, atol=2e-5)


# ---- k-diffusion


def k_samplers() -> Any:
    return peers.k_diffusion_sampling()


@needs_k_diffusion
@pytest.mark.parametrize(
    ("name", "solver"),
    [("euler", solvers.ddim()), ("dpmpp_2m", solvers.dpmpp(2, rule="bh2")), ("heun", None), ("lms", None)],
)
def test_k_diffusion_samples_from_our_model(name: str, solver):
    model, x = LAW.denoiser(SDE), randn(16, 2)
    grid = grids.karras(SDE, 40)
    theirs = k_diffusion.model(model)
    sigmas = (-grid.lam).exp()
    assert float(sigmas[0]) == pytest.approx(theirs.sde.sigma_max)
    levels = k_samplers().get_sigmas_karras(10, theirs.sde.sigma_min, theirs.sde.sigma_max)
    assert levels[-1] == 0 and levels.dtype == torch.float32  # their own grid fits
    drawn = k_samplers().sample_euler(theirs, x / SDE.alpha(1.0), levels, disable=True)
    assert drawn.isfinite().all()
    found = getattr(k_samplers(), f"sample_{name}")(theirs, x / SDE.alpha(1.0), sigmas, disable=True)
    fine = solver is None
    run = (solvers.unipc(3) if fine else solver).solve(model, x, grids.karras(SDE, 400) if fine else grid)
    expected = run.x / SDE.alpha(run.end)
    tolerance = 0.05 if fine else 1e-9  # other methods: the same limit
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(found, expected + 2 * tolerance, rtol=0, atol=tolerance)


@needs_k_diffusion
def test_k_diffusion_s_model_in_our_samplers():
    class Wrapped(nn.Module):
        """A discrete-time network as k-diffusion wraps it: sigmas, D from noise."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sigmas", (-0.5 * VPSDE.from_betas(BETAS).log_snr(TIMES)).exp())
            self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

        def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            return LAW.denoiser(EDM())(x, sigma)

    theirs = Wrapped()
    ours = k_diffusion.denoiser(theirs)
    assert ours.sde == EDM(float(theirs.sigma_min), float(theirs.sigma_max))
    grid = grids.karras(ours.sde, 20)
    x = randn(8, 2) * ours.sde.sigma_max
    found = solvers.ddim().solve(ours, x, grid).x
    expected = k_samplers().sample_euler(theirs, x, grid.t, disable=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
TIMES = torch.arange(1, 1001, dtype=F64) / 1000


# ---- azula


@needs_azula
@pytest.mark.parametrize(
    ("name", "solver"), [("DDIMSampler", solvers.ddim()), ("DDPMSampler", solvers.ddpm())]
)
def test_azula_samples_from_our_model(name: str, solver):
    import azula.sample

    model, x, noises = LAW.denoiser(SDE), randn(16, 2), randn(12, 16, 2, seed=1)
    theirs = azula_model(model)
    sampler = getattr(azula.sample, name)(theirs, steps=12, silent=True, dtype=F64)
    rows = iter(noises)
    with mock.patch.object(torch, "randn_like", lambda x: next(rows)):
        found = sampler(x)
    t = theirs.schedule.time(sampler.timesteps)
    expected = solver.solve(model, x, t, noise=lambda k, shape: noises[k]).x
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


azula_model = azula.model


@needs_azula
def test_azula_s_network_in_our_samplers():
    import azula.denoise
    import azula.noise
    import azula.sample

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.MLP(2, hidden=16, layers=2).double()

        def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
            return self.net(x, time.expand(len(x)))

    torch.manual_seed(0)
    theirs = azula.denoise.KarrasDenoiser(Backbone(), azula.noise.VPSchedule())
    ours = azula_denoiser(theirs)
    x = randn(8, 2)
    sampler = azula.sample.DDIMSampler(theirs, steps=12, silent=True, dtype=F64)
    found = solvers.ddim().solve(ours, x, sampler.timesteps).x
    torch.testing.assert_close(found, sampler(x), rtol=1e-9, atol=1e-9)
    drawn = sample(ours, (8, 2), solvers.unipc(3), steps=8, grid=grids.karras, dtype=F64)
    assert drawn.x.isfinite().all() and drawn.end == 0
    # Under another process it is the same model.
    moved = under(ours, SDE)
    again = solvers.unipc(3).solve(moved, x, grids.log_snr(SDE, 10, 0.01)).x
    t = ours.sde.time(2 * grids.log_snr(SDE, 10, 0.01).lam)
    scale = ours.sde.alpha(t) / SDE.alpha(grids.log_snr(SDE, 10, 0.01).t)
    same = solvers.unipc(3).solve(ours, x * scale[0], t).x
    torch.testing.assert_close(again * scale[-1], same, rtol=1e-6, atol=1e-6)


azula_denoiser = azula.denoiser


@needs_azula
def test_azula_s_guidance_on_our_model():
    import azula.guidance.cfg

    class Labelled(Denoiser):
        def forward(self, x: Tensor, t: Any, label: float = 0.0) -> Tensor:
            return super().forward(x, t) + label

    model = Labelled(networks.MLP(2, hidden=8, layers=1).double(), SDE, "data")
    guided = azula.guidance.cfg.CFGDenoiser(azula_model(model))
    x, t = randn(3, 2), torch.tensor(0.5, dtype=F64)
    found = guided(x, t, {"label": 2.0}, {"label": 1.0}, guidance=0.5).mean
    torch.testing.assert_close(found, model(x, guided.schedule.time(t)) + 2.5)
