"""Many tables at once: on the same states, and their exact maps on Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..sde import LinearSDE
from ..tableau import Tableau


class Stack(NamedTuple):
    """T tables of at most K rows and H remembered outputs, side by side: `mix` (T, K, H), the others (T, K).
    Shorter ones end in rows that change nothing."""

    times: Tensor
    skip: Tensor
    out: Tensor
    keep: Tensor
    mix: Tensor
    noise: Tensor


def stack(tables: Sequence[Tableau]) -> Stack:
    """The tables as a `Stack`."""
    rows, width = max(map(len, tables)), max(table.mix.shape[1] for table in tables)

    def padded(values: Sequence[Tensor], fill: float) -> Tensor:
        made = torch.full((len(tables), rows), fill, dtype=torch.float64)
        for into, value in zip(made, values, strict=True):
            into[: len(value)] = value
        return made

    mix = torch.zeros(len(tables), rows, width, dtype=torch.float64)
    for into, table in zip(mix, tables, strict=True):
        into[: len(table), : table.mix.shape[1]] = table.mix
    times = padded([table.times[:-1] for table in tables], 0.0)
    for into, table in zip(times, tables, strict=True):
        into[len(table) :] = table.times[-2]  # a time at which the denoiser is known to be finite
    return Stack(
        times,
        padded([table.skip for table in tables], 0.0),
        padded([table.out for table in tables], 0.0),
        padded([table.keep for table in tables], 1.0),
        mix,
        padded([table.noise for table in tables], 0.0),
    )


def run_stack(
    tables: Stack,
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b d"],
    noise: Iterable[Tensor] = (),
) -> Float[Tensor, "t b d"]:
    """Where every table takes the states `x`, on their device. `denoise(x, t)` of states (T B, D) and times
    (T B,); row k adds the next of `noise`, (T, B, D) or, the same for all tables, (B, D)."""
    count, batch, noises = len(tables.times), len(x), iter(noise)
    used, noisy = tables.mix.any(0).tolist(), tables.noise.any(0).tolist()  # here, where nothing waits for it
    tables = Stack(*(values.to(x.device) for values in tables))
    state, history, missing = x.expand(count, *x.shape), [], x.new_full((), math.nan)
    for k in range(tables.keep.shape[1]):
        times = tables.times[:, k].repeat_interleave(batch)
        skip, out, keep, level = (v[:, k, None, None] for v in (*tables[1:4], tables.noise))
        denoised = denoise(state.reshape(count * batch, -1), times).view_as(state)
        history = [skip * state + out * denoised, *history[: tables.mix.shape[2] - 1]]
        state = keep * state
        for weight, output, any_uses in zip(tables.mix[:, k].T, history, used[k], strict=False):
            if any_uses:
                state.addcmul_(weight[:, None, None], output)
        z = next(noises, missing)
        if noisy[k]:
            state.addcmul_(level, z)
    return state


class Maps(NamedTuple):
    """On N(m, v) with its exact denoiser a table takes x to `slope x + constant m + spread z`, z normal; each
    (T, L) for L variances v."""

    slope: Tensor
    constant: Tensor
    spread: Tensor


def maps(tables: Stack, sde: LinearSDE, variances: Float[Tensor, " l"]) -> Maps:
    """The exact maps of all tables, from one pass backwards through the rows.

    With `m_k = a_k x + c_k m` the derivative g_k of the output by the state before row k obeys

        g_k = keep_k g_{k+1} + a_k s_k,   s_k = sum_j mix_{k+j,j} g_{k+j+1},   g_K = 1,

    and `slope = g_0`, `constant = sum_k c_k s_k`, `spread^2 = sum_k noise_k^2 g_{k+1}^2`.
    """
    alpha, sigma = (v[..., None] for v in (sde.alpha(tables.times), sde.sigma(tables.times)))
    gain = alpha * variances / (alpha**2 * variances + sigma**2)
    on_state = tables.skip[..., None] + tables.out[..., None] * gain
    on_mean = tables.out[..., None] * (1 - gain * alpha)
    rows, width = tables.mix.shape[1:]
    later = [torch.ones(len(tables.times), len(variances), dtype=torch.float64)]  # g_{k+1}, g_{k+2}, ...
    constant, variance = torch.zeros_like(later[0]), torch.zeros_like(later[0])
    for k in reversed(range(rows)):
        through = sum(
            (tables.mix[:, k + j, j, None] * g for j, g in enumerate(later)), torch.zeros_like(constant)
        )
        constant += on_mean[:, k] * through
        variance += (tables.noise[:, k, None] * later[0]) ** 2
        fresh = tables.keep[:, k, None] * later[0] + on_state[:, k] * through
        later = [fresh, *later[: width - 1]]
    return Maps(later[0], constant, variance.sqrt())
