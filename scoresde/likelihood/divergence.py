"""The trace of a Jacobian: exact, or estimated from a few products with it.

An estimator is an immutable object with `probes` (random directions, drawn once and kept along the whole
trajectory, so that the integrand is smooth), `estimates` (M unbiased numbers a sample) and `standard_error`
(of their mean). Products are `W -> J^T W`, one backward pass each; a trace does not see the transposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..noise import Noise

Pull = Callable[[Tensor], Tensor]
"""W (M, n, D) -> J^T W, for the n Jacobians (D, D) of n samples."""

CHUNK = 2**22  # numbers in a batch of directions that are pulled back at once


@runtime_checkable
class Divergence(Protocol):
    """What `log_prob` needs of an estimator; it gives `columns` = M estimates a sample."""

    @property
    def columns(self) -> int: ...

    def probes(self, noise: Noise, dim: int) -> Tensor:
        """(B, R, D) directions, float64."""
        ...

    def estimates(self, pull: Pull, probes: Tensor) -> Tensor:
        """(n, M) numbers whose mean estimates the trace, from the probes (n, R, D) of n samples."""
        ...

    def standard_error(self, values: Tensor, dim: int) -> Tensor:
        """(B,) of the mean of `values` (B, M), integrals of the estimates."""
        ...


@dataclass(frozen=True)
class Exact:
    """The trace itself, by D products: for small dimensions."""

    columns = 1

    def probes(self, noise: Noise, dim: int) -> Float[Tensor, "b 0 d"]:
        return torch.empty(len(noise.ids), 0, dim, dtype=torch.float64, device=noise.device)

    def estimates(self, pull: Pull, probes: Float[Tensor, "n 0 d"]) -> Float[Tensor, "n 1"]:
        n, _, dim = probes.shape
        basis = torch.eye(dim, dtype=probes.dtype, device=probes.device)
        trace = probes.new_zeros(n)
        for rows in basis.split(max(1, CHUNK // max(1, n * dim))):
            pulled = pull(rows[:, None].expand(-1, n, -1))
            trace = trace + (pulled * rows[:, None]).sum((0, 2))
        return trace[:, None]

    def standard_error(self, values: Float[Tensor, "b 1"], dim: int) -> Float[Tensor, " b"]:
        return torch.zeros_like(values[:, 0])


def rademacher(noise: Noise, count: int, dim: int) -> Float[Tensor, "b r d"]:
    """Signs: of all independent entries the smallest variance, `2 (|A|_F^2 - sum_i a_ii^2)` for a symmetric
    Jacobian A, so a diagonal one costs nothing."""
    return _signs(gaussian(noise, count, dim))


def _signs(z: Tensor) -> Tensor:
    return torch.where(z < 0, -1.0, 1.0).double()


def gaussian(noise: Noise, count: int, dim: int) -> Float[Tensor, "b r d"]:
    """Standard normals: variance `2 |A|_F^2`."""
    return noise(0, (len(noise.ids), count, dim))


@dataclass(frozen=True)
class Probing:
    """`z^T A z` for `count` directions z. Subclasses draw them, and know their spread."""

    count: int = 16

    def __post_init__(self) -> None:
        _check_count(self.count, "probes")

    @property
    def columns(self) -> int:
        return self.count

    def estimates(self, pull: Pull, probes: Float[Tensor, "n r d"]) -> Float[Tensor, "n r"]:
        return _quadratic(pull, probes)


@dataclass(frozen=True)
class Hutchinson(Probing):
    """`z^T A z` for independent `probes` with E[z z^T] = I, drawn by `law` (Hutchinson 1989, Commun. Stat.
    Simul. 18:1059; for log-densities Grathwohl et al. 2019, arXiv:1810.01367)."""

    law: Callable[[Noise, int, int], Tensor] = rademacher

    def probes(self, noise: Noise, dim: int) -> Float[Tensor, "b r d"]:
        return self.law(noise, self.count, dim)

    def standard_error(self, values: Float[Tensor, "b r"], dim: int) -> Float[Tensor, " b"]:
        return _standard_error(values)


@dataclass(frozen=True)
class Orthogonal(Probing):
    """`z^T A z` for directions of length D^(1/2) that are orthogonal to each other, uniform otherwise: draws
    without replacement, so their mean has `1 - R/D` of the variance and is exact for R = D."""

    def probes(self, noise: Noise, dim: int) -> Float[Tensor, "b r d"]:
        if self.count > dim:
            raise ValueError(
                f"expected at most {dim} orthogonal probes in {dim} dimensions, found {self.count}; take "
                "Exact()"
            )
        return math.sqrt(dim) * torch.linalg.qr(gaussian(noise, self.count, dim).mT).Q.mT.contiguous()

    def standard_error(self, values: Float[Tensor, "b r"], dim: int) -> Float[Tensor, " b"]:
        # Over all D directions the traceless part sums to 0, so two of them have covariance -var/(D - 1).
        left = 1 - values.shape[1] / dim
        return _standard_error(values) * math.sqrt(left) if left else torch.zeros_like(values[:, 0])


@dataclass(frozen=True)
class HutchPP:
    """The trace on the span of `A^T S`, S having `rank` random columns, plus Hutchinson's estimate with
    `count` probes on what is orthogonal to it (Meyer et al. 2021, arXiv:2010.09649, algorithm 1).

    2 rank + count products. It pays where a few directions dominate the Jacobian. S is normal: of signs, two
    columns can be parallel in few dimensions, and rounding decides the span, anew at every point of the
    trajectory.
    """

    rank: int = 8
    count: int = 8

    def __post_init__(self) -> None:
        _check_count(self.rank, "directions (rank)")
        _check_count(self.count, "probes")

    @property
    def columns(self) -> int:
        return self.count

    def probes(self, noise: Noise, dim: int) -> Float[Tensor, "b r d"]:
        if self.rank > dim:
            raise ValueError(f"expected rank <= {dim}, the dimension, found {self.rank}; take Exact()")
        z = gaussian(noise, self.rank + self.count, dim)
        return torch.cat([z[:, : self.rank], _signs(z[:, self.rank :])], 1)

    def estimates(self, pull: Pull, probes: Float[Tensor, "n r d"]) -> Float[Tensor, "n m"]:
        sketch = _pulled(pull, probes[:, : self.rank])
        Q = torch.linalg.qr(sketch.mT).Q.mT.contiguous()  # (n, rank, D)
        z = probes[:, self.rank :]
        rest = z - (z @ Q.mT) @ Q
        return _quadratic(pull, Q).sum(1, keepdim=True) + _quadratic(pull, rest)

    def standard_error(self, values: Float[Tensor, "b m"], dim: int) -> Float[Tensor, " b"]:
        return _standard_error(values)


def pullback(outputs: Tensor, inputs: Tensor) -> Pull:
    """W (M, n, D) -> J^T W of `outputs` (n, ...) in `inputs` (n, ...), a graph's end and its leaf.

    All M products at once where every operation of the network can be vectorised, else one after another.
    """
    return partial(_pull, outputs, inputs)


def _pull(outputs: Tensor, inputs: Tensor, W: Tensor) -> Tensor:
    try:
        return _product(outputs, inputs, W, batched=True)
    except RuntimeError:  # an operation has no vectorised derivative; a real fault comes again below
        return torch.stack([_product(outputs, inputs, w) for w in W])


def _product(outputs: Tensor, inputs: Tensor, w: Tensor, *, batched: bool = False) -> Tensor:
    if not outputs.requires_grad:  # does not depend on its input
        return torch.zeros_like(w)
    (g,) = torch.autograd.grad(
        outputs,
        inputs,
        w.reshape(*w.shape[: w.ndim - 2], *outputs.shape),
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    return torch.zeros_like(w) if g is None else g.reshape(w.shape)


def _pulled(pull: Pull, probes: Tensor) -> Tensor:
    """J^T z for the probes (n, R, D)."""
    rows = probes.transpose(0, 1)
    parts = rows.split(max(1, CHUNK // max(1, rows[0].numel())))
    return torch.cat([pull(part) for part in parts]).transpose(0, 1)


def _quadratic(pull: Pull, probes: Tensor) -> Tensor:
    """(n, R) numbers z^T J z."""
    return (probes * _pulled(pull, probes)).sum(-1)


def _standard_error(values: Tensor) -> Tensor:
    """Of the mean over axis 1, from the spread; infinite for a single value, which says nothing of its
    error."""
    count = values.shape[1]
    if count == 1:
        return torch.full_like(values[:, 0], math.inf)
    squares = (values - values.mean(1, keepdim=True)).square().sum(1)
    return (squares / (count * (count - 1))).sqrt()


def _check_count(count: int, what: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"expected a whole number of {what} >= 1, found {count!r}")
