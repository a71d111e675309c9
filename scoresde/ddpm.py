"""The DDPM chain (Ho, Jain and Abbeel 2020, arXiv:2006.11239), the exact N-step discretization of a VP-SDE.

Index i = 1..N is the chain's step; arrays are 0-based, so `betas[i - 1]` belongs to step i. Indices may be an int or an integer tensor of shape (B,).
The chain is kept as `log alpha_i = log(1 - beta_i)`, which keeps its digits when beta_i is close to 0 or to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sde import VPSDE, like

if TYPE_CHECKING:
    from .denoiser import BaseDenoiser

Index = int | Tensor


class DDPM:
    """The chain with transition `q(x_i | x_{i-1}) = N((1 - beta_i)^(1/2) x_{i-1}, beta_i I)`.

    `betas` has shape (N,), each strictly between 0 and 1. Raises ValueError otherwise.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        table = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
        if table.ndim != 1 or len(table) == 0 or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError(f"expected a one-dimensional, non-empty table of betas strictly between 0 and 1, found {betas}")
        self.log_alphas = torch.log1p(-table)

    @classmethod
    def from_log_alphas(cls, log_alphas: Tensor) -> DDPM:
        """The chain with `log(1 - beta_i)` given, (N,) negative numbers; the way to betas that round to 1."""
        if log_alphas.ndim != 1 or len(log_alphas) == 0 or not bool((log_alphas < 0).all() & log_alphas.isfinite().all()):
            raise ValueError(f"expected a one-dimensional, non-empty tensor of finite negative log alphas, found {log_alphas}")
        chain = cls.__new__(cls)
        chain.log_alphas = log_alphas.double().cpu()
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
        """(N,) beta-tilde_i = (1 - alpha_bar_{i-1})/(1 - alpha_bar_i) beta_i, the variance of q(x_{i-1} | x_i, x_0); 0 at i = 1 (eq. 7)."""
        return self._noise(self._previous()) / self._noise(self.log_alpha_bars) * self.betas

    @property
    def snr(self) -> Tensor:
        """(N,) alpha_bar_i / (1 - alpha_bar_i)."""
        return 1 / torch.expm1(-self.log_alpha_bars)

    @property
    def elbo_weights(self) -> Tensor:
        """(N,) factors w_i in `L_{i-1} = w_i |x_0 - D(x_i)|^2` (nats): `(SNR_{i-1} - SNR_i)/2`; infinite at i = 1, whose term is the decoder's (Kingma et al. 2021, arXiv:2107.00630, eq. 13)."""
        return 0.5 * (1 / torch.expm1(-self._previous()) - self.snr)

    def _previous(self) -> Tensor:
        """log alpha_bar_{i-1}, with alpha_bar_0 = 1."""
        return torch.cat([self.log_alpha_bars.new_zeros(1), self.log_alpha_bars[:-1]])

    @staticmethod
    def _noise(log_alpha_bar: Tensor) -> Tensor:
        return -torch.expm1(log_alpha_bar)

    def _take(self, table: Tensor, i: Index, x: Tensor, lowest: int = 1) -> Tensor:
        """table[i - 1], shaped to multiply x."""
        index = torch.as_tensor(i, device="cpu")
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"expected integer chain indices 1..{len(self)}, found dtype {index.dtype}")
        if index.numel() and not lowest <= int(index.min()) <= int(index.max()) <= len(self):
            raise ValueError(f"expected chain indices from {lowest} to {len(self)}, found {int(index.min())}..{int(index.max())}")
        return like(table[index.long() - 1].to(x.device), x)

    def marginal(self, x_0: Tensor, i: Index) -> tuple[Tensor, Tensor]:
        """Mean and variance of `q(x_i | x_0) = N(alpha_bar_i^(1/2) x_0, 1 - alpha_bar_i)` (eq. 4)."""
        return self._take((0.5 * self.log_alpha_bars).exp(), i, x_0) * x_0, self._take(self._noise(self.log_alpha_bars), i, x_0)

    def transition(self, x_j: Tensor, j: Index, i: Index) -> tuple[Tensor, Tensor]:
        """Mean and variance of `q(x_i | x_j)`, j < i; j = 0 is the data. (B,) indices go pairwise."""
        bars = torch.cat([self.log_alpha_bars, self.log_alpha_bars.new_zeros(1)])  # index -1 is alpha_bar_0
        gap = self._take(bars, i, x_j.double()) - self._take(bars, j, x_j.double(), lowest=0)
        if not bool((gap < 0).all()):
            raise ValueError(f"expected j < i, found j={j}, i={i}")
        return (0.5 * gap).exp().to(x_j.dtype) * x_j, self._noise(gap).to(x_j.dtype)

    def posterior(self, x_t: Tensor, x_0: Tensor, i: Index) -> tuple[Tensor, Tensor]:
        """Mean and variance beta-tilde of `q(x_{i-1} | x_i = x_t, x_0)` (eqs. 6, 7); the other classical variance is `betas[i - 1]`."""
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
        return self._take((-0.5 * self.log_alphas).exp(), i, x_t) * (x_t + self._take(self.betas, i, x_t) * score)

    def respace(self, indices: Sequence[int]) -> DDPM:
        """The chain through the kept indices (strictly increasing, in 1..N): same marginals there, `beta'_j = 1 - alpha_bar_j/alpha_bar_{j-1}`."""
        kept = list(indices)
        if not kept or any(b <= a for a, b in zip([0, *kept], kept, strict=False)) or kept[-1] > len(self):
            raise ValueError(f"expected strictly increasing indices in 1..{len(self)}, found {kept[:5]}{'...' if len(kept) > 5 else ''}")
        bars = self.log_alpha_bars[torch.tensor(kept) - 1]
        return DDPM.from_log_alphas(torch.diff(bars, prepend=bars.new_zeros(1)))

    def sde(self) -> VPSDE:
        """The VP-SDE whose marginals at t = i/N are the chain's."""
        from .schedules import Tabulated

        return VPSDE(schedule=Tabulated((0.0, *(-self.log_alpha_bars).tolist())))

    def loss(self, model: BaseDenoiser, x_0: Tensor, i: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """Algorithm 1: (B,) means of `|eps - eps_theta(alpha_bar_i^(1/2) x_0 + (1 - alpha_bar_i)^(1/2) eps, i)|^2` over the elements, with `i` (B,) drawn from 1..N."""
        mean, variance = self.marginal(x_0, i)
        predicted = model.noise(mean + variance.sqrt() * eps, i.to(x_0.device).double() / len(self), **cond)
        return (eps - predicted).square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(self, model: BaseDenoiser, x_N: Tensor, noises: Sequence[Tensor], **cond: Tensor) -> Tensor:  # noqa: N803
        """Algorithm 2, as printed: from `x_N` (B, ...) and `noises[i - 1]` for the step from i to i - 1 (that of i = 1 is not used), with variance beta_i.

        `solvers.ddpm()` is the same chain as a tableau, for any grid and with either variance.
        """
        x = x_N
        for i in range(len(self), 0, -1):
            mean = self.mean_from_noise(x, model.noise(x, i / len(self), **cond), i)
            x = mean + self._take(self.betas, i, x).sqrt() * noises[i - 1] if i > 1 else mean
        return x


def discretize(sde: VPSDE, n: int, rule: str = "exact") -> DDPM:
    """The n-step chain of a VP-SDE on t_i = i/n.

    "exact": `log alpha_i = -(B_i - B_{i-1})`, marginals equal to the SDE's. "euler": `beta_i = beta(t_i)/n`, first order in 1/n.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"expected a number of steps n >= 1, found {n!r}")
    t = torch.arange(n + 1, dtype=torch.float64) / n
    if rule == "exact":
        return DDPM.from_log_alphas(-sde.B(t).diff())
    if rule != "euler":
        raise ValueError(f"expected rule 'exact' or 'euler', found {rule!r}")
    betas = sde.beta(t[1:]) / n
    if not bool((betas < 1).all()):
        raise ValueError(
            f"the Euler rule beta(t)/n needs beta < 1, found {betas.max().item():.4g} at n={n}: take at least {int(sde.beta(t).max().item()) + 1} steps or rule='exact'"
        )
    return DDPM(betas)
