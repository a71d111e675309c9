"""Inputs that are wrong, one argument at a time, for the public functions; and whether the error says so.

A case is a call that must not return. It is

    clear     if it ends in a ValueError, TypeError or FloatingPointError of the library that says what was
              expected and what was found (or in Python's own for an argument or an operator that does not
              exist), after at most one network call
    obscure   if it ends in any other exception
    silent    if it returns
    hang      if it takes more than `LIMIT` seconds of CPU time
"""

from __future__ import annotations

import copy
import functools
import math
import re
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import scoresde
from scoresde import (
    DDPM,
    EDM,
    VESDE,
    VPSDE,
    Denoiser,
    Grid,
    Karras,
    Rectified,
    SubVPSDE,
    Tableau,
    checkpoint,
    decode,
    encode,
    energy,
    grids,
    guidance,
    likelihood,
    losses,
    networks,
    sample,
    schedules,
    solvers,
    train,
)
from scoresde.laws import Empirical, Gaussian, Mixture
from scoresde.noise import BrownianPath, Noise

LIMIT = 5.0
PACKAGE = str(Path(scoresde.__file__).parent)

NAN, INF = math.nan, math.inf
COUNTS = (0, -1, 2.5, NAN, "3", None, True)  # where a whole number of at least 1 belongs
POSITIVE = (0.0, -1.0, NAN)  # where a positive number belongs
TIMES = (-0.1, NAN, torch.tensor(1), torch.tensor([True, False]), "now", None)


class Case(NamedTuple):
    name: str
    call: Callable[[], Any]


class Outcome(NamedTuple):
    """`kind` is "clear", "obscure", "silent" or "hang"."""

    name: str
    kind: str
    detail: str


class Linear(nn.Module):
    """A network that counts its calls; `change` is what it does wrong."""

    calls = 0  # of all networks here

    def __init__(self, change: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.weight, self.change = nn.Parameter(torch.tensor(0.5)), change

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Any:
        Linear.calls += 1
        return self.change(self.weight * x)


def varied(
    name: str, function: Callable[..., Any], good: Mapping[str, Any], **bad: Sequence[Any]
) -> list[Case]:
    """One case for each bad value of each argument, the others being good."""
    return [
        Case(
            f"{name}({argument}={_shown(value)})",
            functools.partial(function, **{**good, argument: value}),
        )
        for argument, values in bad.items()
        for value in values
    ]


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 4:
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))
    return text if len(text) <= 60 else f"{text[:35]}...{text[-22:]}"


def import_all() -> None:
    """What is imported where it is first used; that takes seconds, and adds warning filters."""
    import scipy.integrate  # noqa: F401
    import torchsde  # noqa: F401

    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])


def cases() -> list[Case]:
    """All of them."""
    import_all()
    found = [
        *_schedules(),
        *_processes(),
        *_chains(),
        *_laws(),
        *_denoisers(),
        *_grids(),
        *_solvers(),
        *_sampling(),
        *_guided(),
        *_densities(),
        *_noise(),
        *_tables(),
        *_networks(),
        *_training(),
        *_files(),
    ]
    names = [case.name for case in found]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two cases of one name: {sorted(twice)}"
    return found


def _schedules() -> Iterator[Case]:
    yield from varied(
        "Linear",
        schedules.Linear,
        {},
        beta_min=(-0.1, NAN, INF, "0.1", None),
        beta_max=(0.0, -1, NAN, INF, "20"),
    )
    yield from varied("VPSDE", VPSDE, {}, beta_min=(-1.0, NAN), beta_max=(0.0, NAN), schedule=("linear", 3))
    yield from varied("SubVPSDE", SubVPSDE, {}, beta_min=(-1.0,), beta_max=(-20.0,))
    yield from varied("Cosine", schedules.Cosine, {}, s=(-0.1, NAN, "a"), log_snr_min=(NAN, 20.0, -1e4, -INF))
    sigmoid = functools.partial(varied, "Sigmoid", schedules.Sigmoid, {})
    yield from sigmoid(
        start=(4.0, NAN, -INF), end=(-4.0, NAN, INF), tau=(*POSITIVE, 1e-9), log_snr_min=(NAN, 50.0)
    )
    nodes = ([], [0.0], [0.0, 0.0], [0.0, 1.0, 0.5], [0.1, 1.0], [0.0, NAN], [0.0, INF], "ab", 3)
    yield from varied("Tabulated", schedules.Tabulated, {}, nodes=nodes)
    yield from varied("Learned", schedules.Learned, {}, log_snr_max=(-20.0, NAN), hidden=(0, -1, 2.5))
    for make in (VESDE, EDM):
        yield from varied(
            make.__name__, make, {}, sigma_min=(0.0, -1.0, NAN, 1e3, "1"), sigma_max=(0.0, -1.0, NAN, INF)
        )
    betas = ([], [0.0, 0.1], [0.1, 1.0], [-0.1], [NAN, 0.1], [[0.1, 0.2]], 0.1, "betas", None)
    yield from varied("VPSDE.from_betas", VPSDE.from_betas, {}, betas=betas)
    yield from varied("VPSDE.betas", VPSDE().betas, {"n": 10}, n=COUNTS, rule=("Euler", None, 3))
    yield Case("VPSDE.betas(10, 'euler')", lambda: VPSDE().betas(10, "euler"))
    yield Case("SubVPSDE.betas(10)", lambda: SubVPSDE().betas(10))


def processes() -> dict[str, Any]:
    return {
        "VP": VPSDE(),
        "sub-VP": SubVPSDE(),
        "cosine": VPSDE(schedule=schedules.Cosine()),
        "table": VPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000)),
        "VE": VESDE(),
        "EDM": EDM(),
        "Rectified": Rectified(),
    }


def _processes() -> Iterator[Case]:
    x = torch.zeros(2, 3)
    for name, sde in processes().items():
        for method in ("alpha", "sigma", "log_snr", "diffusion"):
            yield from varied(f"{name}.{method}", getattr(sde, method), {}, t=TIMES)
        yield from varied(f"{name}.marginal", sde.marginal, {"x0": x, "t": 0.5}, t=(-1.0, NAN, torch.rand(3)))
        yield from varied(f"{name}.marginal", sde.marginal, {"x0": x, "t": 0.5}, x0=(x.long(), x.byte()))
        yield from varied(f"{name}.drift", sde.drift, {"x": x, "t": 0.5}, t=(torch.rand(3),), x=(x.long(),))
        if name in ("cosine", "Rectified"):  # others have a meaning beyond t_max
            yield from varied(f"{name}.marginal", sde.marginal, {"x0": x}, t=(1.1, torch.tensor([0.5, 1.5])))
        yield from varied(
            f"{name}.transition", sde.transition, {"s": 0.3, "t": 0.6}, s=(0.9, NAN), t=(0.1, NAN)
        )
        bridge = {"x0": x, "xt": x, "s": 0.3, "t": 0.6}
        yield from varied(f"{name}.bridge", sde.bridge, bridge, s=(0.9, -1.0, NAN), xt=(x.long(),))
        yield from varied(f"{name}.time", sde.time, {}, log_snr=("1", None, torch.tensor(1)))


def _chains() -> Iterator[Case]:
    chain, x = DDPM(torch.linspace(1e-4, 0.02, 100)), torch.zeros(2, 3)
    yield from varied("DDPM", DDPM, {}, betas=([], [0.0], [1.0], [-0.1], [NAN], [[0.1]], 0.5, "betas", None))
    logs = (torch.zeros(3), torch.tensor([0.1]), torch.tensor([NAN]), torch.zeros(0), -torch.ones(2, 2))
    yield from varied("DDPM.from_log_alphas", DDPM.from_log_alphas, {}, log_alphas=logs)
    indices = (0, -1, 101, 1.5, True, torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3]), "1", None)
    for method in ("posterior", "marginal", "mean_from_noise", "mean_from_score"):
        second = {"posterior": "x_0", "mean_from_noise": "eps", "mean_from_score": "score"}
        first = "x_0" if method == "marginal" else "x_t"
        good = {first: x, "i": 5} | ({second[method]: x} if method in second else {})
        yield from varied(f"DDPM.{method}", getattr(chain, method), good, i=indices)
        yield from varied(f"DDPM.{method}", getattr(chain, method), good, **{first: (x.long(),)})
    yield from varied(
        "DDPM.transition", chain.transition, {"x_j": x, "j": 3, "i": 9}, j=(9, 50, -1), i=(2, 0, 101)
    )
    kept = ([], [0], [1, 1], [2, 1], [101], [1.5], "12", None)
    yield from varied("DDPM.respace", chain.respace, {}, indices=kept)
    yield from varied("discretize", scoresde.discretize, {"sde": VPSDE(), "n": 10}, n=COUNTS, rule=("exakt",))
    yield Case("discretize(VESDE)", lambda: scoresde.discretize(VESDE(), 10))  # pyright: ignore[reportArgumentType]


def _laws() -> Iterator[Case]:
    plane = {"mean": [0.0, 0.0], "cov": 1.0}
    means = ([NAN, 0.0], [INF, 0.0], [], "mean", None)
    covs = (
        -1.0,
        NAN,
        INF,
        [1.0, 2.0, 3.0],
        [1.0, -1.0],
        [[1.0, 0.5], [0.4, 1.0]],
        [[1.0, 2.0], [2.0, 1.0]],
        "c",
        None,
    )
    yield from varied("Gaussian", Gaussian, plane, mean=means, cov=covs)
    mixture = {"weights": [0.5, 0.5], "means": [[0.0], [1.0]], "covs": 0.1}
    weights = ([0.5], [0.5, 0.6], [-0.5, 1.5], [NAN, 1.0], [], 1.0, "w", None)
    yield from varied(
        "Mixture",
        Mixture,
        mixture,
        weights=weights,
        means=(0.0, [], [[NAN], [0.0]], "m"),
        covs=(-0.1, NAN, [0.1] * 3),
    )
    points = ([], 0.0, [[NAN]], "points", None)
    yield from varied("Empirical", Empirical, {"points": [[0.0], [1.0]]}, points=points, weights=weights[:-1])
    law = Gaussian([0.0, 1.0], 0.5)
    yield from varied("Gaussian.sample", law.sample, {}, n=(-1, 2.5, "2", None))
    events = (torch.zeros(2), torch.zeros(3, 3), torch.zeros(3, 2).long(), torch.zeros(3, 2, 1))
    yield from varied("Gaussian.log_prob", law.log_prob, {}, x=events)
    yield Case("Empirical.log_prob", lambda: Empirical([[0.0, 1.0]]).log_prob(torch.zeros(1, 2)))
    yield from varied(
        "Gaussian.marginal", law.marginal, {"sde": VPSDE()}, t=(-1.0, NAN, torch.rand(2), torch.tensor(1))
    )
    seen = {"y": [0.0], "A": [[1.0, 0.0]], "noise_var": 0.1}
    yield from varied(
        "Gaussian.posterior",
        law.posterior,
        seen,
        y=([0.0, 1.0], [NAN]),
        A=([[1.0]], [1.0, 0.0]),
        noise_var=POSITIVE,
    )
    yield from varied("Gaussian.to", lambda dtype: law.to(dtype), {}, dtype=(torch.long, torch.bool))
    exact = law.denoiser(VPSDE())
    yield from varied("exact denoiser", exact, {"t": 0.5}, x=events)
    yield from varied("exact denoiser", exact, {"x": torch.zeros(2, 2)}, t=(*TIMES, torch.rand(3)))
    yield from varied("exact score", exact.score, {"x": torch.zeros(2, 2)}, t=(-1.0, NAN, torch.rand(3)))


def _denoisers() -> Iterator[Case]:
    x, sde = torch.zeros(2, 3), VPSDE()
    good = {"network": Linear(), "sde": sde}
    yield from varied(
        "Denoiser",
        Denoiser,
        good,
        predicts=("eps", "Noise", 3, None),
        time_input=("time", 1, None),
        network=("unet", None),
        sde=("vp", None, schedules.Linear()),
    )
    yield from varied("Karras", Karras, {}, sigma_data=(*POSITIVE, INF, "1"))
    model = Denoiser(Linear(), sde)
    for name in ("noise", "score", "velocity"):
        view = getattr(model, name)
        yield from varied(
            f"Denoiser.{name}", view, {"x": x}, t=(-0.1, NAN, torch.rand(3), torch.tensor(1), "t")
        )
    yield from varied("Denoiser", model, {"t": 0.5}, x=(x.long(), x.byte(), None))
    yield from varied("Denoiser", model, {"x": x, "t": 0.5}, labels=(torch.tensor([1, 2]),))
    yield Case("score without noise", lambda: model.score(x, 0.0))
    yield Case("data from noise without signal", lambda: Denoiser(Linear(), Rectified())(x, 1.0))
    yield Case("log_snr as input without noise", lambda: Denoiser(Linear(), sde, "data", "log_snr")(x, 0.0))
    for name, change in OUTPUTS.items():
        yield Case(f"network that returns {name}", functools.partial(_drawn, solvers.dpmpp(), Linear(change)))
        yield Case(
            f"called network that returns {name}", functools.partial(Denoiser(Linear(change), sde), x, 0.5)
        )


# What a network may return by mistake for an input (2, 3, 4, 4).
OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "one sample": lambda x: x[:1],
    "one channel": lambda x: x[:, :1],
    "twice the channels": lambda x: torch.cat([x, x], 1),
    "an axis more": lambda x: x.expand(5, *x.shape),
    "a number": lambda x: x.sum(),
    "a mean image": lambda x: x.mean((-1,), keepdim=True),
    "flat": lambda x: x.flatten(1)[:, :, None],
    "a tuple": lambda x: (x, x),
    "an object": lambda x: {"sample": x},
    "None": lambda x: None,
    "an array": lambda x: x.detach().numpy(),
}
NOT_FINITE: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda x: x * NAN,
    "inf": lambda x: x + INF,
    "one NaN": lambda x: torch.where(torch.arange(x.numel()).view(x.shape) == 1, NAN, x),
}


def _drawn(solver: Any, network: nn.Module, predicts: str = "noise", **options: Any) -> Any:
    model = Denoiser(network, VPSDE(), predicts)
    return sample(model, (2, 3, 4, 4), solver, **{"steps": 4, **options})


GRIDS = ("uniform", "power", "quadratic", "log_snr", "karras")


def _grids() -> Iterator[Case]:
    for name in GRIDS:
        good = {"sde": VPSDE(), "steps": 5}
        yield from varied(
            f"grids.{name}",
            getattr(grids, name),
            good,
            steps=COUNTS,
            end=(NAN, 1.0, 2.0, -0.5, "0"),
            sde=("vp", None),
        )
    yield from varied("grids.karras", grids.karras, {"sde": VPSDE(), "steps": 5}, rho=(*POSITIVE, INF, "7"))
    yield from varied("grids.power", grids.power, {"sde": VPSDE(), "steps": 5}, exponent=(*POSITIVE, INF))
    yield from varied("grids.karras", grids.karras, {"sde": EDM(), "steps": 5}, end=(1e-4, 80.0, 100.0, -1.0))
    table = VPSDE.from_betas(torch.linspace(1e-4, 0.02, 100))
    chain = {"sde": table, "steps": 5}
    yield from varied(
        "grids.ddpm",
        grids.ddpm,
        chain,
        steps=(*COUNTS, 101),
        spacing=("Leading", 1, None),
        sde=(VPSDE(), EDM()),
        end=(2.0,),
    )
    for times in (
        [],
        [1.0],
        [0.1, 1.0],
        [1.0, 0.5, 0.5],
        [1.0, 0.0, 0.0],
        [1.0, NAN, 0.1],
        [2.0, 0.5],
        [1.0, -0.1],
        [INF, 0.5],
        [[1.0, 0.5]],
        [1.0, 1.0, 0.0],
    ):
        yield Case(
            f"Grid.of({times})", functools.partial(Grid.of, VPSDE(), torch.tensor(times, dtype=torch.float64))
        )
    yield Case("Grid.of(EDM's grid)", lambda: Grid.of(VPSDE(), grids.karras(EDM(0.01, 1.0), 4)))
    yield from varied("Grid.of", Grid.of, {"sde": VPSDE()}, t=("times", None, 3))


def _solvers() -> Iterator[Case]:
    orders = (0, -1, 9, 2.5, True, "2", None)
    for name in ("dpm", "dpmpp", "sde_dpmpp", "unipc", "deis", "adams", "seeds", "er_sde"):
        yield from varied(f"solvers.{name}", getattr(solvers, name), {}, order=orders)
    for name in ("dpm", "dpmpp", "sde_dpmpp", "unipc", "adams", "er_sde"):
        yield from varied(f"solvers.{name}", getattr(solvers, name), {}, rule=("bh3", "Exact", None))
    yield from varied("solvers.sde_dpmpp", solvers.sde_dpmpp, {}, eta=(-0.1, NAN, INF, "1"))
    yield Case("solvers.dpmpp(3, singlestep, bh2)", lambda: solvers.dpmpp(2, True, "bh2"))
    yield Case("solvers.sde_dpmpp(3, singlestep)", lambda: solvers.sde_dpmpp(3, singlestep=True))
    yield from varied("solvers.deis", solvers.deis, {}, variable=("rho", None))
    yield from varied("solvers.unipc", solvers.unipc, {}, stored=("x0", None))
    yield from varied(
        "solvers.sa", solvers.sa, {}, order=orders, corrector=(-1, 9, 2.5), tau=(-1.0, NAN, INF, "1")
    )
    yield from varied(
        "solvers.exponential",
        solvers.exponential,
        {},
        order=orders,
        corrector=(-1, 9, 1.5),
        stored=("x0", 3),
        variable=("rho",),
        tau=(-1.0, NAN),
        rule=("midpoint",),
    )
    yield from varied("solvers.ddim", solvers.ddim, {}, eta=(-0.1, 1.1, NAN, "0"))
    yield from varied("solvers.ddpm", solvers.ddpm, {}, variance=("fixed", None, 1), rule=("song", None))
    for name in ("euler_maruyama", "reverse_diffusion"):
        yield from varied(f"solvers.{name}", getattr(solvers, name), {}, rule=("song", None, 1))
    yield from varied(
        "solvers.edm",
        solvers.edm,
        {},
        churn=(-1, NAN),
        low=(-1, NAN, 60.0),
        high=(NAN, 0.01),
        spread=POSITIVE,
    )
    intervals = (
        [(0.3, 0.1, 2, 4)],
        [(0.1, 0.3, 0, 4)],
        [(0.1, 0.3, 2, 0)],
        [(0.1, 0.3)],
        [(NAN, 1.0, 1, 1)],
        3,
    )
    yield from varied("solvers.restart", solvers.restart, {}, intervals=intervals)
    yield from varied("solvers.dpm_fast", solvers.dpm_fast, {}, stored=("x0", None))
    yield from varied(
        "solvers.reversible", solvers.reversible, {}, order=(0, 3, "2"), coupling=(*POSITIVE, 1.1, "1")
    )
    tolerances = (-1e-3, 0.0, NAN, 1.0, INF, "tight", None)
    both = {"rtol": 0.0, "atol": 0.0}
    yield from varied(
        "solvers.adaptive_ode", solvers.adaptive_ode, both, rtol=tolerances, order=(0, 7, 2.5, "5")
    )
    yield from varied(
        "solvers.adaptive_sde", solvers.adaptive_sde, both, rtol=tolerances, atol=(-1.0, NAN, INF)
    )
    for name in ("adaptive_ode", "adaptive_sde", "scipy_ode", "torchsde_solver"):
        yield from varied(f"solvers.{name}", getattr(solvers, name), {}, max_calls=COUNTS)
    yield from varied(
        "solvers.scipy_ode", solvers.scipy_ode, {}, method=("rk45", "Euler", None), rtol=tolerances
    )
    yield from varied(
        "solvers.torchsde_solver", solvers.torchsde_solver, {}, method=("Euler", "rk4", None), atol=(-1.0,)
    )
    yield Case("torchsde_solver('srk', adaptive)", lambda: solvers.torchsde_solver("srk", True))
    corrected = {"predictor": solvers.ddim()}
    yield from varied(
        "solvers.predictor_corrector",
        solvers.predictor_corrector,
        corrected,
        corrector_steps=(-1, 1.5, True, "1"),
        snr=(*POSITIVE, INF),
        norm=("l2", None),
        predictor=("ddim", None, solvers.adaptive_ode()),
    )
    yield from varied(
        "solvers.annealed_langevin",
        solvers.annealed_langevin,
        {},
        steps_per_level=COUNTS,
        step=(*POSITIVE, INF),
    )
    for name in ("langevin", "mala"):
        chain = {
            "model": Gaussian([0.0, 0.0], 1.0).denoiser(VPSDE()),
            "x": torch.zeros(2, 2),
            "t": 0.5,
            "step": 0.1,
            "steps": 2,
            "noise": Noise.of(0, batch=2),
        }
        steps = (*POSITIVE, INF, torch.ones(3), "0.1", None)
        yield from varied(
            f"solvers.{name}",
            getattr(solvers, name),
            chain,
            step=steps,
            steps=COUNTS,
            t=(0.0, -0.1, 1.5, NAN),
        )
    yield Case(
        "mala without log_prob",
        lambda: solvers.mala(
            Denoiser(Linear(), VPSDE()), torch.zeros(2, 2), 0.5, step=0.1, steps=2, noise=Noise.of(0, batch=2)
        ),
    )
    yield from varied("solvers.from_tableau", solvers.from_tableau, {}, table=("table", None))
    for solver in (solvers.dpmpp(), solvers.heun(), solvers.reversible(), solvers.torchsde_solver("srk")):
        yield from varied(f"{solver}.steps_for", solver.steps_for, {}, calls=(0, -1, NAN, "20", None))


def _sampling() -> Iterator[Case]:
    law = Gaussian([0.0, 1.0], 0.5).denoiser(VPSDE())
    good = {"model": law, "shape": (2, 2), "solver": solvers.dpmpp(), "steps": 4}
    shapes = ((), (2,), (-1, 2), (2.5, 2), "ab", None, 4, (True, 2), (2, 3), (2, 2, 2))
    yield from varied(
        "sample",
        sample,
        good,
        shape=shapes,
        steps=COUNTS,
        end=(NAN, 1.0, 2.0, -1.0, "0"),
        seed=(0.5, "0", 2**64, None),
        solver=("dpmpp", None, solvers.dpmpp, 3),
        model=(Linear(), None, Gaussian([0.0], 1.0), lambda x, t: x),
        ids=([0], [0, 1, 2], [0.5, 1.5], torch.zeros(2), [[0, 1]], "01", 2),
        dtype=(torch.float16, torch.bfloat16, torch.long, torch.complex64, "float32"),
        device=("tpu", 3.5),
        grid=("karras", [0.1, 1.0], torch.tensor([0.0, 1.0]), torch.tensor([1.0, NAN]), 5),
        condition=([1], "label", 3),
        callback=(3, "print"),
        progres=(True,),
    )
    yield Case(
        "sample(grid that ends elsewhere)",
        lambda: sample(law, (2, 2), solvers.ddim(), grid=grids.uniform(VPSDE(), 4), end=0.5),
    )
    yield Case(
        "sample(grid of another process)",
        lambda: sample(law, (2, 2), solvers.ddim(), grid=grids.karras(EDM(0.01, 1.0), 4)),
    )
    yield Case(
        "sample(condition that the network does not take)",
        lambda: _drawn(solvers.ddim(), Linear(), condition={"labels": torch.zeros(2)}),
    )
    for name, solver in {
        "table": solvers.unipc(),
        "stochastic": solvers.ddpm(),
        "corrected": solvers.predictor_corrector(solvers.ddim()),
        "reversible": solvers.reversible(),
        "external": solvers.torchsde_solver(),
    }.items():
        for what, change in {
            **NOT_FINITE,
            "one sample": OUTPUTS["one sample"],
            "None": OUTPUTS["None"],
        }.items():
            yield Case(
                f"sample({name} solver, network returns {what})",
                functools.partial(_drawn, solver, Linear(change)),
            )
    for name, solver in {
        "ode": solvers.adaptive_ode(),
        "sde": solvers.adaptive_sde(),
        "scipy": solvers.scipy_ode(),
    }.items():
        for what in ("one sample", "one channel", "a number", "None", "a tuple"):
            call = functools.partial(_drawn, solver, Linear(OUTPUTS[what]))
            yield Case(f"sample({name}, network returns {what})", call)
    yield Case(
        "sample(noise without signal)",
        lambda: sample(Denoiser(Linear(), Rectified()), (2, 3), solvers.ddim(), steps=4),
    )
    yield Case(
        "torchsde from alpha = 0",
        lambda: sample(Denoiser(Linear(), Rectified(), "flow"), (2, 3), solvers.torchsde_solver(), steps=4),
    )
    yield Case(
        "ddpm(score_sde) off VP",
        lambda: sample(
            Gaussian([0.0, 1.0], 0.5).denoiser(EDM()), (2, 2), solvers.ddpm(rule="score_sde"), steps=4
        ),
    )
    yield Case(
        "ddpm(score_sde) with few steps", lambda: sample(law, (2, 2), solvers.ddpm(rule="score_sde"), steps=5)
    )
    x = torch.zeros(2, 2)
    for name, function, argument in (("encode", encode, "x"), ("decode", decode, "latent")):
        both = {"model": law, argument: x, "solver": solvers.ddim(), "steps": 4}
        yield from varied(
            name,
            function,
            both,
            **{argument: (x.long(), x.byte(), torch.zeros(2, 3), torch.zeros(2), None, "x")},
            steps=(0, 2.5),
            end=(NAN, 2.0),
            solver=("ddim", None),
            model=(None, Linear()),
        )
        yield Case(f"{name}(NaN)", functools.partial(function, law, x * NAN, solvers.ddim(), steps=4))
    for solver in (
        solvers.ddpm(),
        solvers.euler_maruyama(),
        solvers.adaptive_sde(),
        solvers.torchsde_solver(),
        solvers.predictor_corrector(solvers.ddim()),
        solvers.annealed_langevin(),
    ):
        yield Case(f"encode by {solver}", functools.partial(encode, law, x, solver, steps=4))
    yield Case("encode from end=0", lambda: encode(law, x, solvers.ddim(), steps=4, end=0.0))
    yield Case("reversible to end=0", lambda: sample(law, (2, 2), solvers.reversible(), steps=4, end=0.0))


def _guided() -> Iterator[Case]:
    law = Gaussian([0.0, 1.0], 0.5).denoiser(VPSDE())
    x, models, scales = torch.zeros(2, 2), (None, nn.Linear(2, 2), "model"), (NAN, INF, "2", None)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return -x.square().sum(1)

    by_classifier = {"model": law, "log_prob": log_prob, "scale": 1.0}
    yield from varied(
        "guidance.classifier",
        guidance.classifier,
        by_classifier,
        model=models,
        log_prob=(None, 3),
        scale=scales,
    )
    for name, wrong in {
        "one number": lambda x, t: x.sum(),
        "a number an element": lambda x, t: -x.square(),
    }.items():
        call = functools.partial(sample, guidance.classifier(law, wrong), (2, 2), solvers.ddim(), steps=3)
        yield Case(f"guidance by a log_prob of {name}", call)
    free = {"model": Denoiser(Linear(), VPSDE()), "scale": 2.0, "null": {"label": torch.tensor(-1)}}
    yield from varied(
        "guidance.classifier_free",
        guidance.classifier_free,
        free,
        model=models,
        scale=scales,
        null=({}, None, "label", [1]),
        rescale=(-0.1, 1.1, NAN),
    )
    yield Case(
        "guidance.classifier_free without a condition",
        lambda: sample(guidance.classifier_free(**free), (2, 2), solvers.ddim(), steps=3),  # pyright: ignore
    )
    yield from varied(
        "guidance.interval",
        guidance.interval,
        {"scale": 1.0, "low": 0.1, "high": 1.0},
        scale=scales[:2],
        low=(NAN, 2.0),
    )
    seen = {"model": law, "A": lambda x: x[:, :1], "y": torch.zeros(2, 1), "noise_var": 0.1}
    for name in ("linear_inverse", "pigdm", "dps"):
        make = getattr(guidance, name)
        yield from varied(
            f"guidance.{name}", make, seen, model=models, noise_var=(-1.0, NAN, INF), scale=scales
        )
    painted = {"model": law, "mask": torch.tensor([True, False]), "y": x}
    yield from varied("guidance.inpaint", guidance.inpaint, painted, model=models, noise_var=(-1.0, NAN))
    yield from varied(
        "energy.product", energy.product, {"models": [law, law]}, models=([], [None], [law, nn.Linear(2, 2)])
    )
    yield from varied(
        "energy.mixture",
        energy.mixture,
        {"models": [law, law]},
        models=([], [None]),
        weights=([1.0], [-1.0, 2.0]),
    )


def _densities() -> Iterator[Case]:
    law = Gaussian([0.0, 1.0], 0.5).denoiser(VPSDE())
    good = {"model": law, "x": torch.zeros(2, 2)}
    yield from varied(
        "likelihood.log_prob",
        likelihood.log_prob,
        good,
        x=(torch.zeros(2, 2).long(), torch.zeros(2), torch.zeros(2, 3)),
        end=(NAN, 2.0, 1.0, -0.5),
        tolerance=(0.0, -1.0, NAN),
        order=(0, 9, 2.5),
        max_calls=COUNTS,
        ids=([0], [0.5, 1.0]),
        seed=(0.5, 2**64),
    )
    yield from varied(
        "likelihood.elbo",
        likelihood.elbo,
        {**good, "decoder": likelihood.GaussianDecoder()},
        x=(torch.zeros(2, 2).long(), torch.zeros(2)),
        end=(NAN, 0.0, 2.0),
        draws=COUNTS,
        ids=([0],),
    )
    steps = (*POSITIVE, INF)
    yield from varied(
        "likelihood.DiscreteDecoder",
        likelihood.DiscreteDecoder,
        {"step": 0.1, "low": -1.0, "high": 1.0},
        step=steps,
    )


def _noise() -> Iterator[Case]:
    good = {"seed": 0, "batch": 2}
    yield from varied(
        "Noise.of",
        Noise.of,
        good,
        seed=(0.5, "0", 2**64, -(2**63) - 1, None),
        batch=(-1, 1.5, "2"),
        dtype=(torch.long, torch.complex64, "float32"),
        offset=(-1, 0.5, 2**63),
        ids=([1], [0.5, 1.0], torch.zeros(2)),
    )
    yield Case("Noise.of()", lambda: Noise.of(0))
    noise = Noise.of(0, batch=2)
    shapes = ((3, 2), (), (2, -1), (2, 1.5))
    yield from varied(
        "Noise", noise, {"row": 0, "shape": (2, 2)}, row=(-1, 0.5, "0", 2**63, torch.zeros(2)), shape=shapes
    )
    yield from varied("Noise.prior", noise.prior, {}, shape=shapes)
    yield from varied("Noise.words", noise.words, {"row": 0, "count": 1}, count=(-1, 0.5), row=(-1,))
    yield from varied("Noise.shift", noise.shift, {}, rows=(-1, 0.5, None))
    path = {"source": noise, "shape": (2, 2), "start": 0.0, "stop": 1.0}
    yield from varied(
        "BrownianPath",
        BrownianPath,
        path,
        shape=((3, 2), ()),
        start=(1.0, 2.0, NAN, -INF),
        stop=(0.0, INF, NAN),
        depth=(0, 61, 2.5),
        source=(None, 3),
    )
    brownian = BrownianPath(**path)
    yield from varied("BrownianPath()", brownian, {}, c=(-0.1, 1.1, NAN, torch.rand(3)))
    yield from varied(
        "BrownianPath.increment", brownian.increment, {"c_a": 0.1, "c_b": 0.2}, c_a=(-1.0, NAN), c_b=(2.0,)
    )
    clocks = ([], [0.5], [0.5, 0.5], [0.1, 0.5, 0.3], [0.0, 2.0], [0.0, NAN], [0.5, 0.5 + 1e-16])
    yield from varied("BrownianPath.noise", brownian.noise, {}, clock=clocks)


def _tables() -> Iterator[Case]:
    one = torch.ones(2)
    good = {
        "times": torch.tensor([1.0, 0.5, 0.1]),
        "skip": one,
        "out": one,
        "keep": one,
        "mix": one[:, None],
        "noise": one,
    }
    bad = {
        key: (torch.ones(3), torch.tensor([1.0, NAN]), "ab", None) for key in ("skip", "out", "keep", "noise")
    }
    mixes = (torch.ones(3, 1), one, torch.ones(2, 2), torch.zeros(2, 0))
    times = (torch.ones(2), torch.tensor([1.0, NAN, 0.0]))
    yield from varied("Tableau", Tableau, good, **bad, mix=mixes, times=times)
    table = Tableau(**good)
    texts = (
        "",
        "{}",
        "[]",
        "null",
        "text",
        '{"format": "scoresde.tableau/1"}',
        table.to_json()[:-9],
        None,
        table.to_json().replace("0.5", "NaN", 1),
    )
    yield from varied("Tableau.from_json", Tableau.from_json, {}, text=texts)
    yield Case("Tableau + from elsewhere", lambda: table + table)
    yield Case("Tableau + 3", lambda: table + 3)  # pyright: ignore[reportOperatorIssue]
    made = solvers.from_tableau(solvers.ddim().tableau(VPSDE(), grids.uniform(VPSDE(), 4)))
    yield Case("a table on other ends", lambda: _drawn(made, Linear(), end=0.3))
    for solver in (solvers.dpmpp(), solvers.ddpm(), solvers.heun(), solvers.restart()):
        yield from varied(
            f"{solver}.tableau", solver.tableau, {"sde": VPSDE()}, times=([0.1, 1.0], "times", None)
        )
    law, exact = Gaussian([0.0, 1.0], 0.5), solvers.ddim().tableau(VPSDE(), grids.uniform(VPSDE(), 4))
    yield from varied(
        "Tableau.law",
        exact.law,
        {"gaussian": law, "sde": VPSDE()},
        gaussian=(Mixture([1.0], [[0.0]], 1.0), None),
    )


def _networks() -> Iterator[Case]:
    sizes = (0, -1, 2.5, "8", True)
    yield from varied(
        "MLP",
        networks.MLP,
        {"dim": 2},
        dim=sizes,
        hidden=sizes,
        layers=sizes,
        dropout=(-0.1, 1.0, NAN, "0"),
        classes=(0, -1, 2.5),
        vector_dim=(0, -1),
        embedding=("cosine", None, 3),
        time_input=("time", None),
        out_dim=(0,),
    )
    small = {"channels": 1, "base": 8, "multipliers": (1,), "blocks": 1, "attention": (), "heads": 2}
    yield from varied(
        "UNet",
        networks.UNet,
        small,
        channels=sizes,
        base=sizes,
        blocks=sizes,
        multipliers=((), (0,), (1, 2.5), 3),
        heads=(0, 2.5),
        dropout=(1.0, -1.0),
        classes=(0,),
        embedding=("cosine",),
        time_input=("clock",),
        attention=((5,),),
    )
    yield Case(
        "UNet(heads that do not divide)", lambda: networks.UNet(**{**small, "attention": (0,), "heads": 3})
    )
    unet, mlp = networks.UNet(**small, classes=3), networks.MLP(2, hidden=8, classes=3)
    image, clock, vector = torch.zeros(2, 1, 8, 8), torch.rand(2), torch.zeros(2, 2)
    labels = (torch.tensor([0, 3]), torch.tensor([-2, 0]), torch.tensor([0]), torch.rand(2))
    yield from varied(
        "UNet()",
        unet,
        {"x": image, "time": clock},
        x=(image[:, :0], torch.zeros(2, 2, 8, 8), torch.zeros(2, 1, 7, 7)[..., 0]),
        time=(torch.rand(3), torch.rand(2, 1)),
        label=labels,
        vector=(torch.rand(2, 3),),
    )
    yield from varied(
        "MLP()",
        mlp,
        {"x": vector, "time": clock},
        x=(torch.zeros(2, 3), torch.zeros(2)),
        time=(torch.rand(3),),
        label=labels,
    )


def _training() -> Iterator[Case]:
    model = Denoiser(networks.MLP(2, hidden=8, layers=1), VPSDE())
    x = torch.zeros(8, 2)
    data = (x[:, 0], x[:0], x * NAN, x.long(), (x, torch.zeros(3)), None, 3, [])
    yield from varied(
        "train.fit",
        train.fit,
        {"model": model, "data": x, "steps": 2},
        data=data,
        steps=COUNTS,
        batch_size=COUNTS,
        lr=(*POSITIVE, INF, "1e-3"),
        warmup=(-1, NAN),
        weight_decay=(-1.0, INF),
        ema_decay=(-0.1, 1.1, NAN),
        label_dropout=(-0.1, 1.1),
        clip=POSITIVE,
        every=COUNTS,
        patience=COUNTS,
        precision=("int8", None),
        save_every=(5,),
        momentum=(0.9,),
        model=(nn.Linear(2, 2), None),
        resume=("/nonexistent/file",),
    )
    x, eps, t = torch.zeros(2, 3), torch.zeros(2, 3), torch.rand(2)
    good = {"model": model, "x0": torch.zeros(2, 2), "eps": torch.zeros(2, 2), "t": t}
    yield from varied(
        "losses.denoising", losses.denoising, good, t=(torch.rand(3), -t, t * NAN, torch.tensor([0, 1]))
    )
    yield from varied("losses.denoising", losses.denoising, good, x0=(torch.zeros(2, 2).long(),))
    yield Case("losses.implicit", lambda: losses.implicit(lambda x: x[:1], x))
    yield Case("losses.sliced", lambda: losses.sliced(lambda x: x[:, :1], x, eps))
    yield Case("losses.uniform_log_snr(Rectified)", lambda: losses.uniform_log_snr(Rectified(), t))


def _files() -> Iterator[Case]:
    model = Denoiser(networks.MLP(2, hidden=8, layers=1), VPSDE())
    folder = Path(tempfile.gettempdir()) / "scoresde-bad-inputs"
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.network.out.bias.fill_(NAN)  # pyright: ignore
    yield from varied(
        "checkpoint.save",
        checkpoint.save,
        {"path": folder / "a", "model": model},
        model=(bad,),
        metadata=({"x": {1, 2}}, {"x": NAN}),
        ema=(bad,),
    )
    yield Case(
        "checkpoint.save(own schedule)",
        lambda: checkpoint.save(
            folder / "a", Denoiser(model.network, VPSDE(schedule=type("Own", (schedules.Linear,), {})()))
        ),
    )
    for name in ("load", "describe"):
        yield from varied(
            f"checkpoint.{name}",
            getattr(checkpoint, name),
            {},
            path=(folder / "missing", "", "/", str(folder / "no/such")),
        )
    yield Case(
        "checkpoint.restore(missing)",
        lambda: checkpoint.restore(folder / "missing", model, copy.deepcopy(model)),
    )


# ---- judging


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds of CPU time; on POSIX, in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"not back after {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def judge(case: Case) -> Outcome:
    """Make the call and see how it ends."""
    Linear.calls = 0
    try:
        with limited(LIMIT):
            returned = case.call()
    except TimeoutError as error:
        return Outcome(case.name, "hang", str(error))
    except Exception as error:
        kind = "clear" if _clear(error) and Linear.calls <= 1 else "obscure"
        return Outcome(case.name, kind, f"{type(error).__name__}: {error} [{Linear.calls} calls]")
    return Outcome(case.name, "silent", f"returned {_shown(returned)}")


def _clear(error: Exception) -> bool:
    """Raised on purpose by the library, saying what was expected and what was found; or by Python, for an
    argument or an operator that does not exist."""
    if not isinstance(error, ValueError | TypeError | FloatingPointError):
        return False
    text = str(error)
    if isinstance(error, TypeError) and re.search(r"unexpected keyword argument|unsupported operand", text):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    says = re.search(r"expected|needs|cannot|belongs to|returned NaN or Inf|runs from", text) is not None
    return last.filename.startswith(PACKAGE) and (last.line or "").startswith("raise") and says
