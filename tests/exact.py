"""Exact output laws of any sampler that is affine on Gaussian data: run it on unit vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.laws import Gaussian

F64 = torch.float64


def affine_law(solver, model, grid, start: Gaussian, rows: int = 0) -> Gaussian:
    """The law of what `solver` makes of draws of `start`, when the model is affine in x.

    Sample 0 starts at 0, the next D at the unit vectors, and one for each of the D numbers of each of `rows`
    rows of noise has that number equal to 1 and nothing else.
    """
    event, D = start.event_shape, start.dim
    x = torch.zeros(1 + D * (1 + rows), D, dtype=F64)
    x[1 : 1 + D] = torch.eye(D, dtype=F64)

    def noise(k: int, shape: Sequence[int]) -> Tensor:
        z = torch.zeros(len(x), D, dtype=F64)
        z[1 + D * (k + 1) : 1 + D * (k + 2)] = torch.eye(D, dtype=F64)
        return z.view(tuple(shape))

    out = solver.solve(model, x.view(-1, *event), grid, noise=noise if rows else None).x.flatten(1)
    constant, response = out[0], (out[1:] - out[0]).mT
    through, driven = response[:, :D], response[:, D:]
    mean = constant + through @ start.mean.flatten()
    return Gaussian(mean.view(event), symmetric(through @ start.cov @ through.mT + driven @ driven.mT))


def symmetric(cov: Tensor) -> Tensor:
    return (cov + cov.mT) / 2


def distance(found: Gaussian, expected: Gaussian) -> float:
    """The largest difference of means and covariances."""
    gaps = [(found.mean - expected.mean).flatten(), (found.cov - expected.cov).flatten()]
    return float(torch.cat(gaps).abs().max())
