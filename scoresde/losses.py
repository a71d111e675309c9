"""Objectives: denoising, implicit and sliced score matching, their weightings, and their times.

Every weighting is stated as the factor w(t) on `|x_0 - D(x_t)|^2`, whatever the network predicts, so all are
comparable. The error of any other view `F = p x_0 + q eps` at the same x_t is a multiple of it, `|F - F*|^2 =
(p - q alpha/sigma)^2 |x_0 - D|^2`.

A loss is made of four parts, each a plain function: random numbers u in [0, 1) (`independent`, `stratified`),
the time t of each (`uniform`, `uniform_log_snr`, `log_normal`, `chain`), its weight (`simple`, `likelihood`,
...), and the error itself. Options of the parts are given by `functools.partial`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .denoiser import NOISE, BaseDenoiser, Denoiser, Karras, Prediction
from .schedules import holds
from .sde import LinearSDE, like, one_each
from .variance import LearnedVariance, step_divergence

Weighting = Callable[[LinearSDE, Tensor], Tensor]
"""(sde, t) -> w(t), float64, of the shape of t."""

Times = Callable[[LinearSDE, Tensor], Tensor]
"""(sde, u) -> t for u in [0, 1), increasing or decreasing in u: the quantile function of the law of t, so
that any way of drawing u works.
"""

Draw = Callable[[int, torch.Generator], Tensor]
"""(n, generator) -> (n,) float64 numbers in [0, 1), each uniform."""

Loss = Callable[..., Tensor]
"""(model, x0, eps, t, weight, **conditions) -> (B,): `denoising`, `hybrid` or `important`."""

Score = Callable[[Tensor], Tensor]


@runtime_checkable
class Classifies(Protocol):
    """What `classification` takes, such as `guidance.Classifier`."""

    sde: LinearSDE

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...


# ---- weightings: the factor on |x_0 - D|^2


def unit(prediction: Prediction, sde: LinearSDE, t: Tensor) -> Tensor:
    """The weight `(p - q alpha/sigma)^2` under which the loss is the plain mean square of the predicted
    quantity's error.
    """
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    p, q = prediction.pq(alpha, sigma)
    return (p - q * alpha / sigma).square()


def simple(sde: LinearSDE, t: Tensor) -> Tensor:
    """`alpha^2/sigma^2`, the SNR: mean square error of the noise (L_simple, Ho et al. 2020, arXiv:2006.11239,
    eq. 14).
    """
    return unit(NOISE, sde, t)


def likelihood(sde: LinearSDE, t: Tensor) -> Tensor:
    """`g^2 alpha^2 / (2 sigma^4) = -(d SNR/dt)/2`: nats per unit of time, the g^2 weighting of the score's
    error (Song et al. 2021, arXiv:2101.09258, eq. 7).

    Its integral over [s, t] is the chain's ELBO weight, (SNR_s - SNR_t)/2. With t from `uniform_log_snr` it
    is estimated by the `simple` loss times half the range of log-SNR, at far smaller variance than with
    uniform t: that is the paper's importance sampling.
    """
    return 0.5 * sde.rates(t)[1] * (sde.alpha(t) / sde.sigma(t).square()).square()


def min_snr(sde: LinearSDE, t: Tensor, *, gamma: float = 5.0) -> Tensor:
    """`min(SNR, gamma)` (Hang et al. 2023, arXiv:2303.09556, eq. 6)."""
    return simple(sde, t).clamp_max(gamma)


def truncated_snr(sde: LinearSDE, t: Tensor) -> Tensor:
    """`max(SNR, 1)` (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""
    return simple(sde, t).clamp_min(1.0)


def snr_plus_one(sde: LinearSDE, t: Tensor) -> Tensor:
    """`SNR + 1` (ibid.): on a variance-preserving process the mean square error of the velocity."""
    return simple(sde, t) + 1


def edm(sde: LinearSDE, t: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """`(sigma^2 + alpha^2 sigma_data^2)/(sigma sigma_data)^2 = 1/c_out^2`: weight one on the raw output under
    `Karras(sigma_data)` (Karras et al. 2022, arXiv:2206.00364, table 1).
    """
    return unit(Karras(sigma_data), sde, t)


# ---- times: quantile functions of the law of t


def uniform(sde: LinearSDE, u: Tensor, *, end: float | None = None) -> Tensor:
    """`t = end + u (t_max - end)`; end defaults to `sde.default_end`."""
    low = sde.default_end if end is None else end
    return low + u * (sde.t_max - low)


def uniform_log_snr(sde: LinearSDE, u: Tensor, *, end: float | None = None) -> Tensor:
    """log-SNR uniform between its values at `end` (u = 0) and `t_max`; ValueError where those are infinite
    (Rectified at t = 1).
    """
    high, low = _log_snr_range(sde, end)
    if not math.isfinite(high - low):
        raise ValueError(
            f"expected a finite range of log-SNR, found [{low}, {high}] for {sde}; use losses.log_normal or "
            "losses.uniform, or end > 0"
        )
    return sde.time(high + u * (low - high))


def log_normal(sde: LinearSDE, u: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """`log(sigma/alpha) ~ N(mean, std^2)`, clipped to the SDE's range (Karras et al. 2022, arXiv:2206.00364,
    table 1).
    """
    log_sigma = mean + std * torch.special.ndtri(u)
    return sde.time(-2 * log_sigma).clamp(max(sde.t_min, sde.default_end), sde.t_max)


def chain(sde: LinearSDE, u: Tensor, *, n: int = 1000) -> Tensor:
    """`t = i/n`, i uniform in 1..n: with `simple`, Algorithm 1 of Ho et al. (2020, arXiv:2006.11239) on the
    n-step chain. Raises ValueError for a process that is not on [0, 1].
    """
    _check_unit_range(sde)
    return ((u * n).floor() + 1) / n


def in_proportion(sde: LinearSDE, u: Tensor, *, sizes: Tensor) -> Tensor:
    """`t = i/n`, i with probability `sizes[i - 1]/sum(sizes)`: importance sampling, for the loss `important`.

    sizes (n,) positive; the variance is least for the root mean square of the loss at each i (Nichol and
    Dhariwal 2021, arXiv:2102.09672, eq. 18). Raises ValueError for other sizes, and like `chain`.
    """
    _check_unit_range(sde)
    shares = _shares(sizes)
    below = torch.searchsorted(shares.cumsum(0).to(u.device), u, right=True)
    return (below.clamp_max(len(shares) - 1) + 1).double() / len(shares)


def _check_unit_range(sde: LinearSDE) -> None:
    if (sde.t_min, sde.t_max) != (0, 1):
        raise ValueError(
            f"expected a process with times in [0, 1] for the times i/n of a chain, found {sde} on "
            f"[{sde.t_min}, {sde.t_max}]; use losses.log_normal or losses.uniform"
        )


def _shares(sizes: Tensor) -> Tensor:
    """(n,) probabilities, float64, on the CPU."""
    sizes = sizes.detach().double().cpu()
    if sizes.ndim != 1 or not bool(((sizes > 0) & sizes.isfinite()).all()):
        raise ValueError(
            f"sizes: expected positive numbers (n,), one for each step of the chain, found {sizes}; add a "
            "little where nothing is lost"
        )
    return sizes / sizes.sum()


def _log_snr_range(sde: LinearSDE, end: float | None) -> tuple[float, float]:
    ends = torch.tensor([sde.default_end if end is None else end, sde.t_max], dtype=torch.float64)
    high, low = sde.log_snr(ends).tolist()
    return high, low


# ---- draws of u


def independent(n: int, generator: torch.Generator) -> Tensor:
    """n independent uniform numbers."""
    return torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """`u_i = (i + u)/n` with a single u: each is uniform, and one lies in each n-th of [0, 1) (Kingma et al.
    2021, arXiv:2107.00630, appendix I.1).

    In increasing order: pair them with samples that are in random order.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    i = torch.arange(n, dtype=torch.float64, device=generator.device)
    return ((i + offset) / n).remainder(1.0)  # (n - 1 + u)/n may round to 1


# ---- the losses, one number per sample


def denoising(
    model: BaseDenoiser,
    x0: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    t: Float[Tensor, " b"],
    weight: Weighting = simple,
    **cond: Any,
) -> Float[Tensor, " b"]:
    """Denoising score matching: `w(t)` times the mean over elements of `|x_0 - D(x_t, t)|^2`, `x_t = alpha
    x_0 + sigma eps` (Vincent 2011, Neural Computation 23:1661).

    The minimiser is E[x_0 | x_t] for any positive weight. For a `Denoiser` the error is taken on the
    network's own output and target, so that nothing cancels at small sigma.
    """
    x_t = _noisy(model.sde, x0, eps, t)
    w = weight(model.sde, t)
    if isinstance(model, Denoiser):
        error = model.raw(x_t, t, **cond) - model.target(x0, eps, t)
        w = w / unit(model.predicts, model.sde, t)
    else:
        error = model(x_t, t, **cond) - x0
    return like(w.to(x0.device), x0).flatten() * _mean_square(error)


def hybrid(
    model: LearnedVariance,
    x0: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    t: Float[Tensor, " b"],
    weight: Weighting = simple,
    *,
    n: int = 1000,
    scale: float = 1e-3,
    **cond: Any,
) -> Float[Tensor, " b"]:
    """`denoising` plus `scale n` times the mean over elements of the ELBO's KL of the step from t = i/n to
    (i - 1)/n, for t from `chain` with the same n (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 16).

    The second term trains the variance only: the prediction is detached in it. Whatever the scale, the best v
    is that of the best variance, `Sigma = beta-tilde (1 + 2 w E[error of the noise^2 | x_t])`. The step to
    t = 0, whose term in the bound is the decoder's, has none. One call of the network.
    """
    sde = model.sde
    F, v = model.halves(_noisy(sde, x0, eps, t), t, **cond)
    square = (F - model.target(x0, eps, t)).square()
    to_data = unit(model.predicts, sde, t)
    w = weight(sde, t) / to_data
    s = ((t * n).round() - 1) / n
    inner = s > 0
    s = torch.where(inner, s, 0.5 * t)
    term = step_divergence(sde, s, t, square.detach() / like(to_data, x0), v).flatten(1).mean(1)
    plain = like(w.to(x0.device), x0).flatten() * square.flatten(1).mean(1)
    return plain + (scale * n * torch.where(inner.to(x0.device), term, 0)).to(plain.dtype)


def important(
    model: BaseDenoiser,
    x0: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    t: Float[Tensor, " b"],
    weight: Weighting = simple,
    *,
    sizes: Tensor,
    loss: Loss = denoising,
    **cond: Any,
) -> Float[Tensor, " b"]:
    """`loss/(n p_i)` at t = i/n with probability p_i, for t from `in_proportion` with the same sizes: the
    mean is that of the loss over the chain, whatever the sizes.
    """
    shares = _shares(sizes)
    i = (t * len(shares)).round().long() - 1
    factor = 1 / (len(shares) * shares.to(t.device)[i])
    return like(factor.to(x0.device), x0).flatten() * loss(model, x0, eps, t, weight, **cond)


def classification(
    classifier: Classifies,
    x0: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    t: Float[Tensor, " b"],
    label: Int[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """`-log p(label | x_t)`, `x_t = alpha x_0 + sigma eps`: cross-entropy on noisy data, whose minimiser is
    the classifier that guidance needs (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4.1).

    `classifier(x, t)` is log p(y | x_t = x) for all classes, (B, K), and has an `sde`. Raises ValueError for
    labels that are none of them, where the host knows them.
    """
    log_p = classifier(_noisy(classifier.sde, x0, eps, t), t)
    known = torch.zeros_like(label) if label.is_floating_point() else (label >= 0) & (label < log_p.shape[1])
    if not holds(known):
        raise ValueError(
            f"label: expected integers from 0 to {log_p.shape[1] - 1}, found {label.dtype} from "
            f"{label.min().item()} to {label.max().item()}"
        )
    return -log_p.gather(1, label.long()[:, None])[:, 0]


def implicit(score: Score, x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """`|s(x)|^2/2 + tr(ds/dx)`, the trace exact by one backward pass per element (Hyvarinen 2005, JMLR 6:695,
    eq. 4).

    In expectation over x ~ p it is the Fisher divergence `E|s - grad log p|^2 / 2` minus `E|grad log p|^2 /
    2`. `score` maps (B, ...) to the same shape and must treat the samples independently. Differentiable in
    the parameters of `score`. Raises ValueError if `score` changes the shape.
    """

    def loss(x: Tensor, s: Tensor) -> Tensor:
        columns = s.flatten(1)
        diagonal = [_gradient(columns[:, i], x).flatten(1)[:, i] for i in range(columns.shape[1])]
        return 0.5 * columns.square().sum(1) + torch.stack(diagonal).sum(0)

    return _with_gradients(loss, score, x)


def sliced(
    score: Score, x: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], *, reduce_variance: bool = True
) -> Float[Tensor, " b"]:
    """`v.(ds/dx) v + |s|^2/2`, or with `(v.s)^2/2` in place of the second term, by one backward pass (Song et
    al. 2019, arXiv:1905.07088, eqs. 8, 7).

    Unbiased for `implicit` when E[v v^T] = I (normal or Rademacher v, of the shape of x). Differentiable like
    it.
    """

    def loss(x: Tensor, s: Tensor) -> Tensor:
        along = (v * s).flatten(1).sum(1)
        curvature = (v * _gradient(along, x)).flatten(1).sum(1)
        return curvature + 0.5 * (s.flatten(1).square().sum(1) if reduce_variance else along.square())

    return _with_gradients(loss, score, x)


def _noisy(sde: LinearSDE, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t. Raises ValueError for noise of another shape than x_0."""
    mean, std = sde.marginal(x0, t)
    return mean + std * one_each(eps, x0)


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def _with_gradients(loss: Callable[[Tensor, Tensor], Tensor], score: Score, x: Tensor) -> Tensor:
    """`loss(x, score(x))` with x a leaf that takes gradients; a plain number where the caller wants none."""
    if x.ndim < 2:
        raise ValueError(f"expected x of shape (B, ...) with an axis after the batch, found {tuple(x.shape)}")
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        s = score(x)
        if s.shape != x.shape:
            raise ValueError(f"expected a score of the shape of x, {tuple(x.shape)}; found {tuple(s.shape)}")
        value = loss(x, s)
    return value if wanted else value.detach()


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """d values_b / d x_b, itself differentiable; zero where the values do not depend on x."""
    if not values.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=True, materialize_grads=True)
    return gradient
