"""The data laws that benchmarks are run on, each with an exact denoiser."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.denoiser import BaseDenoiser
from scoresde.engines import shares
from scoresde.laws import Gaussian, Law, LowRank, Mixture
from scoresde.schedules import Time, wide
from scoresde.sde import LinearSDE


def gaussian(dim: int = 16, seed: int = 0) -> Gaussian:
    """A rotated Gaussian with standard deviations from 0.05 to 1."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(_normal(generator, dim, dim)).Q
    variances = torch.logspace(math.log10(0.05), 0, dim, dtype=torch.float64) ** 2
    return Gaussian(0.5 * _normal(generator, dim), basis * variances @ basis.T)


def ring(modes: int = 8, radius: float = 1.0, std: float = 0.1) -> Mixture:
    """Equal round modes on a circle in the plane."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(torch.full((modes,), 1 / modes, dtype=torch.float64), means, std**2)


def rotations(modes: int = 8) -> Tensor:
    """The rotations (modes, 2, 2) that leave `ring` as it is."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    return rows.view(modes, 2, 2)


def anisotropic(
    dim: int = 64, modes: int = 20, low: float = 0.03, high: float = 0.6, seed: int = 1
) -> Mixture:
    """Modes of unequal weight, each with its own rotated covariance of standard deviations from `low` to
    `high`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(modes, generator=generator, dtype=torch.float64) + 0.5
    spectrum = torch.logspace(math.log10(low), math.log10(high), dim, dtype=torch.float64) ** 2
    bases = torch.linalg.qr(_normal(generator, modes, dim, dim)).Q
    return Mixture(weights / weights.sum(), 0.5 * _normal(generator, modes, dim), bases * spectrum @ bases.mT)


class Directions(NamedTuple):
    """Modes spread in `rank` directions each: an orthonormal frame (D, R), and in it the means (K, R) and
    factors (K, R, rank)."""

    frame: Tensor
    means: Tensor
    factors: Tensor


def directions(dim: int = 3072, modes: int = 10, rank: int = 20, seed: int = 2) -> Directions:
    """What `subspace` is made of."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(_normal(generator, dim, 3 * rank)).Q
    size = math.sqrt(dim) / math.sqrt(3 * rank)
    means = 0.25 * size * _normal(generator, modes, 3 * rank)
    return Directions(frame, means, 0.1 * size * _normal(generator, modes, 3 * rank, rank))


OUTSIDE = 0.02  # standard deviation in all directions that no mode is spread in


def subspace() -> Mixture:
    """Image-sized data: modes spread in a few directions each, with small noise in all others."""
    frame, means, factors = directions()
    noise = torch.full((len(means),), OUTSIDE**2, dtype=torch.float64)
    return Mixture(_equal(len(means)), means @ frame.T, LowRank(noise, frame @ factors))


def inside() -> Mixture:
    """The law of `subspace` in the coordinates of its frame and one direction outside."""
    _, means, factors = directions()
    rank = means.shape[1]
    covs = OUTSIDE**2 * torch.eye(rank + 1, dtype=torch.float64).repeat(len(means), 1, 1)
    covs[:, :rank, :rank] += factors @ factors.mT
    return Mixture(_equal(len(means)), torch.nn.functional.pad(means, (0, 1)), covs)


class Inside(BaseDenoiser):
    """The denoiser of `inside` at one time for all samples, in a third of the time that its law takes: x is
    multiplied with the directions U_k of all modes side by side, and so is what comes back. With
    S_k = v I + U_k L_k U_k^T, F = alpha^2 v + sigma^2, G_k = alpha^2 L_k + F and d_k = x - alpha m_k it is

        sum_k r_k (m_k + alpha v / F d_k + U_k (alpha L_k sigma^2 / (F G_k)) U_k^T d_k).

    What cancels in the logits costs 1e-10 of them here."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.sde = sde
        _, means, factors = directions()
        U, sizes, _ = torch.linalg.svd(torch.nn.functional.pad(factors, (0, 0, 0, 1)), full_matrices=False)
        self.means = torch.nn.functional.pad(means, (0, 1))
        self.L = sizes.square().flatten()  # (K r,)
        self.U = U.transpose(0, 1).flatten(1)  # (R + 1, K r)
        self.inside = (self.means[:, None] @ U).flatten()  # U_k^T m_k
        self.sums = torch.eye(len(means), dtype=U.dtype).repeat_interleave(sizes.shape[1], 0)

    def forward(self, x: Tensor, t: Time) -> Tensor:
        alpha, var = self.sde.alpha(wide(t)), self.sde.sigma(wide(t)) ** 2
        F = alpha**2 * OUTSIDE**2 + var
        G = alpha**2 * self.L + F
        z = x @ self.U - alpha * self.inside
        # (|d_k|^2 - |x|^2) / F - |z|^2 (1 / F - 1 / G)
        logits = x @ (alpha / F * self.means.mT) - alpha**2 / (2 * F) * self.means.square().sum(1)
        logits += z.square() @ (0.5 * (1 / F - 1 / G)[:, None] * self.sums) - 0.5 * G.log() @ self.sums
        r = shares(logits)
        z *= r @ self.sums.mT
        gain = alpha * self.L * var / (F * G)
        return alpha * OUTSIDE**2 / F * x + r @ (var / F * self.means) + z @ (gain[:, None] * self.U.mT)


def to_inside(x: Tensor) -> Tensor:
    """x (B, D) turned about the frame so that what lies outside lies in one direction: (B, R + 1). It keeps
    lengths, and commutes with every sampler that treats all coordinates alike."""
    frame = directions().frame
    coordinates = x @ frame
    rest = (x - coordinates @ frame.T).norm(dim=1, keepdim=True)
    return torch.cat([coordinates, rest], 1)


def _equal(modes: int) -> Tensor:
    return torch.full((modes,), 1 / modes, dtype=torch.float64)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


PROBLEMS: dict[str, Law] = {}


def problem(name: str) -> Law:
    """ "gaussian" | "ring" | "anisotropic" | "subspace", made once."""
    if name not in PROBLEMS:
        PROBLEMS[name] = {
            "gaussian": gaussian,
            "ring": ring,
            "anisotropic": anisotropic,
            "subspace": subspace,
        }[name]()
    return PROBLEMS[name]
