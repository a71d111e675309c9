"""Stacks of covariance matrices kept as eigenvalues, so that every function of `alpha^2 S + sigma^2 I` is a
function of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The covariance `variance I + factor factor^T`, factor (D, r); for mixtures variance () or (K,), factor
    (K, D, r)."""

    variance: float | Tensor
    factor: Tensor


Numbers = int | float | Sequence[Any] | np.ndarray | Tensor
Covariance = Numbers | LowRank


def real(value: Numbers, name: str, device: torch.device | None = None) -> Tensor:
    """A float64 copy of `value`; TypeError unless it is real numbers, ValueError unless they are finite."""
    try:
        if isinstance(value, Tensor | np.ndarray) and torch.as_tensor(value).is_complex():
            raise TypeError  # torch would drop the imaginary parts
        tensor = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"expected {name} as numbers, found {value!r}") from None
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"expected {name} to be finite, found NaN or infinity")
    return tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """K covariances `S_k = floor_k I + Q_k diag(values_k - floor_k) Q_k^T`, float64, all of one kind:

    isotropic   values (K, 1), no basis          diagonal   values (K, D), no basis
    full        values (K, D), basis (K, D, D)   low-rank   values (K, r), basis (K, D, r), floor (K,)
    """

    dim: int
    values: Tensor
    basis: Tensor | None = None
    floor: Tensor | None = None

    @property
    def kind(self) -> str:
        if self.basis is not None:
            return "full" if self.floor is None else f"rank-{self.values.shape[1]} plus isotropic"
        return "isotropic" if self.values.shape[1] == 1 else "diagonal"

    @property
    def singular(self) -> bool:
        """Whether some variance is 0, so that there is no density."""
        return any(bool((v == 0).any()) for v in (self.values, self.floor) if v is not None)

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> Spectrum:
        """The spectrum of `scale S + shift I`."""
        floor = None if self.floor is None else scale * self.floor + shift
        return replace(self, values=scale * self.values + shift, floor=floor)

    def to(self, device: torch.device | str) -> Spectrum:
        moved = [None if v is None else v.to(device) for v in (self.values, self.basis, self.floor)]
        return Spectrum(self.dim, *moved)  # pyright: ignore[reportArgumentType]

    def diagonal(self) -> Tensor:
        """The diagonals (K, D)."""
        if self.basis is None:
            return self.values.expand(-1, self.dim)
        floor = 0 if self.floor is None else self.floor[:, None]
        above = self.values - floor
        return floor + (self.basis.square() @ above[..., None]).squeeze(-1)

    def dense(self) -> Tensor:
        """The matrices (K, D, D)."""
        return torch.stack([root @ root.mT for root in map(self.root, range(len(self.values)))])

    def root(self, k: int) -> Tensor:
        """A matrix L (D, D) with `L L^T = S_k`."""
        if self.basis is None:
            return torch.diag(self.values[k].expand(self.dim).sqrt())
        if self.floor is None:
            return self.basis[k] * self.values[k].sqrt()
        base = self.floor[k].sqrt() * torch.eye(self.dim, dtype=torch.float64, device=self.values.device)
        return base + (self.basis[k] * (self.values[k].sqrt() - self.floor[k].sqrt())) @ self.basis[k].mT

    def color(self, z: Tensor, k: Tensor) -> Tensor:
        """Turn standard normals z (n, D) into draws of N(0, S_k), k (n,)."""
        if self.basis is None:
            return self.values[k].sqrt() * z
        out = torch.empty_like(z)
        for j in range(len(self.values)):
            rows = (k == j).nonzero().squeeze(-1)
            roots = self.values[j].sqrt()
            if self.floor is None:
                out[rows] = (z[rows] * roots) @ self.basis[j].mT
            else:
                base = self.floor[j].sqrt()
                out[rows] = base * z[rows] + (z[rows] @ self.basis[j] * (roots - base)) @ self.basis[j].mT
        return out

    def condition(self, k: int, A: Tensor, noise_var: float) -> tuple[Tensor, Spectrum, Tensor, Tensor]:
        """Observe `A x + N(0, noise_var I)`, A (m, D), under N(., S_k): the gain (D, m), the posterior
        spectrum (a stack of one), and the
        eigenvalues (m,) and eigenvectors (m, m) of the law of the observation, `A S_k A^T + noise_var I`.

        Square-root form of the Kalman update: with L L^T = S and A L = U t V^T, posterior = L V
        diag(noise_var/(noise_var + t^2)) V^T L^T.
        """
        frame, L = self._frame(k, A)
        observed = A @ L if frame is None else A @ frame @ L
        U, t, Vh = torch.linalg.svd(observed, full_matrices=True)
        seen = noise_var + t**2
        gain = (L @ Vh[: len(t)].mT * (t / seen)) @ U[:, : len(t)].mT
        shrink = torch.ones_like(Vh[0])
        shrink[: len(t)] = (noise_var / seen).sqrt()
        basis, roots, _ = torch.linalg.svd(L @ Vh.mT * shrink)
        evidence = torch.full_like(U[0], noise_var)
        evidence[: len(t)] = seen
        if frame is None:
            return gain, Spectrum(self.dim, roots[None] ** 2, basis[None]), evidence, U
        floor = self.values[k] if self.floor is None else self.floor[k : k + 1]
        return frame @ gain, Spectrum(self.dim, roots[None] ** 2, (frame @ basis)[None], floor), evidence, U

    def _frame(self, k: int, A: Tensor) -> tuple[Tensor | None, Tensor]:
        """An orthonormal frame W (D, R), None for the identity, outside of which S_k is isotropic and A
        vanishes; and a root of W^T S_k W."""
        isotropic = self.basis is None and self.values.shape[1] == 1
        if not isotropic and self.floor is None:
            return None, self.root(k)
        columns = A.mT if self.basis is None else torch.cat((self.basis[k], A.mT), dim=1)
        if columns.shape[1] >= self.dim:
            return None, self.root(k)
        frame = torch.linalg.qr(columns).Q
        if self.basis is None or self.floor is None:
            return frame, torch.diag(self.values[k].sqrt().expand(frame.shape[1]))
        inside = replace(self, dim=frame.shape[1], basis=(frame.mT @ self.basis[k])[None])
        return frame, replace(inside, values=self.values[k : k + 1], floor=self.floor[k : k + 1]).root(0)


def stack(spectra: Sequence[Spectrum]) -> Spectrum:
    """Put stacks of one kind on top of each other."""

    def cat(name: str) -> Any:
        parts = [getattr(s, name) for s in spectra]
        return None if parts[0] is None else torch.cat(parts)

    return Spectrum(spectra[0].dim, cat("values"), cat("basis"), cat("floor"))


def spectrum_of(
    cov: Covariance, lead: tuple[int, ...], event: tuple[int, ...], device: torch.device
) -> Spectrum:
    """Read a covariance by its shape: `lead` is () for one Gaussian and (K,) for a mixture. Raises ValueError
    where no reading fits or it is not one."""
    dim, count = math.prod(event), math.prod(lead)
    if isinstance(cov, LowRank):
        return _low_rank(cov, lead, dim, device)
    S = real(cov, "the covariance", device)
    if S.shape in ((), lead):
        return Spectrum(dim, _non_negative(S.expand(lead).reshape(count, 1)))
    if S.shape == (*lead, *event):
        return Spectrum(dim, _non_negative(S.reshape(count, dim)))
    if S.shape == (*lead, dim, dim):
        return _full(S.reshape(count, dim, dim), _precision(cov))
    each = f" with {count} in front (one per component)" if lead else ""
    raise ValueError(
        f"expected a covariance that is a scalar, has the event's shape {event} (diagonal), has shape"
        f" {(dim, dim)} (full){each}, or is a LowRank; found shape {tuple(S.shape)}"
    )


def _precision(cov: Numbers) -> float:
    """The eps of the dtype that a covariance was given in; float64's for what has no floating one."""
    if isinstance(cov, Tensor) and cov.is_floating_point():
        return torch.finfo(cov.dtype).eps
    if isinstance(cov, np.ndarray) and np.issubdtype(cov.dtype, np.floating):
        return float(np.finfo(cov.dtype).eps)
    return 2.0**-52


def _non_negative(values: Tensor) -> Tensor:
    if bool((values < 0).any()):
        raise ValueError(f"expected variances >= 0, found {values.min().item()}")
    return values.clone()


def _full(S: Tensor, eps: float) -> Spectrum:
    dim = S.shape[-1]
    rounding = 10 * dim * eps * S.abs().amax((-2, -1))
    skew = (S - S.mT).abs().amax((-2, -1))
    if bool((skew > rounding).any()):
        raise ValueError(
            f"expected symmetric covariances, found |S - S^T| = {skew.max().item():.3g}; use (S + S.T) / 2"
        )
    values, basis = torch.linalg.eigh((S + S.mT) / 2)
    if bool((values < -rounding[:, None]).any()):
        raise ValueError(
            f"expected positive semidefinite covariances, found an eigenvalue {values.min().item():.3g}"
        )
    # An eigenvalue that eigh cannot tell from 0 is 0: the law is then known to be degenerate.
    resolved = dim * 2.0**-52 * values.amax(-1, keepdim=True)
    return Spectrum(dim, torch.where(values > resolved, values, 0.0), basis)


def _low_rank(cov: LowRank, lead: tuple[int, ...], dim: int, device: torch.device) -> Spectrum:
    count = math.prod(lead)
    floor, factor = real(cov.variance, "the variance", device), real(cov.factor, "the factor", device)
    if floor.shape not in ((), lead) or factor.ndim != len(lead) + 2 or factor.shape[:-1] != (*lead, dim):
        raise ValueError(
            f"expected LowRank(variance, factor) with variance of shape () {f'or {lead} ' if lead else ''}"
            f"and factor of shape {(*lead, dim, 'r')},"
            f" found shapes {tuple(floor.shape)} and {tuple(factor.shape)}"
        )
    floor = _non_negative(floor.expand(lead).reshape(count))
    basis, roots, _ = torch.linalg.svd(factor.reshape(count, dim, -1), full_matrices=False)
    values = floor[:, None] + roots**2
    return Spectrum(dim, values, basis, None if basis.shape[-1] == dim else floor)
