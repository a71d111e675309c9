"""The check of denoisers: ours, and a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..laws import Law
from ..sde import like
from .failure import at_most, holds
from .numerics import a_few, has, something


@torch.no_grad()
def check_denoiser(
    model: Any,
    law: Law | None = None,
    *,
    data: Tensor | None = None,
    times: Tensor | None = None,
    rtol: float = 1e-9,
) -> None:
    """That a denoiser is consistent: its views are those of one D, each sample depends on its own state and
    time only, and with `law`, D is E[x_0 | x_t].

    model   `model(x, t)` with `.sde` and the views `.noise .score .velocity .flow`, of any dtype
    law     what x_0 is drawn from: then Tweedie's formula, `D = (x + sigma^2 grad log p_t)/alpha`, must hold
            with the gradient of `law.marginal(sde, t).log_prob` by autograd, to `rtol` of the terms
    data    x_0 (B, ...) at which to look; draws of the law unless given
    times   (K,), a few strictly inside the range unless given

    A trained denoiser passes without a law; an exact one, or a network that was set to be right, with it. If
    the model has `log_prob(x, t)`, its score must be that one's gradient. Raises ValueError without law and
    data, and for no sample or no time.
    """
    has(model, "denoiser", ("sde", "noise", "score", "velocity", "flow"))
    sde, generator = model.sde, torch.Generator().manual_seed(0)
    if data is None:
        if law is None:
            raise ValueError("expected a law or data to look at, found neither; pass data of shape (B, ...)")
        data = law.sample(8, generator=generator)
    x0 = data.double()
    dtype = torch.promote_types(getattr(model, "dtype", torch.float64), torch.float32)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64).to(x0.device)
    clock = a_few(sde) if times is None else times
    something(data=x0, times=clock)
    for t in clock:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        x = (like(alpha, x0) * x0 + like(sigma, x0) * eps).to(dtype)
        check_views(model, x, t)
        if law is not None:
            there = law.marginal(sde, t)
            check_score(model, x.double(), t, there.log_prob, rtol, law)
        if hasattr(model, "log_prob"):
            check_score(model, x.double(), t, lambda y, t=t: model.log_prob(y, t), rtol, model)
    each = clock[torch.arange(len(x0)) % len(clock)]
    alpha, sigma = (like(c, x0) for c in (sde.alpha(each), sde.sigma(each)))
    check_apart(model, (alpha * x0 + sigma * eps).to(dtype), each)


def check_apart(model: Any, x: Tensor, t: Tensor) -> None:
    """x (B, ...) at times t (B,) of their own gives what each sample gives at its time beside other mates."""
    for time in t.unique():
        mine = t == time
        mates = torch.where(like(mine, x) > 0, x, -2 * x)
        alpha, sigma = model.sde.alpha(time), model.sde.sigma(time)
        rounding = _rounding(alpha, sigma, x[mine], model(x, time)[mine])
        bound = rounding * (1 + alpha) * (1 + 1 / sigma) * (1 + sigma)  # of the widest view
        for view in (model, model.noise, model.score, model.velocity, model.flow):
            gap = (view(x, t) - view(mates, time)).double()[mine].flatten(1).abs().amax(1)
            claim = "each sample depends on its own state and time only"
            at_most(claim, gap, bound, t=float(time), model=model)


def _rounding(alpha: Tensor, sigma: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """What a D may be off by, (B,): from noise to data it grows by sigma/alpha, from data to noise by
    alpha/sigma."""
    size = 1 + x.double().flatten(1).abs().amax(1) + D.double().flatten(1).abs().amax(1)
    return 64 * torch.finfo(x.dtype).eps * size * (1 + 1 / alpha) * (1 + 1 / sigma) ** 2 * (1 + sigma)


def check_views(model: Any, x: Tensor, t: Tensor) -> None:
    D = model(x, t)
    holds("D has the shape and dtype of x", D.shape == x.shape and D.dtype == x.dtype, shape=D.shape)
    together = model(x, t.expand(len(x)))
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    rounding = _rounding(alpha, sigma, x, D)
    where: dict[str, Any] = {"t": float(t), "model": model}

    wide, D = x.double(), D.double()
    alpha_x, sigma_x = like(alpha, wide), like(sigma, wide)
    noise = (wide - alpha_x * D) / sigma_x
    for claim, found, known, factor in (
        ("a batch of equal times is a single time", together, D, 1),
        ("noise is (x - alpha D)/sigma", model.noise(x, t), noise, 1 + alpha),
        (
            "score is (alpha D - x)/sigma^2 (Tweedie)",
            model.score(x, t),
            -noise / sigma_x,
            (1 + alpha) / sigma,
        ),
        ("velocity is alpha noise - sigma D", model.velocity(x, t), alpha_x * noise - sigma_x * D, 1 + sigma),
        ("flow is noise - D", model.flow(x, t), noise - D, 2),
    ):
        gap = (found.double() - known).flatten(1).abs().amax(1)
        at_most(claim, gap, rounding * factor, **where)


def check_score(
    model: Any, x: Tensor, t: Tensor, log_prob: Callable[[Tensor], Tensor], rtol: float, law: Any
) -> None:
    """score = grad log p and alpha D = x + sigma^2 grad log p."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(leaf).sum(), leaf)
    alpha, sigma = (like(c, x) for c in (model.sde.alpha(t), model.sde.sigma(t)))
    pulled = sigma**2 * gradient
    size = x.abs() + pulled.abs() + 1
    where: dict[str, Any] = {"x": x, "t": float(t), "model": model, "law": law}
    D, score = model(x, t), model.score(x, t)
    claim = "the denoiser is E[x_0 | x_t] (Tweedie: alpha D = x + sigma^2 grad log p_t)"
    at_most(claim, (alpha * D - x - pulled).abs(), rtol * size, **where)
    claim = "the score is the gradient of the log-density"
    at_most(claim, (sigma**2 * score - pulled).abs(), rtol * size, **where)
