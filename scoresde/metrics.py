"""Distances between sets of samples, and between a set and itself: the noise floor.

A metric here is a function `(x (n, ...), y (m, ...)) -> float` in float64, that tends to 0 for equal laws as
n and m grow. With finitely many samples it is not 0: `floor` measures what true samples reach.
`energy_distance` and `mmd` are unbiased (0 in expectation, and so sometimes negative); the others are biased
upwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from .laws import Law

Metric = Callable[[Tensor, Tensor], float]

# Largest block of a distance matrix that is held at a time, in elements.
_BLOCK = 2**22
ENOUGH = 4096  # samples whose distances tell the median


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


def sliced_wasserstein(
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "m ..."],
    *,
    p: float = 2.0,
    directions: int = 128,
    seed: int = 0,
) -> float:
    """`(mean over unit directions u of W_p(u.X, u.Y)^p)^(1/p)`, each W_p of the two empirical laws exact.

    In one dimension `W_p^p = int_0^1 |F^-1(q) - G^-1(q)|^p dq`: sorted values against sorted values, also of
    sets of different sizes. The directions are uniform on the sphere and depend on `seed` only; samples of
    one number have one direction, and the distance is W_p itself.

    Raises ValueError for no samples, other shapes, values that are not finite, p < 1 or too large for float64
    to hold the distances to this power, or no directions.
    Rabin, Peyre, Delon, Bernot 2011 (doi 10.1007/978-3-642-24785-9_37); Bonneel et al. 2015.
    """
    a, b = _filled(x, y)
    _check_power(p)
    if directions < 1:
        raise ValueError(f"expected at least one direction, found {directions}")
    if a.shape[1] == 1:
        u = a.new_ones(1, 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64).to(a.device)
        u = u / u.norm(dim=0)
    rows, columns, widths = _quantiles(len(a), len(b), a.device)
    gaps = (a @ u).sort(0).values[rows] - (b @ u).sort(0).values[columns]
    return float((widths @ _costs(gaps.abs(), p)).mean() ** (1 / p))


def _quantiles(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the quantile functions of n and m sorted values are constant together: the index of the one, of
    the other, and the width of each piece of [0, 1]. In whole numbers, so that nothing is lost."""
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique().to(device)
    before = torch.cat([steps.new_zeros(1), steps[:-1]])
    return before // m, before // n, (steps - before).double() / (n * m)


def wasserstein(x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], *, p: float = 2.0) -> float:
    """`W_p = (min over permutations s of mean_i |x_i - y_s(i)|^p)^(1/p)`, exact, for sets of one size.

    |.| is Euclidean over everything after the first axis. The best assignment by scipy (Crouse 2016), in
    O(n^3): 1000 samples take about 0.1 s, 4000 some seconds. In D dimensions two sets from one law are
    about n^(-1/D) apart: compare with `floor`.

    Raises ValueError for sets of different sizes, no samples, other shapes, values that are not finite, or
    p < 1 or too large for float64 to hold the distances to this power.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = _filled(x, y)
    _check_power(p)
    if len(a) != len(b):
        raise ValueError(
            f"expected as many samples on both sides, found {len(a)} and {len(b)}; take a part of the larger "
            "set, or sliced_wasserstein"
        )
    cost = _costs(torch.cat([_distances(part, b) for part in _parts(a, b)]), p)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return float(cost[torch.as_tensor(rows), torch.as_tensor(columns)].mean() ** (1 / p))


def mmd(x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."], *, bandwidth: float | None = None) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy `E k(X, X') + E k(Y, Y') - 2 E k(X, Y)` for
    `k(a, b) = exp(-|a - b|^2/(2 bandwidth^2))`; it may be negative.

    bandwidth: by default the median of all distances between different samples of both sets together, so
    values of different pairs of sets have different units; give it to compare several sets with one.

    Raises ValueError for fewer than two samples, other shapes, values that are not finite, or a bandwidth
    that is not positive (the median is 0 if most samples are copies of one).
    Gretton et al. 2012 (JMLR 13:723), lemma 6 and section 8 (the median heuristic).
    """
    a, b = _flat(x, y)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least two samples on both sides, found {len(a)} and {len(b)}")
    scale = median_distance(torch.cat([a, b])) if bandwidth is None else float(bandwidth)
    if not 0 < scale < math.inf:
        raise ValueError(f"expected a bandwidth > 0 and finite, found {scale}; give another one")

    def total(u: Tensor, v: Tensor) -> float:
        blocks = (_distances(part, v).div_(scale).square_().mul_(-0.5).exp_() for part in _parts(u, v))
        return float(sum(block.sum() for block in blocks))

    within = sum((total(z, z) - len(z)) / (len(z) * (len(z) - 1)) for z in (a, b))
    return within - 2 * total(a, b) / (len(a) * len(b))


def drawn(x: Float[Tensor, "n ..."], most: int) -> Float[Tensor, "m ..."]:
    """At most so many of them, always the same: neither the first nor one in so many, for lists are often
    sorted, or go through their classes in turn."""
    if len(x) <= most:
        return x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:most].to(x.device)]


def median_distance(x: Float[Tensor, "n ..."]) -> float:
    """The median of |x_i - x_j| over i < j: the usual bandwidth of `mmd`. Of more than 4096 samples, that of
    4096 drawn from them, always the same."""
    a, _ = _flat(x, x)
    if len(a) < 2:
        return 0.0
    distances = torch.pdist(drawn(a, ENOUGH))
    # of an even number the mean of the two in the middle; torch.median takes the lower one
    middle = {(len(distances) + 1) // 2, len(distances) // 2 + 1}
    return sum(float(distances.kthvalue(k).values) for k in middle) / len(middle)


def frechet(
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "m ..."],
    features: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """The squared Frechet distance `|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))` between the Gaussians with the
    means and covariances (over n - 1) of features of the samples: W_2^2 of these Gaussians.

    features: (n, ...) -> (n, d); the samples themselves, flattened, if None. With the 2048 features of the
    Inception network it is the FID of Heusel et al. 2017 (arXiv:1706.08500, eq. 6); a network of your own
    field says more. The trace of the root is the sum of the singular values of `R'^T R` for roots S = R R^T,
    so no matrix is squared, and nothing is lost where the covariances are singular (n <= d).

    Biased upwards by finite samples, the more the larger d is: compare with `floor`. Raises ValueError for
    fewer than two samples, features of other shapes, or values that are not finite.
    """
    if features is not None:
        with torch.no_grad():
            x, y = features(x), features(y)
        if x.ndim != 2 or y.ndim != 2:
            raise ValueError(
                f"expected features of shape (n, d), found {tuple(x.shape)} and {tuple(y.shape)}"
            )
    a, b = _flat(x, y)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least two samples on both sides, found {len(a)} and {len(b)}")
    shift = (a.mean(0) - b.mean(0)).square().sum()
    one, other = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (a, b))  # z^T z is the covariance
    root = torch.linalg.svdvals(_triangle(one) @ _triangle(other).mT).sum()
    return float((shift + one.square().sum() + other.square().sum() - 2 * root).clamp_min(0))  # rounding


def _triangle(z: Tensor) -> Tensor:
    """R with R^T R = z^T z, of at most D rows."""
    return torch.linalg.qr(z, mode="r").R


class Coverage(NamedTuple):
    """How samples are spread over the modes of a mixture.

    covered    share of the modes that got at least one sample, of those with a weight > 0
    distance   total variation `sum_k |found_k - weight_k|/2` between the shares found and the weights
    shares     (K,) found: the mean posterior probability of each mode
    """

    covered: float
    distance: float
    shares: Tensor


def mode_coverage(x: Float[Tensor, "n ..."], mixture: Law) -> Coverage:
    """Which modes of a mixture the samples fall into, by their posterior probabilities
    `r_k(x) = w_k N(x; m_k, S_k)/p(x)`; a sample is counted for its most probable mode in `covered`.

    Samples of a process that ends at t > 0 belong to `mixture.marginal(sde, t)`. Raises ValueError for no
    samples, samples that do not fit the law, or values that are not finite.
    """
    if not len(x):
        raise ValueError("expected at least one sample, found none")
    _flat(x, x)  # says what is not finite
    r = mixture.responsibilities(x)
    shares, weights = r.mean(0), mixture.weights
    hit = torch.bincount(r.argmax(1), minlength=len(weights)) > 0
    possible = weights > 0
    covered = float((hit & possible).sum() / possible.sum())
    return Coverage(covered, float((shares - weights).abs().sum() / 2), shares)


class Floor(NamedTuple):
    """What a metric gives for true samples: mean and standard deviation over random splits."""

    mean: float
    std: float


def floor(
    metric: Metric,
    data: Float[Tensor, "m ..."],
    n: int,
    splits: int = 20,
    *,
    against: int | None = None,
    seed: int = 0,
) -> Floor:
    """The noise floor of `metric` for n samples: its values for n random ones of `data` against others of
    `data`, over some splits.

    against: how many others; by default all that are left. `wasserstein` takes sets of one size: against=n.
    A sampler whose distance is within two standard deviations of the mean cannot be told from the data by so
    few samples. Splits share their data, so the deviation is a little too small.

    Raises ValueError unless both sides have at least 2 samples, m together at most, or for fewer than two
    splits.
    """
    others = len(data) - n if against is None else against
    if n < 2 or others < 2 or n + others > len(data):
        raise ValueError(
            f"expected at least 2 samples on both sides, together at most the {len(data)} in data, found {n} "
            f"and {others}"
        )
    if splits < 2:
        raise ValueError(f"expected at least 2 splits, found {splits}")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(data), generator=generator).to(data.device) for _ in range(splits)]
    found = [metric(data[order[:n]], data[order[n : n + others]]) for order in orders]
    values = torch.tensor(found, dtype=torch.float64)
    return Floor(float(values.mean()), float(values.std()))


def _check_power(p: float) -> None:
    if not 1 <= p < math.inf:
        raise ValueError(f"expected a power p >= 1 and finite, found {p}")


def _costs(distances: Tensor, p: float) -> Tensor:
    """distances^p. Raises ValueError where float64 cannot hold the largest, or holds it for 0."""
    largest = distances.max()
    if largest > 0 and not 0 < float(largest**p) < math.inf:
        raise ValueError(
            f"expected a power p for which float64 holds |x - y|^p, found p = {p} and a largest distance of "
            f"{float(largest):.4g}; take a smaller p, or divide the samples by that distance"
        )
    return distances**p


def _filled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _flat(x, y)
    if not (len(a) and len(b)):
        raise ValueError(f"expected at least one sample on both sides, found {len(a)} and {len(b)}")
    return a, b


def _flat(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if min(x.ndim, y.ndim) < 1 or x.shape[1:] != y.shape[1:]:
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
