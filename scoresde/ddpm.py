"""The DDPM chain (Ho, Jain and Abbeel 2020, arXiv:2006.11239), the exact N-step discretization of a VP-SDE.

Index i = 1..N is the chain's step; arrays are 0-based, so `betas[i - 1]` belongs to step i. Indices may be an
int or an integer tensor of shape (B,). The chain is kept as `log alpha_i = log(1 - beta_i)`, which keeps its
digits when beta_i is close to 0 or to 1.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .denoiser import BaseDenoiser, evaluating
from .schedules import Tabulated, beta_table, float_table, holds
from .sde import VPSDE, like, one_each

Index = int | Tensor


class DDPM:
    """The chain with transition `q(x_i | x_{i-1}) = N((1 - beta_i)^(1/2) x_{i-1}, beta_i I)`.

    `betas` has shape (N,), each strictly between 0 and 1. Raises ValueError otherwise.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        self.log_alphas = torch.log1p(-beta_table(betas))
        self.times = _times(len(self.log_alphas))

    @classmethod
    def from_log_alphas(
        cls, log_alphas: Sequence[float] | Tensor, times: Sequence[float] | Tensor | None = None
    ) -> DDPM:
        """The chain with `log(1 - beta_i)` given, (N,) negative numbers; the way to betas that round to 1.

        `times` (N,) is where a denoiser is called for each step, i/N unless given.
        """
        log_alphas = float_table(log_alphas, "log alphas")
        valid = (log_alphas < 0) & log_alphas.isfinite()
        if log_alphas.ndim != 1 or len(log_alphas) == 0 or not bool(valid.all()):
            raise ValueError(
                "expected a one-dimensional, non-empty tensor of finite negative log alphas, "
                f"found shape {tuple(log_alphas.shape)} with {int((~valid).sum())} other numbers"
            )
        at = _times(len(log_alphas)) if times is None else float_table(times, "times")
        if at.shape != log_alphas.shape:
            raise ValueError(f"expected times of shape {tuple(log_alphas.shape)}, found {tuple(at.shape)}")
        chain = cls.__new__(cls)
        chain.log_alphas, chain.times = log_alphas.clone(), at.clone()
        return chain

    def __len__(self) -> int:
        return len(self.log_alphas)

    def __repr__(self) -> str:
        return f"DDPM(<{len(self)} betas from {self.betas[0].item():.4g} to {self.betas[-1].item():.4g}>)"

    @property
    def betas(self) -> Tensor:
        """(N,) variances of the steps."""
        return -torch.expm1(self.log_alphas)

    @property
    def alphas(self) -> Tensor:
        """(N,) 1 - beta_i."""
        return self.log_alphas.exp()

    @property
    def log_alpha_bars(self) -> Tensor:
        """(N,) log of the products of alphas."""
        return self.log_alphas.cumsum(0)

    @property
    def alpha_bars(self) -> Tensor:
        """(N,) products of alphas."""
        return self.log_alpha_bars.exp()

    @property
    def posterior_variances(self) -> Tensor:
        """(N,) variances of q(x_{i-1} | x_i, x_0), eq. 7; 0 at i = 1.

        beta-tilde_i = (1 - alpha_bar_{i-1})/(1 - alpha_bar_i) beta_i
        """
        return self._noise(self._previous()) / self._noise(self.log_alpha_bars) * self.betas

    @property
    def snr(self) -> Tensor:
        """(N,) alpha_bar_i / (1 - alpha_bar_i)."""
        return 1 / torch.expm1(-self.log_alpha_bars)

    @property
    def elbo_weights(self) -> Tensor:
        """(N,) factors w_i in `L_{i-1} = w_i |x_0 - D(x_i)|^2` (nats): `(SNR_{i-1} - SNR_i)/2`.

        Kingma et al. 2021, arXiv:2107.00630, eq. 13. Infinite at i = 1, whose term is the decoder's.
        """
        # As a product: the difference of ratios loses the digits of short steps.
        before = self._previous()
        noise = self._noise(before).abs() * self._noise(self.log_alpha_bars)  # abs: at i = 1 it is 0, not -0
        return 0.5 * before.exp() * self.betas / noise

    def _previous(self) -> Tensor:
        """log alpha_bar_{i-1}, with alpha_bar_0 = 1."""
        return torch.cat([self.log_alpha_bars.new_zeros(1), self.log_alpha_bars[:-1]])

    @staticmethod
    def _noise(log_alpha_bar: Tensor) -> Tensor:
        return -torch.expm1(log_alpha_bar)

    def _index(self, i: Index, lowest: int = 1) -> Tensor:
        """`i` as an int64 tensor where it lives, checked against lowest..N where the host knows it."""
        try:
            index = torch.as_tensor(i)
        except (TypeError, RuntimeError):
            raise TypeError(f"expected integer indices {lowest}..{len(self)}, found {i!r}") from None
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"expected integer indices {lowest}..{len(self)}, found dtype {index.dtype}")
        index = index.long()
        if not holds((index >= lowest) & (index <= len(self))):
            raise ValueError(f"expected chain indices {lowest}..{len(self)}, found {_extremes(index)}")
        return index

    def _take(self, table: Tensor, i: Index, x: Tensor) -> Tensor:
        """table[i - 1], shaped to multiply x."""
        index = self._index(i)
        return like(table.to(index.device)[index - 1], x)

    def marginal(self, x_0: Tensor, i: Index) -> tuple[Tensor, Tensor]:
        """Mean and variance of `q(x_i | x_0) = N(alpha_bar_i^(1/2) x_0, 1 - alpha_bar_i)` (eq. 4)."""
        mean = self._take((0.5 * self.log_alpha_bars).exp(), i, x_0) * x_0
        return mean, self._take(self._noise(self.log_alpha_bars), i, x_0)

    def transition(self, x_j: Tensor, j: Index, i: Index) -> tuple[Tensor, Tensor]:
        """Mean and variance of `q(x_i | x_j)`, j < i; j = 0 is the data. (B,) indices go pairwise."""
        last = self._index(i)
        first = self._index(j, lowest=0).to(last.device)
        if not holds(first < last):
            raise ValueError(f"expected j < i, found j = {_extremes(first)}, i = {_extremes(last)}")
        # alpha_bar_0 = 1
        bars = torch.cat([self.log_alpha_bars.new_zeros(1), self.log_alpha_bars]).to(last.device)
        gap = bars[last] - bars[first]
        return like((0.5 * gap).exp(), x_j) * x_j, like(self._noise(gap), x_j)

    def posterior(self, x_t: Tensor, x_0: Tensor, i: Index) -> tuple[Tensor, Tensor]:
        """Mean and variance beta-tilde of `q(x_{i-1} | x_i = x_t, x_0)` (eqs. 6, 7).

        The other classical variance is `betas[i - 1]`.
        """
        noise = self._noise(self.log_alpha_bars)
        on_data = (0.5 * self._previous()).exp() * self.betas / noise
        on_state = (0.5 * self.log_alphas).exp() * self._noise(self._previous()) / noise
        mean = self._take(on_data, i, x_t) * x_0 + self._take(on_state, i, x_t) * x_t
        return mean, self._take(self.posterior_variances, i, x_t)

    def mean_from_noise(self, x_t: Tensor, eps: Tensor, i: Index) -> Tensor:
        """`(x_t - beta_i (1 - alpha_bar_i)^(-1/2) eps) / alpha_i^(1/2)` (eq. 11)."""
        weight = self.betas / self._noise(self.log_alpha_bars).sqrt()
        return self._take((-0.5 * self.log_alphas).exp(), i, x_t) * (x_t - self._take(weight, i, x_t) * eps)

    def mean_from_data(self, x_t: Tensor, x_0: Tensor, i: Index) -> Tensor:
        """The posterior mean with x_0 predicted."""
        return self.posterior(x_t, x_0, i)[0]

    def mean_from_score(self, x_t: Tensor, score: Tensor, i: Index) -> Tensor:
        """`(x_t + beta_i score) / alpha_i^(1/2)`."""
        scale = self._take((-0.5 * self.log_alphas).exp(), i, x_t)
        return scale * (x_t + self._take(self.betas, i, x_t) * score)

    @torch.no_grad()
    def _check_process(self, model: BaseDenoiser) -> None:
        """ValueError for a model of another process, which would take x_i for another noise level.

        `log SNR_i = -(B + log(1 - exp(-B)))`, B = -log alpha_bar_i, is finite where alpha_bar_i underflows.
        """
        found, B = 0.5 * model.sde.log_snr(self.times), -self.log_alpha_bars
        known = -0.5 * (B + (-torch.expm1(-B)).log())
        if not torch.allclose(found, known, rtol=0, atol=1e-3):
            i = int((found - known).abs().argmax())
            raise ValueError(
                f"expected a model on the chain's own process, chain.sde(); found one on {model.sde}, whose "
                f"log(alpha/sigma) at t = {self.times[i].item():.4g} is {found[i].item():.6g} and not "
                f"{known[i].item():.6g}"
            )

    def respace(self, indices: Sequence[int]) -> DDPM:
        """The chain through the kept indices (strictly increasing, in 1..N): the same marginals there.

        `beta'_j = 1 - alpha_bar_j/alpha_bar_{j-1}`; a denoiser is still called at the full chain's times.
        """
        try:
            kept = [operator.index(i) for i in indices]
        except TypeError:
            raise TypeError(f"expected a sequence of integers in 1..{len(self)}, found {indices!r}") from None
        if not kept or any(b <= a for a, b in zip([0, *kept], kept, strict=False)) or kept[-1] > len(self):
            shown = f"{kept[:5]}{'...' if len(kept) > 5 else ''}"
            raise ValueError(f"expected strictly increasing indices in 1..{len(self)}, found {shown}")
        at = torch.tensor(kept) - 1
        bars = self.log_alpha_bars[at]
        return DDPM.from_log_alphas(torch.diff(bars, prepend=bars.new_zeros(1)), self.times[at])

    def sde(self) -> VPSDE:
        """The VP-SDE whose marginals at t = i/N are the chain's (N being this chain's length)."""
        return VPSDE(schedule=Tabulated((0.0, *(-self.log_alpha_bars).tolist())))

    def loss(self, model: BaseDenoiser, x_0: Tensor, i: Index, eps: Tensor, **cond: Tensor) -> Tensor:
        """Algorithm 1: (B,) means of `|eps - eps_theta(x_i, i)|^2` over the elements, `i` in 1..N.

        `x_i = alpha_bar_i^(1/2) x_0 + (1 - alpha_bar_i)^(1/2) eps`; the model's process is `self.sde()`.
        """
        self._check_process(model)
        index = self._index(i)
        std = self._take(self._noise(self.log_alpha_bars).sqrt(), index, x_0)
        x_i = self.marginal(x_0, index)[0] + std * one_each(eps, x_0)
        predicted = model.noise(x_i, self.times.to(index.device)[index - 1], **cond)
        return (eps - predicted).square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(self, model: BaseDenoiser, x_N: Tensor, noises: Sequence[Tensor], **cond: Tensor) -> Tensor:
        """Algorithm 2, as printed, with variance beta_i: from `x_N` (B, ...) to x_0.

        `noises[i - 1]` (B, ...) belongs to the step from i to i - 1; that of i = 1 is not used. The model's
        process is `self.sde()`; it runs in evaluation mode. `solvers.ddpm()` is the same as a tableau, for
        any grid and either variance.
        """
        self._check_process(model)
        if len(noises) < len(self):
            raise ValueError(f"expected noises for {len(self)} steps, found {len(noises)}")
        x = x_N
        with evaluating(model):
            for i in range(len(self), 0, -1):
                mean = self.mean_from_noise(x, model.noise(x, self.times[i - 1], **cond), i)
                std = self._take(self.betas.sqrt(), i, x)
                x = mean + std * one_each(noises[i - 1], x) if i > 1 else mean
        return x


def discretize(sde: VPSDE, n: int, rule: str = "exact") -> DDPM:
    """The n-step chain of a VP-SDE on t_i = i/n, by either rule of `VPSDE.log_alphas`."""
    if not isinstance(sde, VPSDE):
        raise TypeError(f"expected a VP-SDE to discretize, found {sde!r}")
    return DDPM.from_log_alphas(sde.log_alphas(n, rule))


def _times(n: int) -> Tensor:
    """The times 1/n, ..., 1 of the steps."""
    return torch.arange(1, n + 1, dtype=torch.float64) / n


def _extremes(index: Tensor) -> str:
    return f"{int(index.min())}..{int(index.max())}"
