"""The data laws that benchmarks are run on, each with an exact denoiser."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.laws import Gaussian, Law, LowRank, Mixture


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
