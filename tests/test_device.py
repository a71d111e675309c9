"""A GPU gives what the CPU gives, to rounding, from the same seeds; and no step of a solver waits for it.

What the other tests show on one device (they take --device) these carry over to another, for every solver and
the public functions around them, whatever the options. That nothing goes to the device or comes from it
between two steps is seen without a GPU too, on tensors that have no data.
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scoresde import (
    EDM,
    VPSDE,
    BaseDenoiser,
    Denoiser,
    Rectified,
    checkpoint,
    decode,
    encode,
    grids,
    guidance,
    laws,
    likelihood,
    networks,
    sample,
    select,
    solvers,
    train,
)
from scoresde.noise import Noise
from scoresde.schedules import Learned
from scoresde.sde import like
from scoresde.solvers.watch import Outputs, States

pytestmark = pytest.mark.usefixtures("unchecked")
on_gpu = pytest.mark.cuda

GPU, META = torch.device("cuda"), torch.device("meta")
F64 = torch.float64
VP = VPSDE()
SOLVERS = solvers.examples()
# torchsde keeps its Brownian motion on the CPU
FIXED = [name for name, one in SOLVERS.items() if one.steps_for(1000) > 1 and "torchsde" not in name]
MEANS = torch.tensor([[0.5, -0.4, 0.1], [-0.6, 0.2, 0.8]], dtype=F64)
LAW = laws.Mixture(torch.tensor([0.4, 0.6], dtype=F64), MEANS, torch.tensor([0.1, 0.3], dtype=F64))


def on_both(function: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    return function(torch.device("cpu")), function(GPU)


def assert_same(found: tuple[Tensor, Tensor], rtol: float = 1e-10, atol: float = 1e-11) -> None:
    cpu, gpu = found
    assert gpu.device.type == GPU.type and cpu.device.type == "cpu"
    assert float(cpu.double().std()) > 0 and bool(cpu.isfinite().all())
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=rtol, atol=atol)


def unet(device: torch.device, sde: Any = VP, dtype: torch.dtype = F64) -> Denoiser:
    """With conditions by label, and weights that are the same everywhere and none of them 0."""
    torch.manual_seed(0)
    net = networks.UNet(1, base=8, multipliers=(1, 2), blocks=1, classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return Denoiser(net, sde).eval().to(device, dtype)


# ---- solvers


@on_gpu
@pytest.mark.parametrize("sde", [VP, EDM(), Rectified()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_gives_the_same_samples(name: str, sde: Any) -> None:
    lam = torch.linspace(-2.2, 1.9, 9, dtype=F64)
    times = sde.time(2 * (lam + 0.1 * (3 * lam).sin()))

    def run(device: torch.device) -> Any:
        noise = Noise.of(3, batch=5, device=device, dtype=F64)
        x = noise.prior((5, 3)) * float(sde.sigma(times[0]))
        return SOLVERS[name].solve(LAW.denoiser(sde).to(device), x, times, noise=noise)

    cpu, gpu = on_both(run)
    assert gpu.network_calls == cpu.network_calls and gpu.status == cpu.status == "ok"
    assert_same((cpu.x, gpu.x), 1e-9, 1e-9)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "solver", [solvers.dpmpp(2), solvers.ddpm(), solvers.predictor_corrector(solvers.ddpm())], ids=repr
)
def test_samples_of_a_network(solver: Any, dtype: torch.dtype) -> None:
    """`sample`, with its own noise, for a U-Net with labels."""

    def run(device: torch.device) -> Tensor:
        label = torch.tensor([0, 1, 2, 0], device=device)
        model = unet(device, dtype=dtype)
        return sample(model, (4, 1, 8, 8), solver, steps=5, seed=4, condition={"label": label}).x

    assert_same(on_both(run), *((1e-8, 1e-8) if dtype == F64 else (2e-3, 2e-3)))


@on_gpu
def test_there_and_back() -> None:
    for solver in (solvers.dpmpp(3), solvers.reversible(2)):

        def run(device: torch.device, solver: Any = solver) -> Tensor:
            model = LAW.denoiser(VP).to(device)
            x = LAW.sample(4, generator=torch.Generator().manual_seed(1)).to(device)
            latent = encode(model, x, solver, steps=10)
            assert latent.x.device.type == device.type
            back = decode(model, latent, solver, steps=10).x
            if solver == solvers.reversible(2):
                assert torch.allclose(back, x, rtol=0, atol=1e-12)
            return back

        assert_same(on_both(run), 1e-9, 1e-9)


def waits(function: Callable[[], Any]) -> list[str]:
    """Where the program waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = "called a synchronizing CUDA operation"
    return [f"{one.filename}:{one.lineno}" for one in caught if said in str(one.message)]


@on_gpu
def test_waits_are_seen() -> None:
    x = torch.ones(2, device=GPU)
    assert waits(lambda: x + 1) == [] and len(waits(lambda: [float(x[0]), float(x[1])])) == 2


@on_gpu
@pytest.mark.parametrize("name", FIXED)
def test_no_step_waits_for_the_device(name: str) -> None:
    """Three times the steps wait as often as one time: before the first step and after the last."""
    model = unet(GPU, dtype=torch.float32)

    def run(steps: int) -> Any:
        label = torch.zeros(2, dtype=torch.long, device=GPU)
        return sample(model, (2, 1, 8, 8), SOLVERS[name], steps=steps, condition={"label": label})

    run(4)
    assert waits(lambda: run(12)) == waits(lambda: run(4))


def devices(values: Any) -> set[str]:
    return {one.device.type for one in tree_leaves(values) if isinstance(one, Tensor)}


def caller() -> str:
    """The line of ours that is running."""
    frames = [one for one in traceback.extract_stack()[:-2] if "scoresde" in one.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "here"


class Copies(TorchDispatchMode):
    """Keeps where tensors go from the host to `META`. (What reads from there raises an error: no data.)"""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moving = "copy" in str(func) or "index" in str(func)
        if moving and "cpu" in devices((args, kwargs)) and META.type in devices(out):
            self.seen.append(caller())
        return out


class Uploads(TorchFunctionMode):
    """Keeps where tensors on `META` are made of numbers of the host."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and META.type in devices(out)
        if made and META.type not in devices(args[0] if func != Tensor.new_tensor else ()):
            self.seen.append(caller())
        return out


def traffic(run: Callable[[], Any]) -> list[str]:
    seen: list[str] = []
    with Uploads(seen), Copies(seen):
        run()
    return seen


def test_traffic_is_seen() -> None:
    ready = torch.ones(2, device=META)
    assert traffic(lambda: ready + 1.0) == traffic(lambda: ready.new_full((), 2.0)) == []
    for upload in (
        lambda: like(torch.tensor(2.0), ready),
        lambda: torch.tensor(2.0, device=META),
        lambda: ready.new_tensor([2.0]),
        lambda: ready[torch.tensor([0])],
    ):
        assert len(traffic(upload)) == 1
    with pytest.raises(RuntimeError, match="meta"):
        float(ready[0])


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the device once, after the last step, to report outputs that were not finite."""
    for kind in (Outputs, States):
        monkeypatch.setattr(kind, "first_bad", lambda self: None)


class Small(nn.Module):
    """For images of four pixels, or their classes."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.linear, self.classes = nn.Linear(4, classes or 4), classes
        self.labels = nn.Embedding(4, 4)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        out = self.linear(x.flatten(1)) + time[:, None]
        if label is not None:
            out = out + self.labels(label)
        return out if self.classes else out.view_as(x)


LABEL = torch.zeros(2, dtype=torch.long, device=META)


def small() -> Denoiser:
    return Denoiser(Small(), VP).eval().to(META)


def assert_silent(model: BaseDenoiser, solver: Any) -> None:
    """Three times the steps send as much to the device as one time, and nothing comes back."""
    noise = Noise(0, torch.arange(2, device=META), META, torch.float32)
    x = torch.zeros(2, 1, 2, 2, device=META)

    def run(steps: int) -> list[str]:
        return traffic(lambda: solver.solve(model, x, grids.log_snr(VP, steps), noise=noise))

    assert run(12) == run(4) != []


def test_the_watch_sees_states(monkeypatch: pytest.MonkeyPatch, nothing_is_read: None) -> None:
    """After every row of a table: those that the network gets next, and the result."""
    shown: list[Tensor] = []
    monkeypatch.setattr(States, "__call__", lambda self, out: shown.append(out))
    given: list[Tensor] = []
    model = small()
    model.network.register_forward_hook(lambda module, args, out: given.append(args[0]))
    x = torch.zeros(2, 1, 2, 2, device=META)
    samples = solvers.dpmpp(2).solve(model, x, grids.log_snr(VP, 4))
    assert len(shown) == 4 and all(a is b for a, b in zip(shown, [*given[1:], samples.x], strict=True))


@pytest.mark.parametrize("ends", [False, True])
def test_learned_schedules_follow_the_clock(ends: bool) -> None:
    """Parameters on the host, times elsewhere: what training asks for on a GPU."""
    schedule, t = Learned(learn_ends=ends), torch.linspace(0.1, 0.9, 5, dtype=F64, device=META)
    for function in (schedule.log_snr, schedule.B, schedule.beta):
        assert function(t).device == META and function(t).shape == (5,)


def test_proposals_follow_their_numbers() -> None:
    u = torch.full((3, 2), 0.5, dtype=F64, device=META)
    for proposal in (likelihood.by_log_snr, likelihood.along(VP)):
        t, rate = proposal(VP, u, 1e-3)
        assert t.device == rate.device == META and t.shape == rate.shape == (3, 2)


@pytest.mark.parametrize("name", FIXED)
def test_no_step_sends_anything_to_the_device(name: str, nothing_is_read: None) -> None:
    assert_silent(small().given(label=LABEL), SOLVERS[name])


# What is known of the data may come from the host: it is sent once.


def classified() -> BaseDenoiser:
    net = guidance.Classifier(Small(classes=3), VP).to(META)
    return guidance.classifier(small(), net.log_prob(1), guidance.interval(2.0, -1.0, 5.0))


def moved() -> BaseDenoiser:
    model, net = Denoiser(Small(), VP), guidance.Classifier(Small(classes=3), VP)
    return guidance.classifier(model, net.log_prob(torch.tensor([0, 2])), 2.0).eval().to(META)


def restored() -> BaseDenoiser:
    return guidance.inpaint(small(), torch.eye(2, dtype=torch.bool), torch.ones(1, 1, 2, 2), 0.1)


def coloured() -> BaseDenoiser:
    return guidance.colorize(small(), torch.ones(1, 1, 2, 2))


def observed() -> BaseDenoiser:
    return guidance.linear_inverse(small(), torch.ones(1, 4), torch.ones(1), 0.1)


def free() -> BaseDenoiser:
    return guidance.classifier_free(small(), 2.0, null={"label": -1}, rescale=0.5).given(label=LABEL)


def free_of_a_tensor() -> BaseDenoiser:
    null = {"label": torch.tensor(-1)}
    return guidance.classifier_free(small(), 2.0, null=null, rescale=0.5).given(label=LABEL)


@pytest.mark.parametrize("made", [classified, moved, free, free_of_a_tensor, restored, coloured, observed])
@pytest.mark.parametrize("solver", [solvers.dpmpp(2), solvers.ddpm()], ids=["2m", "ddpm"])
def test_guidance_sends_nothing_either(made: Any, solver: Any, nothing_is_read: None) -> None:
    assert_silent(made(), solver)


# ---- guidance, likelihood, energies


@on_gpu
def test_guidance() -> None:
    def classified(device: torch.device) -> BaseDenoiser:
        return guidance.classifier(LAW.denoiser(VP).to(device), lambda x, t: -x.square().sum(1), 0.3)

    def free(device: torch.device) -> BaseDenoiser:
        null = {"label": torch.tensor(2)}
        return guidance.classifier_free(unet(device), 2.0, null=null, rescale=0.5)

    def observed(device: torch.device) -> BaseDenoiser:
        A, y = torch.tensor([[1.0, 0.5, 0.0]], dtype=F64), torch.tensor([0.4], dtype=F64)
        return guidance.linear_inverse(LAW.denoiser(VP).to(device), A.to(device), y.to(device), 0.01)

    def masked(device: torch.device) -> BaseDenoiser:
        mask = torch.zeros(8, 8, dtype=torch.bool, device=device)
        mask[:4] = True
        return guidance.inpaint(unet(device), mask, torch.ones(1, 1, 8, 8, dtype=F64, device=device))

    label = torch.tensor([0, 1])
    for make, shape, condition in (
        (classified, (2, 3), {}),
        (free, (2, 1, 8, 8), {"label": label}),
        (observed, (2, 3), {}),
        (masked, (2, 1, 8, 8), {"label": label}),
    ):

        def run(device: torch.device, make: Any = make, shape: Any = shape, given: Any = condition) -> Tensor:
            moved = {key: value.to(device) for key, value in given.items()}
            return sample(make(device), shape, solvers.dpmpp(2), steps=6, condition=moved, device=device).x

        assert_same(on_both(run), 1e-8, 1e-8)


@on_gpu
@pytest.mark.parametrize(
    "divergence",
    [
        likelihood.Exact(),
        likelihood.Hutchinson(4),
        likelihood.Hutchinson(4, likelihood.gaussian),
        likelihood.Orthogonal(2),
        likelihood.HutchPP(2, 2),
    ],
    ids=["exact", "rademacher", "gaussian", "orthogonal", "hutch++"],
)
def test_log_densities(divergence: Any) -> None:
    x = LAW.sample(5, generator=torch.Generator().manual_seed(0))

    def run(device: torch.device) -> Any:
        return likelihood.log_prob(LAW.denoiser(VP).to(device), x.to(device), divergence=divergence, seed=2)

    cpu, gpu = on_both(run)
    assert_same((cpu.value, gpu.value), 1e-7, 1e-7)
    assert gpu.network_calls == cpu.network_calls


@on_gpu
def test_bounds() -> None:
    x = LAW.sample(5, generator=torch.Generator().manual_seed(0))
    for options in ({"draws": 8, "seed": 1}, {"grid": grids.log_snr(VP, 8)}):

        def run(device: torch.device, options: Any = options) -> Tensor:
            model = LAW.denoiser(VP).to(device)
            return likelihood.elbo(model, x.to(device), likelihood.GaussianDecoder(), **options).value

        assert_same(on_both(run))


@on_gpu
def test_langevin_and_mala() -> None:
    def run(device: torch.device) -> Tensor:
        model, noise = LAW.denoiser(VP).to(device), Noise.of(1, batch=6, device=device, dtype=F64)
        x = LAW.sample(6, generator=torch.Generator().manual_seed(0)).to(device)
        density = LAW.to(device).marginal(VP, 0.1).log_prob
        plain = solvers.langevin(model, x, 0.1, step=0.05, steps=5, noise=noise).x
        adjusted = solvers.mala(
            model, x, 0.1, step=0.3, steps=9, noise=noise, log_prob=lambda x, t: density(x)
        ).x
        return torch.cat([plain, adjusted])

    assert_same(on_both(run))


# ---- choosing


@on_gpu
def test_compare_and_tune() -> None:
    def compared(device: torch.device) -> dict[str, float]:
        rows = select.compare(LAW.denoiser(VP).to(device), calls=(5,), shape=(3,), n=64).rows
        assert all(row.memory is not None and row.memory >= 0 for row in rows) or device.type == "cpu"
        return {f"{row.solver} {row.grid}": row.error for row in rows}

    cpu, gpu = on_both(compared)
    assert gpu == pytest.approx(cpu, rel=1e-6) and len(gpu) > 20

    def tuned(device: torch.device) -> Tensor:
        found = select.tune(
            LAW.denoiser(VP).to(device), solvers.dpmpp(2), 5, 100.0, shape=(3,), n=32, starts=1
        )
        assert found.report.start is not None
        return found.table.times

    cpu, gpu = on_both(tuned)
    assert torch.allclose(gpu.cpu(), cpu, rtol=1e-3)


@on_gpu
def test_surrogates_come_from_data_anywhere() -> None:
    data = LAW.sample(500, generator=torch.Generator().manual_seed(0))
    pool = select.pool()[::40]
    cpu, gpu = on_both(lambda device: select.recommend(VP, data.to(device), 5, candidates=pool).ranking)
    assert [one.candidate for one in gpu] == [one.candidate for one in cpu]
    assert [one.error for one in gpu] == pytest.approx([one.error for one in cpu], rel=1e-6)


# ---- training and files


@on_gpu
def test_trained_on_one_and_loaded_on_the_other(tmp_path: Any) -> None:
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def fitted(device: torch.device) -> list[float]:
        model = unet(device, dtype=torch.float32).train()
        run = train.fit(model, x.to(device), steps=20, batch_size=16, lr=1e-3, every=5)
        losses = [float(record.loss) for record in run]
        checkpoint.save(tmp_path / device.type, run.ema)
        return losses

    cpu, gpu = on_both(fitted)
    assert all(map(math.isfinite, gpu)) and len(gpu) == len(cpu)
    for saved in ("cpu", "cuda"):
        drawn = on_both(
            lambda device, saved=saved: (
                sample(
                    checkpoint.load(tmp_path / saved).to(device).double(),
                    (3, 1, 8, 8),
                    solvers.dpmpp(2),
                    steps=5,
                ).x
            )
        )
        assert_same(drawn, 1e-8, 1e-8)
