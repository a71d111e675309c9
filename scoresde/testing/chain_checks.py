"""The check of DDPM chains: ours, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ddpm import DDPM
from .failure import at_most, holds
from .numerics import EPS, has

CHAIN_METHODS = (
    "log_alpha_bars", "betas", "times", "marginal", "transition", "posterior", "respace", "__len__",
)  # fmt: skip


@torch.no_grad()
def check_discretization(
    chain: Any,
    sde: Any,
    order: float | None = None,
    *,
    sizes: Sequence[int] | None = None,
    rtol: float = 1e-12,
) -> None:
    """That a DDPM chain is the process's: exactly, or with `order`, up to O(N^-order).

    chain   a `DDPM`, an object with its methods, a table of betas, or a function of N that makes one of them
    order   None: the marginals are the process's at every node `chain.times` to `rtol`; the posterior is the
            conditional of the joint Gaussian; transitions compose; respacing keeps the marginals and the
            times. A number: `chain` is a function of N, and the largest error of log alpha_bar over the
            nodes falls as N^-order, within 0.15
    sizes   the numbers of steps N to try a function at: 200, 400, 800 and 1600 unless given, more where the
            process is steep
    """
    if order is not None:
        if not callable(chain):
            raise TypeError(f"chain: expected a function of N to measure an order on, found {type(chain)}")
        _check_order_of_chain(chain, sde, order, sizes or _sizes(sde))
        return
    tables = [chain(n) for n in sizes or _sizes(sde)] if callable(chain) else [chain]
    for each in tables:
        made = _chain(each)
        has(made, "chain", CHAIN_METHODS)
        _check_marginals(made, sde, rtol)
        _check_chain(made, rtol)


def _sizes(sde: Any) -> list[int]:
    """Four doublings from where a step is short against 1/beta, as far as that can be paid for."""
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64) * sde.t_max
    steepest = 2 * float(sde.drift(torch.ones(len(t), 1, dtype=torch.float64), t).abs().max())
    first = min(max(200, round(8 * steepest)), 20_000)
    return [first, 2 * first, 4 * first, 8 * first]


def _chain(made: Any) -> Any:
    made = torch.from_numpy(made) if isinstance(made, np.ndarray) else made
    return DDPM(made) if isinstance(made, Sequence | Tensor) else made


def _errors(chain: Any, sde: Any) -> Tensor:
    """log alpha_bar_i minus the process's, at the times of the chain (N,)."""
    return chain.log_alpha_bars - 2 * sde.alpha(chain.times).log()


def _check_order_of_chain(chain: Callable[[int], Any], sde: Any, order: float, sizes: Sequence[int]) -> None:
    errors = [float(_errors(_chain(chain(n)), sde).abs().max()) for n in sizes]
    rounding = 1e-11 * max(1.0, float(sde.alpha(sde.t_max).log().abs()))
    claim = "the discretization has an error to measure an order on (an exact one is checked without order)"
    at_most(claim, rounding, min(errors), sizes=list(sizes), errors=errors, sde=sde)
    slope = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    claim = f"the discretization is of order {order}, measured order {slope:.3f}"
    at_most(claim, abs(float(slope) - order), 0.15, sizes=list(sizes), errors=errors, sde=sde)


def _check_marginals(chain: Any, sde: Any, rtol: float) -> None:
    i = torch.arange(1, len(chain) + 1)
    t = chain.times
    bars = chain.log_alpha_bars
    where: dict[str, Any] = {"i": i, "t": t, "sde": sde}
    inside = bool(((t > sde.t_min) & (t <= sde.t_max)).all())
    holds("the chain's times lie in (t_min, t_max]", inside, times=t.tolist()[:5])
    errors = _errors(chain, sde).abs()
    bound = rtol * bars.abs().clamp_min(1)
    claim = f"the marginals are the process's at every node: log alpha_bar{_likely_cause(chain, sde, bound)}"
    at_most(claim, errors, bound, **where)


def _likely_cause(chain: Any, sde: Any, bound: Tensor) -> str:
    """Two mistakes that are easily made and easily told."""
    n = len(chain)
    nodes = torch.arange(1, n + 1, dtype=torch.float64) / n
    right = bool(((chain.log_alpha_bars - 2 * sde.alpha(nodes).log()).abs() <= 1e3 * bound).all())
    if right and not torch.equal(chain.times, nodes):
        return f" (right at t = i/N, but step 1 says t = {float(chain.times[0]):.6g}: a shifted label?)"
    f = sde.drift(torch.ones(n, 1, dtype=torch.float64), chain.times)[:, 0]
    if bool(((chain.betas * n + 2 * f).abs() <= 1e-9 * f.abs()).all()):
        return " (the table is beta(t_i)/N, Euler's rule: say order=1)"
    return ""


def _check_chain(chain: Any, rtol: float) -> None:
    """What holds within a chain, whatever the process."""
    n = len(chain)
    i = torch.arange(1, n + 1)
    bars, betas = chain.log_alpha_bars, chain.betas
    before = torch.cat([bars.new_zeros(1), bars[:-1]])
    size = bars.abs().clamp_min(1)
    where: dict[str, Any] = {"i": i, "chain": chain}
    at_most("betas lie in (0, 1]", torch.maximum(-betas, betas - 1), 0.0, **where)
    # beta as the chain states it, against its own products
    gap = (betas + torch.expm1(bars - before)).abs()
    at_most("alpha_bar is the product of 1 - beta", gap, rtol * betas + 8 * EPS * size, **where)

    one, zero = torch.ones(n, 1, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)
    noise, noise_before = -torch.expm1(bars), -torch.expm1(before)
    mean, variance = chain.marginal(one, i)
    gap = (mean[:, 0] - (0.5 * bars).exp()).abs() + (variance.flatten() - noise).abs()
    at_most("marginal is (alpha_bar^(1/2) x_0, 1 - alpha_bar)", gap, 16 * EPS * size, **where)

    # x_{i-1} | x_0 and x_i | x_{i-1}, precisions added.
    a = (0.5 * (bars - before)).exp()
    total = a**2 * noise_before + betas
    slack = rtol + 16 * EPS * size / noise
    on_data, variance = chain.posterior(zero, one, i)
    on_state, _ = chain.posterior(one, zero, i)
    for part, found, known in (
        ("factor of x_0", on_data, (0.5 * before).exp() * betas / total),
        ("factor of x_t", on_state, a * noise_before / total),
        ("variance", variance, betas * noise_before / total),
    ):
        claim = f"posterior is the conditional of the joint Gaussian: {part}"
        at_most(claim, (found.flatten() - known).abs(), slack * known.clamp_min(16 * EPS), **where)

    j = torch.div(i, 2, rounding_mode="floor")
    mean, variance = chain.transition(one, j, i)
    bars_0 = torch.cat([bars.new_zeros(1), bars])
    noise_j, scale = -torch.expm1(bars_0[j]), (0.5 * bars_0[j]).exp()
    gap = (mean[:, 0] * scale - (0.5 * bars).exp()).abs()
    gap = gap + (mean[:, 0] ** 2 * noise_j + variance.flatten() - noise).abs()
    at_most("transitions compose to the marginal", gap, 16 * EPS * size, j=j, **where)

    for kept in (list(range(n, 0, -3))[::-1], [1, n] if n > 1 else [1]):
        short, index = chain.respace(kept), torch.tensor(kept) - 1
        gap = (short.log_alpha_bars - bars[index]).abs()
        at_most("respacing keeps the marginals", gap, 16 * EPS * size[index], i=index + 1, chain=chain)
        gap = (short.times - chain.times[index]).abs()
        at_most("respacing keeps the times", gap, 0.0, i=index + 1, chain=chain)
