"""Solvers of other libraries: scipy's on the probability-flow ODE, torchsde's on the reverse SDE.

They are wrapped so that they keep what the other solvers promise, and the docstrings say where they cannot.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, Conditioned
from ..grids import Grid
from ..noise import BrownianPath, Noise
from ..sde import LinearSDE, like
from ..tableau import NoiseSource, Step
from .base import Callback, Card, Samples, evaluating

OK, EXHAUSTED, STUCK, NOT_FINITE = "ok", "call limit reached", "step underflow", "network returned NaN or Inf"


class Halt(Exception):
    """Ends a run from inside the network call; the status is its argument."""


class Calls:
    """Counts network calls and halts a run whose calls are spent or whose output is not finite."""

    def __init__(self, limit: float | int = math.inf) -> None:
        self.limit, self.made = limit, 0

    def __call__(self, evaluate: Callable[[], Tensor]) -> Tensor:
        if self.made >= self.limit:
            raise Halt(EXHAUSTED)
        self.made += 1
        out = evaluate()
        if not bool(out.isfinite().all()):
            raise Halt(NOT_FINITE)
        return out


def _checked_control(rtol: float, atol: float, max_calls: int) -> None:
    # below 100 roundings scipy takes another tolerance than the one it was given
    if not (100 * np.finfo(float).eps <= rtol < 1 and 0 <= atol < math.inf):
        raise ValueError(f"expected 2.3e-14 <= rtol < 1 and 0 <= atol < inf, found rtol={rtol}, atol={atol}")
    if isinstance(max_calls, bool) or not isinstance(max_calls, int) or max_calls < 1:
        raise ValueError(f"expected a whole number of calls max_calls >= 1, found {max_calls!r}")


def _one_by_one(model: BaseDenoiser, batch: int) -> Iterator[tuple[slice, BaseDenoiser]]:
    """Every sample with its model: conditions that have one entry for each sample are split too."""
    for i in range(batch):
        rows = slice(i, i + 1)
        if isinstance(model, Conditioned):
            cond = {
                key: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
                for key, value in model.cond.items()
            }
            yield rows, model.model.given(**cond)
        else:
            yield rows, model


def _status(found: list[str]) -> str | tuple[str, ...]:
    return found[0] if len(set(found)) == 1 else tuple(found)


def _no_noise(sde: LinearSDE, t: float) -> bool:
    return float(sde.sigma(t)) == 0


# --- scipy ---------------------------------------------------------------------------------------------------

SCIPY = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")


@dataclass(frozen=True)
class ScipyODE:
    """See `scipy_ode`."""

    method: str
    rtol: float
    atol: float
    per_sample: bool
    max_calls: int
    card: Card = field(repr=False)

    def __repr__(self) -> str:
        options = f"rtol={self.rtol}, atol={self.atol}, per_sample={self.per_sample}, max_calls={self.max_calls}"
        return f"scipy_ode({self.method!r}, {options})"

    def steps_for(self, calls: int) -> int:
        """Steps follow the tolerance, not the grid: 1, for the two ends."""
        return 1

    def solve(
        self,
        model: BaseDenoiser,
        x: Tensor,
        times: Grid | Tensor,
        *,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Run from `x` (B, ...) at times[0] to times[-1], either way; `noise` is not used.

        The nodes between are only where the callback, if any, sees scipy's dense output, once the run is over;
        each costs a network call.
        """
        started = time.perf_counter()
        grid = Grid.of(model.sde, times)
        first, last = float(grid.t[0]), float(grid.t[-1])
        if _no_noise(model.sde, first):
            raise ValueError(f"expected to start at a time with noise, found t = {first}; encode from a later end")
        denoise = _no_noise(model.sde, last)
        stop = min(float(model.sde.default_end), first) if denoise else last
        nodes = [t for t in grid.t[:-1].tolist() if (t - stop) * (first - stop) > 0] if callback else []
        with torch.no_grad(), evaluating(model):
            parts = _one_by_one(model, len(x)) if self.per_sample else [(slice(None), model)]
            runs = [self._integrate(part, x[rows], first, stop, nodes, denoise) for rows, part in parts if x.numel()]
            calls, path = sum(run.calls for run in runs), []
            for k in range(min((len(run.dense) for run in runs), default=0)):
                state = torch.cat([run.dense[k] for run in runs])
                kept = callback(Step(k, nodes[k], state, model(state, nodes[k]))) if callback else None
                path.extend([] if kept is None else [kept])
                calls += 1
        result = torch.cat([run.x for run in runs]) if runs else x.clone()
        status = _status([run.status for run in runs]) if runs else OK
        return Samples(result, calls, time.perf_counter() - started, status, tuple(path), last)

    def _integrate(
        self, model: BaseDenoiser, x: Tensor, first: float, stop: float, nodes: list[float], denoise: bool
    ) -> ODERun:
        """One run of scipy's solver, step by step, on the flat float64 state."""
        import scipy.integrate

        calls, velocity = Calls(self.max_calls), model.sde.probability_flow(model)

        def tensor(y: np.ndarray) -> Tensor:
            return torch.from_numpy(y.astype(np.float64)).view(x.shape).to(x)

        def field(t: float, y: np.ndarray) -> np.ndarray:
            out = calls(lambda: velocity(tensor(y), float(t)))
            return out.to("cpu", torch.float64).numpy().ravel()

        y = x.to("cpu", torch.float64).numpy().ravel()
        dense: list[Tensor] = []
        try:
            solver = getattr(scipy.integrate, self.method)(field, first, y, stop, rtol=self.rtol, atol=self.atol)
            while solver.status == "running":
                solver.step()
                y = solver.y
                reached = [t for t in nodes[len(dense) :] if (t - solver.t) * (first - stop) >= 0]
                interpolant = solver.dense_output() if reached and solver.status != "failed" else None
                dense += [tensor(interpolant(t)) for t in reached] if interpolant else []
            if solver.status == "failed":
                return ODERun(tensor(y), STUCK, calls.made, dense)
            state = tensor(y)
            return ODERun(calls(lambda: model(state, stop)) if denoise else state, OK, calls.made, dense)
        except Halt as halt:
            return ODERun(tensor(y), str(halt), calls.made, dense)


class ODERun(NamedTuple):
    """Where a run ended and how; `dense` has the states at the nodes it passed."""

    x: Tensor
    status: str
    calls: int
    dense: list[Tensor]


def scipy_ode(
    method: str = "RK45",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    *,
    per_sample: bool = False,
    max_calls: int = 10000,
) -> ScipyODE:
    """The probability-flow ODE in t by a solver of `scipy.integrate`: the "black-box" sampler of Song et al.
    (2021, arXiv:2011.13456, section 4.3 and appendix D.4), who use RK45 at 1e-5.

    method      "RK23" | "RK45" | "DOP853" | "LSODA" | "Radau" | "BDF". The last two, and LSODA where it finds the
                problem stiff, estimate a Jacobian by one call for each number of the state: for small problems only
    rtol, atol  of the error per step, root mean square over the state. In float32 the network's rounding is
                about 1e-6 of the state: much smaller tolerances only chase it
    per_sample  False: one state for the batch, as everyone does: a sample then depends on its neighbours, by about
                the tolerance. True: one run for each sample, one after the other, so that it does not
    max_calls   of a run (of each sample if per_sample)

    Only the first and the last time of the grid matter. A run to sigma = 0 stops at `sde.default_end` and returns D
    there. `Samples.status` is "ok", "call limit reached", "step underflow" or "network returned NaN or Inf" (per
    sample a tuple); then x is the last accepted state. `network_calls` are all calls made. The state is
    float64 on the host, the network gets the dtype and device of x. Deterministic: it encodes as well.

    Raises ValueError for other methods, tolerances and limits.
    """
    if method not in SCIPY:
        raise ValueError(f"expected method to be one of {SCIPY}, found {method!r}")
    _checked_control(rtol, atol, max_calls)
    card = Card(None, None, 1, False, "Song et al. 2021, arXiv:2011.13456", frozenset(), "data")
    return ScipyODE(method, rtol, atol, per_sample, max_calls, card)


# --- torchsde ------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How torchsde wants the equation for a method, and what is known of the method for additive noise."""

    sde_type: str
    noise_type: str
    weak_order: int
    calls: int


# "additive" saves srk most of its calls, milstein the autograd through g, and adaptive euler a warning.
TORCHSDE = {
    "euler": Form("ito", "additive", 1, 1),
    "milstein": Form("ito", "additive", 1, 1),
    "srk": Form("ito", "additive", 2, 2),
    "euler_heun": Form("stratonovich", "diagonal", 1, 1),
    "heun": Form("stratonovich", "diagonal", 2, 2),
    "midpoint": Form("stratonovich", "diagonal", 2, 2),
    "log_ode": Form("stratonovich", "diagonal", 2, 2),
    "reversible_heun": Form("stratonovich", "diagonal", 1, 1),
}


class ReverseTime:
    """The reverse SDE as torchsde wants it: flat states (B, D) on the increasing clock s = -t, in float64 on the host.

    A call is remembered by state and time, so that none is made twice: torchsde asks for the shapes first, and srk
    and step doubling ask again for what they know.
    """

    def __init__(self, model: BaseDenoiser, shape: torch.Size, form: Form, calls: Calls) -> None:
        self.model, self.shape, self.calls = model, shape, calls
        self.sde_type, self.noise_type = form.sde_type, form.noise_type
        self.only_shape: float | None = None  # a time at which only the drift's shape is of interest
        self._known: list[tuple[float, Tensor, Tensor]] = []
        if form.noise_type == "additive":
            self.g_prod = lambda s, y, v: self._scale(s, y) * v
        else:
            self.g = lambda s, y: self._scale(s, y).expand_as(y)

    def score(self, s: Tensor, y: Tensor) -> Tensor:
        """score(y, t), of the shape of y."""
        for time_, state, value in self._known:
            if state is y and time_ == float(s):
                return value
        out = self.calls(lambda: self.model.score(y.view(self.shape), -s)).view(y.shape)
        self._known = [(float(s), y, out), *self._known[:3]]
        return out

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """-(f x - g^2 score)."""
        if float(s) == self.only_shape:
            return y
        rate, g2 = self.model.sde.rates(-s)
        return like(g2, y) * self.score(s, y) - like(rate, y) * y

    def _scale(self, s: Tensor, y: Tensor) -> Tensor:
        return like(self.model.sde.diffusion(-s), y)


class StepNoise(NamedTuple):
    """Brownian motion over step k of K: `W = h^(1/2) z_k`, `int W = h (W/2 + H)` with `H = (h/12)^(1/2) z_{K+k}`."""

    noise: NoiseSource
    k: int
    steps: int
    full: torch.Size
    levy_area_approximation = "foster"  # an area that noise of this kind never asks for

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.full[0], math.prod(self.full[1:])))

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        h = float(tb - ta)
        W = math.sqrt(h) * self.noise(self.k, self.full).reshape(self.shape)
        if not return_U:
            return (W, None) if return_A else W
        H = math.sqrt(h / 12) * self.noise(self.steps + self.k, self.full).reshape(self.shape)
        return W, h * (W / 2 + H)


class PathIncrements(NamedTuple):
    """Brownian motion over any interval."""

    path: BrownianPath
    levy_area_approximation = "foster"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.path.shape[0], math.prod(self.path.shape[1:])))

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        W = self.path.increment(float(ta), float(tb)).reshape(self.shape)
        return (W, None) if return_A else W


@dataclass(frozen=True)
class TorchSDE:
    """See `torchsde_solver`."""

    method: str
    adaptive: bool
    rtol: float
    atol: float
    per_sample: bool
    max_calls: int
    card: Card = field(repr=False)

    def __repr__(self) -> str:
        if not self.adaptive:
            return f"torchsde_solver({self.method!r})"
        options = f"rtol={self.rtol}, atol={self.atol}, per_sample={self.per_sample}, max_calls={self.max_calls}"
        return f"torchsde_solver({self.method!r}, adaptive=True, {options})"

    def steps_for(self, calls: int) -> int:
        """The largest number of grid steps that takes at most `calls` network calls; 1 if adaptive."""
        start = int(self.method == "reversible_heun")
        if self.adaptive:
            return 1
        if calls < self.card.calls_per_step + start:
            least = self.card.calls_per_step + start
            raise ValueError(f"expected at least {least} calls, the cost of one step of {self}; found {calls}")
        return (calls - start) // self.card.calls_per_step

    def solve(
        self,
        model: BaseDenoiser,
        x: Tensor,
        times: Grid | Tensor,
        *,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Run from `x` (B, ...) at times[0] to times[-1] with `noise(row, shape)`; see `torchsde_solver`."""
        started = time.perf_counter()
        grid = Grid.of(model.sde, times)
        if float(grid.t[0]) < float(grid.t[-1]):
            raise ValueError(
                f"{self} is stochastic and cannot run from data to noise: encode with a deterministic solver"
            )
        if noise is None:
            raise ValueError(f"{self} is stochastic: expected a noise source, found None")
        if float(model.sde.alpha(grid.t[0])) == 0:
            raise ValueError(
                f"expected a start with some signal, found alpha = 0 at t = {grid.t[0].item()}, "
                "where the SDE has infinite rates; start a little below"
            )
        run = self._adaptive if self.adaptive else self._fixed
        with torch.no_grad(), evaluating(model):
            return run(model, x, grid, noise, callback, started)

    def _fixed(
        self,
        model: BaseDenoiser,
        x: Tensor,
        grid: Grid,
        noise: NoiseSource,
        callback: Callback | None,
        started: float,
    ) -> Samples:
        """One call of sdeint for each step, with a first step that is longer than it: it ends exactly on the node."""
        denoise = _no_noise(model.sde, float(grid.t[-1]))
        K, calls, path = len(grid), Calls(), []
        steps = K - denoise
        sde = ReverseTime(model, x.shape, TORCHSDE[self.method], calls)
        y, extra = x.reshape(len(x), -1), None
        for k in range(K if x.numel() else 0):
            s, t = -grid.t[k], float(grid.t[k])
            try:
                if callback is not None:
                    score = sde.score(s, y)
                    denoised = (y + like(model.sde.sigma(t) ** 2, y) * score) / like(model.sde.alpha(t), y)
                    kept = callback(Step(k, t, y.view(x.shape), denoised.view(x.shape)))
                    path.extend([] if kept is None else [kept])
                if k == steps:
                    state = y.view(x.shape)
                    y = calls(lambda state=state, t=t: model(state, t)).reshape(y.shape)
                else:
                    clock = torch.stack([s, -grid.t[k + 1]])
                    sde.only_shape = None if extra is None else float(s)
                    y, extra = _sdeint(sde, y, clock, StepNoise(noise, k, K, x.shape), self.method, extra=extra)
            except Halt:
                raise FloatingPointError(
                    f"{self}: the network returned NaN or Inf at call {calls.made}, in the step from t = {t:.6g}; "
                    "check the model, its dtype and its inputs there"
                ) from None
        seconds, end = time.perf_counter() - started, float(grid.t[-1])
        return Samples(y.reshape(x.shape), calls.made, seconds, OK, tuple(path), end)

    def _adaptive(
        self,
        model: BaseDenoiser,
        x: Tensor,
        grid: Grid,
        noise: NoiseSource,
        callback: Callback | None,
        started: float,
    ) -> Samples:
        """One call of sdeint from end to end, for the batch or for each sample."""
        if not isinstance(noise, Noise):
            raise TypeError(f"expected a scoresde.noise.Noise to make a Brownian path from, found {noise!r}")
        first, last = float(grid.t[0]), float(grid.t[-1])
        parts = list(_one_by_one(model, len(x))) if self.per_sample else [(slice(None), model)]
        runs = [
            self._path(part, x[rows], grid, replace(noise, ids=noise.ids[rows])) for rows, part in parts if x.numel()
        ]
        calls, path = sum(run.calls for run in runs), []
        if callback is not None and runs:
            kept = callback(Step(0, first, x, model(x, first)))
            calls, path = calls + 1, [] if kept is None else [kept]
        result = torch.cat([run.x for run in runs]) if runs else x.clone()
        status = _status([run.status for run in runs]) if runs else OK
        return Samples(result, calls, time.perf_counter() - started, status, tuple(path), last)

    def _path(self, model: BaseDenoiser, x: Tensor, grid: Grid, noise: Noise) -> SDERun:
        first, last = float(grid.t[0]), float(grid.t[-1])
        denoise, calls = _no_noise(model.sde, last), Calls(self.max_calls)
        stop = min(float(model.sde.default_end), first) if denoise else last
        sde, span = ReverseTime(model, x.shape, TORCHSDE[self.method], calls), first - stop
        control = {"adaptive": True, "rtol": self.rtol, "atol": self.atol, "dt_min": 1e-12 * span}
        y = x.reshape(len(x), -1)
        try:
            if span:
                bm = PathIncrements(BrownianPath(noise, x.shape, -first, -stop))
                clock = torch.tensor([-first, -stop], dtype=torch.float64)
                y, _ = _sdeint(sde, y, clock, bm, self.method, dt=first - float(grid.t[1]), **control)
            state = y.reshape(x.shape)
            return SDERun(calls(lambda: model(state, stop)) if denoise else state, OK, calls.made)
        except Halt as halt:
            return SDERun(torch.full_like(x, math.nan), str(halt), calls.made)


class SDERun(NamedTuple):
    """Where a run ended and how."""

    x: Tensor
    status: str
    calls: int


def _sdeint(
    sde: ReverseTime, y: Tensor, clock: Tensor, bm: Any, method: str, *, extra: Any = None, **control: Any
) -> tuple[Tensor, Any]:
    """The state at the end of the clock, and the extra state that reversible_heun hands from step to step."""
    import torchsde

    options = {"dt": 2 * float(clock[-1] - clock[0]), "extra": True, "extra_solver_state": extra, **control}
    with _own_generator(y.device) if sde.noise_type == "additive" else nullcontext():
        states, extra = torchsde.sdeint(sde, y, clock, bm=bm, method=method, **options)
    return states[-1], extra or None


def _own_generator(device: torch.device) -> AbstractContextManager[None]:
    """Leaves torch's generators as they are: for additive noise torchsde draws from them to test the shapes."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def torchsde_solver(
    method: str = "euler",
    adaptive: bool = False,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    *,
    per_sample: bool = False,
    max_calls: int = 10000,
) -> TorchSDE:
    """The reverse SDE by `torchsde.sdeint` (Li et al. 2020, arXiv:2001.01328; Kidger et al. 2021, arXiv:2105.13493).

    method     calls a step, and weak order for this equation:
               "euler" 1, 1 | "milstein" 1, 1 (the same numbers) | "euler_heun" 1, 1 | "reversible_heun" 1 (and 1), 1
               | "heun" 2, 2 | "midpoint" 2, 2 | "log_ode" 2, 2 (the same numbers) | "srk" 2, 2, strong order 1.5
    The noise is additive, so Ito and Stratonovich are the same equation and each method gets the form it is
    written for. srk takes 2 calls a step in the form for additive noise; torchsde's own choice, for diagonal
    noise, takes 10.

    adaptive=False: one step from node to node, exactly on the grid, with row k of the noise for step k, as
    `euler_maruyama` has it (to which "euler" is equal to rounding); srk also uses row K + k, K the number of
    steps, for the time integral. A last step to sigma = 0 returns D. Any noise source will do, also the increments
    of a Brownian path, but not for srk: they do not determine the integral.

    adaptive=True: torchsde's step doubling to rtol, atol (root mean square over the batch) on a Brownian path that is
    a function of (seed, sample id, element), so rejected steps keep their noise. The first try is the
    grid's first step; other nodes between the ends are not used, and the callback sees the start only. Samples then
    depend on their neighbours through the common steps, unless per_sample=True runs one after the other. A run that
    has not arrived after max_calls calls (each), or met NaN, says so in `Samples.status` and is NaN. Not for
    srk: the time integral of the path is not known. To sigma = 0 it stops at `sde.default_end` and returns D there.

    Raises ValueError for other methods, tolerances, limits; in `solve` for grids from data to noise and starts
    with alpha = 0; FloatingPointError for NaN at fixed steps; TypeError for adaptive steps without a `Noise`.
    """
    if method not in TORCHSDE:
        raise ValueError(f"expected method to be one of {sorted(TORCHSDE)}, found {method!r}")
    if adaptive and method == "srk":
        raise ValueError("srk needs the time integral of the Brownian path: take fixed steps, or another method")
    _checked_control(rtol, atol, max_calls)
    form = TORCHSDE[method]
    weak = None if adaptive else form.weak_order
    card = Card(None, weak, form.calls, True, "Li et al. 2020, arXiv:2001.01328", frozenset(), "data")
    return TorchSDE(method, adaptive, rtol, atol, per_sample, max_calls, card)
