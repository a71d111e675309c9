"""The evidence lower bound of the generative SDE, discrete and continuous, term by term.

All terms are costs in nats, -log p(x) <= L_T + L_diffusion + L_0, for x_t = alpha x + sigma eps:

    L_T          KL(q(x_T | x) || N(0, prior_std^2 I))
    L_diffusion  sum of KL(q(x_s | x_t, x) || p(x_s | x_t)) over the steps of a grid, or its limit
                 (1/2) int E |eps - E[eps | x_t]|^2 d(-log SNR)
    L_0          E[-log p(x | x_end)], the decoder's

(Ho et al. 2020, arXiv:2006.11239, eq. 5; Kingma et al. 2021, arXiv:2107.00630, eqs. 11 to 15). The parts are
plain functions, differentiable in the network and in a learned schedule; `elbo` puts them together.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..denoiser import DATA, NOISE, BaseDenoiser, as_conditions, evaluating
from ..grids import Grid
from ..noise import Noise
from ..schedules import Time, holds, wide
from ..sde import LinearSDE, like
from ..variance import half_gain, step_divergence, with_variance
from .density import bits_per_dim, check_parts, nodes_from_t_max

ELBO_ROWS = 2**61  # of the noise: no sampler reaches them
DECODER_DRAWS = 4

Variance = Callable[[LinearSDE, Tensor, Tensor], Tensor]
"""(sde, s, t) -> variance of p(x_s | x_t), s < t, float64."""

Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, ...), D(x_end) (B, ...), sigma/alpha at the end) -> log p(x | x_end), (B,) nats."""

Proposal = Callable[[LinearSDE, Tensor, float], tuple[Tensor, Tensor]]
"""(sde, u, end) -> time and -d log SNR/du, for u uniform on [0, 1): how the continuous bound draws times."""


# ---- the variance of a step


def posterior_variance(sde: LinearSDE, s: Tensor, t: Tensor) -> Tensor:
    """That of q(x_s | x_t, x): beta-tilde of DDPM, right for data without spread."""
    return (sde.sigma(s) / sde.sigma(t)) ** 2 * sde.transition(s, t)[1] ** 2


def transition_variance(sde: LinearSDE, s: Tensor, t: Tensor) -> Tensor:
    """That of q(x_t | x_s): beta of DDPM, right for standard normal data under a VP-SDE."""
    return sde.transition(s, t)[1] ** 2


# ---- decoders


@dataclass(frozen=True)
class GaussianDecoder:
    """`N(x; D, std^2 I)`, for data with a density; `std` is sigma/alpha at the end unless given."""

    std: float | None = None

    def __post_init__(self) -> None:
        _check_width(self.std)

    def __call__(self, x: Tensor, mean: Tensor, ratio: Tensor) -> Float[Tensor, " b"]:
        std = _width(self.std, ratio)
        squares = ((x - mean) / std).square().flatten(1).sum(1)
        return -0.5 * squares - math.prod(x.shape[1:]) * (std.log() + 0.5 * math.log(2 * math.pi))


@dataclass(frozen=True)
class DiscreteDecoder:
    """The mass of N(D, std^2 I) in the cells of the lattice low, low + step, ..., high on which x lies; the
    outermost cells reach to infinity (Ho et al. 2020, arXiv:2006.11239, eq. 13).

    The logarithm is exact in the tails too. `std` is sigma/alpha at the end unless given. Raises ValueError
    for x on the host that does not lie there: scaled otherwise, or dequantized.
    """

    step: float
    low: float
    high: float
    std: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.step < math.inf and -math.inf < self.low < self.high < math.inf):
            raise ValueError(f"expected step > 0 and low < high, finite; found {self}")
        _check_width(self.std)

    def __call__(self, x: Tensor, mean: Tensor, ratio: Tensor) -> Float[Tensor, " b"]:
        self._check_lattice(x)
        std, half = _width(self.std, ratio), self.step / 2
        lower = torch.where(x < self.low + half, -math.inf, (x - half - mean) / std)
        upper = torch.where(x > self.high - half, math.inf, (x + half - mean) / std)
        return log_normal_mass(lower, upper).flatten(1).sum(1)

    def _check_lattice(self, x: Tensor) -> None:
        """Up to a third of a step, which is more than 8 bits are rounded to in bfloat16."""
        place = (x.double() - self.low) / self.step
        nearest = place.round().clamp(0, round((self.high - self.low) / self.step))
        if not holds((place - nearest).abs() < 1 / 3):
            least, most = x.aminmax()
            raise ValueError(
                f"expected x on the lattice {self.low}, {self.low + self.step}, ..., {self.high}, found "
                f"numbers from {least.item():.6g} to {most.item():.6g} beside it; dequantized x has a "
                "density, take GaussianDecoder()"
            )


def log_normal_mass(a: Tensor, b: Tensor) -> Tensor:
    """`log(Phi(b) - Phi(a))` for a < b, either of them possibly infinite, without cancellation."""
    narrow = (b - a) * torch.maximum(a.abs(), b.abs()).clamp_min(1) < 0.1
    # Each form gets cells of its own kind only, so that gradients are finite.
    by_series = _narrow_mass(torch.where(narrow, a, 0), torch.where(narrow, b, 0.1))
    return torch.where(narrow, by_series, _wide_mass(torch.where(narrow, -1, a), torch.where(narrow, 1, b)))


def _narrow_mass(a: Tensor, b: Tensor) -> Tensor:
    """By the Taylor series of the density about the middle, `phi (1 + sum_n He_n(m) s^n/n!)` for even n up to
    6, to about 1e-14.
    """
    h, m2 = b - a, (0.5 * (a + b)).square()
    h2 = h.square()
    rest = h2 * (m2 - 1) / 24 + h2**2 * ((m2 - 6) * m2 + 3) / 1920
    rest = rest + h2**3 * (((m2 - 15) * m2 + 45) * m2 - 15) / 322560
    return h.log() - 0.5 * (m2 + math.log(2 * math.pi)) + torch.log1p(rest)


def _wide_mass(a: Tensor, b: Tensor) -> Tensor:
    flip = a + b > 0  # both to the side where Phi is small
    a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
    top = torch.special.log_ndtr(b)
    gap = torch.special.log_ndtr(a) - top
    return top + torch.where(gap > -math.log(2), (-torch.expm1(gap)).log(), torch.log1p(-gap.exp()))


def _check_width(std: float | None) -> None:
    if std is not None and not 0 < std < math.inf:
        raise ValueError(f"expected a standard deviation std > 0, or None for sigma/alpha, found {std}")


def _width(std: float | None, ratio: Tensor) -> Tensor:
    return ratio if std is None else ratio.new_tensor(std)


# ---- times of the continuous bound


def by_log_snr(sde: LinearSDE, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
    """log SNR uniform between the end (u = 0) and t_max. Raises ValueError where it is infinite."""
    high, low = sde.log_snr(_ends(sde, end, u)).unbind()
    if not math.isfinite(last := float(sde.log_snr(wide(sde.t_max)))):  # on the CPU, wherever u is
        raise ValueError(
            f"expected a finite log-SNR to spread draws over, found {last:.4g} at t_max of {sde}; give "
            "proposal=likelihood.along(sde), whose t is uniform, or a grid"
        )
    return sde.time(high + u * (low - high)), (high - low).expand_as(u)


def along(schedule: LinearSDE) -> Proposal:
    """log SNR as under another process whose time is uniform: `along(sde)` itself has uniform t.

    With `VPSDE(schedule=schedules.Learned(...))` a proposal to be learned: any one gives the same mean, the
    mean square of the estimates is what training lowers (Kingma et al. 2021, arXiv:2107.00630, appendix I.2).
    """

    def proposal(sde: LinearSDE, u: Tensor, end: float) -> tuple[Tensor, Tensor]:
        first, last = schedule.time(sde.log_snr(_ends(sde, end, u))).unbind()
        clock = first + u * (last - first)
        rate = (last - first) * schedule.rates(clock)[1] / schedule.sigma(clock) ** 2
        return sde.time(schedule.log_snr(clock)), rate

    return proposal


def _ends(sde: LinearSDE, end: float, u: Tensor) -> Tensor:
    return torch.tensor([end, sde.t_max], dtype=torch.float64, device=u.device)


# ---- the terms, (B,) nats


def prior_term(sde: LinearSDE, x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """L_T = `(|alpha x|^2/P^2 + D (v - 1 - log v))/2` with P = prior_std, v = (sigma/P)^2, at t_max."""
    t = wide(sde.t_max)
    signal, v = sde.alpha(t) / sde.prior_std, (sde.sigma(t) / sde.prior_std) ** 2
    squares = (like(signal, x.double()) * x.double()).square().flatten(1).sum(1)
    return 0.5 * (squares + math.prod(x.shape[1:]) * (v - 1 - v.log()).to(x.device))


def diffusion_term(
    model: BaseDenoiser, x: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], t: Time, **cond: Any
) -> Float[Tensor, " b"]:
    """`(g^2/sigma^2) |eps - E[eps | x_t]|^2/2`, nats per unit of time: its mean over eps, integrated over t
    from the end to t_max, is the continuous L_diffusion.

    For t uniform it is VDM's loss; the gradient of its mean square in a `schedules.Learned` of the model's
    process is that of its variance.
    """
    f_g2 = model.sde.rates(t)[1] / model.sde.sigma(t) ** 2
    return 0.5 * like(f_g2, x.double()).flatten() * noise_error(model, x, eps, t, **cond)


def step_term(
    model: BaseDenoiser,
    x: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    s: Time,
    t: Time,
    variance: Variance = posterior_variance,
    **cond: Any,
) -> Float[Tensor, " b"]:
    """KL(q(x_s | x_t, x) || p(x_s | x_t)) at x_t = alpha x + sigma eps, s < t, p having the mean of q with
    the model's D(x_t) in place of x.

        w |x - D|^2 r + (D/2) (r - 1 - log r),   w = (SNR_s - SNR_t)/2,   r = posterior_variance/variance
    """
    sde, s, t = model.sde, wide(s), wide(t)
    r = posterior_variance(sde, s, t) / variance(sde, s, t)
    x = x.double()
    mean, std = sde.marginal(x, t)
    error = (x - model.as_view(DATA, mean + std * eps.double(), t, **cond)).square().flatten(1).sum(1)
    spread = 0.5 * math.prod(x.shape[1:]) * (r - 1 - r.log())
    return like(half_gain(sde, s, t) * r, x).flatten() * error + like(spread, x).flatten()


def learned_step_term(
    model: BaseDenoiser, x: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], s: Time, t: Time, **cond: Any
) -> Float[Tensor, " b"]:
    """`step_term` with the variance that the model states, a `LearnedVariance`, of every element (Nichol and
    Dhariwal 2021, arXiv:2102.09672, eq. 15). One call. Raises TypeError for other models.
    """
    inner, given = with_variance(model)
    x, eps = x.double(), eps.double()
    mean, std = model.sde.marginal(x, t)
    D, v = inner.data_and_share(mean + std * eps, t, **{**given, **cond})
    return step_divergence(model.sde, s, t, (x - D).square(), v).flatten(1).sum(1)


def noise_error(
    model: BaseDenoiser, x: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], t: Time, **cond: Any
) -> Float[Tensor, " b"]:
    """`|eps - E[eps | x_t]|^2`, summed over a sample, float64."""
    x, eps = x.double(), eps.double()
    mean, std = model.sde.marginal(x, t)
    return (eps - model.as_view(NOISE, mean + std * eps, t, **cond)).square().flatten(1).sum(1)


# ---- all together


@dataclass(frozen=True)
class Elbo:
    """The terms of the bound for a batch, costs in nats, float64.

    prior           (B,) L_T
    diffusion       (B,) L_diffusion, the sum of `steps`
    decoder         (B,) L_0
    steps           (B, K) its parts: the KL of each step of the grid, from t_max on, or what each draw of t
                    adds to the continuous bound
    times           (B, K) the times t that they belong to
    standard_error  (B,) of the sum, over eps and t; from differences of neighbouring steps, so that what
                    changes from one to the next counts too
    end             the time of the decoder's x_end
    network_calls, seconds  what it took
    """

    prior: Float[Tensor, " b"]
    diffusion: Float[Tensor, " b"]
    decoder: Float[Tensor, " b"]
    steps: Float[Tensor, "b k"]
    times: Float[Tensor, "b k"]
    standard_error: Float[Tensor, " b"]
    dim: int
    end: float
    network_calls: int
    seconds: float

    @property
    def value(self) -> Float[Tensor, " b"]:
        """(B,) the bound, an estimate of a number that is at most log p(x)."""
        return -(self.prior + self.diffusion + self.decoder)

    def bits_per_dim(self, step: float = 1.0) -> Float[Tensor, " b"]:
        """(B,) `-(value/D + log step)/log 2`. step = 1 with a `DiscreteDecoder`, whose x has a probability;
        the spacing of the lattice for a `GaussianDecoder` on dequantized x."""
        return bits_per_dim(self.value, self.dim, step)


def elbo(
    model: BaseDenoiser,
    x: Float[Tensor, "b ..."],
    decoder: Decoder,
    *,
    grid: Grid | Tensor | None = None,
    end: float | None = None,
    variance: Variance | None = posterior_variance,
    proposal: Proposal = by_log_snr,
    draws: int = 32,
    seed: int = 0,
    ids: Tensor | Sequence[int] | None = None,
    condition: Mapping[str, Any] | None = None,
) -> Elbo:
    """The evidence lower bound on log p(x) for x (B, ...), without gradients.

    decoder           `GaussianDecoder()`, `DiscreteDecoder(step, low, high)`, or any function like them
    grid, variance    the bound of the chain through these times, a Grid or decreasing times from t_max to the
                      end, with this variance of a step (None: the one that the model states, see
                      `LearnedVariance`): one call for each of them. For a DDPM, `grid=chain.times.flip(0)`
                      with `chain.sde()` as the model's process; t_max alone is a chain of one step, whose
                      bound is L_T + L_0
    end               without a grid, of the continuous bound, `sde.default_end` unless given
    proposal, draws   how it draws t: `draws` times a sample, one in each of as many equal parts of [0, 1)
    seed, ids         sample i is a function of (seed, ids[i]) only; ids default to 0..B-1
    condition         passed on to the model as keywords

    The decoder's term is the mean of 4 draws of x_end. Raises TypeError or ValueError for arguments that do
    not fit: a grid that does not start at t_max, an end without noise.
    """
    check_parts(model, x, condition)
    started, sde = time.perf_counter(), model.sde
    if isinstance(decoder, type) or not callable(decoder):
        raise TypeError(f"expected a decoder object such as GaussianDecoder(), found {decoder!r}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"expected a whole number of draws >= 1, found {draws!r}")
    with torch.no_grad(), evaluating(model):
        nodes = _nodes(sde, grid, end)
        last = float(nodes[-1])
        noise = Noise.of(seed, ids, batch=len(x), device=x.device, dtype=torch.float64, offset=ELBO_ROWS)
        x, cond = x.detach().double(), as_conditions(condition or {}, model.device)
        decoded = [_decode(model, x, noise(k, x.shape), last, decoder, cond) for k in range(DECODER_DRAWS)]
        costs = torch.stack(decoded, 1)
        rest = noise.shift(DECODER_DRAWS)
        if grid is None:
            steps, times = _continuous(model, x, rest, last, proposal, draws, cond)
        else:
            steps, times = _discrete(model, x, rest, nodes.to(x.device), variance, cond)
        spread = (costs - costs.mean(1, keepdim=True)).square().sum(1) / (DECODER_DRAWS - 1)
        return Elbo(
            prior_term(sde, x),
            steps.sum(1),
            costs.mean(1),
            steps,
            times,
            (_variance_of_sum(steps) + spread / DECODER_DRAWS).sqrt(),
            math.prod(x.shape[1:]),
            last,
            DECODER_DRAWS + steps.shape[1],
            time.perf_counter() - started,
        )


def _nodes(sde: LinearSDE, grid: Grid | Tensor | None, end: float | None) -> Tensor:
    """`nodes_from_t_max`, and of a chain of one step, which goes to the decoder at once, t_max alone."""
    if not isinstance(grid, Tensor) or grid.shape != (1,):
        return nodes_from_t_max(sde, grid, end)
    node = nodes_from_t_max(sde, torch.cat([grid, grid.new_tensor([sde.default_end])]), None)[:1]
    if end is not None and float(node) != end:
        raise ValueError(
            f"expected a grid that ends at end={end}, found {float(node)} alone; give one of them"
        )
    return node


def _decode(
    model: BaseDenoiser, x: Tensor, eps: Tensor, end: float, decoder: Decoder, cond: dict[str, Any]
) -> Tensor:
    """(B,) -log p(x | x_end)."""
    mean, std = model.sde.marginal(x, end)
    denoised = model.as_view(DATA, mean + std * eps, wide(end).to(x.device), **cond)
    ratio = model.sde.sigma(end) / model.sde.alpha(end)
    log_p = decoder(x, denoised, ratio.to(x.device))
    if not isinstance(log_p, Tensor) or log_p.shape != (len(x),):
        found = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
        raise ValueError(
            f"expected the decoder to return log p(x | x_end), one number a sample, shape ({len(x)},); "
            f"found {found}"
        )
    return -log_p


def _discrete(
    model: BaseDenoiser,
    x: Tensor,
    noise: Noise,
    nodes: Tensor,
    variance: Variance | None,
    cond: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(B, K) terms of the K steps between the nodes, and their times."""
    term = learned_step_term if variance is None else partial(step_term, variance=variance)
    terms = [
        term(model, x, noise(k, x.shape), s, t, **cond) for k, (t, s) in enumerate(itertools.pairwise(nodes))
    ]
    return torch.stack(terms, 1) if terms else x.new_zeros(len(x), 0), nodes[:-1].expand(len(x), -1)


def _continuous(
    model: BaseDenoiser,
    x: Tensor,
    noise: Noise,
    end: float,
    proposal: Proposal,
    draws: int,
    cond: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(B, K) what each of K draws of t adds, and the times."""
    # One uniform number a sample, w in (0, 1), and (k + w)/K for each k: Kingma et al. 2021, appendix I.1.
    w = (noise.words(draws, 1)[:, 0] >> 12).double() * 2.0**-52 + (0.5 + 2.0**-53)
    u = (torch.arange(draws, dtype=torch.float64, device=x.device) + w[:, None]) / draws
    t, rate = proposal(model.sde, u, end)
    terms = [
        0.5 / draws * rate[:, k] * noise_error(model, x, noise(k, x.shape), t[:, k], **cond)
        for k in range(draws)
    ]
    return torch.stack(terms, 1), t


def _variance_of_sum(terms: Tensor) -> Tensor:
    """(B,) variance of the sum of independent terms (B, K), from differences of neighbours."""
    count = terms.shape[1]
    if count == 0:
        return terms.sum(1)
    if count == 1:
        return torch.full_like(terms[:, 0], math.inf)
    return 0.5 * terms.diff(dim=1).square().sum(1) * count / (count - 1)
