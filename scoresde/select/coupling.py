"""How far the laws of stochastic tables' outputs are from the data's, on a law whose denoiser is known.

Samples by themselves tell it badly: n of them and n true ones are about n^(-1/2) apart by chance. Here
chance does the same to both. A fine table starts from samples of the law of x_T itself, all others from the
normals in these, and one Brownian motion drives them, on the clock c = exp(2 int tau^2 dlam) of a solver of
noise level tau. So the outputs differ by the strong error only, and their distance is the less noisy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from .. import grids, solvers
from ..laws import Law
from ..sde import LinearSDE
from ..solvers.exponential import er_noise_level
from ..tableau import Tableau
from .tables import run_stack, stack

LEVELS = (0.1**0.5, 0.5**0.5, 1.0, er_noise_level)  # tau of the fine tables
FINE, FINER = 100, 2  # their rows: at least so many, and so many times those of the others
GROUPS = 8  # of samples
DIRECTIONS = 64  # that distributions are compared along
# Numbers that are held at a time, about: on a CPU what fits its cache, elsewhere what outlasts a launch.
NUMBERS, MANY = 2**21, 2**26
ENDLESS = 40.0  # |lam| where there is no signal, or no noise
FORGOTTEN = 3.0  # what a row adds to log c when next to nothing of the noise before it is kept


class Distances(NamedTuple):
    """Squared sliced 2-Wasserstein distances per coordinate (T,), free of what chance adds, which may make
    them negative, and their standard errors, given the directions. Quantiles of groups differ less than those
    of laws: on Gaussians groups of 8, 50 and 400 samples give some 25, 5 and 1 % too little."""

    squares: Tensor
    errors: Tensor


def law_distances(
    sde: LinearSDE, law: Law, tables: Sequence[Tableau], n: int, generator: torch.Generator
) -> Distances:
    """Between the outputs of the tables from the prior, n samples of each, and the law at their last time,
    which is the same for all. Computed where the law and the generator are.

    Raises ValueError if these are on different devices."""
    if generator.device not in (law.device, torch.device(law.device.type)):
        raise ValueError(
            f"expected a law and a generator on one device, found {law.device} and {generator.device}"
        )
    exact, each = law.denoiser(sde), max(2, n // GROUPS)
    normals_of = partial(torch.randn, generator=generator, dtype=torch.float64, device=law.device)
    directions = normals_of(law.dim, DIRECTIONS)
    directions = directions / directions.norm(dim=0)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return exact(x.view(len(x), *law.event_shape), t).reshape(x.shape)

    def quantiles(x: Tensor) -> Tensor:
        return (x @ directions).sort(-2).values

    fine = fine_tables(sde, max(FINE, FINER * max(map(len, tables))), float(tables[0].times[-1]))
    held = NUMBERS if law.device.type == "cpu" else MANY
    size = max(1, held // (each * law.dim * (1 + min(len(law.means), 32))))
    parts = [tables[i : i + size] for i in range(0, len(tables), size)]
    clocks = [clocks_of(sde, fine, part) for part in parts]

    def apart() -> Tensor:
        """(T, n, R) the differences of quantiles, of one group."""
        normals = normals_of(each, law.dim)
        data = law.sample(each, generator=generator).reshape(each, -1)
        start = sde.alpha(sde.t_max) * data + sde.sigma(sde.t_max) * normals
        drawn = normals_of(len(fine.lam) - 1, *start.shape)
        wanted = quantiles(run_stack(stack(fine.tables), denoise, start, drawn))
        motion, found = fine.motion(drawn), []
        for part, clock in zip(parts, clocks, strict=True):
            noise = increments(fine, motion, clock, generator)
            x = run_stack(stack(part), denoise, sde.prior_std * normals, noise)
            found.append((quantiles(x) - wanted[clock.level.to(x.device)]).float())
        return torch.cat(found)

    return between_groups(torch.stack([apart() for _ in range(GROUPS)]))


class Fine(NamedTuple):
    """L tables on one grid, half the log-SNR of its F + 1 nodes, and the logarithms of their clocks
    (L, F + 1)."""

    tables: list[Tableau]
    lam: Tensor
    log_clock: Tensor

    def logs(self, lam: Tensor) -> Tensor:
        """(L, ...) the logarithms of the clocks at any half log-SNR."""
        j = torch.searchsorted(self.lam, lam).clamp(1, len(self.lam) - 1)
        share = ((lam - self.lam[j - 1]) / (self.lam[j] - self.lam[j - 1])).clamp(0, 1)
        return self.log_clock[:, j - 1].lerp(self.log_clock[:, j], share)

    def motion(self, normals: Float[Tensor, "f n d"]) -> Float[Tensor, "g l n d"]:
        """W at the nodes, from the normals of the rows, on their device."""
        roots = self.log_clock.exp().diff().sqrt().T.to(normals.device)
        W = normals.new_zeros(1 + len(normals), roots.shape[1], *normals.shape[1:])
        torch.mul(roots[:, :, None, None], normals[:, None], out=W[1:])
        return W.cumsum_(0)


def fine_tables(sde: LinearSDE, rows: int, end: float) -> Fine:
    """One for each of `LEVELS`."""
    grid = grids.power(sde, rows, end, exponent=3)
    tables = [
        solvers.exponential(2, corrector=3, stored="flow", variable="sigma", tau=tau).tableau(sde, grid)
        for tau in LEVELS
    ]
    rises = torch.stack([_rises(sde, table.times, table.noise) for table in tables])
    return Fine(tables, _lam(sde, grid.t), pad(rises.cumsum(1), (1, 0)))


def _lam(sde: LinearSDE, times: Tensor) -> Tensor:
    """Half the log-SNR, finite where there is no signal or no noise."""
    return (sde.log_snr(times) / 2).clamp(-ENDLESS, ENDLESS)


def _rises(sde: LinearSDE, times: Tensor, noise: Tensor) -> Tensor:
    """log c_t - log c_s of every row: what keeps the marginals adds noise of variance
    `sigma_t^2 (1 - c_s/c_t)`."""
    share = torch.where(noise > 0, noise / sde.sigma(times[..., 1:]), 0.0).square()
    return -torch.log1p(-share.clamp(max=1 - 1e-9))


class Clocks(NamedTuple):
    """For T tables: which fine table has the nearest noise level (T,), and its clock at their nodes
    (T, K + 1)."""

    level: Tensor
    values: Tensor


def clocks_of(sde: LinearSDE, fine: Fine, tables: Sequence[Tableau]) -> Clocks:
    """Of tables of at most K rows; shorter ones stay at their last node."""
    short = [max(map(len, tables)) - len(table) for table in tables]
    times = torch.stack(
        [pad(t.times, (0, k), value=float(t.times[-1])) for t, k in zip(tables, short, strict=True)]
    )
    noise = torch.stack([pad(t.noise, (0, k)) for t, k in zip(tables, short, strict=True)])
    logs = fine.logs(_lam(sde, times))
    off = logs.diff().clamp(max=FORGOTTEN) - _rises(sde, times, noise).clamp(max=FORGOTTEN)
    level = off.abs().sum(-1).argmin(0)
    return Clocks(level, logs[level, torch.arange(len(level))].exp())


class Bridges(NamedTuple):
    """What K rows of T tables need of W (K, T): the node of the fine tables before the row's end, whether the
    row starts after it, how far between the nodes it ends and what W spreads there, whether it goes on from
    all before it, and the root of the time it takes."""

    before: Tensor
    inside: Tensor
    share: Tensor
    spread: Tensor
    goes_on: Tensor
    root: Tensor


def bridges_of(fine: Fine, clocks: Clocks) -> Bridges:
    """On the host: so many small numbers are no work for another device."""
    nodes, now, rows = fine.log_clock.exp()[clocks.level], clocks.values[:, 0], []
    for then in clocks.values.T[1:].contiguous():
        j = torch.searchsorted(nodes, then[:, None])[:, 0].clamp(1, nodes.shape[1] - 1)
        before, after = (nodes.gather(1, i[:, None])[:, 0] for i in (j - 1, j))
        left = torch.maximum(now, before)
        share = ((then - left) / (after - left)).clamp(0, 1)
        spread = (share * (after - then).clamp_min(0)).sqrt()
        goes_on = then > now * (1 + 1e-12)
        root = torch.where(goes_on, then - now, 1.0).sqrt()
        rows.append(Bridges(j - 1, now > before, share, spread, goes_on, root))
        now = torch.where(goes_on, then, now)
    return Bridges(*map(torch.stack, zip(*rows, strict=True)))


def increments(
    fine: Fine, motion: Float[Tensor, "g l n d"], clocks: Clocks, generator: torch.Generator
) -> Iterator[Float[Tensor, "t n d"]]:
    """Standard normals for every row, on the device of the motion: what W does over it, over the root of the
    time that takes. For a row that does not go on from all before it, new ones.

    Between the nodes of the fine tables W is a bridge from where the last row left it."""
    level, *bridges = (v.to(motion.device) for v in (clocks.level, *bridges_of(fine, clocks)))
    W = motion[0, level]
    for before, *row in zip(*bridges, strict=True):
        inside, share, spread, goes_on, root = (values[:, None, None] for values in row)
        z = torch.randn(W.shape[1:], generator=generator, dtype=W.dtype, device=W.device)
        known = torch.where(inside, W, motion[before, level])
        met = known.lerp(motion[1:][before, level], share) + spread * z
        yield torch.where(goes_on, (met - W) / root, z)
        W = torch.where(goes_on, met, W)


def between_groups(apart: Float[Tensor, "g t n r"]) -> Distances:
    """The mean product of the differences of two groups, which are independent; and the jackknife's standard
    error over groups."""
    g, flat = len(apart), apart.flatten(2).transpose(0, 1)
    products = (flat @ flat.mT).double() / flat.shape[2]
    products = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    total, of_group = products.sum((1, 2)), products.sum(2)
    squares = total / (g * (g - 1))
    without = (total[:, None] - 2 * of_group) / ((g - 1) * (g - 2))
    return Distances(squares, ((g - 1) / g * (without - squares[:, None]).square().sum(1)).sqrt())
