"""The one primitive behind exponential solvers: integrate a polynomial through remembered outputs against the exact linear flow.

In half-log-SNR `lam`, with noise level tau (0: probability-flow ODE, 1: reverse SDE), every reverse process reads

    dx = x (dlog sigma - tau^2 dlam) + (1 + tau^2) alpha x_0 dlam + 2^(1/2) tau sigma dW.

Let `m = p x + q x_0` be what is remembered, `r = alpha p/q`. For y = x/sigma the linear rate is `-(tau^2 + (1 + tau^2) r)`; with its propagator Phi,

    x_t = sigma_t Phi(s, t) x_s/sigma_s + sigma_t int Phi(lam, t) (1 + tau^2) alpha/(sigma q) m dlam + sigma_t int Phi(lam, t) 2^(1/2) tau dW.

Replacing m(lam) by its Lagrange polynomial in a variable u(lam) gives `x_t = A x_s + sum_j b_j m_j + C z`. The integrals are 32-point Gauss-Legendre in lam: 1e-14 relative
for steps from 1e-4 to 30, with no series and no special cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..denoiser import DATA, FLOW, NOISE, VELOCITY, Prediction
from ..sde import LinearSDE

Tau = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """A quantity to remember: `m = p x + q x_0`, by `ratio = alpha p/q` and `weight = alpha/(sigma q)` as functions of lam (and of the SDE, for scale)."""

    prediction: Prediction
    ratio: Callable[[Tensor], Tensor]
    weight: Callable[[LinearSDE, Tensor], Tensor]

    def rows(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(skip, out): `m = skip x + out D`, from m = p' x_0 + q' eps with eps = (x - alpha x_0)/sigma."""
        p, q = self.prediction.pq(alpha, sigma)
        return q / sigma, p - q * alpha / sigma


def _velocity_weight(sde: LinearSDE, lam: Tensor) -> Tensor:
    t = sde.time(2 * lam)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return -alpha / (alpha**2 + sigma**2)


STORED = {
    "data": Stored(DATA, torch.zeros_like, lambda sde, lam: lam.exp()),
    "noise": Stored(NOISE, lambda lam: -torch.ones_like(lam), lambda sde, lam: -torch.ones_like(lam)),
    "velocity": Stored(VELOCITY, lambda lam: -(2 * lam).sigmoid(), _velocity_weight),
    "flow": Stored(FLOW, lambda lam: -lam.sigmoid(), lambda sde, lam: -lam.sigmoid()),
}

VARIABLES: dict[str, Callable[[LinearSDE, Tensor, Tensor], Tensor]] = {
    # each is u(lam) up to an affine map, which a Lagrange polynomial does not see; `base` keeps the numbers near 1
    "lam": lambda sde, lam, base: lam - base,
    "sigma/alpha": lambda sde, lam, base: torch.expm1(base - lam),
    "sigma": lambda sde, lam, base: (-lam).sigmoid(),
    "t": lambda sde, lam, base: sde.time(2 * lam),
}


@cache
def _legendre() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights on [0, 1], and the matrix whose row i integrates an interpolated function from node i to 1."""
    points = 32
    x, w = np.polynomial.legendre.leggauss(points)
    basis = np.polynomial.legendre.legvander(x, points - 1)  # values -> Legendre coefficients by the discrete transform
    transform = (basis * w[:, None]).T * (np.arange(points)[:, None] + 0.5)
    tails = np.stack([_legendre_tail(n, x) for n in range(points)], 1)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2), torch.from_numpy(tails @ transform / 2)


def _legendre_tail(n: int, x: np.ndarray) -> np.ndarray:
    """int_x^1 P_n."""
    if n == 0:
        return 1 - x
    below, above = (np.polynomial.legendre.legval(x, np.eye(n + 2)[k]) for k in (n - 1, n + 1))
    return (below - above) / (2 * n + 1)


def lagrange(u: Tensor, nodes: Tensor) -> Tensor:
    """(N, P, Q) Lagrange basis on `nodes` (N, P) at the points `u` (N, Q)."""
    columns = []
    for j in range(nodes.shape[1]):
        others = [i for i in range(nodes.shape[1]) if i != j]
        factors = [(u - nodes[:, i, None]) / (nodes[:, j] - nodes[:, i])[:, None] for i in others]
        columns.append(torch.stack(factors).prod(0) if factors else torch.ones_like(u))
    return torch.stack(columns, 1)


def step_weights(
    sde: LinearSDE, s: Tensor, t: Tensor, nodes: Tensor, *, stored: str = "data", variable: str = "lam", tau: Tau | Tensor = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`(A, b, C)` of the steps `x_t = A x_s + sum_j b_j m_j + C z`, vectorised over N steps.

    s, t (N,) times of base and target, both with finite lam (t < s); nodes (N, P) times of the outputs m_j, past, present or future, with finite lam.
    tau: a number, an (N,) tensor of one number per step, or a function of lam. Returns A (N,), b (N, P), C (N,) in float64.
    """
    kind = STORED[stored]
    lam_s, lam_t, lam_nodes = (0.5 * sde.log_snr(v) for v in (s, t, nodes))
    x, w, tail = _legendre()
    h = (lam_t - lam_s)[:, None]
    lam = lam_s[:, None] + h * x
    tau2 = _noise_level(tau, lam) ** 2
    rate = tau2 + (1 + tau2) * kind.ratio(lam)
    decay = (-h * (rate @ tail.T)).exp()  # Phi(lam, t)
    scale = sde.sigma(t) / sde.sigma(s)
    A = scale * (-h[:, 0] * (rate @ w)).exp()  # noqa: N806
    kernel = decay * (1 + tau2) * _scaled_weight(kind, sde, t, lam, lam_t[:, None])
    u = VARIABLES[variable]
    basis = lagrange(u(sde, lam, lam_s[:, None]), u(sde, lam_nodes, lam_s[:, None]))
    b = h * (basis * (kernel * w)[:, None, :]).sum(-1)
    C = sde.sigma(t) * (h[:, 0] * (2 * tau2 * decay**2 @ w)).sqrt()  # noqa: N806
    return A, b, C


def _noise_level(tau: Tau | Tensor, lam: Tensor) -> Tensor:
    """tau at lam (N, Q)."""
    if isinstance(tau, Tensor):
        return tau.double()[:, None].expand_as(lam)
    return tau(lam) if callable(tau) else torch.full_like(lam, tau)


def _scaled_weight(kind: Stored, sde: LinearSDE, t: Tensor, lam: Tensor, lam_t: Tensor) -> Tensor:
    """sigma_t alpha/(sigma q); for data in the form that cannot overflow."""
    if kind.prediction is DATA:
        return sde.alpha(t)[:, None] * (lam - lam_t).exp()
    return sde.sigma(t)[:, None] * kind.weight(sde, lam)
