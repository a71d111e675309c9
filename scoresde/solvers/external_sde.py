"""torchsde's solvers on the reverse SDE."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, evaluating
from ..grids import Grid
from ..noise import BrownianPath, Noise
from ..sde import like
from ..tableau import NoiseSource, Step
from .base import Callback, Card, Samples, check_calls
from .external_ode import OK, Calls, Halt, checked_control, evaluations, no_noise, one_by_one, status_of


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
    "midpoint": Form("stratonovich", "diagonal", 1, 2),
    "log_ode": Form("stratonovich", "diagonal", 1, 2),
    "reversible_heun": Form("stratonovich", "diagonal", 2, 1),
}


class ReverseTime:
    """The reverse SDE as torchsde wants it: flat states (B, D), and the increasing clock s = -t, float64.

    A call is remembered by state and time, so that none is made twice: torchsde asks for the shapes first,
    and srk
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
    """Brownian motion over step k of K: `W = h^(1/2) z_k, int W = h (W/2 + H), H = (h/12)^(1/2) z_{K+k}`,
    in the dtype of the state."""

    noise: NoiseSource
    k: int
    steps: int
    full: torch.Size
    dtype: torch.dtype
    levy_area_approximation = "foster"  # an area that noise of this kind never asks for

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.full[0], math.prod(self.full[1:])))

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        h = float(tb - ta)
        W = (math.sqrt(h) * self.noise(self.k, self.full)).reshape(self.shape).to(self.dtype)
        if not return_U:
            return (W, None) if return_A else W
        H = math.sqrt(h / 12) * self.noise(self.steps + self.k, self.full).reshape(self.shape)
        return W, (h * (W / 2 + H)).to(self.dtype)


class PathIncrements(NamedTuple):
    """Brownian motion over any interval, in the dtype of the state."""

    path: BrownianPath
    dtype: torch.dtype
    levy_area_approximation = "foster"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.path.shape[0], math.prod(self.path.shape[1:])))

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Any:
        W = self.path.increment(float(ta), float(tb)).reshape(self.shape).to(self.dtype)
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
        options = (
            f"rtol={self.rtol}, atol={self.atol}, per_sample={self.per_sample}, max_calls={self.max_calls}"
        )
        return f"torchsde_solver({self.method!r}, adaptive=True, {options})"

    def steps_for(self, calls: int) -> int:
        """The largest number of grid steps that takes at most `calls` network calls; 1 if adaptive."""
        start = int(self.method == "reversible_heun")
        if self.adaptive:
            return 1
        check_calls(calls, self.card.calls_per_step + start, self)
        return (calls - start) // self.card.calls_per_step

    @torch.no_grad()
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
        with evaluating(model):
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
        """One call of sdeint for each step, with a first step that is longer than it: it ends exactly on the
        node."""
        denoise = no_noise(model.sde, float(grid.t[-1]))
        K, calls, path = len(grid), Calls(), []
        steps = K - denoise
        sde = ReverseTime(model, x.shape, TORCHSDE[self.method], calls)
        y, extra = x.flatten(1), None
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
                    bm = StepNoise(noise, k, K, x.shape, x.dtype)
                    y, extra = _sdeint(sde, y, clock, bm, self.method, extra=extra)
            except Halt:
                raise FloatingPointError(
                    f"{self}: the network returned NaN or Inf at call {calls.made}, in the step "
                    f"from t = {t:.6g}; check the model, its dtype and its inputs there"
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
        parts = list(one_by_one(model, len(x))) if self.per_sample else [(slice(None), model)]
        runs = [
            self._path(part, x[rows], grid, replace(noise, ids=noise.ids[rows]))
            for rows, part in parts
            if x.numel()
        ]
        calls, path = sum(run.calls for run in runs), []
        if callback is not None and runs:
            kept = callback(Step(0, first, x, model(x, first)))
            calls, path = calls + 1, [] if kept is None else [kept]
        result = torch.cat([run.x for run in runs]) if runs else x.clone()
        status = status_of([run.status for run in runs]) if runs else OK
        seconds, made = time.perf_counter() - started, evaluations([run.calls for run in runs], x)
        return Samples(result, calls, seconds, status, tuple(path), last, evaluations=made)

    def _path(self, model: BaseDenoiser, x: Tensor, grid: Grid, noise: Noise) -> SDERun:
        first, last = float(grid.t[0]), float(grid.t[-1])
        denoise, calls = no_noise(model.sde, last), Calls(self.max_calls)
        stop = min(float(model.sde.default_end), first) if denoise else last
        sde, span = ReverseTime(model, x.shape, TORCHSDE[self.method], calls), first - stop
        control = {"adaptive": True, "rtol": self.rtol, "atol": self.atol, "dt_min": 1e-12 * span}
        y = x.flatten(1)
        try:
            if span:
                bm = PathIncrements(BrownianPath(noise, x.shape, -first, -stop), x.dtype)
                clock = torch.tensor([-first, -stop], dtype=torch.float64)
                y, _ = _sdeint(sde, y, clock, bm, self.method, dt=first - float(grid.t[1]), **control)
            state = y.reshape(x.shape)
            # a copy, for the next sample's output may be written where this one is
            return SDERun(calls(lambda: model(state, stop)).clone() if denoise else state, OK, calls.made)
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
    """Leaves torch's generators as they are: for additive noise torchsde draws from them to test the
    shapes."""
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
    max_calls: int = 2000,
) -> TorchSDE:
    """The reverse SDE by `torchsde.sdeint` (Li et al. 2020, arXiv:2001.01328; Kidger et al. 2021,
    arXiv:2105.13493).

    method     calls a step, and weak order for this equation:
               "euler" 1, 1 | "milstein" 1, 1 (the same numbers) | "euler_heun" 1, 1
               | "reversible_heun" 1 (and 1 for the start), 2 | "heun" 2, 2 | "midpoint" 2, 1 (2 on Gaussian
               data) | "log_ode" 2, 1 (the same numbers as midpoint) | "srk" 2, 2 (strong order 1.5)
    The noise is additive, so Ito and Stratonovich are the same equation and each method gets the form it is
    written for. srk takes 2 calls a step in the form for additive noise; torchsde's own choice, for diagonal
    noise, takes 10.

    adaptive=False: one step from node to node, exactly on the grid, with row k of the noise for step k, as
    `euler_maruyama` has it (to which "euler" is equal to rounding); srk also uses row K + k, K the number of
    steps, for the time integral. A last step to sigma = 0 returns D. Any noise source will do, also the
    increments of a Brownian path, but not for srk: they do not determine the integral.

    adaptive=True: torchsde's step doubling to rtol, atol (root mean square over the batch) on a Brownian path
    that is a function of (seed, sample id, element), so rejected steps keep their noise. The first try is the
    grid's first step; other nodes between the ends are not used, and the callback sees the start only.
    Samples then depend on their neighbours through the common steps, unless per_sample=True runs one after
    the other. A run that has not arrived after max_calls calls (each), or met NaN, says so in
    `Samples.status` and is NaN. Not for srk: the time integral of the path is not known. To sigma = 0 it
    stops at `sde.default_end` and returns D there.

    Raises ValueError for other methods, tolerances, limits; in `solve` for grids from data to noise and
    starts with alpha = 0; FloatingPointError for NaN at fixed steps; TypeError for adaptive steps without a
    `Noise`.
    """
    if method not in TORCHSDE:
        raise ValueError(f"expected method to be one of {sorted(TORCHSDE)}, found {method!r}")
    if adaptive and method == "srk":
        raise ValueError(
            "srk needs the time integral of the Brownian path: take fixed steps, or another method"
        )
    checked_control(rtol, atol, max_calls)
    form = TORCHSDE[method]
    weak = None if adaptive else form.weak_order
    card = Card(None, weak, form.calls, True, "Li et al. 2020, arXiv:2001.01328", frozenset(), "data")
    return TorchSDE(method, adaptive, rtol, atol, per_sample, max_calls, card)
