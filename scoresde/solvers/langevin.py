"""Langevin dynamics `x <- x + eps score + (2 eps)^(1/2) z`, which keeps p_t up to the bias of its step.

As the corrector behind any table, annealed over noise levels, and at a fixed time with and without
Metropolis' test.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, evaluating
from ..grids import Grid
from ..sde import LinearSDE, like
from ..tableau import NoiseSource, Step, Tableau, run
from .base import Callback, Card, Samples, TableSolver, check_calls
from .onestep import one_step_table
from .watch import Watch
from .weights import singular_step

SONG = "Song et al. 2021, arXiv:2011.13456"
SONG_2019 = "Song and Ermon 2019, arXiv:1907.05600"
NORMS = ("sample", "batch", "sigma")


def square_norm(v: Tensor) -> Tensor:
    """||v_b||^2 of every sample, (B,) float64, added by halving: every bit is the same in any batch."""
    total = v.double().flatten(1).square()
    n = total.shape[1]
    while n > 1:
        half = n // 2
        total[:, :half] += total[:, n - half : n]
        n -= half
    return total[:, :1].sum(1)


def _move(x: Tensor, score: Tensor, z: Tensor, eps: Tensor) -> Tensor:
    """x + eps score + (2 eps)^(1/2) z in the dtype of x, eps of shape () or (B,)."""
    return x + like(eps, x) * score + like((2 * eps).sqrt(), x) * z.to(x.dtype)


@dataclass(frozen=True)
class PredictorCorrector:
    """See `predictor_corrector`."""

    predictor: TableSolver
    corrector_steps: int
    snr: float
    norm: str
    card: Card = field(repr=False)

    def __repr__(self) -> str:
        options = f"corrector_steps={self.corrector_steps}, snr={self.snr}, norm={self.norm!r}"
        return f"predictor_corrector({self.predictor!r}, {options})"

    def steps_for(self, calls: int) -> int:
        """The largest number of grid steps that takes at most `calls` network calls."""
        steps = 1
        check_calls(calls, self._calls(steps), self)
        while self._calls(steps + 1) <= calls:
            steps += 1
        return steps

    def _calls(self, steps: int) -> int:
        return self.predictor.calls(steps) + self.corrector_steps * steps

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
        """Run from `x` (B, ...) at times[0] to times[-1]. The callback sees the predictor's calls.

        With R rows in the predictor's table, it uses the noise rows 0..R - 1, as when it runs alone; step m
        of the corrector at node j = 1, 2, ... uses row `R + (j - 1) corrector_steps + m`.
        """
        started = time.perf_counter()
        grid = Grid.of(model.sde, times)
        if self.corrector_steps and float(grid.t[0]) < float(grid.t[-1]):
            raise ValueError(
                f"{self} is stochastic and cannot run from data to noise: encode with a deterministic solver"
            )
        if noise is None and self.corrector_steps:
            raise ValueError(f"{self} is stochastic: expected a noise source, found None")
        table = self.predictor.tableau(model.sde, grid)
        watch, path = Watch(repr(self), x), []
        correct = self._corrector(model, x, grid, table, noise, watch)
        with evaluating(model):
            rows = model.rows(table.times[:-1], x)

            def before(k: int, state: Tensor, F: Tensor) -> None:
                t = float(table.times[k])
                watch(F, t)
                if callback is not None:
                    kept = callback(
                        Step(k, t, state, F * rows.b[k] + state * rows.a[k] if rows.a[k] else F * rows.b[k])
                    )
                    path.extend([] if kept is None else [kept])

            result = run(table, rows, x, noise, before=before, after=correct)
        seconds, end = time.perf_counter() - started, float(table.times[-1])
        return Samples(result, watch.finish(), seconds, path=tuple(path), end=end)

    def _corrector(
        self,
        model: BaseDenoiser,
        x: Tensor,
        grid: Grid,
        table: Tableau,
        noise: NoiseSource | None,
        watch: Watch,
    ) -> Callable[[Tensor], Tensor | None] | None:
        """What happens to the state after each row: Langevin steps where it has reached a node with noise."""
        if self.corrector_steps == 0 or noise is None:
            return None
        sde, M, row = model.sde, self.corrector_steps, iter(range(len(table)))
        nodes = _node_rows(table, grid)
        decay = sde.scale(grid.t[1:], grid.t[:-1]) ** 2  # 1 - beta of the step that led here
        sigma, spread = sde.sigma(grid.t), torch.hypot(sde.alpha(grid.t), sde.sigma(grid.t))
        clock = grid.t.to(x.device)

        def correct(state: Tensor) -> Tensor | None:
            j = nodes.get(next(row), 0)
            if j == 0 or float(sigma[j]) == 0:
                return None
            for m in range(M):
                score = model.score(state, clock[j])
                watch(score, float(grid.t[j]))
                z = noise(len(table) + (j - 1) * M + m, state.shape)
                length = self._length(z, score, float(sigma[j]), float(spread[j]))
                state = _move(state, score, z, 2 * float(decay[j - 1]) * length**2)
            return state

        return correct

    def _length(self, z: Tensor, score: Tensor, sigma: float, spread: float) -> Tensor:
        """snr ||z||/||score||, () or (B,), at most `spread`: finite also where the score is 0."""
        if self.norm == "sigma":
            return score.new_full((), self.snr * sigma, dtype=torch.float64)
        above, below = self.snr * square_norm(z).sqrt(), square_norm(score).sqrt()
        if self.norm == "batch":
            above, below = above.mean(), below.mean()
        return torch.where(above < spread * below, above / below, spread)


def _node_rows(table: Tableau, grid: Grid) -> dict[int, int]:
    """Row -> j where the state after the row is the predictor's result at node j >= 1, and not a stage.

    That is the last row to arrive at the node, if the next one leaves it downwards.
    """
    arrivals = [*table.times[1:].tolist(), -math.inf]
    last = {t: k for k, t in enumerate(arrivals)}
    rows = {}
    for j, t in enumerate(grid.t[1:].tolist(), 1):
        if t not in last or arrivals[last[t] + 1] >= t:
            raise ValueError(
                f"expected a predictor that stops at every node, found {table.name} not to at t = {t:.6g}; "
                "use one without steps across nodes and without noise that leads away from them"
            )
        rows[last[t]] = j
    return rows


def predictor_corrector(
    predictor: TableSolver, corrector_steps: int = 1, snr: float = 0.16, norm: str = "sample"
) -> PredictorCorrector:
    """Any table, followed at every new node with noise by `corrector_steps` steps of Langevin dynamics there:

        x <- x + eps score(x, t) + (2 eps)^(1/2) z,    eps = 2 a (snr ||z||/||score||)^2

    with a = (alpha_before/alpha_now)^2 of the predictor's step, the paper's `1 - beta_i` (1 for VE).

    norm  "sample" of each sample by itself | "batch": their means over the batch, as published; samples then
          depend on their neighbours | "sigma": sigma for ||z||/||score||, its value for data at a point

    The published step is not bounded where the score vanishes; here `snr ||z||/||score||` is at most
    `(alpha^2 + sigma^2)^(1/2)`, the spread of standardised data. In few dimensions the ratio of norms is no
    measure of anything and biases the result: there take "sigma". With 0 steps it is the predictor, bit for
    bit. Costs `corrector_steps` calls a grid step on top.

    Predictor first, then corrector at the time it reached, as in algorithms 2 and 3 of Song et al. (2021,
    arXiv:2011.13456; step sizes: algorithms 4 and 5). Their code runs the corrector first, at the old time,
    so it corrects the prior and not the result. Raises ValueError in `solve` for predictors that do not stop
    at the nodes: `dpm_fast`, and `edm` with churn.
    """
    if not isinstance(predictor, TableSolver):
        raise TypeError(f"expected a fixed-grid solver as predictor, found {predictor!r}")
    whole = isinstance(corrector_steps, int) and not isinstance(corrector_steps, bool)
    if not (whole and corrector_steps >= 0 and 0 < snr < math.inf):
        raise ValueError(f"expected corrector_steps >= 0 and snr > 0, found {corrector_steps!r} and {snr!r}")
    if norm not in NORMS:
        raise ValueError(f"expected norm to be one of {NORMS}, found {norm!r}")
    inner = predictor.card
    noisy = inner.stochastic or corrector_steps > 0
    calls = inner.calls_per_step + corrector_steps
    kept = inner.properties & {"clock_free"} if corrector_steps else inner.properties
    card = Card(None, None, calls, noisy, SONG, kept, inner.final, inner.memory)
    return PredictorCorrector(predictor, corrector_steps, snr, norm, card)


def annealed_langevin(steps_per_level: int = 5, step: float = 0.1) -> TableSolver:
    """Annealed Langevin dynamics: at every node of the grid, `steps_per_level` steps of `eps = step sigma^2`.

    From node to node `x/alpha` is carried over. A table, for eps does not depend on the data. A node without
    noise gets D; one without signal (alpha = 0) is left by the first-order exponential step.

    Song and Ermon 2019 (arXiv:1907.05600, algorithm 1; 2020, arXiv:2006.09011): their alpha_i is 2 eps, so
    their epsilon/sigma_L^2 is `2 step`, and `snr` r of `predictor_corrector` is `step = 2 r^2`.
    """
    whole = isinstance(steps_per_level, int) and not isinstance(steps_per_level, bool)
    if not (whole and steps_per_level >= 1 and 0 < step < math.inf):
        raise ValueError(
            f"expected steps_per_level >= 1 and step > 0, found {steps_per_level!r} and {step!r}"
        )
    M = steps_per_level

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        head, tail = int(torch.isinf(grid.lam[0])), int(torch.isinf(grid.lam[-1]))
        levels = grid.t[head : len(grid.t) - tail]
        t = levels.repeat_interleave(M)
        moved = torch.ones_like(t)
        moved[M - 1 : -1 : M] = sde.scale(levels[:-1], levels[1:])
        # x + eps score = (1 - step) x + step alpha D
        keep, mix, noise = (
            torch.full_like(t, 1 - step),
            step * sde.alpha(t),
            math.sqrt(2 * step) * sde.sigma(t),
        )
        parts = [torch.stack([t, moved * keep, moved * mix, moved * noise])]
        if head:
            parts.insert(0, _singular(sde, grid.t[0], grid.t[1]))
        if tail and len(levels):
            parts.append(_singular(sde, grid.t[-2], grid.t[-1]))
        start, keep, mix, noise = torch.cat(parts, 1)
        return one_step_table("annealed_langevin", torch.cat([start, grid.t[-1:]]), (keep, mix, noise))

    card = Card(None, None, M, True, SONG_2019, frozenset({"clock_free", "scale_covariant"}))
    options = (("steps_per_level", M), ("step", step))
    return TableSolver("annealed_langevin", build, card, options, calls=lambda steps: M * (steps + 1))


def _singular(sde: LinearSDE, s: Tensor, t: Tensor) -> Tensor:
    """(4, 1): time and coefficients of a row that leaves alpha = 0 or reaches sigma = 0."""
    return torch.stack([s, *singular_step(sde, s, t, "data", 0.0)])[:, None]


class Chain(NamedTuple):
    """The end of a chain: states (B, ...), the share of accepted proposals (B,) float64, and network
    calls."""

    x: Tensor
    acceptance: Tensor
    network_calls: int


def langevin(
    model: BaseDenoiser,
    x: Tensor,
    t: float,
    *,
    step: float | Tensor,
    steps: int,
    noise: NoiseSource,
    callback: Callable[[int, Tensor], Any] | None = None,
) -> Chain:
    """The unadjusted Langevin algorithm for p_t: `x <- x + step score(x, t) + (2 step)^(1/2) z`, `steps`
    times.

    x (B, ...); step > 0, a number or (B,), in units of the variance of x_t; row k of `noise` for step k. The
    callback gets (k, x) after every step. On N(m, v) the chain has mean m and variance `v/(1 - step/(2 v))`,
    and diverges for step >= 2 v. (Roberts and Tweedie 1996, doi 10.2307/3318418.)

    Raises ValueError for steps that are not positive, TypeError without a noise source, FloatingPointError if
    the network returns NaN or Inf.
    """
    eps, clock = _checked(model, x, t, step, steps, noise), _clock(t, x)
    watch = Watch("langevin", x)
    with torch.no_grad(), evaluating(model):
        for k in range(steps):
            score = model.score(x, clock)
            watch(score, t)
            x = _move(x, score, noise(k, x.shape), eps)
            if callback is not None:
                callback(k, x)
    return Chain(x, torch.ones(len(x), dtype=torch.float64, device=x.device), watch.finish())


def mala(
    model: BaseDenoiser,
    x: Tensor,
    t: float,
    *,
    step: float | Tensor,
    steps: int,
    noise: NoiseSource,
    log_prob: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callable[[int, Tensor], Any] | None = None,
) -> Chain:
    """The Metropolis-adjusted Langevin algorithm: `langevin`, each step of it accepted with probability
    min(1, R),

        R = p(x') q(x | x') / (p(x) q(x' | x)),    q(x' | x) = N(x + step score(x), 2 step),

    so that p_t is invariant exactly, whatever the step (Besag 1994; Roberts and Tweedie 1996).

    log_prob(x, t) -> (B,) is log p_t up to a constant; by default the model's own (exact denoisers and
    energies have one). Proposal k uses row 2 k of `noise`, its acceptance row 2 k + 1. `steps + 1` calls
    each of the score and of log_prob; the latter's rounding matters in float32 and many dimensions.

    Raises as `langevin`, TypeError if there is no log_prob, and ValueError if it returns another shape.
    """
    log_p = getattr(model, "log_prob", None) if log_prob is None else log_prob
    if log_p is None:
        raise TypeError(
            f"expected log_prob(x, t), which {type(model).__name__} does not have; pass log_prob="
        )
    eps, clock = _checked(model, x, t, step, steps, noise), _clock(t, x)
    watch, accepted = Watch("mala", x), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with torch.no_grad(), evaluating(model):
        # copies, for a network may write its next output where this one is
        score, density = model.score(x, clock).clone(), _density(log_p, x, clock)
        watch(score, t)
        for k in range(steps):
            z = noise(2 * k, x.shape)
            proposal = _move(x, score, z, eps)
            new_score, new_density = model.score(proposal, clock), _density(log_p, proposal, clock)
            watch(new_score, t)
            back = (
                x - proposal - like(eps, x) * new_score
            )  # log q = -||back||^2/(4 step); forth it is -||z||^2/2
            ratio = new_density - density - square_norm(back) / (4 * eps) + square_norm(z) / 2
            # log of a uniform variable, from a normal one; a ratio that is NaN rejects
            chance = torch.special.log_ndtr(noise(2 * k + 1, (len(x), 1)).double()[:, 0])
            yes = chance < ratio
            wide = yes.view(-1, *[1] * (x.ndim - 1))
            x, score = torch.where(wide, proposal, x), torch.where(wide, new_score, score)
            density, accepted = torch.where(yes, new_density, density), accepted + yes
            if callback is not None:
                callback(k, x)
    return Chain(x, accepted / steps, watch.finish())


def _density(log_p: Callable[[Tensor, Tensor], Tensor], x: Tensor, clock: Tensor) -> Tensor:
    """log p of every sample, (B,) float64, a copy. Raises ValueError for what is not one number a sample."""
    found = log_p(x, clock)
    if found.shape != x.shape[:1]:
        raise ValueError(
            f"expected log_prob to return one number a sample, ({len(x)},), found {tuple(found.shape)}"
        )
    return found.to(torch.float64, copy=True)


def _clock(t: float, x: Tensor) -> Tensor:
    return torch.tensor(t, dtype=torch.float64, device=x.device)


@torch.no_grad()
def _checked(
    model: BaseDenoiser, x: Tensor, t: float, step: float | Tensor, steps: int, noise: NoiseSource
) -> Tensor:
    """The step as a float64 tensor of shape () or (B,) beside x, after checking the arguments."""
    try:
        eps = torch.as_tensor(step, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected a step > 0, a number or of shape ({len(x)},), found {step!r}") from None
    if eps.ndim > 1 or (eps.ndim == 1 and len(eps) != len(x)) or not bool(((eps > 0) & eps.isfinite()).all()):
        raise ValueError(f"expected a step > 0, a number or of shape ({len(x)},), found {step}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"expected a whole number of steps >= 1, found {steps!r}")
    if not (0 <= t <= model.sde.t_max and float(model.sde.sigma(t)) > 0):
        raise ValueError(
            f"expected a time with noise, 0 <= t <= {model.sde.t_max} and sigma(t) > 0, found {t}"
        )
    if not callable(noise):
        raise TypeError(
            f"expected a noise source, a function of (row, shape) such as Noise.of(0, batch={len(x)}), found "
            f"{noise!r}"
        )
    return eps.to(x.device)
