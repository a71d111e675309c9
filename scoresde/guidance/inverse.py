"""Inverse problems: what is known of the data by a linear measurement, `y = A x_0 + N(0, noise_var I)`.

With `C = Cov[x_0 | x_t] = (sigma^2/alpha) dD/dx` (Tweedie's formula, second order), and `p(x_0 | x_t)` taken
for normal, `p(y | x_t) = N(y; A D, noise_var I + A C A^T)`, and guidance by its gradient is Kalman's update:

    D + (sigma^2/alpha) (dD/dx)^T A^T v,      v = (noise_var I + A C A^T)^-1 (y - A D).

The methods differ in the C that they put into v. All norms and products are those of single samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import DATA, BaseDenoiser, checked, some_rows
from ..gradients import Pull, pullback
from ..schedules import Time, wide
from ..sde import LinearSDE, like
from .base import Guided
from .classifier import shift
from .scales import Scale, checked_scale

Operator = Tensor | Callable[[Tensor], Tensor]
"""A matrix (m, D) that acts on flattened samples, or a linear function of a batch that treats samples alike
and apart, such as a blur.
"""


def linear_inverse(
    model: BaseDenoiser,
    A: Operator,
    y: Tensor,
    noise_var: float,
    *,
    scale: Scale = 1.0,
    iterations: int = 8,
) -> Observed:
    """The denoiser given `y = A x_0 + N(0, noise_var I)`, C from the denoiser's Jacobian: moment matching.

    A           a matrix (m, D) that acts on flattened samples, or a linear function of a batch
    y           what A makes of data, and nothing else (`y * mask` for `A = lambda x: x * mask`): (m,) or
                (B, m) for a matrix, else with a batch axis, of 1 or B entries
    noise_var   variance of the noise of y, >= 0
    scale       a number or a function of noise level
    iterations  at most so many, with a backward pass each, by which v is found; as many as A C A^T has
                different eigenvalues find it exactly

    On Gaussian data it is the denoiser of `law.posterior(y, A, noise_var)`, exactly; on mixtures it is not,
    since it takes what is left of all components for one Gaussian.

    Rozet et al. 2024, arXiv:2405.13712; Boys et al. 2023, arXiv:2310.06721. One call of the model and
    1 + iterations backward passes. Raises ValueError for shapes that do not fit and numbers out of range, and
    where alpha = 0 (flow matching at t = 1), for nothing is known of the data there: give a grid from 0.999.
    """
    return Observed(model, A, y, Matched(_variance(noise_var), _whole(iterations)), scale)


def pigdm(
    model: BaseDenoiser,
    A: Operator,
    y: Tensor,
    noise_var: float,
    *,
    data_var: float = 1.0,
    scale: Scale = 1.0,
    iterations: int = 8,
) -> Observed:
    """`linear_inverse` with `C = r^2 I`, `r^2 = data_var sigma^2/(alpha^2 data_var + sigma^2)`, in v.

    Pseudoinverse guidance (Song et al. 2023, ICLR, "Pseudoinverse-guided diffusion models for inverse
    problems", eq. 7), with the noise of y. Exact on N(m, data_var I), and too timid or too strong in
    directions of other variance: on N(0, [[1, 0.8], [0.8, 1]]) with x_1 + N(0, 0.01) = 1, where x_2 has mean
    0.792 and variance 0.366, the probability flow ends with 0.753 and 0.397.

    One backward pass through the model, and one through A an iteration.
    """
    if not 0 < data_var < math.inf:
        raise ValueError(f"data_var: expected a variance > 0, found {data_var}")
    inverse = Isotropic(_variance(noise_var), float(data_var), _whole(iterations))
    return Observed(model, A, y, inverse, scale)


def dps(model: BaseDenoiser, A: Operator, y: Tensor, noise_var: float, *, scale: Scale = 1.0) -> Observed:
    """`linear_inverse` with C = 0 in v, so that `v = (y - A D)/noise_var`: diffusion posterior sampling.

    Chung et al. 2023, arXiv:2209.14687, theorem 1. It takes D for certain: far too strong at high noise, and
    stiff for small noise_var. With the example of `pigdm` the probability flow ends with mean 1.128 and
    variance 0.274. `dps_normed` has the strength that their code has.
    """
    if not _variance(noise_var) > 0:
        raise ValueError(f"noise_var: expected a variance > 0 to divide by, found {noise_var}")
    return Observed(model, A, y, Certain(float(noise_var)), scale)


def dps_normed(model: BaseDenoiser, A: Operator, y: Tensor, *, zeta: Scale = 1.0) -> Observed:
    """`linear_inverse` with `v = zeta (y - A D)/|y - A D|`, guidance by the gradient of `-zeta |y - A D|`.

    The rule of Chung et al. (2023, arXiv:2209.14687, section 4) for its strength, as a property of the
    process: their code adds the gradient once a step, so that it guides the more the more steps there are.
    The noise of y does not enter, and nothing is exact.
    """
    return Observed(model, A, y, Normed(), zeta)


class Measured(NamedTuple):
    """What a rule for v may use: times of shape () or (B,), `error = y - A D` (B, ...), `pull(v)`, which is
    `(dD/dx)^T A^T v`, and a state of zeros.
    """

    sde: LinearSDE
    t: Tensor
    A: Callable[[Tensor], Tensor]
    error: Tensor
    pull: Pull
    zero: Tensor


@dataclass(frozen=True)
class Matched:
    """C = (sigma^2/alpha) dD/dx."""

    noise_var: float
    iterations: int

    def __call__(self, m: Measured) -> Tensor:
        alpha, sigma = m.sde.alpha(m.t), m.sde.sigma(m.t)
        ratio = like(torch.where(alpha > 0, sigma**2 / alpha, 0), m.error)  # at alpha = 0 nothing is guided
        return conjugate_residuals(
            lambda v: self.noise_var * v + ratio * m.A(m.pull(v)), m.error, self.iterations
        )


@dataclass(frozen=True)
class Isotropic:
    """C = r^2 I, that of data of one variance."""

    noise_var: float
    data_var: float
    iterations: int

    def __call__(self, m: Measured) -> Tensor:
        alpha, sigma = m.sde.alpha(m.t), m.sde.sigma(m.t)
        r2 = like(self.data_var * sigma**2 / (alpha**2 * self.data_var + sigma**2), m.error)
        _, transposed, _ = pullback(lambda x: (m.A(x), x), m.zero)
        return conjugate_residuals(
            lambda v: self.noise_var * v + r2 * m.A(transposed(v)), m.error, self.iterations
        )


@dataclass(frozen=True)
class Certain:
    """C = 0."""

    noise_var: float

    def __call__(self, m: Measured) -> Tensor:
        return m.error / self.noise_var


@dataclass(frozen=True)
class Normed:
    """The error over its norm, 0 where there is none."""

    def __call__(self, m: Measured) -> Tensor:
        norm = dot(m.error, m.error).sqrt()
        return m.error * like(quotient(torch.ones_like(norm), norm), m.error)


class Observed(Guided):
    """See `linear_inverse`."""

    def __init__(
        self,
        model: BaseDenoiser,
        A: Operator,
        y: Tensor,
        rule: Callable[[Measured], Tensor],
        scale: Scale = 1.0,
    ) -> None:
        super().__init__(model)
        A, y = A if callable(A) else torch.as_tensor(A), torch.as_tensor(y)
        if isinstance(A, Tensor):
            if A.ndim != 2 or y.ndim not in (1, 2) or y.shape[-1] != len(A):
                raise ValueError(
                    "expected A of shape (m, D) and y of shape (m,) or (B, m), found shapes "
                    f"{tuple(A.shape)} and {tuple(y.shape)}"
                )
            A, y = Matrix(A.to(model.device)), y.reshape(-1, len(A))
        self.A, self.y, self.rule, self.scale = A, y.to(model.device), rule, checked_scale(scale)

    def extra_repr(self) -> str:
        return f"rule={self.rule}, scale={self.scale}"

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        t = wide(t)
        if self.y.ndim == 0 or len(self.y) not in (1, len(x)):
            raise ValueError(
                f"expected y of shape ({len(x)}, ...) or (1, ...) like A x, found {tuple(self.y.shape)}"
            )
        if isinstance(self.A, Matrix):
            self.A.check(x)
        gain = like(shift(DATA, self.scale, self.sde, t), x)
        seen, pull, D = pullback(lambda x: self._seen(x, t, cond), x)
        if seen.shape[1:] != self.y.shape[1:]:
            raise ValueError(
                f"expected y of shape ({len(x)}, ...) or (1, ...) like A x, {tuple(seen.shape)}; found "
                f"{tuple(self.y.shape)}"
            )
        error = self.y.to(seen) - seen
        v = self.rule(Measured(self.sde, t.to(x.device), self.A, error, pull, torch.zeros_like(D)))
        return D + gain * pull(v)

    def _seen(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        D = checked(self.model(x, t, **cond), x)
        return self.A(D), D

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        y = some_rows(self.y, rows, batch)
        return Observed(self.model.narrowed(rows, batch), self.A, y, self.rule, self.scale)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (m, D) as a function of flattened samples."""

    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x).mT

    def check(self, x: Tensor) -> None:
        """ValueError unless there is a column for each number of a sample."""
        numbers = math.prod(x.shape[1:])
        if numbers != self.matrix.shape[1]:
            raise ValueError(
                f"expected A with a column for each of the {numbers} numbers of a sample, found shape "
                f"{tuple(self.matrix.shape)}"
            )


def conjugate_residuals(apply: Pull, b: Tensor, iterations: int) -> Tensor:
    """`apply^-1 b` for every sample of b (B, ...), by the least residual in the span of b, apply b, ...

    Exact after as many iterations as apply has different eigenvalues if it is symmetric and positive; the
    Jacobians of networks are neither, and then the residual still never grows, where conjugate gradients run
    away (Eisenstat, Elman and Schultz 1983, doi 10.1137/0720023).
    """
    z, r = torch.zeros_like(b), b
    steps: list[tuple[Tensor, Tensor]] = []
    for _ in range(min(iterations, b[0:1].numel())):
        p, q = r, apply(r)
        for earlier, image in steps:
            along = like(quotient(dot(q, image), dot(image, image)), b)
            p, q = p - along * earlier, q - along * image
        steps.append((p, q))
        length = like(quotient(dot(r, q), dot(q, q)), b)
        z, r = z + length * p, r - length * q
    return z


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of samples, (B,) float64."""
    products = a.double() * b.double()
    return products.flatten(1).sum(1) if products.ndim > 1 else products


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where b is not above 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


# ---- replacement


def inpaint(model: BaseDenoiser, mask: Tensor, y: Tensor, noise_var: float = 0.0) -> Replaced:
    """The denoiser given the elements of the data under `mask`: there it returns what is known, elsewhere D.

    mask       True (or 1) where y is known, else False (or 0); broadcast against y
    y          (1, ...) or (B, ...) like the state; what it holds elsewhere does not matter
    noise_var  variance of the noise of y: its elements are taken for N(y, noise_var), whatever the model
               expects there

    Every solver that is `marginal_exact` then keeps the known part of the state at `N(alpha y, sigma^2)`, as
    replacement by noised data does (Song et al. 2021, arXiv:2011.13456, appendix I.2), with the noise of the
    solver and none of its own.

    The other elements see the known ones only through x_t, and not y itself: exact if they are independent,
    and else drawn too little to what they should be. With the example of `pigdm`, by the probability flow
    mean 0.351 and variance 0.674 in place of 0.792 and 0.366, by 100 ancestral steps 0.485 and 0.501.
    `linear_inverse` with `A = lambda x: x * mask` and `y * mask` has no such bias, at the price of gradients.
    """
    mask, y = torch.as_tensor(mask), torch.as_tensor(y)
    known = mask.to(y.device) != 0
    if bool((known & (mask.to(y.device) != 1)).any()):
        low, high = mask.aminmax()
        raise ValueError(f"mask: expected zeros and ones only, found {low.item()} to {high.item()}")
    try:
        y, known = torch.broadcast_tensors(y, known)
    except RuntimeError:
        raise ValueError(
            f"mask: expected a shape that broadcasts against that of y, {tuple(y.shape)}, found "
            f"{tuple(mask.shape)}"
        ) from None
    return Replaced(model, Masked(known.to(y.dtype)), torch.where(known, y, 0), _variance(noise_var))


def colorize(model: BaseDenoiser, grey: Tensor, noise_var: float = 0.0) -> Replaced:
    """The denoiser given the mean over the channels of images (B, C, H, W): `inpaint` of one coordinate of a
    rotation of the channels (Song et al. 2021, arXiv:2011.13456, appendix I.3).

    grey (1 or B, 1, H, W) is the mean over the channels, of noise `noise_var`. Bias as in `inpaint`.
    """
    if grey.ndim != 4 or grey.shape[1] != 1:
        raise ValueError(f"grey: expected images (B, 1, H, W), found shape {tuple(grey.shape)}")
    return Replaced(model, Grey(), grey, _variance(noise_var))


@dataclass(frozen=True, eq=False)
class Masked:
    """The elements under a mask of zeros and ones (1 or B, ...); the rest is 0."""

    mask: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.mask.to(x)

    def to(self, device: torch.device) -> Masked:
        return Masked(self.mask.to(device))

    def width(self, x: Tensor) -> int:
        """Variance of a coordinate for each unit of variance of y."""
        return 1

    def event(self, x: Tensor) -> tuple[int, ...]:
        """The shape of what is known of a sample."""
        return tuple(x.shape[1:])

    def narrowed(self, rows: Tensor | slice, batch: int) -> Masked:
        return Masked(some_rows(self.mask, rows, batch))


@dataclass(frozen=True)
class Grey:
    """The mean over the channels, in every channel. The coordinate, along (1, ..., 1)/C^(1/2), is C^(1/2)
    times the mean.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).expand_as(x)

    def to(self, device: torch.device) -> Grey:
        return self

    def width(self, x: Tensor) -> int:
        """Variance of a coordinate for each unit of variance of y."""
        return x.shape[1]

    def event(self, x: Tensor) -> tuple[int, ...]:
        """The shape of what is known of a sample."""
        return (1, *x.shape[2:])


class Replaced(Guided):
    """See `inpaint`: D outside an orthogonal projection of the data, and inside it the mean of what is known,
    `N(y, v)`, given x_t: `y + alpha v/(alpha^2 v + sigma^2) (P x_t - alpha y)`.
    """

    def __init__(self, model: BaseDenoiser, part: Masked | Grey, y: Tensor, noise_var: float) -> None:
        super().__init__(model)
        self.part, self.y, self.noise_var = part.to(model.device), y.to(model.device), noise_var

    def extra_repr(self) -> str:
        return f"{type(self.part).__name__}, noise_var={self.noise_var}"

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        event = self.part.event(x)
        if self.y.shape not in ((1, *event), (len(x), *event)):
            raise ValueError(
                f"expected what is known with a batch axis of 1 or {len(x)} and then {event} for x of shape "
                f"{tuple(x.shape)}, found shape {tuple(self.y.shape)}"
            )
        D = checked(self.model(x, t, **cond), x)
        y, known = self.y.to(x), self.y.to(x)
        if self.noise_var:
            alpha, sigma = self.sde.alpha(wide(t)), self.sde.sigma(wide(t))
            v = self.noise_var * self.part.width(x)
            known = y + like(alpha * v / (alpha**2 * v + sigma**2), x) * (self.part(x) - like(alpha, x) * y)
        return checked(D - self.part(D) + known, x)

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        part, y = some_rows(self.part, rows, batch), some_rows(self.y, rows, batch)
        return Replaced(self.model.narrowed(rows, batch), part, y, self.noise_var)


def _variance(noise_var: float) -> float:
    if torch.as_tensor(noise_var).numel() != 1:
        raise ValueError(f"noise_var: expected one variance for all of y, found {noise_var}")
    if not 0 <= noise_var < math.inf:
        raise ValueError(f"noise_var: expected a variance >= 0, found {noise_var}")
    return float(noise_var)


def _whole(iterations: int) -> int:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected a whole number of at least 1, found {iterations!r}")
    return iterations
