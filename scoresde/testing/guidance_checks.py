"""The checks of guidance: ours, and a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser
from ..guidance import interval
from ..laws import Law
from ..sde import like
from .denoiser_checks import check_score, check_views
from .failure import at_most, holds
from .numerics import a_few, something

Guide = Callable[[Any], BaseDenoiser]
"""scale -> guided denoiser, with its conditions filled in: `lambda w: guidance.classifier(model, log_p, w)`,
`lambda w: guidance.classifier_free(model, w, null=null).given(label=label)`.
"""

SCALES = (-0.5, 0.0, 0.5, 1.0, 3.0)


@torch.no_grad()
def check_guidance(
    guide: Guide,
    model: BaseDenoiser,
    *,
    data: Tensor,
    conditional: BaseDenoiser | None = None,
    posterior: Law | None = None,
    log_prob: Callable[[Tensor, Tensor], Tensor] | None = None,
    times: Tensor | None = None,
    rtol: float = 1e-9,
) -> None:
    """That guidance is `D_0 + scale (D_1 - D_0)` between the right ends, and leaves everything as it was.

    guide        scale -> denoiser
    model        the unguided denoiser, which scale 0 must be, bit for bit
    data         x_0 (B, ...) at which to look
    conditional  the denoiser that scale 1 must be, bit for bit: that of classifier-free guidance
    posterior    p(x_0 | y): at scale 1 the score must be that of its `marginal(sde, t)`, to `rtol`
    log_prob     (x, t (B,)) -> (B,), log p(y | x_t): the score must move by `scale` times its gradient,
                 measured by central differences, to 1e-6 of the terms
    times        (K,), a few strictly inside the range unless given

    Also: all views are those of one D, rows prepared for a solver are the forward pass, the result is the
    same under `enable_grad`, `no_grad` and `inference_mode`, and `requires_grad`, `.grad` and the training
    flags of parameters and of the state stay as found. Raises ValueError for no sample or no time.
    """
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(data.shape, generator=generator, dtype=torch.float64).to(data.device)
    dtype = torch.promote_types(model.dtype, torch.float32)
    guided = {w: guide(w) for w in SCALES}
    ends, left = (guided[0.0], guided[1.0]), _Found(guided[3.0])
    clock = a_few(model.sde) if times is None else times.double()
    something(data=data, times=clock)
    for t in clock:
        alpha, sigma = (like(c, eps) for c in (model.sde.alpha(t), model.sde.sigma(t)))
        x = (alpha * data.double() + sigma * eps).to(dtype)
        _check_end("scale 0 is the unguided model, bit for bit", ends[0], model, x, t)
        if conditional is not None:
            _check_end("scale 1 is the conditional model, bit for bit", ends[1], conditional, x, t)
        if posterior is not None:
            there = posterior.marginal(model.sde, t)
            check_score(ends[1], x.double(), t, there.log_prob, rtol, posterior)
        for scale, each in guided.items():
            check_views(each, x, t)
            _check_affine(each, scale, ends, x, t)
        if log_prob is not None:
            _check_gradient(guided[3.0], model, log_prob, x, t)
    _check_rows(guided[3.0], x, clock.sort(descending=True).values)
    _check_modes(guided[3.0], x, clock[len(clock) // 2])
    left.check()


@torch.no_grad()
def check_interval(guide: Guide, sde: Any, *, data: Tensor, outside: float = 0.0) -> None:
    """That a scale which is a function of noise level counts where it says, sample by sample.

    `guide(interval(3, low, high, outside=outside))` must be `guide(3)` at log-SNRs from low to high, both
    included, and `guide(outside)` elsewhere: for one time, for a batch of different ones, and in rows
    prepared for a solver. `data` (B, ...) is x_0; ValueError if there is none.
    """
    something(data=data)
    times = a_few(sde).sort(descending=True).values
    levels = sde.log_snr(times)
    low, high = float(levels[len(levels) // 3]), float(levels[(2 * len(levels)) // 3])
    inside = (levels >= low) & (levels <= high)
    limited = guide(interval(3.0, low, high, outside=outside))
    strong, weak = guide(3.0), guide(outside)
    x = data.double()[:1].repeat(len(times), *[1] * (data.ndim - 1))
    known = torch.where(like(inside, x) > 0, strong(x, times), weak(x, times))
    bound = like(_rounding(sde, times, x, 3.0, strong(x, times), weak(x, times)), x)
    claim = f"guidance counts for log-SNR from {low:.4g} to {high:.4g} and is {outside} elsewhere"
    at_most(f"{claim}, in a batch", (limited(x, times) - known).abs(), bound, t=like(times, x))
    rows = limited.rows(times, x[:1])
    for k, t in enumerate(times):
        one = slice(k, k + 1)
        at_most(f"{claim}, at one time", (limited(x[one], t) - known[one]).abs(), bound[one], t=float(t))
        prepared = rows.a[k] * x[one] + rows.b[k] * rows.evaluate(x[one], k)
        at_most(f"{claim}, in prepared rows", (prepared - known[one]).abs(), bound[one], t=float(t))


def _rounding(sde: Any, t: Tensor, x: Tensor, scale: float, *terms: Tensor) -> Tensor:
    """What the D of guidance may be off by, () or (B,): it grows by sigma/alpha from noise to data."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    size = 1 + sum(term.double().flatten(1).abs().amax() for term in (x, *terms))
    return 64 * torch.finfo(x.dtype).eps * (1 + abs(scale)) * size * (1 + sigma) * (1 + 1 / alpha)


def _check_end(claim: str, found: BaseDenoiser, known: BaseDenoiser, x: Tensor, t: Tensor) -> None:
    one, other = found(x, t), known(x, t)
    gap = float((one - other).abs().max())
    holds(claim, torch.equal(one, other), t=float(t), largest_difference=gap)


def _check_affine(
    guided: BaseDenoiser, scale: float, ends: tuple[BaseDenoiser, BaseDenoiser], x: Tensor, t: Tensor
) -> None:
    without, given = ends[0](x, t), ends[1](x, t)
    gap = (guided(x, t) - (without + scale * (given - without))).abs()
    bound = _rounding(guided.sde, t, x, scale, without, given)
    claim = "guidance is affine in the scale, D_0 + scale (D_1 - D_0)"
    at_most(claim, gap, bound, scale=scale, t=float(t), x=x)


def _check_gradient(
    guided: BaseDenoiser,
    model: BaseDenoiser,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
) -> None:
    """Along random directions, by differences of fourth order and with half the step."""
    generator, clock = torch.Generator().manual_seed(1), t.expand(len(x))
    moved, wide = guided.score(x, t) - model.score(x, t), x.double()
    for _ in range(3):
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        v = v / like(v.flatten(1).norm(dim=1), v)
        h = 1e-3 * float(model.sde.sigma(t))
        coarse, fine = (_slope(log_prob, wide, v, clock, step) for step in (h, h / 2))
        along = (moved.double() * v).flatten(1).sum(1)
        size = fine.abs() + moved.double().flatten(1).norm(dim=1)
        rounding = 64 * torch.finfo(x.dtype).eps * model.score(x, t).double().flatten(1).norm(dim=1)
        claim = "guidance moves the score by scale times the gradient of log_prob (central differences)"
        bound = 1e-6 * (1 + size) + 4 * (fine - coarse).abs() + rounding
        at_most(claim, (along - 3 * fine).abs(), bound, t=float(t), scale=3.0)


def _slope(log_prob: Callable[[Tensor, Tensor], Tensor], x: Tensor, v: Tensor, t: Tensor, h: float) -> Tensor:
    near = log_prob(x + h * v, t) - log_prob(x - h * v, t)
    far = log_prob(x + 2 * h * v, t) - log_prob(x - 2 * h * v, t)
    return (8 * near - far).double() / (12 * h)


def _check_rows(guided: BaseDenoiser, x: Tensor, times: Tensor) -> None:
    rows = guided.rows(times, x)
    for k, t in enumerate(times):
        known = guided(x, t)
        gap = (rows.a[k] * x + rows.b[k] * rows.evaluate(x, k) - known).abs()
        bound = _rounding(guided.sde, t, x, 3.0, known)
        at_most("rows prepared for a solver are the forward pass", gap, bound, t=float(t), x=x)


def _check_modes(guided: BaseDenoiser, x: Tensor, t: Tensor) -> None:
    expected = guided(x, t)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            state = x.clone()
            found = guided(state, t)
            holds("the state's requires_grad is left as found", not state.requires_grad, mode=mode.__name__)
            holds("all gradient modes give the same", torch.equal(found, expected), mode=mode.__name__)


class _Found:
    """How a model was found: the gradients and flags of its parameters, and its training flags."""

    def __init__(self, model: BaseDenoiser) -> None:
        self.model, self.training = model, [part.training for part in model.modules()]
        self.parameters = [
            (name, p, p.requires_grad, None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters()
        ]

    def check(self) -> None:
        """Raises AssertionError if the model is not so any more."""
        same = self.training == [part.training for part in self.model.modules()]
        holds("training flags are left as found", same, model=self.model)
        for name, p, required, grad in self.parameters:
            holds("requires_grad is left as found", p.requires_grad == required, parameter=name)
            same = p.grad is None if grad is None else p.grad is not None and torch.equal(p.grad, grad)
            holds("the gradients of parameters are left as found", same, parameter=name)
