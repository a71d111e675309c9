"""The checks of likelihoods, of their divergences and of lower bounds: ours, and a user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser
from ..grids import Grid
from ..laws import Gaussian, Law
from ..likelihood.bound import Variance, posterior_variance
from ..likelihood.divergence import Divergence
from ..noise import Noise
from ..schedules import Time
from ..sde import LinearSDE
from .failure import at_most, holds
from .numerics import has, something

Estimate = Callable[[BaseDenoiser, Tensor], Any]
"""(model, x (B, ...)) -> a report like `likelihood.LogProb` or `likelihood.Elbo`."""

REPORT = ("value", "standard_error", "solver_error", "prior_gap", "truncation", "latent", "end")
WIDTHS = 8.0  # standard errors: by chance once in 1e15 for normal ones, in 1e6 for a t of 15 degrees


class Turned(BaseDenoiser):
    """The denoiser of Q x_0, Q orthogonal (D, D), from that of x_0: `Q D(Q^T x, t)`."""

    def __init__(self, model: BaseDenoiser, Q: Tensor) -> None:
        super().__init__()
        self.model, self.sde, self.Q = model, model.sde, Q

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        back = turned(x, self.Q.mT)
        return turned(self.model(back, t, **cond), self.Q)


def turned(x: Tensor, Q: Tensor) -> Tensor:
    """Q x for each of x (B, ...), flattened."""
    return (x.flatten(1) @ Q.mT.to(x)).view(x.shape)


@torch.no_grad()
def check_likelihood(
    estimate: Estimate, law: Law, sde: LinearSDE, *, data: Tensor | None = None, atol: float = 1e-6
) -> None:
    """That a log-density is right within the errors it states, on a law whose density is known.

    estimate  (model, x) -> a report with `value standard_error solver_error prior_gap truncation latent end`,
              all as in `likelihood.LogProb`: `likelihood.log_prob`, or a `functools.partial` of it
    law, sde  what x_0 is drawn from, with a density, and the process; the model is `law.denoiser(sde)`
    data      x (B, ...) at the time `end`; draws of the law unless given

    Within `atol` plus the stated solver error plus 8 standard errors:

        value + log p_T(x_T) - log N(x_T; 0, prior_std^2 I) = log p_end(x)

    the stated `prior_gap` is that difference, to a tenth of its size; `truncation` is log p_end(x) - log
    p_0(x), to a fifth, where it is small; and rotating data and model together changes nothing. Raises
    ValueError for no data.
    """
    x = law.sample(8, generator=torch.Generator().manual_seed(0)) if data is None else data.double()
    something(data=x)
    model = law.denoiser(sde)
    found = estimate(model, x)
    has(found, "log-density", REPORT)
    allowed = atol + found.solver_error + _error(found)
    where: dict[str, Any] = {"law": law, "sde": sde, "end": found.end}

    known = law.marginal(sde, found.end).log_prob(x)
    prior = Gaussian(torch.zeros(x.shape[1:], dtype=torch.float64), sde.prior_std**2)
    gap = law.marginal(sde, sde.t_max).log_prob(found.latent) - prior.log_prob(found.latent)
    claim = "value + what the prior misses of the law at t_max is log p at the end"
    at_most(claim, (found.value + gap - known).abs(), allowed, known=known, **where)
    claim = "the stated prior gap is log p_T(x_T) - log prior(x_T)"
    at_most(claim, (found.prior_gap - gap).abs(), allowed + 0.1 * gap.abs().max(), known=gap, **where)
    cut = known - law.log_prob(x)
    if float(cut.abs().max()) < 0.1:  # a first-order number is of no use where it is large
        claim = "the stated truncation is log p_end(x) - log p_0(x)"
        bound = allowed + 0.2 * cut.abs().max()
        at_most(claim, (found.truncation - cut).abs(), bound, known=cut, **where)

    dim = math.prod(x.shape[1:])
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    other = estimate(Turned(model, Q), turned(x, Q))
    allowed = allowed + other.solver_error + _error(other)
    claim = "a rotation of data and model changes nothing"
    at_most(claim, (found.value - other.value).abs(), allowed, known=found.value, **where)


def _error(found: Any) -> Tensor:
    """8 standard errors; infinite where a single probe says nothing of its error."""
    return WIDTHS * found.standard_error


@torch.no_grad()
def check_divergence(divergence: Divergence, dim: int = 6, draws: int = 4000, rtol: float = 1e-10) -> None:
    """That an estimator of traces is unbiased and states its own spread.

    On a fixed matrix (dim, dim) that is neither symmetric nor diagonal, over `draws` independent probes: the
    mean of the estimates is the trace within 8 standard errors (within `rtol` for one that has no spread),
    and the mean square of the stated standard error is the variance of the mean of its columns, within 30 %
    (not asked of a single column, which states infinity).
    """
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(dim, dim, generator=generator, dtype=torch.float64) + 2 * torch.eye(dim).double()
    trace = float(A.trace())
    noise = Noise.of(0, None, batch=draws, device=torch.device("cpu"), dtype=torch.float64)
    estimates = divergence.estimates(lambda W: W @ A, divergence.probes(noise, dim))
    holds(
        "there are as many estimates as columns",
        estimates.shape == (draws, divergence.columns),
        found=tuple(estimates.shape),
        columns=divergence.columns,
    )
    means = estimates.mean(1)
    spread = float(means.var())
    where: dict[str, Any] = {"divergence": divergence, "trace": trace}
    bound = WIDTHS * math.sqrt(spread / draws) + rtol * float(A.norm()) * dim
    at_most("the mean of the estimates is the trace", abs(float(means.mean()) - trace), bound, **where)
    stated = divergence.standard_error(estimates, dim)
    if divergence.columns > 1 or not bool(stated.isinf().all()):
        claim = "the stated standard error is the spread of the mean, over the draws"
        off = abs(float(stated.square().mean()) - spread)
        at_most(claim, off, 0.3 * spread + (rtol * float(A.norm())) ** 2, spread=spread, **where)


@torch.no_grad()
def check_bound(
    estimate: Estimate,
    law: Law,
    sde: LinearSDE,
    *,
    grid: Grid | None = None,
    variance: Variance = posterior_variance,
    draws: int = 2000,
) -> None:
    """That an evidence lower bound is one, and on a Gaussian law that its terms are what they must be.

    estimate        (model, x) -> a report with `prior diffusion decoder steps value end`, as
                    `likelihood.Elbo`; of `law.denoiser(sde)`, on `draws` draws of the law, which has a
                    density
    grid, variance  those of the chain that the estimate bounds; no grid for the continuous bound

    Exactly: `value = -(prior + diffusion + decoder)`, `diffusion = sum of steps`, and

        prior = KL(N(alpha x, sigma^2 I) || N(0, prior_std^2 I))    at t_max.

    On average over the law, within 8 standard errors: value <= log p; and for a `Gaussian` with variances v_j
    along its axes, of each step from t to s and of the continuous bound,

        sum_j w r v_j SNR_t/(1 + v_j SNR_t) + (D/2)(r - 1 - log r),   w = (SNR_s/SNR_t - 1)/2,
        (1/2) sum_j log((1 + v_j SNR_end)/(1 + v_j SNR_T)),

    r being the posterior's variance over `variance`.
    """
    x = law.sample(draws, generator=torch.Generator().manual_seed(0))
    found = estimate(law.denoiser(sde), x)
    has(found, "bound", ("prior", "diffusion", "decoder", "steps", "value", "end"))
    dim = math.prod(x.shape[1:])
    where: dict[str, Any] = {"law": law, "sde": sde, "end": found.end}
    size = found.prior.abs() + found.diffusion.abs() + found.decoder.abs()
    whole = found.prior + found.diffusion + found.decoder
    at_most("value is -(prior + diffusion + decoder)", (found.value + whole).abs(), 1e-12 * size, **where)
    off = (found.diffusion - found.steps.sum(1)).abs()
    at_most("diffusion is the sum of steps", off, 1e-12 * found.steps.abs().sum(1), **where)

    alpha, v = sde.alpha(sde.t_max), (sde.sigma(sde.t_max) / sde.prior_std) ** 2
    squares = (alpha / sde.prior_std * x).square().flatten(1).sum(1)
    known = 0.5 * (squares + dim * (v - 1 - v.log()))
    at_most("prior is KL(q_T || N(0, prior_std^2 I))", (found.prior - known).abs(), 1e-10 * (dim + known))

    excess = found.value - law.log_prob(x)
    at_most("the bound is at most log p, on average", excess.mean(), _widths(excess), **where)
    if isinstance(law, Gaussian):
        variances = law.eigen().values
        if grid is None:
            ends = sde.log_snr(torch.tensor([found.end, sde.t_max], dtype=torch.float64)).exp()
            high, low = torch.log1p(variances * ends[:, None]).sum(1).unbind()
            off = (found.diffusion.mean() - 0.5 * (high - low)).abs()
            claim = "the diffusion term is log((1 + v SNR_end)/(1 + v SNR_T))/2, on average"
            at_most(claim, off, _widths(found.diffusion), **where)
        else:
            known = _expected_steps(sde, grid, variances, variance)
            off = (found.steps.mean(0) - known).abs()
            bound = _widths(found.steps) + 1e-9 * (1 + known)
            at_most("the KL of each step, on average", off, bound, t=grid.t[:-1], known=known, **where)


def _expected_steps(sde: LinearSDE, grid: Grid, variances: Tensor, variance: Variance) -> Tensor:
    """(K,) the mean over a Gaussian law of KL(q(x_s | x_t, x) || p(x_s | x_t))."""
    t, s = grid.t[:-1], grid.t[1:]
    w = 0.5 * torch.expm1(sde.log_snr(s) - sde.log_snr(t))
    snr = sde.log_snr(t).exp()[:, None]
    error = (variances * snr / (1 + variances * snr)).sum(1)
    # Of q(x_s | x_t, x), by adding the precisions of x_s given x and of x_t given x_s.
    scale, std = sde.transition(s, t)
    r = 1 / (1 / sde.sigma(s) ** 2 + (scale / std) ** 2) / variance(sde, s, t)
    return w * r * error + 0.5 * len(variances) * (r - 1 - r.log())


def _widths(values: Tensor) -> Tensor:
    """8 standard errors of the mean over axis 0."""
    return WIDTHS * values.std(0) / math.sqrt(len(values))
