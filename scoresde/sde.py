"""Linear stochastic differential equations `dx = f(t) x dt + g(t) dw`; `x_t = alpha(t) x_0 + sigma(t) eps`.

Schedule quantities are float64 whatever the caller's dtype; what mixes with `x` (`marginal`, `drift`,
`bridge`, scores) is cast to `x.dtype` at the end. Times are floats or tensors of shape `()` or `(B,)`.
Negative times, and s > t, raise ValueError where the host knows the values (numbers and CPU tensors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .schedules import (
    Linear,
    Schedule,
    Tabulated,
    Time,
    check_numbers,
    holds,
    sigmoid,
    tabulated_betas,
    unit_interval,
    wide,
)

if TYPE_CHECKING:
    from .denoiser import BaseDenoiser


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (B,), shaped to multiply `x` (B, ...), on its device and in its dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor as state, found {x!r}")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating state, found {x.dtype}; scale integer data to floats first")
    cast = coefficient.to(x)
    if cast.ndim == 0:
        return cast
    if cast.ndim != 1 or len(cast) not in (1, len(x)):
        raise ValueError(f"expected times of shape () or ({len(x)},), found {tuple(cast.shape)}")
    return cast.view(-1, *[1] * (x.ndim - 1))


def one_each(noise: Tensor, x: Tensor) -> Tensor:
    """The noise, if it is one number for each of x: a broadcast one would be the same for several. Raises
    ValueError for another shape."""
    if noise.shape != x.shape:
        raise ValueError(f"expected noise of the state's shape {tuple(x.shape)}, found {tuple(noise.shape)}")
    return noise


def clock(t: Time) -> Tensor:
    """`t` as a float64 tensor on its own device. Raises ValueError for a negative or undefined time."""
    t = wide(t)
    if not holds(t >= 0):
        raise ValueError(f"expected times t >= 0, found {t.min().item()}")
    return t


class LinearSDE:
    """A process `x_t = alpha(t) x_0 + sigma(t) eps`: data at `t_min`, noise at `t_max`.

    Subclasses give `alpha, sigma, log_snr, time` and `rates`; the rest follows. Arguments `t` are floats or
    tensors of shape () or (B,).
    """

    t_min: float = 0.0
    t_max: float = 1.0
    default_end: float = 1e-3
    prior_std: float = 1.0

    def alpha(self, t: Time) -> Tensor:
        """Signal scale, float64."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Tensor:
        """Noise scale, float64."""
        raise NotImplementedError

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha^2 / sigma^2), strictly decreasing; twice the half-log-SNR `lam` of solver formulas."""
        raise NotImplementedError

    def time(self, log_snr: Time) -> Tensor:
        """The inverse of `log_snr`."""
        raise NotImplementedError

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """(f, g^2) = (d log alpha / dt, d sigma^2/dt - 2 f sigma^2), float64."""
        raise NotImplementedError

    def scale(self, s: Time, t: Time) -> Tensor:
        """alpha_t / alpha_s."""
        return self.alpha(t) / self.alpha(s)

    def innovation(self, s: Time, t: Time) -> Tensor:
        """`std^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2`, what s -> t adds, without cancellation."""
        raise NotImplementedError

    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """(a, std) of `x_t | x_s ~ N(a x_s, std^2)`, s <= t, with `a = alpha_t/alpha_s`; float64."""
        if not holds(wide(s) <= wide(t)):
            raise ValueError(f"expected times s <= t, found s={s}, t={t}")
        return self.scale(s, t), self.innovation(s, t).clamp_min(0).sqrt()

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean `alpha x_0` (B, ...) and standard deviation `sigma` (broadcastable to it) of `x_t | x_0`."""
        return like(self.alpha(t), x0) * x0, like(self.sigma(t), x0)

    def bridge(self, x0: Tensor, xt: Tensor, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation (broadcastable to it) of `x_s | x_0, x_t`, s <= t (Bayes).

        mean = a sigma_s^2/sigma_t^2 x_t + alpha_s V/sigma_t^2 x_0, std = sigma_s V^(1/2)/sigma_t,
        with (a, V^(1/2)) = transition(s, t) (Ho et al. 2020, arXiv:2006.11239, eq. 7, for any s < t).
        """
        a, noise = self.transition(s, t)
        sigma = self.sigma(t)
        # Where nothing is noisy yet, s = t = 0 and x_s is x_t.
        ratio = torch.where(sigma > 0, self.sigma(s) / sigma, 1)
        fraction = torch.where(sigma > 0, noise / sigma, 0)
        mean = like(a * ratio**2, xt) * xt + like(self.alpha(s) * fraction**2, xt) * x0
        return mean, like(ratio * noise, xt)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """Forward drift f(t) x."""
        return like(self.rates(t)[0], x) * x

    def diffusion(self, t: Time) -> Tensor:
        """Forward diffusion coefficient g(t), float64."""
        return self.rates(t)[1].sqrt()

    def sample_prior(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draws of N(0, prior_std^2 I), the law in which sampling starts at `t_max`."""
        return self.prior_std * torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)

    def probability_flow(self, denoiser: BaseDenoiser) -> Callable[..., Tensor]:
        """The field `v(x, t) = f x - g^2/2 score(x, t)` of the probability-flow ODE `dx = v dt`.

        Song et al. 2021, arXiv:2011.13456, eq. 13. Called as `v(x, t, **cond)`, with the shape of `x`.
        """

        def field(x: Tensor, t: Time, **cond: Any) -> Tensor:
            f, g2 = self.rates(t)
            return like(f, x) * x - like(g2 / 2, x) * denoiser.score(x, t, **cond)

        return field

    def reverse(self, denoiser: BaseDenoiser, shape: Sequence[int] | None = None) -> ReverseSDE:
        """The reverse-time SDE; `shape` is the shape of one sample when `f, g` get it flattened."""
        return ReverseSDE(self, denoiser, None if shape is None else tuple(shape))


@dataclass(frozen=True)
class ReverseSDE:
    """`dx = [f x - g^2 score] dt + g dw`, time running from t_max to t_min.

    Anderson 1982; Song et al. 2021, arXiv:2011.13456, eq. 6. `drift, diffusion` are functions of t; `f, g`
    are the same process on the increasing clock `s = t_max - t` and on states of shape (B, D), as
    `torchsde.sdeint` wants it.
    """

    sde: LinearSDE
    denoiser: BaseDenoiser
    shape: tuple[int, ...] | None = None

    noise_type = "diagonal"
    sde_type = "ito"

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f x - g^2 score(x, t), the coefficient of dt (dt < 0 while sampling)."""
        f, g2 = self.sde.rates(t)
        return like(f, x) * x - like(g2, x) * self.denoiser.score(x, t)

    def diffusion(self, t: Time) -> Tensor:
        """g(t), float64."""
        return self.sde.diffusion(t)

    def _clock(self, s: Time) -> Tensor:
        # A clock that rounds to just beyond the ends belongs to the end.
        return (self.sde.t_max - wide(s)).clamp(self.sde.t_min, self.sde.t_max)

    def f(self, s: Time, y: Tensor) -> Tensor:
        """Drift on the clock s, for `y` of shape (B, D)."""
        x = y if self.shape is None else y.reshape(len(y), *self.shape)
        return -self.drift(x, self._clock(s)).reshape(y.shape)

    def g(self, s: Time, y: Tensor) -> Tensor:
        """Diffusion on the clock s, for `y` of shape (B, D)."""
        return like(self.diffusion(self._clock(s)), y).expand_as(y)


class VPSDE(LinearSDE):
    """Variance preserving: `dx = -beta(t)/2 x dt + beta(t)^(1/2) dw`.

    `alpha = exp(-B/2)`, `sigma^2 = 1 - exp(-B)`, `B = int beta` (Song et al. 2021, arXiv:2011.13456, eq. 11).
    `VPSDE(0.1, 20)` is the linear schedule; any other comes as `VPSDE(schedule=...)`, a DDPM table through
    `VPSDE.from_betas`.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, schedule: Schedule | None = None
    ) -> None:
        if isinstance(schedule, type) or not isinstance(schedule, Schedule | None):
            raise TypeError(
                f"expected a schedule with B, beta and time, as in scoresde.schedules, found {schedule!r}"
            )
        self.schedule: Schedule = Linear(beta_min, beta_max) if schedule is None else schedule

    def __repr__(self) -> str:
        S = self.schedule
        # Code that makes it again, unless it is a long table.
        shown = f"Tabulated(<{S.steps} steps>)" if isinstance(S, Tabulated) and S.steps > 40 else repr(S)
        return f"{type(self).__name__}(schedule={shown})"

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> VPSDE:
        """The process with the DDPM chain's marginals at t = i/N; `sde.betas(N)` gives the table back.

        `betas` has shape (N,), each strictly between 0 and 1; raises ValueError otherwise.
        """
        return cls(schedule=tabulated_betas(betas))

    def B(self, t: Time) -> Tensor:
        """Integrated rate, float64."""
        return self.schedule.B(clock(t))

    def beta(self, t: Time) -> Tensor:
        """Rate, float64."""
        return self.schedule.beta(clock(t))

    def alpha(self, t: Time) -> Tensor:
        return (-0.5 * self.B(t)).exp()

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(-self.B(t))).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        B = self.B(t)
        return -(B + (-torch.expm1(-B)).log())

    def time(self, log_snr: Time) -> Tensor:
        return self.schedule.time(-logsigmoid(wide(log_snr)))

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        beta = self.beta(t)
        return -0.5 * beta, beta

    def scale(self, s: Time, t: Time) -> Tensor:
        return (0.5 * (self.B(s) - self.B(t))).exp()

    def innovation(self, s: Time, t: Time) -> Tensor:
        return -torch.expm1(self.B(s) - self.B(t))

    def log_alphas(self, n: int, rule: str = "exact") -> Tensor:
        """The (n,) float64 logarithms of `1 - beta_i` in the n-step DDPM chain on t_i = i/n.

        "exact": `-(B_i - B_{i-1})` with `B_0 = 0`, marginals equal to the SDE's at every node.
        "euler": `log(1 - beta(t_i)/n)`, first order in 1/n; raises ValueError where beta(t_i) >= n.
        """
        if isinstance(n, bool) or not isinstance(n, Integral) or int(n) < 1:
            raise ValueError(f"expected a number of steps n >= 1, found {n!r}")
        if rule not in ("exact", "euler"):
            raise ValueError(f"expected rule 'exact' or 'euler', found {rule!r}")
        t = torch.arange(1, n + 1, dtype=torch.float64) / n
        if rule == "exact":
            B = self.B(t)
            return -torch.diff(B, prepend=B.new_zeros(1))
        rates = self.beta(t)
        if not bool((rates < n).all()):
            raise ValueError(
                f"expected beta(t)/n < 1 for the Euler rule, found {rates.max().item() / n:.4g} at n={n}; "
                "take more steps, or rule='exact'"
            )
        return torch.log1p(-rates / n)

    def betas(self, n: int, rule: str = "exact") -> Tensor:
        """The (n,) float64 table `beta_i` of the n-step chain, t_i = i/n, by either rule of `log_alphas`."""
        return -torch.expm1(self.log_alphas(n, rule))


class SubVPSDE(VPSDE):
    """`dx = -beta/2 x dt + (beta (1 - exp(-2B)))^(1/2) dw`: the mean of the VP-SDE, `sigma = 1 - exp(-B)`.

    Song et al. 2021, arXiv:2011.13456, eq. 12.
    """

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(-self.B(t))

    def log_snr(self, t: Time) -> Tensor:
        B = self.B(t)
        return -B - 2 * (-torch.expm1(-B)).log()

    def time(self, log_snr: Time) -> Tensor:
        # alpha / sigma = 1 / (2 sinh(B/2))
        return self.schedule.time(2 * (0.5 * (-0.5 * wide(log_snr)).exp()).asinh())

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        beta = self.beta(t)
        return -0.5 * beta, -beta * torch.expm1(-2 * self.B(t))

    def innovation(self, s: Time, t: Time) -> Tensor:
        # sigma_t^2 - a^2 sigma_s^2 is a product, and sigma_t - a sigma_s = (1 - a)(1 + a exp(-B_s))
        B = self.B(s)
        half = 0.5 * (B - self.B(t))
        a = half.exp()
        return -torch.expm1(half) * (1 + a * (-B).exp()) * (self.sigma(t) + a * self.sigma(s))

    def log_alphas(self, n: int, rule: str = "exact") -> Tensor:
        raise TypeError("expected a VP-SDE to discretize, found sub-VP; use VPSDE(schedule=sde.schedule)")


@dataclass(frozen=True)
class VESDE(LinearSDE):
    """Variance exploding: `alpha = 1`, `sigma = sigma_min (sigma_max/sigma_min)^t`.

    Song et al. 2021, arXiv:2011.13456, eq. 31. At t = 0 the noise is sigma_min, not 0.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _check_noise_range(self.sigma_min, self.sigma_max)

    default_end = 0.0

    @property
    def prior_std(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sigma_max

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(clock(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * (clock(t) * self._log_ratio).exp()

    def log_snr(self, t: Time) -> Tensor:
        return -2 * (math.log(self.sigma_min) + clock(t) * self._log_ratio)

    def time(self, log_snr: Time) -> Tensor:
        return (-0.5 * wide(log_snr) - math.log(self.sigma_min)) / self._log_ratio

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(clock(t)), 2 * self._log_ratio * self.sigma(t) ** 2

    def innovation(self, s: Time, t: Time) -> Tensor:
        return self.sigma(s) ** 2 * torch.expm1(2 * self._log_ratio * (wide(t) - wide(s)))


@dataclass(frozen=True)
class EDM(LinearSDE):
    """`alpha = 1`, `sigma = t`, t in [sigma_min, sigma_max]; t = 0 is the noiseless end.

    Karras et al. 2022, arXiv:2206.00364.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_noise_range(self.sigma_min, self.sigma_max)

    @property
    def t_min(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sigma_min

    @property
    def t_max(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sigma_max

    default_end = t_min  # pyright: ignore[reportAssignmentType]
    prior_std = t_max  # pyright: ignore[reportAssignmentType]

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(clock(t))

    def sigma(self, t: Time) -> Tensor:
        return clock(t).clone()

    def log_snr(self, t: Time) -> Tensor:
        return -2 * clock(t).log()

    def time(self, log_snr: Time) -> Tensor:
        return (-0.5 * wide(log_snr)).exp()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = clock(t)
        return torch.zeros_like(t), 2 * t

    def innovation(self, s: Time, t: Time) -> Tensor:
        s, t = clock(s), clock(t)
        return (t - s) * (t + s)


@dataclass(frozen=True)
class Rectified(LinearSDE):
    """`alpha = 1 - t`, `sigma = t` (Liu et al. 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747).

    No signal is left at t = 1, where the rates of the SDE are infinite: start the reverse SDE in t a little
    below. The probability-flow field is finite there.
    """

    def alpha(self, t: Time) -> Tensor:
        return 1 - unit_interval(clock(t))

    def sigma(self, t: Time) -> Tensor:
        return unit_interval(clock(t))

    def log_snr(self, t: Time) -> Tensor:
        t = unit_interval(clock(t))
        return 2 * (torch.log1p(-t) - t.log())

    def time(self, log_snr: Time) -> Tensor:
        return sigmoid(-0.5 * wide(log_snr))

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = unit_interval(clock(t))
        return -1 / (1 - t), 2 * t / (1 - t)

    def scale(self, s: Time, t: Time) -> Tensor:
        s, t = unit_interval(clock(s)), unit_interval(clock(t))
        return torch.where(s == t, 1, (1 - t) / (1 - s))

    def innovation(self, s: Time, t: Time) -> Tensor:
        # t - a s = (t - s)/(1 - s)
        s, t = unit_interval(clock(s)), unit_interval(clock(t))
        return torch.where(s == t, 0, (t - s) / (1 - s)) * (t + self.scale(s, t) * s)

    def probability_flow(self, denoiser: BaseDenoiser) -> Callable[..., Tensor]:
        """The field `v(x, t) = E[eps - x_0 | x_t]` of the ODE `dx = v dt`; finite at t = 1 too."""
        return denoiser.flow


@torch.no_grad()
def alike(one: LinearSDE, other: LinearSDE, rtol: float = 1e-9) -> bool:
    """Whether two processes have the same marginals, at 64 times."""
    if one is other:
        return True
    t = one.t_max * torch.linspace(0, 1, 65, dtype=torch.float64)[1:]
    levels = ((one.alpha(t), other.alpha(t)), (one.sigma(t), other.sigma(t)))
    return one.t_max == other.t_max and all(torch.allclose(a, b, rtol=rtol, atol=0) for a, b in levels)


def _check_noise_range(sigma_min: float, sigma_max: float) -> None:
    check_numbers(sigma_min=sigma_min, sigma_max=sigma_max)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, both finite; found {sigma_min}, {sigma_max}")
