"""Distances between sets of samples."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Largest block of a distance matrix that is held at a time, in elements.
_BLOCK = 2**22


def energy_distance(x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."]) -> float:
    """Unbiased estimate of the energy distance `2 E|X - Y| - E|X - X'| - E|Y - Y'|` of two laws.

    Pairs of a sample with itself are left out (a U-statistic): the expectation is exactly 0 for two sets from
    one law, and a value may be negative. |.| is Euclidean over everything after the first axis, in float64.

    Raises ValueError for fewer than two samples, other shapes, or values that are not finite. Szekely, Rizzo
    2013 (doi 10.1016/j.jspi.2013.03.018); the U-statistic as in Gretton et al. 2012 (JMLR 13:723), lemma 6.
    """
    a, b = _flat(x, y)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least two samples on both sides, found {len(a)} and {len(b)}")
    across = _total(a, b) / (len(a) * len(b))
    within = sum(_total(z, z) / (len(z) * (len(z) - 1)) for z in (a, b))
    return float(2 * across - within)


def nearest_distance(x: Float[Tensor, "n ..."], reference: Float[Tensor, "m ..."]) -> Float[Tensor, " n"]:
    """`min_j |x_i - reference_j|`, Euclidean over everything after the first axis; float64.

    Raises ValueError for an empty reference, other shapes, or values that are not finite.
    """
    a, b = _flat(x, reference)
    if not len(b):
        raise ValueError("expected at least one sample in reference, found none")
    blocks = [_distances(part, b).amin(1) for part in _parts(a, b)]
    return torch.cat(blocks) if blocks else a.new_empty(0)


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim < 1 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"expected samples of one shape after the first axis, found {tuple(x.shape)} and {tuple(y.shape)}"
        )
    a, b = (z.detach().double().flatten(1) if z.ndim > 1 else z.detach().double()[:, None] for z in (x, y))
    if not bool(a.isfinite().all() & b.isfinite().all()):
        raise ValueError("expected finite samples, found NaN or infinity")
    return a, b


def _parts(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a.split(max(1, _BLOCK // max(1, len(b)))) if len(a) else ()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not by |a|^2 + |b|^2 - 2 a.b, which loses small distances.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _total(a: Tensor, b: Tensor) -> Tensor:
    """Sum of all distances."""
    return torch.stack([_distances(part, b).sum() for part in _parts(a, b)]).sum()
