"""Solvers whose step from t to s < t uses only the newest output: ancestral DDPM, DDIM, Euler-Maruyama,
reverse diffusion, Heun.

Each function gives, for all steps at once, the coefficients of `x_s = keep x_t + mix D(x_t, t) + noise eps`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..grids import Grid
from ..schedules import check_numbers
from ..sde import VPSDE, LinearSDE
from ..tableau import Tableau
from .base import Card, TableSolver

Coefficients = tuple[Tensor, Tensor, Tensor]
Rule = Callable[[LinearSDE, Tensor, Tensor], Coefficients]

SONG = "Song et al. 2021, arXiv:2011.13456"
HO = "Ho et al. 2020, arXiv:2006.11239"


def one_step_table(name: str, times: Tensor, coefficients: Coefficients) -> Tableau:
    """The table that remembers D and nothing else."""
    keep, mix, noise = coefficients
    return Tableau(times, torch.zeros_like(noise), torch.ones_like(noise), keep, mix[:, None], noise, name)


def _solver(name: str, rule: Rule, card: Card, options: tuple = ()) -> TableSolver:
    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        return one_step_table(name, grid.t, rule(sde, grid.t[1:], grid.t[:-1]))

    return TableSolver(name, build, card, options)


def posterior(sde: LinearSDE, s: Tensor, t: Tensor) -> Coefficients:
    """`q(x_s | x_t, x_0 = D)`: keep = a sigma_s^2/sigma_t^2, mix = alpha_s V/sigma_t^2, noise = sigma_s
    V^(1/2)/sigma_t, with (a, V^(1/2)) = transition(s, t)."""
    a, std = sde.transition(s, t)
    ratio, fraction = sde.sigma(s) / sde.sigma(t), std / sde.sigma(t)
    return a * ratio**2, sde.alpha(s) * fraction**2, ratio * std


def ddpm(variance: str = "small", rule: str = "exact") -> TableSolver:
    """Ancestral sampling, Algorithm 2 of Ho et al. (2020, arXiv:2006.11239), on any grid and any SDE.

    variance  "small" beta-tilde, the posterior's | "large" beta, that of the forward step (no noise in a step
              to sigma = 0)
    rule      "exact" | "score_sde": the historical table `beta(j/(K-1))/K` at `j = floor(t (K - 1))` for K
              times, one row for each of them (VP only)
    """
    if variance not in ("small", "large") or rule not in ("exact", "score_sde"):
        raise ValueError(
            f"expected variance 'small' or 'large' and rule 'exact' or 'score_sde', found {variance!r}, "
            f"{rule!r}"
        )
    if rule == "score_sde":
        return _historical("ddpm", _historical_ancestral)

    def large(sde: LinearSDE, s: Tensor, t: Tensor) -> Coefficients:
        keep, mix, _ = posterior(sde, s, t)
        return keep, mix, sde.transition(s, t)[1] * (sde.sigma(s) > 0)

    small = variance == "small"
    properties = frozenset({"clock_free", "scale_covariant", "marginal_exact"} if small else {"clock_free"})
    return _solver(
        "ddpm",
        posterior if small else large,
        Card(None, 1, 1, True, HO, properties),
        (("variance", variance), ("rule", rule)),
    )


def ddim(eta: float = 0.0) -> TableSolver:
    """DDIM: `x_s = alpha_s D + (sigma_s^2 - c^2)^(1/2) eps_hat + c z`, c = eta times the posterior's standard
    deviation (Song, Meng and Ermon 2021, arXiv:2010.02502, eq. 12).

    eta = 0 is the first-order exponential solver of the probability-flow ODE, eta = 1 is DDPM.
    """
    check_numbers(eta=eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta in [0, 1], found {eta}")

    def rule(sde: LinearSDE, s: Tensor, t: Tensor) -> Coefficients:
        if eta == 0:  # also from data to noise
            kept = sde.sigma(s) / sde.sigma(t)
            return kept, sde.alpha(s) - kept * sde.alpha(t), torch.zeros_like(kept)
        _, _, std = posterior(sde, s, t)
        # sigma_s^2 - c^2 = sigma_s^2 (1 - eta^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)), a sum of
        # positive terms
        kept = (
            sde.sigma(s)
            * ((1 - eta**2) + eta**2 * sde.scale(s, t) ** 2 * (sde.sigma(s) / sde.sigma(t)) ** 2).sqrt()
        )
        return kept / sde.sigma(t), sde.alpha(s) - kept * sde.alpha(t) / sde.sigma(t), eta * std

    card = Card(
        1 if eta == 0 else None,
        None if eta == 0 else 1,
        1,
        eta > 0,
        "Song et al. 2021, arXiv:2010.02502",
        frozenset({"marginal_exact", "clock_free", "scale_covariant"}),
    )
    return _solver("ddim", rule, card, (("eta", eta),))


def euler_maruyama(rule: str = "exact") -> TableSolver:
    """Euler-Maruyama of the reverse SDE in t: `x_s = x_t - (t - s) (f x - g^2 score) + g (t - s)^(1/2) z`.
    The noise is additive, so Milstein's method is the same.

    rule "score_sde": step 1/K for K times, one row for each of them, the last time 0 (Song et al. 2021,
    arXiv:2011.13456, code).
    """
    if rule not in ("exact", "score_sde"):
        raise ValueError(f"expected rule 'exact' or 'score_sde', found {rule!r}")
    if rule == "score_sde":
        return _historical("euler_maruyama", lambda sde, t: _euler(sde, torch.full_like(t, 1 / len(t)), t))
    return _solver(
        "euler_maruyama",
        lambda sde, s, t: _euler(sde, t - s, t),
        Card(None, 1, 1, True, SONG, frozenset(), "none"),
        (("rule", rule),),
    )


def _euler(sde: LinearSDE, dt: Tensor, t: Tensor) -> Coefficients:
    f, g2 = sde.rates(t)
    push = dt * g2 / sde.sigma(t) ** 2  # score = (alpha D - x)/sigma^2
    return 1 - dt * f - push, push * sde.alpha(t), (g2 * dt).sqrt()


def reverse_diffusion(rule: str = "exact") -> TableSolver:
    """The reverse of the discretized forward step `x_t = x_s + F x_s + G z`: `x_s = x_t - F x_t + G^2 score +
    G z` (Song et al. 2021, arXiv:2011.13456, eq. 46).

    "exact": F = a - 1, G = V^(1/2) of the exact transition. "score_sde": the historical table of betas, as in
    `ddpm(rule="score_sde")`.
    """
    if rule not in ("exact", "score_sde"):
        raise ValueError(f"expected rule 'exact' or 'score_sde', found {rule!r}")
    if rule == "score_sde":
        return _historical("reverse_diffusion", _historical_reverse_diffusion)

    def exact(sde: LinearSDE, s: Tensor, t: Tensor) -> Coefficients:
        a, std = sde.transition(s, t)
        push = std**2 / sde.sigma(t) ** 2
        return 2 - a - push, push * sde.alpha(t), std

    return _solver(
        "reverse_diffusion",
        exact,
        Card(None, 1, 1, True, SONG, frozenset({"clock_free"}), "none"),
        (("rule", rule),),
    )


def _historical(name: str, coefficients: Callable[[LinearSDE, Tensor], Coefficients]) -> TableSolver:
    """A sampler of score_sde: K times are K rows of step 1/K; the table's last time is 0, which no call
    sees."""

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        times = grid.t if float(grid.t[-1]) > 0 else grid.t[:-1]
        return one_step_table(
            f"{name} (score_sde)", torch.cat([times, times.new_zeros(1)]), coefficients(sde, times)
        )

    return TableSolver(
        name,
        build,
        Card(None, 1, 1, True, SONG, frozenset(), "none"),
        (("rule", "score_sde"),),
        calls=lambda steps: steps + 1,
    )


def _historical_betas(sde: LinearSDE, t: Tensor) -> Tensor:
    if type(sde) is not VPSDE:
        raise TypeError(f"the historical beta table belongs to the VP-SDE, found {sde}; use rule='exact'")
    n = len(t)
    table = sde.beta(torch.linspace(0, 1, n, dtype=torch.float64)) / n
    if not bool((table < 1).all()):
        raise ValueError(
            f"the historical table beta(t)/K needs beta < 1, found {table.max().item():.4g} for K = {n} "
            "times; take more, or rule='exact'"
        )
    return table[(t * (n - 1) + 1e-9).floor().long()]


def _historical_ancestral(sde: LinearSDE, t: Tensor) -> Coefficients:
    betas = _historical_betas(sde, t)
    root, push = (1 - betas).sqrt(), betas / sde.sigma(t) ** 2
    return (1 - push) / root, push * sde.alpha(t) / root, betas.sqrt()


def _historical_reverse_diffusion(sde: LinearSDE, t: Tensor) -> Coefficients:
    betas = _historical_betas(sde, t)
    push = betas / sde.sigma(t) ** 2
    return 2 - (1 - betas).sqrt() - push, push * sde.alpha(t), betas.sqrt()


def from_tableau(table: Tableau) -> TableSolver:
    """A table as a solver, for its own times only. Raises ValueError for a grid with other ends."""
    if not isinstance(table, Tableau):
        raise TypeError(f"expected a Tableau, found {table!r}")

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        ends = torch.stack([grid.t[0], grid.t[-1]])
        if not torch.allclose(ends, table.ends, rtol=1e-9, atol=1e-12):
            raise ValueError(
                f"this table runs from t = {table.ends[0].item()} to {table.ends[1].item()}, found a grid "
                f"from {ends[0].item()} to {ends[1].item()}"
            )
        return table

    return TableSolver(
        table.name,
        build,
        Card(None, None, 1, bool(table.noise.any()), "given as a table", frozenset()),
        calls=lambda steps: max(steps, len(table)),
    )
