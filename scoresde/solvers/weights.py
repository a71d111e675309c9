"""The one primitive behind exponential solvers: integrate a polynomial through remembered outputs against the
exact linear flow.

In half-log-SNR `lam`, with noise level tau (0: probability-flow ODE, 1: reverse SDE), every reverse process
reads

    dx = x (dlog sigma - tau^2 dlam) + (1 + tau^2) alpha x_0 dlam + 2^(1/2) tau sigma dW.

Let `m = p x + q x_0` be what is remembered, `r = alpha p/q`. For y = x/sigma the linear rate is
`-(tau^2 + (1 + tau^2) r)`; with its propagator Phi,

    x_t = sigma_t [Phi(s, t) x_s/sigma_s + int Phi(lam, t) (1 + tau^2) alpha/(sigma q) m dlam
                   + int Phi(lam, t) 2^(1/2) tau dW].

Replacing m(lam) by its Lagrange polynomial in a variable u(lam) gives `x_t = A x_s + sum_j b_j m_j + C z`.
The integrals are 32-point Gauss-Legendre in lam, on one panel for a short step, on several for a long one and
for strong noise: short beside the distance of the rates' poles, and shorter towards the end of the step where
the propagator falls fast. That is 1e-13 relative for steps from 1e-4 to 60 and any number tau below 1e6,
beside the rounding of u, with no series; a function tau(lam) has to be smooth on the scale of the panels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..denoiser import DATA, FLOW, NOISE, VELOCITY, Prediction, view
from ..sde import LinearSDE

Tau = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """A quantity to remember: `m = p x + q x_0`, with r = alpha p/q, by `rest = 1 + r` (which keeps its
    digits where r is near -1), an `integral` of r over lam, and `weight = alpha/(sigma q)` as functions of
    lam (and of the SDE, for scale)."""

    prediction: Prediction
    rest: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor]
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
    "data": Stored(DATA, torch.ones_like, torch.zeros_like, lambda sde, lam: lam.exp()),
    "noise": Stored(NOISE, torch.zeros_like, torch.neg, lambda sde, lam: -torch.ones_like(lam)),
    "velocity": Stored(
        VELOCITY,
        lambda lam: (-2 * lam).sigmoid(),
        lambda lam: logsigmoid(-2 * lam) / 2,
        _velocity_weight,
    ),
    "flow": Stored(
        FLOW,
        lambda lam: (-lam).sigmoid(),
        lambda lam: logsigmoid(-lam),
        lambda sde, lam: -lam.sigmoid(),
    ),
}

VARIABLES: dict[str, Callable[[LinearSDE, Tensor, Tensor], Tensor]] = {
    # each is u(lam) up to an affine map, which a Lagrange polynomial does not see: one in which differences
    # near `base` keep their digits, where the noise is small as well as where the signal is
    "lam": lambda sde, lam, base: lam,
    "sigma/alpha": lambda sde, lam, base: torch.expm1(base - lam),
    "sigma": lambda sde, lam, base: ((base - lam) / 2).sinh() / (lam / 2).cosh(),
    "t": lambda sde, lam, base: sde.time(2 * lam),
}


@cache
def _legendre() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights on [0, 1], and the matrix whose row i integrates an interpolated function from node i
    to 1."""
    points = 32
    x, w = np.polynomial.legendre.leggauss(points)
    basis = np.polynomial.legendre.legvander(x, points - 1)  # for the discrete Legendre transform
    transform = (basis * w[:, None]).T * (np.arange(points)[:, None] + 0.5)
    tails = np.stack([_legendre_tail(n, x) for n in range(points)], 1)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2), torch.from_numpy(tails @ transform / 2)


def _legendre_tail(n: int, x: np.ndarray) -> np.ndarray:
    """int_x^1 P_n."""
    if n == 0:
        return 1 - x
    below, above = (np.polynomial.Legendre.basis(k)(x) for k in (n - 1, n + 1))
    return (below - above) / (2 * n + 1)


LONGEST = 2.0  # panel in lam: poles lie at a distance of pi/2 from the real line
STEEPEST = 20.0  # exponent by which the propagator may fall in a panel where it has not fallen as far before
MOST = 48  # pieces, and halvings: what is beyond, steps of 100 in lam or noise levels of 1e7, loses accuracy


@lru_cache(maxsize=4)
def _panels(pieces: int, halvings: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights and tails as of `_legendre`, on equal pieces of [0, 1], the last of which is halved
    again and again towards 1."""
    x, w, tail = _legendre()
    parts = [1.0] * (pieces - 1) + [0.5**k for k in range(1, halvings + 1)] + [0.5**halvings]
    lengths = torch.tensor(parts, dtype=torch.float64)[:, None] / pieces
    starts = lengths.cumsum(0) - lengths
    weights = (lengths * w).flatten()
    # row i: what is left of its own panel, and the whole of those after it
    own = torch.block_diag(*(length * tail for length in lengths))
    after = torch.ones(len(parts), len(parts), dtype=torch.float64).triu(1).repeat_interleave(len(x), 0)
    return (starts + lengths * x).flatten(), weights, own + after.repeat_interleave(len(x), 1) * weights


def _subdivision(h: Tensor, lam_s: Tensor, tau: Tau | Tensor) -> tuple[Tensor, Tensor]:
    """Pieces (N,) of each step, and halvings (N,) of the last of them."""
    places = torch.linspace(0, 1, 9 if callable(tau) else 1, dtype=torch.float64)
    strongest = _noise_level(tau, lam_s[:, None] + h[:, None] * places).amax(1)
    pieces = (h / LONGEST).ceil().clamp(1, MOST)
    halvings = (h / pieces * (1 + strongest**2) / STEEPEST).log2().ceil()
    return pieces, halvings.nan_to_num(0).clamp(0, MOST)


def lagrange(u: Tensor, nodes: Tensor) -> Tensor:
    """(N, P, Q) Lagrange basis on `nodes` (N, P) at the points `u` (N, Q)."""
    basis = u.new_ones(*nodes.shape, u.shape[1])
    for i, node in enumerate(nodes.unbind(1)):
        gap = nodes - node[:, None]
        gap[:, i] = 1
        factor = (u - node[:, None])[:, None] / gap[:, :, None]
        factor[:, i] = 1
        basis *= factor
    return basis


class Moments(NamedTuple):
    """What a published rule may look at: positions `theta` (N, P) of the nodes (0 base, 1 target), moments
    `mu[k] = int W theta^k` (N,), the step `h` and the kernel at its end."""

    theta: Tensor
    mu: tuple[Tensor, Tensor, Tensor]
    h: Tensor
    end: Tensor


# What public code puts in place of the coefficient of the highest divided difference, by number of nodes: the
# change against exact integration.
RULES: dict[str, dict[int, Callable[[Moments], Tensor]]] = {
    "exact": {},
    "bh1": {2: lambda m: m.h * m.end / 2 - m.mu[1]},
    "bh2": {2: lambda m: m.mu[0] / 2 - m.mu[1]},
    "half3": {2: lambda m: m.mu[0] / 2 - m.mu[1], 3: lambda m: -m.mu[2] / 2},
    "backward": {3: lambda m: m.theta[:, 1] * m.mu[1]},
}

# Adams-Bashforth on equidistant nodes, newest first; used by iPNDM and PLMS whatever the spacing.
ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def step_weights(
    sde: LinearSDE,
    s: Tensor,
    t: Tensor,
    nodes: Tensor,
    *,
    stored: str = "data",
    variable: str = "lam",
    tau: Tau | Tensor = 0.0,
    rule: str = "exact",
) -> tuple[Tensor, Tensor, Tensor]:
    """`(A, b, C)` of the steps `x_t = A x_s + sum_j b_j m_j + C z`, vectorised over N steps.

    s, t (N,) times of base and target, both with finite lam (t < s); nodes (N, P) times of the outputs m_j,
    past, present or future, with finite lam. tau: a number, an (N,) tensor of one number per step, or a
    function of lam. rule: "exact", or a published approximation of it:

    bh1, bh2  UniPC's two-node weights (Zhao et al. 2023, arXiv:2302.04867): `mu_1` replaced by `h W(end)/2`
              or `mu_0/2`; bh2 is DPM-Solver's 2M
    half3     DPM-Solver's 3M (Lu et al. 2022, arXiv:2211.01095): bh2, and the second divided difference
              weighted by half; second order only
    backward  ER-SDE-3 (Cui et al. 2023, arXiv:2309.06169): the newest backward difference taken for the
              derivative; second order only
    adams     iPNDM, PLMS (Liu et al. 2022, arXiv:2202.09778): Adams-Bashforth weights of an equidistant grid;
              second order off such grids

    Returns A (N,), b (N, P), C (N,) in float64.
    """
    lam_s, lam_t, lam_nodes = (0.5 * sde.log_snr(v) for v in (s, t, nodes))
    at = s, t, lam_s, lam_t, lam_nodes
    options = {"stored": stored, "variable": variable, "rule": rule}
    pieces, halvings = _subdivision(lam_t - lam_s, lam_s, tau)
    several = pieces + halvings > 1
    if not bool(several.any()):
        return _integrate(sde, at, _panels(1, 0), tau=tau, **options)
    A, C = torch.empty(2, len(s), dtype=torch.float64)
    b = torch.empty_like(lam_nodes)
    for rows in (~several, several):
        if bool(rows.any()):
            panels = _panels(int(pieces[rows].max()), int(halvings[rows].max()))
            level = tau[rows] if isinstance(tau, Tensor) else tau
            found = _integrate(sde, tuple(v[rows] for v in at), panels, tau=level, **options)
            A[rows], b[rows], C[rows] = found
    return A, b, C


def _integrate(
    sde: LinearSDE,
    at: tuple[Tensor, ...],
    panels: tuple[Tensor, Tensor, Tensor],
    *,
    stored: str,
    variable: str,
    tau: Tau | Tensor,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`step_weights` on the given panels, `at` being s, t and half the log-SNR of s, t and the nodes."""
    kind = STORED[stored]
    (s, t, lam_s, lam_t, lam_nodes), (x, w, tail) = at, panels
    h = (lam_t - lam_s)[:, None]
    lam = lam_s[:, None] + h * x
    tau2 = _noise_level(tau, lam) ** 2
    # -log Phi = int r + int tau^2 (1 + r), the first part in closed form
    r_s, r_lam, r_t = kind.integral(lam_s), kind.integral(lam), kind.integral(lam_t)
    rate = tau2 * kind.rest(lam)
    decay = (-(r_t[:, None] - r_lam) - h * (rate @ tail.T)).exp()  # Phi(lam, t)
    scale = sde.sigma(t) / sde.sigma(s)
    A = scale * (-(r_t - r_s) - h[:, 0] * (rate @ w)).exp()
    kernel = decay * (1 + tau2) * _scaled_weight(kind, sde, t, lam, lam_t[:, None])
    u = VARIABLES[variable]
    basis = lagrange(u(sde, lam, lam_s[:, None]), u(sde, lam_nodes, lam_s[:, None]))
    b = h * (basis * (kernel * w)[:, None, :]).sum(-1)
    if rule == "adams":
        b = b.sum(1, keepdim=True) * torch.tensor(ADAMS[lam_nodes.shape[1]], dtype=torch.float64)
    elif change := RULES[rule].get(lam_nodes.shape[1]):
        start, end = (u(sde, v[:, None], lam_s[:, None]) for v in (lam_s, lam_t))
        theta = (u(sde, lam_nodes, lam_s[:, None]) - start) / (end - start)
        position = (u(sde, lam, lam_s[:, None]) - start) / (end - start)
        mu0, mu1, mu2 = (h[:, 0] * (kernel * w * position**k).sum(1) for k in range(3))
        last = 1 + _noise_level(tau, lam_t[:, None]) ** 2
        last = (last * _scaled_weight(kind, sde, t, lam_t[:, None], lam_t[:, None]))[:, 0]
        b = b + change(Moments(theta, (mu0, mu1, mu2), h[:, 0], last))[:, None] * _highest_difference(theta)
    C = sde.sigma(t) * (h[:, 0] * (2 * tau2 * decay**2 @ w)).sqrt()
    return A, b, C


def _highest_difference(theta: Tensor) -> Tensor:
    """(N, P) weights of the divided difference over all nodes: 1 / prod_{i != j} (theta_j - theta_i)."""
    gaps = theta[:, :, None] - theta[:, None, :] + torch.eye(theta.shape[1], dtype=torch.float64)
    return 1 / gaps.prod(-1)


def _noise_level(tau: Tau | Tensor, lam: Tensor) -> Tensor:
    """tau at lam (N, Q)."""
    if isinstance(tau, Tensor):
        return tau.double()[:, None].expand_as(lam)
    return tau(lam) if callable(tau) else torch.full_like(lam, tau)


def _scaled_weight(kind: Stored, sde: LinearSDE, t: Tensor, lam: Tensor, lam_t: Tensor) -> Tensor:
    """sigma_t alpha/(sigma q); for data in the form that cannot overflow."""
    if kind.prediction is DATA:
        return sde.alpha(t)[:, None] * kind.weight(sde, lam - lam_t)
    return sde.sigma(t)[:, None] * kind.weight(sde, lam)


def singular_step(
    sde: LinearSDE, s: Tensor, t: Tensor, stored: str, tau: Tau
) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, mix, noise) of a step from alpha = 0 or to sigma = 0: the limits of the first-order data
    form."""
    stochastic = float(callable(tau) or tau > 0)
    a, b = view(DATA, STORED[stored].prediction, sde.alpha(s), sde.sigma(s))
    if not bool((a.isfinite() & b.isfinite()).all()):
        raise ValueError(
            f"expected a start with some signal for a solver that remembers {stored}, found alpha = 0 at "
            f"t = {s.item()}; remember data, velocity or flow"
        )
    keep = sde.sigma(t) / sde.sigma(s) * (1 - stochastic)
    return keep + sde.alpha(t) * a, sde.alpha(t) * b, sde.sigma(t) * stochastic
