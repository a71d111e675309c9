"""Adaptive reverse SDE: steps chosen for each sample by itself, all on the sample's own Brownian path."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from ..denoiser import DATA, BaseDenoiser, evaluating
from ..grids import Grid
from ..noise import Noise
from ..sde import like
from ..tableau import NoiseSource
from .adaptive_control import Control, Ledger, State, alone, factor, finite, per_sample
from .base import Callback, Card, Samples

SHARE = 0.1  # of the tolerance for one step: the errors of the steps add up
START = 0.1  # first step in lam
GROWTH = 2.0
LONGEST = 1.0  # in lam: the error of a longer step can miss all that is in the data
ORDER = 1.5  # D moves like the square root of the step, and is weighted by the step


@dataclass
class SDEState(State):
    """s = lam; the last output D (n, ...); and what rejected steps have shown of the path W, on the clock
    c = e^(2 lam): `ahead` (n, P), the places lam where it is known, nearest first, then inf; and the
    `increments` (n, P, ...) of W from each place to the next, the first from where the sample is, in units of
    e^lam there: all within `LONGEST` of it, they are neither too small nor too large for any dtype."""

    output: Tensor
    ahead: Tensor
    increments: Tensor

    @classmethod
    def begin(cls, t: Tensor, lam: Tensor, x: Tensor, output: Tensor) -> SDEState:
        h, ahead = torch.full_like(lam, START), torch.full_like(lam, math.inf)[:, None]
        return cls(t, lam, x, h, finite(output), output, ahead, torch.zeros_like(x)[:, None])

    def bridge(self, s: Tensor, z: Tensor) -> Tensor:
        """e^-lam (W(c_s) - W(c)) at a place s not beyond the next known one, from the normals z."""
        step = torch.expm1(2 * (s - self.s))  # in units of c
        part = (step / torch.expm1(2 * (self.ahead[:, 0] - self.s))).clamp(max=1)
        return like(part, z) * self.increments[:, 0] + like((step * (1 - part)).sqrt(), z) * z

    def remember(self, s: Tensor, increment: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """`ahead, increments` after a step to s: s is listed, and struck off if the sample went there."""
        none, zero = torch.full_like(s, math.inf)[:, None], torch.zeros_like(increment)[:, None]
        rest = (self.increments[:, 0] - increment)[:, None]
        split = torch.cat([increment[:, None], rest, self.increments[:, 1:]], 1)
        known = s == self.ahead[:, 0]
        ahead = per_sample(known, torch.cat([self.ahead, none], 1), torch.cat([s[:, None], self.ahead], 1))
        increments = per_sample(known, torch.cat([self.increments, zero], 1), split)
        ahead = per_sample(accepted, torch.cat([ahead[:, 1:], none], 1), ahead)
        increments = per_sample(accepted, torch.cat([increments[:, 1:], zero], 1), increments)
        unit = torch.where(accepted, (self.s - s).exp(), 1)
        increments = like(unit, increments) * increments
        width = max(1, int((ahead < math.inf).sum(1).max()))
        return ahead[:, :width], increments[:, :width]


@dataclass(frozen=True)
class AdaptiveSDE:
    """See `adaptive_sde`."""

    control: Control
    card: Card = field(repr=False)

    def __repr__(self) -> str:
        rtol, atol, max_calls = self.control.rtol, self.control.atol, self.control.max_calls
        return f"adaptive_sde(rtol={rtol}, atol={atol}, max_calls={max_calls})"

    def steps_for(self, calls: int) -> int:
        """Steps follow the tolerance, not the grid: 1, for the two ends."""
        return 1

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
        """Run from `x` (B, ...) at times[0] to times[-1], with row k of the `Noise` for attempt k of a
        sample; the nodes between are not used. `Samples.path` has what the callback returned, who sees the
        samples still running before every attempted step.

        Raises TypeError for other noises, ValueError for times that increase or start without signal.
        """
        started, sde = time.perf_counter(), model.sde
        grid = Grid.of(sde, times)
        first, last = float(grid.t[0]), float(grid.t[-1])
        if first < last:
            remedy = "encode with a deterministic solver"
            raise ValueError(f"{self} is stochastic and cannot run from data to noise: {remedy}")
        if not isinstance(noise, Noise):
            found = type(noise).__name__
            raise TypeError(
                f"expected a scoresde.noise.Noise, whose samples can be drawn one by one; found {found}"
            )
        if float(sde.alpha(first)) == 0:
            raise ValueError(
                f"expected to start where there is some signal, found t = {first}: start a little later"
            )
        noiseless = float(sde.sigma(last)) == 0
        stop = min(float(sde.default_end), first) if noiseless else last
        end = torch.tensor(stop, dtype=torch.float64, device=x.device)
        path = []
        with evaluating(model):
            ledger = Ledger(model, x)
            if len(ledger.active) and first > stop:
                t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
                state = SDEState.begin(t, 0.5 * sde.log_snr(t), x, ledger.evaluate(DATA, x, t))
                goal, limit = 0.5 * sde.log_snr(end), self.control.max_calls - noiseless
                attempt = partial(self._attempt, ledger, end, noise)
                path = ledger.run(state, goal, attempt, limit, attrgetter("output"), callback)
            if noiseless:
                ledger.denoise(stop)
        return ledger.samples(started, last, path)

    def _attempt(self, ledger: Ledger, end: Tensor, noise: Noise, state: SDEState) -> SDEState:
        """One step of every running sample: D constant for the predictor, linear in lam for the corrector."""
        sde, x = ledger.model.sde, state.x
        goal = 0.5 * sde.log_snr(end)
        s = torch.minimum(state.target(goal), state.ahead[:, 0])
        # Where signal is rare, times are too dense for float64, and may round to beyond the start.
        t = torch.minimum(alone(lambda lam: sde.time(2 * lam), s), state.t)
        t = torch.where(s == goal, end, t)
        running = Noise(noise.seed, noise.ids[ledger.active], x.device, x.dtype, noise.offset)
        increment = state.bridge(s, running(ledger.calls - 1, x.shape))
        h = s - state.s
        alpha, sigma, fresh = sde.alpha(t), sde.sigma(t), -torch.expm1(-2 * h)
        kept = sigma / sde.sigma(state.t) * (-h).exp()
        linear = 1 - fresh / (2 * h)  # int_0^1 of the linear weight of the newer D
        base = like(kept, x) * x + like(sigma * (-h).exp(), x) * increment
        predicted = base + like(alpha * fresh, x) * state.output
        output = ledger.evaluate(DATA, predicted, t)
        change = like(alpha * linear, x) * (output - state.output)
        corrected = predicted + change
        error = self.control.error(change, x, corrected) / SHARE
        accepted = error <= 1
        return SDEState(
            torch.where(accepted, t, state.t),
            torch.where(accepted, s, state.s),
            per_sample(accepted, corrected, x),
            (h * factor(error, ORDER, GROWTH)).clamp(max=LONGEST),
            finite(output),
            per_sample(accepted, output, state.output),
            *state.remember(s, increment, accepted),
        )


def adaptive_sde(rtol: float = 0.05, atol: float = 0.025, *, max_calls: int = 2000) -> AdaptiveSDE:
    """The reverse SDE (tau = 1) with steps chosen for each sample by itself, on one Brownian path a sample.

        x_t = (sigma_t/sigma_s) e^-h x_s + alpha_t int_0^2h e^(v - 2h) D dv + sigma_t (1 - e^-2h)^(1/2) z,

    h = lam_t - lam_s, with D constant, then, after one network call at the end of the step, linear in lam.
    What is kept below a tenth of the tolerance is the difference, root mean square over the sample in units
    of `atol + rtol |x|`. The noise is that of a path W on the clock `c = SNR = e^(2 lam)`, `z = (W(c_t) -
    W(c_s))/(c_t - c_s)^(1/2)`: a rejected step has shown a value of W, and later steps are tied to it by a
    bridge (rejection sampling with memory, Rackauckas and Nie 2017, doi 10.3934/dcdsb.2017133). Drawing anew
    would keep the steps whose noise happens to be small, and lose variance. Adaptive steps for this SDE were
    first proposed by Jolicoeur-Martineau et al. 2021, arXiv:2105.14080.

    max_calls  of the network. A sample that has not arrived by then, whose step underflows, or whose network
               returns NaN or Inf keeps its last state, and `Samples.status` says so

    The first step in lam is 0.1, the next at most twice as long as the one before, none longer than 1: the
    error cannot tell that nothing is there from having jumped over it. While D is the mean, a step from noise
    to the end puts x on the mean, where D is the mean again; on N(1, 1) from sigma = 10^4, unlimited steps
    keep a fifth of the variance. To be blind a step must begin before D shows, at `v e^(2 lam)` below a tenth
    of rtol, and end where x shows no more, at `e^-lam` below a tenth of atol: 5 in lam for data of variance
    `v = atol^2`, more for wider ones. The rest is for errors that are small by chance, as in one
    dimension. A run costs at least `lam_end - lam_start` calls: hundreds where schedules start at -200.

    A run to sigma = 0 stops at `sde.default_end` and returns D there. Other tolerances see other paths.
    Samples leave the batch when they are done: conditions given to `sample` are narrowed with it (what has as
    many entries as the batch belongs to the samples, see `BaseDenoiser.given`), and a network must not
    remember its batch. A callback sees the samples still running before every attempted step, each at its own
    time: `Step.t` is the largest of them. Raises ValueError for other tolerances and limits.
    """
    reference = "Jolicoeur-Martineau et al. 2021, arXiv:2105.14080; Rackauckas and Nie 2017"
    properties = frozenset({"marginal_exact", "clock_free"})  # the tolerance is in units of x
    card = Card(None, None, 1, True, reference, properties, "data", memory=2)
    return AdaptiveSDE(Control(rtol, atol, max_calls), card)
