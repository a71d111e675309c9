"""log p(x) through the probability-flow ODE, with an account of what the number is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..denoiser import FLOW, BaseDenoiser, evaluating
from ..grids import Grid
from ..noise import Noise
from ..sampling import make_grid
from ..sde import LinearSDE
from ..solvers.adaptive_control import Control
from ..solvers.adaptive_ode import Flow
from .divergence import Divergence, Exact, Hutchinson
from .track import Adams, Field

# The streams of this room: rows that no sampler reaches, so that x may come from the same seed.
PROBE_ROWS, DEQUANTIZATION_ROW = 2**62, 2**62 - 1
EXACT_UP_TO = 64  # dimensions, unless the caller says otherwise


@dataclass(frozen=True)
class LogProb:
    """log-densities (nats, float64) of a batch, and how far to trust them.

    value           (B,) log-density of x at the time `end` under the model's ODE started in the sde's prior,
                    N(0, prior_std^2 I). NaN where the solver did not arrive
    standard_error  (B,) of `value` over the random probes; 0 for the exact trace, infinite for one probe
    solver_error    (B,) estimated error of the integration: four times the sum of the steps' absolute
                    differences from the method of one order less, in state and density, each carried to the
                    end by the score. Mostly 10 to 50 times the error, less for tolerances above 1e-2
    prior_gap       (B,) log p_T(x_T) - log N(x_T; 0, prior_std^2 I), what the prior misses of the law at
                    t_max: estimated from the network itself, to second order in alpha/sigma there.
                    `value + prior_gap` is the log-density without that mismatch
    truncation      (B,) log p_end(x) - log p_0(x), the effect of the noise left at the end, to first order in
                    (sigma/alpha)^2. Large where `end` is too early, or the data have no density
    probe_values    (B, M) the values by each probe; `value` is their mean
    latent          (B, ...) the state x_T at t_max, float64
    end             the time of x
    network_calls   calls of the model on a batch, all included; `evaluations` (B,) those that sample took
    seconds         wall time
    status          as in `Samples`: "ok", or what happened to each sample
    """

    value: Float[Tensor, " b"]
    standard_error: Float[Tensor, " b"]
    solver_error: Float[Tensor, " b"]
    prior_gap: Float[Tensor, " b"]
    truncation: Float[Tensor, " b"]
    probe_values: Float[Tensor, "b m"]
    latent: Float[Tensor, "b ..."]
    end: float
    network_calls: int
    evaluations: Int64[Tensor, " b"]
    seconds: float
    status: str | tuple[str, ...]

    @property
    def corrected(self) -> Float[Tensor, " b"]:
        """(B,) `value + prior_gap`."""
        return self.value + self.prior_gap

    def bits_per_dim(self, step: float) -> Float[Tensor, " b"]:
        """(B,) `-(value/D + log step)/log 2`: for x from `dequantize(x, step)`, in expectation at least the
        bits that a coordinate costs on the lattice of spacing `step`."""
        return bits_per_dim(self.value, math.prod(self.latent.shape[1:]), step)


def bits_per_dim(nats: Float[Tensor, " b"], dim: int, step: float = 1.0) -> Float[Tensor, " b"]:
    """`-(nats/dim + log step)/log 2` of log-densities on a lattice of spacing `step`; step = 1 for
    log-probabilities. Raises ValueError for a spacing that is not positive."""
    return -(nats / dim + math.log(_spacing(step))) / math.log(2)


def _spacing(step: float) -> float:
    if not 0 < step < math.inf:
        raise ValueError(f"expected a lattice spacing step > 0, found {step}")
    return step


def dequantize(
    x: Float[Tensor, "b ..."], step: float, *, seed: int = 0, ids: Tensor | Sequence[int] | None = None
) -> Float[Tensor, "b ..."]:
    """`x + step (w - 1/2)` in the dtype of x, w uniform on (0, 1), a function of (seed, ids[i]) for sample i.

    For x on a lattice of spacing `step`, `E log p(x + step (w - 1/2)) + D log step <= log P(x)`, P(x) being
    the mass of p in the cell around x (Theis et al. 2016, arXiv:1511.01844, section 3.1). Raises TypeError
    for x that is not floating, ValueError for a spacing that is not positive.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"expected floating x, found {x.dtype}, which cannot hold what is added; use x.float()"
        )
    count = math.prod(x.shape[1:])
    noise = Noise.of(seed, ids, batch=len(x), device=x.device, dtype=torch.float64)
    w = ((noise.words(DEQUANTIZATION_ROW, count) >> 12).double() + 0.5) * 2.0**-52 + 0.5
    return (x.double() + _spacing(step) * (w.reshape(x.shape) - 0.5)).to(x.dtype)


def log_prob(
    model: BaseDenoiser,
    x: Float[Tensor, "b ..."],
    *,
    end: float | None = None,
    divergence: Divergence | None = None,
    tolerance: float = 1e-4,
    order: int = 5,
    grid: Grid | Tensor | None = None,
    max_calls: int = 1000,
    seed: int = 0,
    ids: Tensor | Sequence[int] | None = None,
    condition: Mapping[str, Any] | None = None,
) -> LogProb:
    """log p of `x` (B, ...), taken to be at the time `end`, under the probability-flow ODE of a denoiser.

    With `y = x/(alpha + sigma)` and `u = sigma/(alpha + sigma)` the ODE is `dy = v du`, v = E[eps - x_0 | x],
    regular at both ends of every process, and (Song et al. 2021, arXiv:2011.13456, eq. 39)

        log p(x) = log N(x_T; 0, prior_std^2 I) + D log(c_T/c_end) + int div_y v du,   c = alpha + sigma.

    Steps are steps in log u.

    end         of the process, where x is; default `sde.default_end`
    divergence  `Exact()`, `Hutchinson(count, law)`, `Orthogonal(count)` or `HutchPP(rank, count)`; by default
                the exact one up to 64 dimensions, then 16 Rademacher probes
    tolerance   of a step, for each sample by itself: root mean square error in y, relative to 1 + |y|, and
                effect on the log-density in nats for each dimension
    order       of the Adams predictor, 1..6; the corrector has one order more, a step takes one call
    grid        fixed nodes instead, a Grid or decreasing times from t_max to the end: every step is taken and
                nothing read back from the device. The first step is cut up (5 more calls) to start the method
    max_calls   of the network; samples that have not arrived by then are NaN, and `status` says so
    seed, ids   the probes of sample i are a function of (seed, ids[i]) only, and independent of the noise
                that `sample` draws with the same seed; ids default to 0..B-1
    condition   passed on to the model as keywords; samples leave the batch when they are done, and with them
                their entries of what has as many as the batch, see `BaseDenoiser.given`

    State and density are float64, the network keeps its dtype. Works under no_grad and inference_mode;
    parameters, their gradients and the training flags stay as they were. Any denoiser will do whose output
    carries gradients back to x; what it detaches inside is missing from the divergence, unnoticed.

    Raises ValueError or TypeError for arguments that do not fit.
    """
    check_parts(model, x, condition)
    started, sde = time.perf_counter(), model.sde
    if isinstance(divergence, type) or not isinstance(divergence, Divergence | None):
        raise TypeError(f"expected a divergence object such as Hutchinson(16), found {divergence!r}")
    if isinstance(order, bool) or order not in range(1, 7):
        raise ValueError(f"expected an order in 1..6, found {order!r}")
    control = Control(tolerance, tolerance, max_calls)
    rounding = 8 * torch.finfo(model.dtype).eps  # of the network, which no step can avoid
    control = replace(control, rtol=max(tolerance, rounding), atol=max(tolerance, rounding))
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        times = nodes_from_t_max(sde, grid, end)
        divergence = divergence or (Exact() if math.prod(x.shape[1:]) <= EXACT_UP_TO else Hutchinson())
        noise = Noise.of(seed, ids, batch=len(x), device=x.device, dtype=torch.float64, offset=PROBE_ROWS)
        probes = divergence.probes(noise, math.prod(x.shape[1:]))
        given = model.given(**_savable(condition or {}))
        field = Field(given, divergence, tuple(x.shape[1:]), probes)
        return _log_prob(field, x.detach().clone(), times, control if grid is None else None, order, started)


def check_parts(model: BaseDenoiser, x: Tensor, condition: Mapping[str, Any] | None) -> None:
    """TypeError or ValueError for what has no likelihood."""
    if not isinstance(model, BaseDenoiser):
        raise TypeError(
            "expected a denoiser as model, such as Denoiser(network, sde) or law.denoiser(sde), "
            f"found {model!r}"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor x of shape (B, ...), found {type(x).__name__}")
    if not x.is_floating_point() or x.ndim < 2 or math.prod(x.shape[1:]) == 0:
        raise ValueError(
            f"expected floating x of shape (B, ...) with at least one coordinate, found {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    if not isinstance(condition, Mapping | None):
        raise TypeError(f"expected a mapping from names to values as condition, found {condition!r}")


def nodes_from_t_max(sde: LinearSDE, grid: Grid | Tensor | None, end: float | None) -> Tensor:
    """The times of a grid, or t_max and the end alone. Raises TypeError and ValueError for a grid that starts
    elsewhere and for an end without noise."""
    if not isinstance(grid, Grid | Tensor | None):
        raise TypeError(
            "expected a Grid such as grids.log_snr(sde, 100), or a tensor of decreasing times as grid, "
            f"found {grid!r}"
        )
    ends = torch.tensor([sde.t_max, sde.default_end if end is None else end], dtype=torch.float64)
    times = make_grid(sde, ends if grid is None else grid, 1, end).t
    if not math.isclose(float(times[0]), sde.t_max, rel_tol=1e-9):
        raise ValueError(
            f"expected a grid that starts at t_max = {sde.t_max}, where the prior is the law, found one that "
            f"starts at {times[0].item()}"
        )
    if not float(sde.sigma(times[-1])) > 0:
        raise ValueError(f"expected an end with noise, found end = {times[-1].item()}; take a later one")
    return times


def _savable(cond: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions that autograd may save: tensors made in inference mode are copied."""
    return {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in cond.items()}


def _log_prob(
    field: Field, x: Tensor, times: Tensor, control: Control | None, order: int, started: float
) -> LogProb:
    """`log_prob` for arguments in order; control = None for the fixed times."""
    sde, flow, divergence = field.sde, Flow(field.sde), field.divergence
    dim, clock = math.prod(x.shape[1:]), times.flip(0).to(x.device)
    start, stop = clock[0], clock[-1]
    scale, scale_T = flow.scale(start), flow.scale(stop)
    z = torch.cat([x.double().flatten(1) / scale, x.new_zeros(len(x), divergence.columns).double()], 1)
    # What determines the prior gap, first: a network that is not determined at t_max says so at once.
    origin = field.model.as_view(FLOW, torch.zeros_like(x, dtype=torch.float64), stop)
    adams = Adams(field, flow, dim, order)
    track = adams.fixed(z, clock) if control is None else adams.adaptive(z, start, stop, control)
    latent = track.z[:, :dim] * scale_T
    log_prior = -0.5 * (latent / sde.prior_std).square().sum(1) - dim * math.log(
        sde.prior_std * math.sqrt(2 * math.pi)
    )
    probe_values = (log_prior + dim * (scale_T / scale).log())[:, None] + track.z[:, dim:]
    status = track.status[0] if len(set(track.status)) == 1 else track.status
    return LogProb(
        probe_values.mean(1),
        divergence.standard_error(probe_values, dim),
        track.error,
        _prior_gap(sde, stop, latent, track.last, origin.flatten(1)),
        _truncation(sde, start, x.double().flatten(1), track.first),
        probe_values,
        latent.reshape(x.shape),
        float(start),
        track.calls + 1,
        track.evaluations + 1,
        time.perf_counter() - started,
        status if len(x) else "ok",
    )


def _prior_gap(sde: LinearSDE, t: Tensor, x: Tensor, last: Tensor, origin: Tensor) -> Tensor:
    """(B,) log p_t(x) - log N(x; 0, prior_std^2 I) where alpha/sigma is small; x (B, D), [v | u div_y v]
    there (`last`) and v at x = 0 (`origin`).

    `p_t(x)/N(x; 0, sigma^2 I) = E exp(alpha x.x_0/sigma^2 - alpha^2 |x_0|^2/(2 sigma^2))`, whose cumulants up
    to second order are numbers of the denoiser, `D(x) = m + (alpha/sigma^2) S x` to that order:

        (alpha/(2 sigma^2)) x.(D(x) + D(0)) - (alpha^2/(2 sigma^2)) |D(0)|^2 - (alpha/2) div_x D(x).
    """
    dim = x.shape[1]
    alpha, sigma, u = sde.alpha(t), sde.sigma(t), Flow(sde).log_u(t).exp()
    scale = alpha + sigma
    at_x, at_0 = x / scale - u * last[:, :dim], -u * origin  # D = y - u v
    div = (dim - last[:, dim:].mean(1)) / scale
    signal = 0.5 * alpha / sigma**2
    network = signal * ((x * (at_x + at_0)).sum(1) - alpha * at_0.square().sum(1)) - 0.5 * alpha * div
    width = sigma / sde.prior_std
    return network - 0.5 * (1 / sigma**2 - 1 / sde.prior_std**2) * x.square().sum(1) - dim * width.log()


def _truncation(sde: LinearSDE, t: Tensor, x: Tensor, first: Tensor) -> Tensor:
    """(B,) log p_t(x) - log p_0(x) to first order in tau = sigma^2/alpha^2; x (B, D), [v | u div_y v].

    x/alpha is x_0 plus noise of variance tau, whose density obeys d/dtau log p = (div s + |s|^2)/2; the rest
    is the factor alpha between the two.
    """
    dim = x.shape[1]
    alpha, sigma, u = sde.alpha(t), sde.sigma(t), Flow(sde).log_u(t).exp()
    noise = x / (alpha + sigma) + (1 - u) * first[:, :dim]  # E[eps | x], s = -(alpha/sigma) noise
    spread = 0.5 * (noise.square().sum(1) - u * dim - (1 - u) * first[:, dim:].mean(1))
    return spread - (1 - alpha) / sigma * (noise * x).sum(1) - dim * alpha.log()
