"""Laws that stand for the user's data: fitted to a batch, small enough to try hundreds of solvers on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..laws import Gaussian, Law, Mixture
from ..metrics import drawn

INSIDE = 64  # coordinates that are modelled one by one
SAMPLES = 4096  # that a fit looks at
COMPONENTS = (1, 2, 4, 8, 16, 32)
ROUNDS = 25
KERNELS = 1024


class Surrogate(NamedTuple):
    """A law on R coordinates, and `others` more of variance `rest` each and mean 0.

    Samplers that treat all coordinates alike do not see a rotation, so R principal coordinates of a batch
    with the mean's direction, and the average variance of all others, do for data of any dimension
    (probabilistic PCA: Tipping and Bishop 1999, doi 10.1111/1467-9868.00196)."""

    law: Law
    rest: float = 0.0
    others: int = 0

    @property
    def dim(self) -> int:
        """Of the data."""
        return self.law.dim + self.others


class _Inside(NamedTuple):
    """A batch (n, R) in its principal coordinates, and what is outside."""

    points: Tensor
    rest: float
    others: int


def gaussian_surrogate(data: Tensor) -> Surrogate:
    """The Gaussian of a batch's mean and (shrunk) covariance.

    All errors on it are exact and take milliseconds, but a Gaussian has no modes to choose between: it ranks
    solvers and grids for mixtures poorly (`benchmarks.recommend`)."""
    points, rest, others = _inside(checked_batch(data))
    cov = _covariances(points, points.new_ones(len(points), 1))[0]
    return Surrogate(Gaussian(points.mean(0), cov), rest, others)


def mixture_surrogate(data: Tensor, *, components: int | None = None, seed: int = 0) -> Surrogate:
    """A Gaussian mixture fitted to a batch by expectation maximisation.

    components  of the mixture; by default of 1, 2, 4, ... 32 what a fit to three quarters of the batch gives
                the last quarter the highest density
    seed        of the starts

    Covariances are full, each shrunk towards a multiple of the identity by the oracle-approximating weight
    (Chen et al. 2010, arXiv:0907.4698, eq. 23), which keeps components of few samples regular.
    Raises ValueError for batches that are too small, constant, or not finite."""
    points, rest, others = _inside(checked_batch(data))
    if components is None:
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
        train, held = points[order[len(points) // 4 :]], points[order[: len(points) // 4]]
        components = _most_likely(train, held, seed)
    elif type(components) is not int or not 1 <= components <= len(points):
        raise ValueError(f"expected a number of components in 1..{len(points)}, found {components!r}")
    return Surrogate(_fit(points, components, seed).law(), rest, others)


def kernel_surrogate(data: Tensor, *, width: float = 0.15) -> Surrogate:
    """The samples themselves, at most 1024 of them, each spread by `width` standard deviations of the data.

    What a network resembles that has learnt few samples by heart more than their law. It is sharper than a
    fitted mixture, and solvers of high order do worse on it: the safer choice for small sets of data.
    Raises ValueError for a width that is not positive."""
    if not 0 < width < math.inf:
        raise ValueError(f"expected a width > 0, found {width}")
    points, rest, others = _inside(checked_batch(data))
    kept = drawn(points, KERNELS)
    spread = width**2 * float(points.var(0).mean())
    return Surrogate(Mixture([1 / len(kept)] * len(kept), kept, spread), rest, others)


def checked_batch(data: Any) -> Tensor:
    """(n, D) float64 of a batch (n, ...)."""
    if not isinstance(data, Tensor) or not data.is_floating_point():
        raise TypeError(
            "expected a batch of data as a floating tensor (n, ...), a law, or (mean, variances), "
            f"found {getattr(data, 'dtype', data)!r}"
        )
    if data.ndim < 2 or len(data) < 8 or data.numel() == 0:
        raise ValueError(
            f"expected a batch of data (n, ...) with at least 8 samples, found shape {tuple(data.shape)}"
        )
    if not bool(data.isfinite().all()):
        raise ValueError("expected finite data, found NaN or infinity")
    points = drawn(data.detach(), SAMPLES).double().cpu().flatten(1)
    if not bool((points != points[0]).any()):
        raise ValueError("expected data that differ, found copies of one sample")
    return points


def _inside(points: Tensor) -> _Inside:
    """The batch itself up to `INSIDE` dimensions, else its principal coordinates."""
    n, D = points.shape
    if D <= INSIDE:
        return _Inside(points, 0.0, 0)
    mean = points.mean(0)
    centred = points - mean
    rank = min(INSIDE - 1, n - 1)
    frame = _principal(centred, rank)
    frame = torch.cat([frame, mean[None] - (frame @ mean) @ frame])  # so that the mean lies inside
    frame = torch.linalg.qr(frame.T).Q
    inside = points @ frame
    captured = (inside - inside.mean(0)).square().sum()
    others = D - frame.shape[1]
    rest = (centred.square().sum() - captured).clamp_min(0) / (max(n - 1, 1) * others)
    return _Inside(inside, float(rest), others)


def _principal(centred: Tensor, rank: int) -> Tensor:
    """(rank, D) orthonormal directions of the largest variances, by the smaller matrix of inner products.
    What squaring loses is less than 1e-15 of the variance, and it takes a third of the time of an SVD.
    """
    n, D = centred.shape
    if n >= D:
        return torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -rank:].T
    return torch.linalg.qr(centred.T @ torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -rank:]).Q.T


class _Parameters(NamedTuple):
    """Of a mixture: weights (K,), means (K, D), covariances (K, D, D)."""

    weights: Tensor
    means: Tensor
    covs: Tensor

    def law(self) -> Mixture:
        return Mixture(self.weights, self.means, self.covs)


def _most_likely(train: Tensor, held: Tensor, seed: int) -> int:
    """The number of components whose fit to `train` gives `held` the highest density; more are not tried once
    they have made it worse."""
    best, highest = 1, -math.inf
    for count in COMPONENTS:
        if count * 4 > len(train):
            break
        density = float(_log_joint(_fit(train, count, seed), held).logsumexp(1).mean())
        if density <= highest:
            break
        best, highest = count, density
    return best


def _fit(points: Tensor, components: int, seed: int) -> _Parameters:
    """Expectation maximisation; components without samples are dropped."""
    shares = _nearest(points, components, seed)
    for _ in range(ROUNDS):
        shares = _log_joint(_maximised(points, shares), points).softmax(1)
    return _maximised(points, shares)


def _maximised(points: Tensor, shares: Tensor) -> _Parameters:
    """The mixture in which the points belong to the components by `shares` (n, K)."""
    shares = shares[:, shares.sum(0) >= 1]
    counts = shares.sum(0)
    return _Parameters(
        counts / counts.sum(), shares.T @ points / counts[:, None], _covariances(points, shares)
    )


def _covariances(points: Tensor, shares: Tensor) -> Tensor:
    """(K, D, D) weighted covariances S, shrunk to `(1 - rho) S + rho tr(S)/D I`, rho of Chen et al. 2010,
    arXiv:0907.4698, eq. 23, with the components' numbers of samples."""
    counts, D = shares.sum(0), points.shape[1]
    made = []
    for share, count in zip(shares.T, counts, strict=True):
        centred = (points - share @ points / count) * share.sqrt()[:, None]
        made.append(centred.T @ centred / count)
    S = torch.stack(made)
    trace, squares = S.diagonal(dim1=1, dim2=2).sum(1), S.square().sum((1, 2))
    excess = (counts + 1 - 2 / D) * (squares - trace**2 / D)
    rho = ((1 - 2 / D) * squares + trace**2) / excess.clamp_min(torch.finfo(S.dtype).tiny)
    rho = rho.clamp(0, 1)[:, None, None]
    # A little of all the data's variance: a component of equal samples has none of its own.
    least = 1e-6 * points.var(0).mean()
    eye = torch.eye(D, dtype=S.dtype)
    return (1 - rho) * S + (rho * trace[:, None, None] / D + least) * eye


def _log_joint(mixture: _Parameters, points: Tensor) -> Tensor:
    """(n, K) log of weight times density, without the constant."""
    root = torch.linalg.cholesky(mixture.covs)
    offsets = (points - mixture.means[:, None]).mT  # (K, D, n)
    white = torch.linalg.solve_triangular(root, offsets, upper=False)
    log_det = root.diagonal(dim1=1, dim2=2).log().sum(1)
    return (mixture.weights.log() - log_det)[None] - 0.5 * white.square().sum(1).T


def _nearest(points: Tensor, components: int, seed: int) -> Tensor:
    """(n, K) ones at the nearest of at most `components` centres: drawn far from each other (k-means++:
    Arthur and Vassilvitskii 2007), then ten rounds of Lloyd."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(components - 1):
        squares = torch.cdist(points, centres).square().amin(1)
        if not bool(squares.any()):  # fewer different samples than components
            break
        centres = torch.cat([centres, points[torch.multinomial(squares, 1, generator=generator)]])
    for _ in range(10):
        shares = torch.nn.functional.one_hot(torch.cdist(points, centres).argmin(1), len(centres)).double()
        counts = shares.sum(0)[:, None]
        centres = torch.where(counts > 0, shares.T @ points / counts.clamp_min(1), centres)
    return shares
