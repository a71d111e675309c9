"""Denoisers that also say how wide the reverse step is: a learned variance between the two classical ones.

Of the reverse step from t to s < t, DDPM's variances are that of q(x_s | x_t, x_0), beta-tilde, right for
data without spread, and that of q(x_t | x_s), beta, right for standard normal data under a VP-SDE; their
ratio is (sigma_t/sigma_s)^2. With

    log Sigma = v log beta + (1 - v) log beta-tilde = log beta-tilde + 2 v log(sigma_t/sigma_s)

(Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15) a network that predicts v for every element reaches the
best one, `beta-tilde + (alpha_s beta/sigma_t^2)^2 Var(x_0 | x_t)`, beta = Var(x_t | x_s) (Bao et al. 2022,
arXiv:2201.06503, theorem 1, whose average over x_t it is).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .denoiser import DATA, BaseDenoiser, Conditioned, Denoiser, Pair, Rows, Wrapper, determined, view
from .schedules import Time, wide
from .sde import LinearSDE, like


class LearnedVariance(Denoiser):
    """A network with twice the channels as a denoiser with the variance of its reverse steps.

    `network(input, time, **cond)` returns (B, 2 C, ...): in the first half F, as for `Denoiser`, in the
    second u, with `v = (1 + u)/2`, not clipped: `UNet(channels, out_channels=2 * channels)`, which begins at
    v = 1/2. To every solver and to guidance it is the denoiser; `solvers.ddpm_learned()` samples with the
    variance, guided by a classifier or without one or not at all, `losses.hybrid` trains both,
    `likelihood.elbo(..., variance=None)` is the bound with it.

    v belongs to the steps it was trained on: those of one chain, or of one grid.
    """

    def halves(self, x: Tensor, t: Time, **cond: Any) -> Pair:
        """(F, v), each (B, C, ...) in the dtype of x, by one call."""
        F, u = _halves(self._output(x, *self._scale_and_label(x, t), **cond), x)
        return F, 0.5 * (1 + u)

    def data_and_share(self, x: Tensor, t: Time, **cond: Any) -> Pair:
        """(D, v), each (B, C, ...), by one call."""
        t = wide(t)
        F, v = self.halves(x, t, **cond)
        pair = view(DATA, self.predicts, self.sde.alpha(t), self.sde.sigma(t))
        a, b = determined(*pair, t, f"data from predicted {self.predicts.name}")
        return like(a, x) * x + like(b, x) * F, v

    def _call(self, x: Tensor, c_in: Tensor | float, label: Tensor, /, **cond: Any) -> Tensor:
        return _halves(self._output(x, c_in, label, **cond), x)[0]

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        whole = super().rows(times, x, **cond)
        return Rows(lambda state, k: _halves(whole.evaluate(state, k), state)[0], whole.a, whole.b)


def _halves(out: Any, x: Tensor) -> Pair:
    """The halves of a network's output along axis 1, in the dtype of x."""
    expected = (len(x), 2 * x.shape[1], *x.shape[2:])
    if not isinstance(out, Tensor) or out.shape != expected:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"expected the network to return prediction and variance, {expected}, found {found}; build it "
            "with twice the output channels, or use Denoiser"
        )
    F, u = out.to(x.dtype).chunk(2, 1)
    return F, u


@runtime_checkable
class StatesVariance(Protocol):
    """A `LearnedVariance`, or a denoiser that guides one and passes its variance on."""

    def data_and_share(self, x: Tensor, t: Time, **cond: Any) -> Pair:
        """(D, v), each (B, C, ...)."""
        ...


def with_variance(model: BaseDenoiser) -> tuple[StatesVariance, dict[str, Any]]:
    """The model that states the variance, and the conditions filled in. Raises TypeError if there is none."""
    if isinstance(model, Conditioned):
        inner, cond = with_variance(model.model)
        return inner, {**cond, **model.cond}
    if isinstance(model, StatesVariance):
        if isinstance(model, Wrapper):
            with_variance(model.model)
        return model, {}
    raise TypeError(
        f"expected a LearnedVariance denoiser, as it is or guided by a classifier or without one, found "
        f"{type(model).__name__}; for another take solvers.ddpm() and likelihood.posterior_variance"
    )


def log_ratio(sde: LinearSDE, s: Time, t: Time) -> Tensor:
    """log(beta/beta-tilde) = 2 log(sigma_t/sigma_s) of the step from t to s, float64; infinite where sigma_s
    is 0.
    """
    return 2 * (sde.sigma(t).log() - sde.sigma(s).log())


def step_divergence(sde: LinearSDE, s: Time, t: Time, square: Tensor, v: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x) || N(mean, Sigma)) of every element, nats, of the shape of `square`, the squared
    error of the predicted data, and of v; float64, since r is near 1 where steps are short.

        w r square + (r - 1 - log r)/2,   w = (SNR_s - SNR_t)/2,   r = beta-tilde/Sigma

    log r = -v log(beta/beta-tilde). The mean is that of q with the predicted data.
    """
    v = v.double()
    gap = v * like(log_ratio(sde, s, t), v)
    return like(half_gain(sde, s, t), v) * (-gap).exp() * square + 0.5 * (torch.expm1(-gap) + gap)


def half_gain(sde: LinearSDE, s: Time, t: Time) -> Tensor:
    """(SNR_s - SNR_t)/2, float64, to rounding for short steps; t may be without signal."""
    high, low = sde.log_snr(s), sde.log_snr(t)
    return -0.5 * high.exp() * torch.expm1(low - high)
