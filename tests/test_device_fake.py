"""A device without one: tensors that say they are elsewhere and yet have numbers, and a list of what passes
between there and the host.

What `test_device` shows on a GPU, or without numbers on `meta`, is seen here on any machine and with them:
the same results, no tensors of two places in one operation, and no traffic that grows with the steps.
(Training needs an optimizer and generators of the device, which only a real one has.)
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from scoresde import (
    EDM,
    VESDE,
    VPSDE,
    BaseDenoiser,
    Denoiser,
    Rectified,
    SubVPSDE,
    decode,
    encode,
    grids,
    guidance,
    laws,
    likelihood,
    losses,
    metrics,
    networks,
    sample,
    schedules,
    solvers,
)
from scoresde.noise import BrownianPath, Noise
from scoresde.solvers.adaptive_ode import gauss

HOST, THERE = torch.device("cpu"), torch.device("meta")
F64 = torch.float64
aten = torch.ops.aten
READING = {  # and `index` by a mask, which counts
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}


class Elsewhere(Tensor):
    """A tensor on `THERE`, whose numbers are in `inner`, on the host."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )
        made.inner = inner
        return made

    def __repr__(self, **options: Any) -> str:
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of the device is used outside of `device()`")


def is_there(device: Any) -> bool:
    return device is not None and torch.device(device) == THERE


def any_there(values: Any) -> bool:
    return any(isinstance(one, Elsewhere) for one in tree_leaves(values))


class Traffic(TorchDispatchMode):
    """Does the operations of the device on the host, and lists in `seen` what passes between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def note(self, kind: str) -> None:
        frames = [one for one in traceback.extract_stack() if "/scoresde/" in one.filename.replace("\\", "/")]
        self.seen.append((kind, f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "the test"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = [one for one in tensors if isinstance(one, Elsewhere)]
        if not there and not is_there(kwargs.get("device")):
            return func(*args, **kwargs)
        self._watch(func, args, kwargs, tensors, bool(there))
        result_there = is_there(kwargs["device"]) if kwargs.get("device") is not None else bool(there)
        if func is aten.copy_.default:
            result_there = isinstance(args[0], Elsewhere)
        if is_there(kwargs.get("device")):
            kwargs["device"] = HOST
        inner_args, inner_kwargs = tree_map(
            lambda one: one.inner if isinstance(one, Elsewhere) else one, (args, kwargs)
        )
        out = func(*inner_args, **inner_kwargs)
        same = {id(one.inner): one for one in there}  # of operations in place

        def wrapped(one: Any) -> Any:
            if not isinstance(one, Tensor) or not result_there:
                return one
            return same[id(one)] if id(one) in same else Elsewhere(one)

        return tree_map(wrapped, out)

    def _watch(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], from_there: bool) -> None:
        if func is aten._to_copy.default or func is aten.copy_.default:
            target = kwargs.get("device")
            to_there = isinstance(args[0], Elsewhere) if target is None else is_there(target)
            source = args[1] if func is aten.copy_.default else args[0]
            if to_there != isinstance(source, Elsewhere):
                self.note("sent" if to_there else "read")
        elif func in READING or (func is aten.index.Tensor and _by_mask(args[1])):
            self.note("read")
        elif from_there and any(one.ndim and not isinstance(one, Elsewhere) for one in tensors):
            self.note("sent" if "index" in str(func) else "mixed")


def _by_mask(indices: Any) -> bool:
    return any(isinstance(one, Elsewhere) and one.dtype == torch.bool for one in indices)


class Making(TorchFunctionMode):
    """What torch makes of numbers without an operation that a dispatch mode sees."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            if any_there(args[:1]) and not isinstance(args[0], Tensor):
                self.traffic.note("read")
            if is_there(kwargs.get("device")) and not isinstance(args[0], Tensor):
                self.traffic.note("sent")
                return Elsewhere(func(*args, **{**kwargs, "device": HOST}))
        if func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            self.traffic.note("sent")
            return Elsewhere(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs, "device": HOST}))
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            self.traffic.note("read")
            return args[0].inner.tolist()
        if func is Tensor.__setitem__ and isinstance(args[0], Elsewhere):
            return func(args[0], *(self._there(args[0], one) for one in args[1:]))
        return func(*args, **kwargs)

    def _there(self, x: Tensor, value: Any) -> Any:
        """An index or a value as a tensor: a list is sent, a number is part of the operation."""
        if isinstance(value, list):
            self.traffic.note("sent")
            return Elsewhere(torch.tensor(value, dtype=torch.int64))
        return Elsewhere(torch.tensor(value, dtype=x.dtype)) if isinstance(value, float) else value


@contextmanager
def device() -> Iterator[list[tuple[str, str]]]:
    traffic = Traffic()
    try:
        with Making(traffic), traffic:
            yield traffic.seen
    finally:
        gauss.cache_clear()  # what is kept there is of no other `meta`


def works() -> bool:
    try:
        with device() as seen:
            x = torch.ones(2, dtype=F64).to(THERE)
            return float((x + torch.zeros(2, device=THERE)).sum()) == 2 and len(seen) == 2
    except (AttributeError, TypeError, RuntimeError, AssertionError, NotImplementedError):
        return False


pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.skipif(not works(), reason="this torch has other wrappers of tensors"),
]

Run = Callable[[torch.device, int], Any]
"""(device, number of steps) -> results"""


def compared(run: Run, few: int, many: int, tol: float = 1e-9) -> tuple[Counter, Counter]:
    """The traffic of few and of many steps, after a look at the results: there, and as on the host."""
    found = []
    for steps in (few, many):
        torch.manual_seed(0)
        expected = [one for one in tree_leaves(run(HOST, steps)) if isinstance(one, Tensor)]
        torch.manual_seed(0)
        with device() as seen:
            got = [one for one in tree_leaves(run(THERE, steps)) if isinstance(one, Tensor)]
        assert len(got) == len(expected) > 0 and all(isinstance(one, Elsewhere) for one in got)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.inner.detach(), other.detach(), rtol=tol, atol=tol, equal_nan=True)
        found.append(Counter(seen))
    assert not [where for kind, where in found[0] if kind == "mixed"]
    return found[0], found[1]


def assert_silent(run: Run, few: int = 3, many: int = 8, tol: float = 1e-9) -> None:
    one, other = compared(run, few, many, tol)
    assert other - one == Counter()


def test_traffic_is_seen() -> None:
    host = torch.ones(3)
    with device() as seen:
        x = host.to(THERE)
        assert (x + 1).device == THERE and (x * torch.tensor(2.0)).device == THERE
        assert [kind for kind, _ in seen] == ["sent"]
        for kind, act in (
            ("read", lambda: float(x[0])),
            ("read", lambda: bool((x > 0).all())),
            ("read", lambda: x.tolist()),
            ("read", lambda: x.cpu()),
            ("read", lambda: x[x > 0]),
            ("read", lambda: (x > 0).nonzero()),
            ("sent", lambda: torch.tensor(1.0, device=THERE)),
            ("sent", lambda: x.new_tensor([1.0])),
            ("sent", lambda: x[torch.tensor([0])]),
            ("sent", lambda: x.copy_(host)),
            ("mixed", lambda: x + host),
        ):
            seen.clear()
            act()
            assert [found for found, _ in seen] == [kind]


# ---- solvers

VP = VPSDE()
MEANS = torch.tensor([[0.5, -0.4, 0.1], [-0.6, 0.2, 0.8]], dtype=F64)
LAW = laws.Mixture(torch.tensor([0.4, 0.6], dtype=F64), MEANS, torch.tensor([0.1, 0.3], dtype=F64))
ONE_OF_A_KIND = {repr(one).split("(")[0]: one for one in solvers.examples().values()}
BY_THE_HOST = [solvers.adaptive_ode(1e-2, 1e-2), solvers.adaptive_sde(0.5, 0.5), solvers.scipy_ode(rtol=1e-2)]
OTHERS = ("adaptive_ode", "adaptive_sde", "scipy_ode", "torchsde_solver")  # the host decides on the steps


def solved(solver: Any, sde: Any = VP) -> Run:
    def run(place: torch.device, steps: int) -> Tensor:
        noise = Noise.of(3, batch=4, device=place, dtype=F64)
        times = grids.log_snr(sde, steps)
        x = noise.prior((4, 3)) * float(sde.sigma(times.t[0]))
        return solver.solve(LAW.denoiser(sde).to(place), x, times, noise=noise).x

    return run


@pytest.mark.parametrize("name", [name for name in ONE_OF_A_KIND if name not in OTHERS])
def test_steps_are_silent(name: str) -> None:
    assert_silent(solved(ONE_OF_A_KIND[name]))


@pytest.mark.parametrize("solver", BY_THE_HOST, ids=repr)
def test_what_the_host_decides_is_the_same(solver: Any) -> None:
    compared(solved(solver), 2, 2, 1e-7)


def test_steps_on_a_path_are_silent() -> None:
    def run(place: torch.device, steps: int) -> Tensor:
        model, noise = LAW.denoiser(VP).to(place), Noise.of(3, batch=4, device=place, dtype=F64)
        times = grids.log_snr(VP, steps)
        path = BrownianPath(noise, (4, 3), float(times.lam[0]), float(times.lam[-1]))
        return solvers.ddpm().solve(model, noise.prior((4, 3)), times, noise=path.noise(times.lam)).x

    assert_silent(run)


@pytest.mark.parametrize("step", [0.05, torch.linspace(0.01, 0.05, 4)], ids=["one", "each"])
def test_chains_are_silent(step: float | Tensor) -> None:
    def run(place: torch.device, steps: int) -> list[Tensor]:
        model, noise = LAW.denoiser(VP).to(place), Noise.of(3, batch=4, device=place, dtype=F64)
        x = noise.prior((4, 3))
        chains = solvers.langevin, solvers.mala
        return [chain(model, x, 0.1, step=step, steps=steps, noise=noise).x for chain in chains]

    assert_silent(run)


# ---- what a network is in


class Small(nn.Module):
    """For images of four pixels, or their classes."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.labels, self.classes = nn.Linear(4, classes or 4), nn.Embedding(4, 4), classes

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        hidden = x.flatten(1) + time[:, None]
        out = self.linear(hidden if label is None else hidden + self.labels(label))
        return out if self.classes else out.view_as(x)


def small(place: torch.device, sde: Any = VP) -> Denoiser:
    return Denoiser(Small(), sde).double().eval().to(place)


def labelled(place: torch.device) -> dict[str, Tensor]:
    return {"label": torch.tensor([0, 2]).to(place)}


def classified(place: torch.device) -> BaseDenoiser:
    net = guidance.Classifier(Small(3), VP).double().to(place)
    return guidance.classifier(small(place), net.log_prob(1), guidance.interval(2.0, -1.0, 5.0))


def free(place: torch.device, **options: Any) -> BaseDenoiser:
    model = guidance.classifier_free(small(place), 2.0, null={"label": 3}, **options)
    return model.given(**labelled(place))


def rescaled(place: torch.device) -> BaseDenoiser:
    return free(place, rescale=0.5)


def doubled(place: torch.device) -> BaseDenoiser:
    return free(place, doubled=True)


ROW, SEEN = torch.ones(1, 4, dtype=F64), torch.ones(1, dtype=F64)


def observed(place: torch.device) -> BaseDenoiser:
    return guidance.linear_inverse(small(place), ROW, SEEN, 0.1)


def pulled(place: torch.device) -> BaseDenoiser:
    return guidance.pigdm(small(place), ROW, SEEN, 0.1)


def restored(place: torch.device) -> BaseDenoiser:
    known = torch.eye(2, dtype=torch.bool), torch.ones(1, 1, 2, 2, dtype=F64)
    return guidance.inpaint(small(place), *known, 0.1)


@pytest.mark.parametrize("made", [small, classified, free, rescaled, doubled, observed, pulled, restored])
def test_guidance_is_silent(made: Any) -> None:
    """In a solver, and asked by itself at times that are there too."""

    def run(place: torch.device, steps: int) -> list[Tensor]:
        model, x = made(place), torch.ones(2, 1, 2, 2, dtype=F64).to(place)
        noise = Noise.of(3, batch=2, device=place, dtype=F64)
        t = torch.tensor([0.3, 0.5], dtype=F64).to(place)
        views = [view(x, t) for _ in range(steps) for view in (model, model.noise)]
        return [solvers.ddpm().solve(model, x, grids.log_snr(VP, steps), noise=noise).x, *views[:2]]

    assert_silent(run)


def test_there_and_back() -> None:
    def run(place: torch.device, steps: int) -> list[Tensor]:
        model, solver = small(place), solvers.reversible(2)
        latent = encode(model, torch.ones(2, 1, 2, 2, dtype=F64).to(place), solver, steps=steps)
        return [latent.x, decode(model, latent, solver, steps=steps).x]

    assert_silent(run)


def test_a_unet_with_labels() -> None:
    def run(place: torch.device, steps: int) -> Tensor:
        net = networks.UNet(1, base=8, multipliers=(1, 2), blocks=1, classes=3)
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
        model = Denoiser(net, VP).double().eval().to(place)
        return sample(model, (2, 1, 4, 4), solvers.sde_dpmpp(2), steps=steps, condition=labelled(place)).x

    assert_silent(run, 2, 4)


# ---- processes, laws, losses, metrics


@pytest.mark.parametrize(
    "sde",
    [
        VP,
        SubVPSDE(),
        VESDE(),
        EDM(),
        Rectified(),
        VPSDE(schedule=schedules.Cosine()),
        VPSDE.from_betas(VP.betas(20)),
    ],
    ids=lambda sde: type(getattr(sde, "schedule", sde)).__name__,
)
def test_processes_and_losses_stay_with_their_times(sde: Any) -> None:
    def run(place: torch.device, steps: int) -> list[Tensor]:
        model, x = small(place, sde), torch.linspace(-1, 1, 16, dtype=F64).view(4, 1, 2, 2).to(place)
        t = torch.linspace(0.1, 0.8, 4, dtype=F64).to(place)
        found: list[Tensor] = []
        for _ in range(steps):
            found = [sde.time(sde.log_snr(t)), sde.drift(x, t), sde.diffusion(t), *sde.bridge(x, x, t / 2, t)]
            error = losses.denoising(model, x, x.flip(0), t, losses.min_snr)
            found += [error, *torch.autograd.grad(error.mean(), [*model.network.linear.parameters()])]
        return found

    assert_silent(run, 1, 3)


@pytest.mark.parametrize(
    "law",
    [
        LAW,
        laws.Gaussian(MEANS[0], torch.tensor([[1, 0.2, 0], [0.2, 0.5, 0.1], [0, 0.1, 0.3]], dtype=F64)),
        laws.Mixture([0.4, 0.6], MEANS, laws.LowRank(0.1, MEANS.flip(0)[..., None])),
        laws.Empirical(MEANS),
    ],
    ids=lambda law: law._spectrum.kind,
)
def test_exact_denoisers_are_silent(law: laws.Law) -> None:
    def run(place: torch.device, steps: int) -> list[Tensor]:
        model, x = law.denoiser(VP).to(place), torch.ones(2, 3, dtype=F64).to(place)
        t = torch.tensor([0.2, 0.7], dtype=F64).to(place)
        views = (model, model.score, model.noise, model.velocity)
        return [view(x, t) for _ in range(steps) for view in views][:4]

    assert_silent(run)


def test_distances_are_the_same() -> None:
    x = LAW.sample(9, generator=torch.Generator().manual_seed(0))
    y = x.flip(1) + 0.2
    for metric in (metrics.energy_distance, metrics.sliced_wasserstein, metrics.mmd, metrics.frechet):
        with device() as seen:
            found = metric(x.to(THERE), y.to(THERE))
        assert found == pytest.approx(metric(x, y), rel=1e-9)
        assert not [where for kind, where in seen if kind == "mixed"]


# ---- likelihood


def test_bounds_are_silent() -> None:
    x = (MEANS * 10).round() / 10

    def run(place: torch.device, steps: int) -> list[Tensor]:
        model, decoder = LAW.denoiser(VP).to(place), likelihood.DiscreteDecoder(0.1, -9.0, 9.0)
        grid = grids.log_snr(VP, steps)
        drawn = likelihood.elbo(model, x.to(place), decoder, draws=steps)
        return [likelihood.elbo(model, x.to(place), decoder, grid=grid).value, drawn.value]

    assert_silent(run)


def test_densities_on_a_grid_are_silent() -> None:
    def run(place: torch.device, steps: int) -> list[Tensor]:
        model = LAW.denoiser(VP).to(place)
        found = likelihood.log_prob(model, MEANS.to(place), grid=grids.log_snr(VP, steps))
        return [found.value, found.solver_error]

    assert_silent(run, tol=1e-8)
