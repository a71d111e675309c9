"""Public samplers as plain functions on one interface: same grid, same noises, same denoiser.

    peer(task, x) -> x at task.t[-1], for x at task.t[0]

The libraries live in an environment of their own, made from benchmarks/peers.txt. Two levels: `k_diffusion`,
`diffusers` and `azula` return peers; the functions with a leading library and a trailing noun
(`k_diffusion_sampling`, `diffusers_scheduler`, `azula_sampler`) give the library's own object on our grid,
for those who want to measure it alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from scoresde.denoiser import BaseDenoiser
from scoresde.schedules import Time, wide
from scoresde.sde import LinearSDE
from scoresde.solvers import torchsde_solver

LIBRARIES = {
    "diffusers": "diffusers",
    "k-diffusion": "k_diffusion",
    "azula": "azula",
    "torchdiffeq": "torchdiffeq",
    "torchsde": "torchsde",
}
RECIPE = "make the environment that the head of benchmarks/peers.txt describes, and use its Python"


@dataclass(frozen=True)
class Task:
    """What a sampler is given. `t` (N + 1,) decreasing float64 times; `denoise(x, t)` is E[x_0 | x_t = x] at
    a 0-dim t; `noise(k)` gives the normals of the k-th request, shaped like x.
    """

    sde: LinearSDE
    t: Tensor
    denoise: Callable[[Tensor, Tensor], Tensor]
    noise: Callable[[int], Tensor] | None = None

    @property
    def alpha(self) -> Tensor:
        return self.sde.alpha(self.t)

    @property
    def sigma(self) -> Tensor:
        return self.sde.sigma(self.t)

    def source(self) -> Callable[..., Tensor]:
        """`noise`, one request after the other, whatever the arguments."""
        if self.noise is None:
            return _no_noise
        requests, noise = iter(range(sys.maxsize)), self.noise
        return lambda *args, **kwargs: noise(next(requests))


Peer = Callable[[Task, Tensor], Tensor]


def _no_noise(like: Any, *args: Any, **kwargs: Any) -> Tensor:
    """For samplers that draw noise and multiply it with zero."""
    if not isinstance(like, Tensor):
        raise ValueError("this sampler is stochastic: expected a task with noise, found None")
    return torch.zeros_like(like)


def missing(library: str) -> str | None:
    """Why a library of LIBRARIES cannot be used here, or None."""
    if importlib.util.find_spec(LIBRARIES[library]) is None:
        return f"{library} is not installed here: {RECIPE}"
    return None


def _import(library: str, module: str) -> Any:
    reason = missing(library)
    if reason:
        raise ImportError(reason)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ImportError(f"{library} is installed but cannot be imported ({error}): {RECIPE}") from error


# k-diffusion: state x/alpha, noise level sigma/alpha


@cache
def k_diffusion_sampling() -> Any:
    """The module k_diffusion.sampling alone; importing the package would ask for torchvision, clip, wandb and
    others.
    """
    package = types.ModuleType("k_diffusion")
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(missing("k-diffusion"))
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = importlib.machinery.ModuleSpec("k_diffusion", None, is_package=True)
    sys.modules["k_diffusion"] = package
    with _placeholder("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        return _import("k-diffusion", "k_diffusion.sampling")


@contextmanager
def _placeholder(*names: str) -> Iterator[None]:
    """Empty modules of these names while the block runs, unless they are there."""
    if importlib.util.find_spec(names[0]) is not None:
        yield
        return
    made = {name: types.ModuleType(name) for name in names}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def one_path(noise: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Normals of a Brownian path in the noise level, as dpmpp_sde needs them: the increment over a step
    contains the one over its first part."""
    start, middle, first = math.nan, math.nan, torch.empty(0)

    def increment(a: Tensor, b: Tensor) -> Tensor:
        nonlocal start, middle, first
        z = noise()
        if float(a) != start:
            start, middle, first = float(a), float(b), z
            return z
        part, whole = start - middle, start - float(b)
        return (part / whole) ** 0.5 * first + (1 - part / whole) ** 0.5 * z

    return increment


def k_diffusion(name: str, path: bool = False, **options: Any) -> Peer:
    """`sample_<name>`; `fast` is given the ends of the grid and its number of steps. path: the noise of a
    step belongs to one Brownian path."""

    def run(task: Task, x: Tensor) -> Tensor:
        function = getattr(k_diffusion_sampling(), f"sample_{name}")
        levels = (task.sigma / task.alpha).to(x.device)
        known = dict(zip(levels.tolist(), task.t, strict=True))

        def model(y: Tensor, level: Tensor) -> Tensor:
            value = level[0].double().cpu()
            t = known.get(value.item())
            t = task.sde.time(-2 * value.log()) if t is None else t
            return task.denoise(y * task.sde.alpha(t).to(y), t)

        noise, more = task.source(), dict(options)
        if "ancestral" in name or "sde" in name:
            more["noise_sampler"] = one_path(noise) if path else noise
        span: tuple = (levels,)
        if (
            name == "dpm_fast"
        ):  # levels as tensors, and a default dtype, because it makes its own grid in that
            span = (levels[-1], levels[0], len(levels) - 1)
        with (
            mock.patch.object(torch, "randn_like", noise),
            _default_dtype(x.dtype),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            y = function(model, x / task.alpha[0].to(x), *span, disable=True, **more)
        return y * task.alpha[-1].to(x)

    return run


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# diffusers: integer timesteps into a table; ours is the grid itself


TABLE_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
NO_FINAL_SIGMA = ("DEISMultistepScheduler", "SASolverScheduler")


def diffusers_scheduler(name: str, alpha: Tensor, sigma: Tensor, **config: Any) -> Any:
    """A scheduler of VP type on N + 1 nodes with these alpha, sigma, in their dtype; timestep j is node
    N - j.

    Its own grids and its float32 tables are replaced; what it computes from them is untouched. No step starts
    from timestep 0, where DDPMScheduler adds no noise, because its own chain ends there.
    """
    module, n = _import("diffusers", "diffusers"), len(alpha) - 1
    made = getattr(module, name)
    if name in TABLE_SCHEDULERS:
        clip = {} if name == "PNDMScheduler" else {"clip_sample": False}
        scheduler = made(
            num_train_timesteps=n + 1, timestep_spacing="leading", steps_offset=1, **clip, **config
        )
        scheduler.set_timesteps(n)
        scheduler.alphas_cumprod = alpha.square().flip(0)
        scheduler.final_alpha_cumprod = scheduler.one = alpha[-1].square()
        return scheduler
    last = {"final_sigmas_type": "sigma_min"} if name not in NO_FINAL_SIGMA else {}
    scheduler = made(lower_order_final=False, **last, **config)
    scheduler.set_timesteps(n)
    scheduler.num_inference_steps = n
    scheduler.timesteps = torch.arange(n, 0, -1)
    scheduler.sigmas = (sigma / alpha).cpu()
    return scheduler


def diffusers(name: str, eta: float | None = None, **config: Any) -> Peer:
    """A scheduler's `step`, fed with predicted noise. eta: of DDIMScheduler.

    DPMSolverMultistepScheduler rounds its state to float32 in every step."""

    def run(task: Task, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = diffusers_scheduler(name, task.alpha.to(x.device), task.sigma.to(x.device), **config)
        module, noise = sys.modules[type(scheduler).__module__], task.source()
        alpha, sigma = task.alpha.to(x), task.sigma.to(x)
        patched = (
            mock.patch.object(module, "randn_tensor", noise)
            if hasattr(module, "randn_tensor")
            else _nothing()
        )
        options = {} if eta is None else {"eta": eta}
        with patched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for j in scheduler.timesteps:
                k = len(task.t) - 1 - int(j)
                eps = (x - alpha[k] * task.denoise(x, task.t[k])) / sigma[k]
                x = scheduler.step(eps, j, x, **options).prev_sample
        return x

    return run


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# azula: any alpha(t), sigma(t)


def azula_sampler(
    name: str,
    t: Tensor,
    schedule: Callable[[Tensor], tuple[Tensor, Tensor]],
    mean: Callable[[Tensor, Tensor], Tensor],
    **options: Any,
) -> Any:
    """A sampler on the nodes `t`; `mean(x, t)` is the denoiser."""
    sample, denoise = _import("azula", "azula.sample"), _import("azula", "azula.denoise")
    parent = getattr(sample, name)

    class Model(denoise.Denoiser):
        def forward(self, x_t: Tensor, time: Tensor) -> Any:
            return denoise.DiracPosterior(mean=mean(x_t, time))

    model = Model()
    model.schedule = schedule
    placed = type(name, (parent,), {"timesteps": property(lambda self: t)})
    return placed(model, steps=len(t) - 1, silent=True, **options)


def azula(name: str, **options: Any) -> Peer:
    """A sampler of azula.sample."""

    def run(task: Task, x: Tensor) -> Tensor:
        def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
            return task.sde.alpha(t).to(x), task.sde.sigma(t).to(x)

        sampler = azula_sampler(name, task.t.to(x.device), schedule, task.denoise, **options)
        with mock.patch.object(torch, "randn_like", task.source()):
            return sampler(x)

    return run


# torchdiffeq: the probability flow in t


def torchdiffeq(method: str, **options: Any) -> Peer:
    """A fixed-step method of odeint, one step from node to node."""

    def run(task: Task, x: Tensor) -> Tensor:
        odeint = _import("torchdiffeq", "torchdiffeq").odeint
        nodes = task.t.to(x.device)

        def velocity(t: Tensor, y: Tensor) -> Tensor:
            rate, g2 = task.sde.rates(t)
            score = (task.sde.alpha(t) * task.denoise(y, t) - y) / task.sde.sigma(t) ** 2
            return (rate * y - g2 / 2 * score).to(y)

        control = {"grid_constructor": lambda f, y, t: nodes, **options}
        return odeint(velocity, x, nodes[[0, -1]], method=method, options=control)[-1]

    return run


class _Given(BaseDenoiser):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.sde, self.task = task.sde, task

    def forward(self, x: Tensor, t: Time) -> Tensor:
        return self.task.denoise(x, wide(t))


def torchsde(method: str) -> Peer:
    """A method of sdeint on the reverse SDE, one step from node to node, in the form in which it takes the
    fewest calls."""

    def run(task: Task, x: Tensor) -> Tensor:
        noise = task.source() if task.noise is None else task.noise
        solver = torchsde_solver(method)
        return solver.solve(_Given(task), x, task.t, noise=lambda k, shape: noise(k)).x

    return run


@dataclass(frozen=True)
class Public:
    """A public sampler that takes `each` calls a step and `start` more."""

    run: Peer
    each: int = 1
    start: int = 0

    def steps_for(self, calls: int) -> int:
        """The largest number of steps that takes at most `calls` calls, or less than 1."""
        return (calls - self.start) // self.each


ODE: dict[str, Public] = {  # the deterministic samplers that people use
    "k-diffusion euler": Public(k_diffusion("euler")),
    "k-diffusion heun": Public(k_diffusion("heun"), 2),
    "k-diffusion dpm_2": Public(k_diffusion("dpm_2"), 2),
    **{f"k-diffusion lms-{p}": Public(k_diffusion("lms", order=p)) for p in (2, 3, 4)},
    "k-diffusion dpmpp_2m": Public(k_diffusion("dpmpp_2m")),
    "k-diffusion dpmpp_3m": Public(k_diffusion("dpmpp_3m_sde", eta=0.0)),
    "k-diffusion dpm_fast": Public(k_diffusion("dpm_fast")),
    "diffusers DDIM": Public(diffusers("DDIMScheduler", eta=0.0)),
    # its first step is taken twice
    "diffusers PNDM": Public(diffusers("PNDMScheduler", skip_prk_steps=True), 1, 1),
    **{f"diffusers DEIS-{p}": Public(diffusers("DEISMultistepScheduler", solver_order=p)) for p in (2, 3)},
    **{
        f"diffusers DPM{plus}{p}M": Public(
            diffusers("DPMSolverMultistepScheduler", solver_order=p, algorithm_type=f"dpmsolver{plus}")
        )
        for p in (2, 3)
        for plus in ("", "++")
    },
    **{
        f"diffusers UniPC-{p} {rule}": Public(
            diffusers("UniPCMultistepScheduler", solver_order=p, solver_type=rule)
        )
        for p in (1, 2, 3)
        for rule in ("bh1", "bh2")
    },
    "azula Euler": Public(azula("EulerSampler")),
    "azula Heun": Public(azula("HeunSampler"), 2),
    **{
        f"azula {q}-{p}": Public(azula(f"{q}Sampler", order=p))
        for q in ("zAB", "vAB", "zEAB", "xEAB", "REAB")
        for p in (2, 3, 4)
    },
    **{
        f"torchdiffeq {method}": Public(torchdiffeq(method), each)
        for method, each in (("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4))
    },
    # the first two steps are rk4's
    "torchdiffeq explicit_adams": Public(torchdiffeq("explicit_adams", max_order=4), 1, 6),
}
ETAS = (1.0, 0.5, 0.1, 0.02)  # noise levels: the eta of each library, from the reverse SDE towards the ODE

SDE: dict[str, Public] = {  # the stochastic samplers that people use
    **{
        f"k-diffusion {name} eta={eta}": Public(k_diffusion(name.split()[0], path, eta=eta, **options), each)
        for name, each, path, options in (
            ("euler_ancestral", 1, False, {}),
            ("dpm_2_ancestral", 2, False, {}),
            ("dpmpp_2s_ancestral", 2, False, {}),
            ("dpmpp_sde", 2, True, {}),
            ("dpmpp_2m_sde midpoint", 1, False, {"solver_type": "midpoint"}),
            ("dpmpp_2m_sde heun", 1, False, {"solver_type": "heun"}),
            ("dpmpp_3m_sde", 1, False, {}),
        )
        for eta in ETAS
    },
    **{f"k-diffusion heun churn={c}": Public(k_diffusion("heun", s_churn=c), 2) for c in (1.0, 10.0)},
    "diffusers DDPM": Public(diffusers("DDPMScheduler")),
    **{f"diffusers DDIM eta={eta}": Public(diffusers("DDIMScheduler", eta=eta)) for eta in ETAS},
    **{
        f"diffusers SDE-DPM++{p}M": Public(
            diffusers("DPMSolverMultistepScheduler", solver_order=p, algorithm_type="sde-dpmsolver++")
        )
        for p in (2, 3)
    },
    **{
        f"diffusers SA-{p} tau={tau:.2g}": Public(
            diffusers(
                "SASolverScheduler",
                predictor_order=p,
                corrector_order=p,
                tau_func=lambda t, tau=tau: torch.tensor(tau, dtype=torch.float64),
            )
        )
        for p in (2, 3)
        for tau in (math.sqrt(eta) for eta in ETAS)
    },
    "azula DDPM": Public(azula("DDPMSampler")),
    **{f"azula DDIM eta={eta}": Public(azula("DDIMSampler", eta=eta)) for eta in ETAS},
    **{f"azula Ito eta={eta}": Public(azula("ItoSampler", eta=eta)) for eta in ETAS},
    **{
        f"torchsde {method}": Public(torchsde(method), each, start)
        for method, each, start in (
            ("euler", 1, 0),
            ("srk", 2, 0),
            ("heun", 2, 0),
            ("midpoint", 2, 0),
            ("reversible_heun", 1, 1),
        )
    },
}
