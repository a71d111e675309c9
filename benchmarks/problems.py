"""The data laws that benchmarks are run on, each with an exact denoiser."""

from __future__ import annotations

import math

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


def subspace(dim: int = 3072, modes: int = 10, rank: int = 20, seed: int = 2) -> Mixture:
    """Image-sized data: modes spread in `rank` directions each, with small noise in all others."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.linalg.qr(_normal(generator, dim, 3 * rank)).Q
    means = 0.25 * math.sqrt(dim) / math.sqrt(3 * rank) * _normal(generator, modes, 3 * rank) @ shared.T
    factors = shared @ (
        0.1 * math.sqrt(dim) / math.sqrt(3 * rank) * _normal(generator, modes, 3 * rank, rank)
    )
    return Mixture(
        torch.full((modes,), 1 / modes, dtype=torch.float64),
        means,
        LowRank(torch.full((modes,), 0.02**2, dtype=torch.float64), factors),
    )


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
