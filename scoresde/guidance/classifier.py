"""Guidance by the gradient of `log p(y | x_t)`, and the classifier network that gives one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..denoiser import (
    DATA,
    TIME_INPUTS,
    BaseDenoiser,
    Pair,
    Prediction,
    Rows,
    checked,
    determined,
    first_tensor,
    some_rows,
)
from ..gradients import gradient
from ..schedules import Time, wide
from ..sde import LinearSDE, alike, like
from ..variance import with_variance
from .base import Guided
from .scales import Scale, at, checked_scale

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), t (B,) float64) -> log p(y | x_t = x) up to a constant, (B,)."""


def shift(target: Prediction, scale: Scale, sde: LinearSDE, t: Tensor) -> Tensor:
    """What `scale` times the gradient is multiplied with to move the view `p x_0 + q eps` at the same x, when
    the gradient itself moves the score: `scale (p sigma^2/alpha - q sigma)`; float64, of the shape of t.

    Raises ValueError where it is not finite: nothing is known of the data without signal (alpha = 0).
    """
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    p, q = target.pq(alpha, sigma)
    strength = at(scale, sde, t)
    # What holds no x_0 needs no division by alpha, and no guidance needs none at all.
    gain = torch.where(p == 0, 0, p * sigma**2 / alpha) - q * sigma
    gain = torch.where(strength == 0, 0, gain * strength)
    return determined(gain, p, t, f"guided {target.name}")[0]


def classifier(model: BaseDenoiser, log_prob: LogProb, scale: Scale = 1.0) -> Classified:
    """The denoiser whose score is `score(x, t) + scale grad log_prob(x, t)`:

        D(x, t) + scale (sigma^2/alpha) grad_x log p(y | x_t = x)

    model      any denoiser
    log_prob   (x (B, ...), t (B,) float64) -> (B,), log p(y | x_t) up to a constant, of a classifier that
               knows noisy data: `Classifier(...).log_prob(label)`, or any differentiable function (what it
               computes under its own `no_grad`, or detaches, does not guide, unnoticed). A module is put in
               evaluation mode by solvers, like the model; samples must not depend on each other
    scale      a number or a function of noise level, see `interval`, `ramp`

    At scale 1 and with the exact log_prob it is the denoiser of p(x_0 | y): `law.posterior`. At other scales
    the guided scores are not the scores of any one law under noise: what comes out is not `p(x) p(y|x)^scale`
    and depends on the solver. On data of variance v with posterior variance q the probability flow ends in a
    Gaussian of variance `v^(1 - scale) q^scale` (the product: `1/((1 - scale)/v + scale/q)`).

    Dhariwal and Nichol 2021, arXiv:2105.05233, section 4; Song et al. 2021, arXiv:2011.13456, eq. 14. The
    ancestral step from t to s moves its mean by `scale (V/a) grad`, (a, V^(1/2)) = sde.transition(s, t), in
    the terms of DDPM `scale beta_i/(1 - beta_i)^(1/2) grad`. Their algorithm 1 moves it by the variance of
    the step times the gradient, which is the gain `sigma_s^2/alpha_s` of where the step ends in place of
    `sigma_t^2/alpha_t`, and the same to first order in the step.

    Gradients are taken under `no_grad` and `inference_mode` too, and leave `requires_grad` and `.grad` alone.
    Raises ValueError where alpha = 0 for what predicts the data, for a log_prob of another shape, and for a
    `Classifier` on another process.
    """
    guided = Classified(model, log_prob, scale)
    if isinstance(log_prob, LabelLogProb) and not alike(log_prob.classifier.sde, model.sde, 1e-6):
        raise ValueError(
            f"log_prob: expected a classifier on the model's process, {model.sde}, found one on "
            f"{log_prob.classifier.sde}"
        )
    return guided


class Classified(Guided):
    """See `classifier`."""

    def __init__(self, model: BaseDenoiser, log_prob: LogProb, scale: Scale = 1.0) -> None:
        super().__init__(model)
        if not callable(log_prob):
            raise TypeError(f"log_prob: expected a function of (x, t), found {type(log_prob).__name__}")
        # Not `log_prob`, by which a model gives its own density.
        self.log_likelihood, self.scale = log_prob, checked_scale(scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"

    def _pull(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log_prob at x, for t of shape () or (B,) on the device of x."""
        clock = t.expand(len(x))
        return gradient(lambda x: self.log_likelihood(x, clock), x)[1]

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.as_view(DATA, x, t, **cond)

    def as_view(self, target: Prediction, /, x: Tensor, t: Time, **cond: Any) -> Tensor:
        t = wide(t)
        return self._guided(target, self.model.as_view(target, x, t, **cond), x, t)

    def _guided(self, target: Prediction, plain: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.scale == 0:
            return plain
        return plain + like(shift(target, self.scale, self.sde, t), x) * self._pull(x, t.to(x.device))

    def data_and_share(self, x: Tensor, t: Time, **cond: Any) -> Pair:
        """(D, v) of a `LearnedVariance`, D guided: the mean of a reverse step is then that of the guided law,
        its variance the one of the law without guidance. log_prob is called at every noise level."""
        inner, given = with_variance(self.model)
        D, v = inner.data_and_share(x, t, **{**given, **cond})
        return self._guided(DATA, D, x, wide(t)), v

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        plain = self.model.rows(times, x, **cond)
        moved = shift(DATA, self.scale, self.sde, times).tolist()
        # Guidance of F, where D = a x + b F; where b = 0 there is no noise and no guidance.
        share = [s / b if b else 0.0 for s, b in zip(moved, plain.b, strict=True)]
        clock = times.to(x.device).unbind()

        def evaluate(state: Tensor, k: int) -> Tensor:
            F = checked(plain.evaluate(state, k), state)
            return F + share[k] * self._pull(state, clock[k]) if share[k] else F

        return Rows(evaluate, plain.a, plain.b)

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        log_prob = some_rows(self.log_likelihood, rows, batch)
        return Classified(self.model.narrowed(rows, batch), log_prob, self.scale)


class Classifier(nn.Module):
    """A network `(input (B, ...), time (B,)) -> logits (B, K)` as `log p(y = k | x_t)`, k = 0..K-1.

    The network gets `x/(alpha^2 + sigma^2)^(1/2)` in its own dtype, of about unit variance on every process,
    and `time` as in `Denoiser`: "t", "log_snr" or "index", in float32 or wider. `networks.NoisyClassifier` is
    one; `train.fit_classifier` trains it on noisy data.
    """

    def __init__(self, network: nn.Module, sde: LinearSDE, time_input: str = "t") -> None:
        super().__init__()
        if time_input not in TIME_INPUTS:
            raise ValueError(f"expected time_input to be one of {sorted(TIME_INPUTS)}, found {time_input!r}")
        self.network, self.sde, self.time_input = network, sde, time_input

    def extra_repr(self) -> str:
        return f"{self.sde}, time_input={self.time_input!r}"

    @property
    def device(self) -> torch.device:
        """Where the parameters live; the CPU if there are none."""
        tensor = first_tensor(self)
        return torch.device("cpu") if tensor is None else tensor.device

    def forward(self, x: Float[Tensor, "b ..."], t: Time) -> Float[Tensor, "b k"]:
        """log p(y = k | x_t = x), in the wider of the dtype of x and float32."""
        t, tensor = wide(t), first_tensor(self)
        dtype = x.dtype if tensor is None else tensor.dtype
        label = TIME_INPUTS[self.time_input](self.sde, t)
        time = label.to(x.device, torch.promote_types(dtype, torch.float32)).expand(len(x))
        size = like(torch.hypot(self.sde.alpha(t), self.sde.sigma(t)), x)
        logits = self.network((x / size).to(dtype), time)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"expected the network to return logits ({len(x)}, K), found {found}")
        return logits.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(1)

    def log_prob(self, label: int | Int[Tensor, " b"]) -> LabelLogProb:
        """The function (x, t) -> log p(label | x_t), for `classifier`; one label for all or one a sample."""
        return LabelLogProb(self, label)


class LabelLogProb(nn.Module):
    """See `Classifier.log_prob`."""

    label: Tensor

    def __init__(
        self, classifier: Classifier, label: int | Tensor, ends: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        given = torch.as_tensor(label)
        if given.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            given = given.long()
        if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
            raise ValueError(
                f"label: expected an integer or integers of shape (B,), found {given.dtype} of shape "
                f"{tuple(given.shape)}"
            )
        # Read and sent to the device here, and not at every call; `ends` where it has been read before
        self.least, self.most = ends or (map(int, given.aminmax()) if given.numel() else (0, 0))
        if self.least < 0:
            raise ValueError(f"label: expected classes from 0 on, found {self.least}")
        device = next((p.device for p in classifier.parameters()), given.device)
        self.classifier = classifier
        self.register_buffer("label", given.to(device), persistent=False)

    def forward(self, x: Float[Tensor, "b ..."], t: Time) -> Float[Tensor, " b"]:
        # a copy, for one made in inference mode could not be kept for backward
        label = self.label.to(x.device, copy=True)
        if label.ndim and len(label) != len(x):
            raise ValueError(f"label: expected {len(x)} labels, one a sample, found {len(label)}")
        log_p = self.classifier(x, t)
        if not self.most < log_p.shape[1]:
            raise ValueError(
                f"label: expected classes 0 to {log_p.shape[1] - 1}, found {self.least} to {self.most}"
            )
        return log_p.gather(1, label.expand(len(x))[:, None])[:, 0]

    def narrowed(self, rows: Tensor | slice, batch: int) -> LabelLogProb:
        return LabelLogProb(self.classifier, some_rows(self.label, rows, batch), (self.least, self.most))
