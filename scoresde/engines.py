"""Fast evaluation of Gaussian mixtures under `x_t = alpha x_0 + sigma eps`: one class per structure of the
covariances.

An engine takes x (B, D), alpha and var = sigma^2, each () or (B, 1), all float64, and gives `Terms`. With V_k
= alpha^2 S_k + var I and
d_k = x - alpha m_k, log N(x; alpha m_k, V_k) = -(d_k^T V_k^-1 d_k + log det V_k)/2, leaving out D/2 log(2
pi).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .spectrum import Spectrum

# A variance of exactly 0 (a point mass seen without noise) stands for its limit from above.
TINY = 1e-200
FAINT = 1e-200  # a share of a mode that is less is none


class Terms(NamedTuple):
    """`log(w_k N_k) = logits_k + common`; `data(r) = sum_k r_k E[x_0 | x, k]`, `pull(r) = sum_k r_k V_k^-1
    d_k` for weights r (B, K)."""

    logits: Tensor
    common: Callable[[], Tensor]
    data: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


def shares(logits: Tensor) -> Tensor:
    """r (B, K), the softmax of the logits. Those below FAINT are 0: what they would be multiplied to are
    subnormal numbers, with which processors are slow, and nothing of it is left in a sum."""
    r = logits.softmax(-1)
    return torch.where(r < FAINT, 0.0, r)


@runtime_checkable
class Engine(Protocol):
    def terms(self, x: Tensor, alpha: Tensor, var: Tensor) -> Terms: ...


def engine_of(log_w: Tensor, means: Tensor, spectrum: Spectrum) -> Engine:
    """The engine for weights (K,), means (K, D) and their covariances."""
    K, D = means.shape
    isotropic = spectrum.basis is None and spectrum.values.shape[1] == 1
    floor = spectrum.values[:, 0] if isotropic else spectrum.floor
    if floor is None:
        return _inner(log_w, means, spectrum)
    same = bool((floor == floor[0]).all())
    centre = (log_w.exp()[:, None] * means).sum(0)
    if isotropic and same:
        return Isotropic(log_w, centre, means - centre, floor[0])
    rank = 0 if isotropic else spectrum.values.shape[1]
    if K * (rank + 1) > D // 2:
        return _inner(log_w, means, spectrum)
    columns = (means - centre).mT
    if spectrum.basis is not None:
        columns = torch.cat((columns, spectrum.basis.transpose(0, 1).reshape(D, K * rank)), dim=1)
    # Modes that share directions span fewer than they have; equal means alone span none.
    frame, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    spanned = sizes > D * torch.finfo(sizes.dtype).eps * sizes[0]
    frame = frame[:, : max(1, int(spanned.sum()))]
    basis = None if spectrum.basis is None else frame.mT @ spectrum.basis
    inside = Spectrum(frame.shape[1], spectrum.values, basis, spectrum.floor)
    return Reduced(_inner(log_w, (means - centre) @ frame, inside), frame, centre, floor, same)


def _inner(log_w: Tensor, means: Tensor, spectrum: Spectrum) -> Engine:
    if spectrum.basis is None:
        return Diagonal(log_w, means, spectrum.values)
    K, D, r = spectrum.basis.shape
    # The bases side by side, (D, K r): one matrix product rotates x into all of them.
    beside = spectrum.basis.transpose(0, 1).reshape(D, K * r)
    rotated = (means[:, None] @ spectrum.basis).squeeze(1)
    return Rotated(log_w, means, spectrum.values, spectrum.basis, beside, rotated, spectrum.floor)


@dataclass(frozen=True, eq=False)
class Isotropic:
    """All S_k = v I with one v: products with the centred means `offsets` (K, D), no (B, K, D) tensor; |x|^2
    drops out of the logits."""

    log_w: Tensor
    centre: Tensor
    offsets: Tensor
    v: Tensor

    def terms(self, x: Tensor, alpha: Tensor, var: Tensor) -> Terms:
        y = x - alpha * self.centre
        V = (alpha**2 * self.v + var).clamp_min(TINY)
        h = alpha * (y @ self.offsets.mT) - 0.5 * alpha**2 * self.offsets.square().sum(-1)
        nearest = h.argmax(-1, keepdim=True)
        return Terms(
            self.log_w + (h - h.gather(-1, nearest)) / V,
            partial(self._common, y, alpha, V, nearest.squeeze(-1)),
            partial(self._data, y, alpha, V),
            partial(self._pull, y, alpha, V),
        )

    def _common(self, y: Tensor, alpha: Tensor, V: Tensor, nearest: Tensor) -> Tensor:
        d = y - alpha * self.offsets[nearest]
        return (-0.5 * (d.square().sum(-1, keepdim=True) / V + y.shape[-1] * V.log())).squeeze(-1)

    def _data(self, y: Tensor, alpha: Tensor, V: Tensor, r: Tensor) -> Tensor:
        m = r @ self.offsets
        return self.centre + m + (alpha * self.v / V) * (y - alpha * m)

    def _pull(self, y: Tensor, alpha: Tensor, V: Tensor, r: Tensor) -> Tensor:
        return (y - alpha * (r @ self.offsets)) / V


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Diagonal covariances, values (K, D), or isotropic ones of different size, values (K, 1)."""

    log_w: Tensor
    means: Tensor
    values: Tensor

    def terms(self, x: Tensor, alpha: Tensor, var: Tensor) -> Terms:
        a = alpha[..., None]
        d = x.unsqueeze(-2) - a * self.means
        V = (a**2 * self.values + var[..., None]).clamp_min(TINY)
        repeat = x.shape[-1] / self.values.shape[-1]
        logits = self.log_w - 0.5 * ((d.square() / V).sum(-1) + repeat * V.log().sum(-1))
        return Terms(logits, partial(_nothing, x), partial(self._data, d, a, V), partial(_weighted, 1 / V, d))

    def _data(self, d: Tensor, a: Tensor, V: Tensor, r: Tensor) -> Tensor:
        return r @ self.means + _weighted(a * self.values / V, d, r)


@dataclass(frozen=True, eq=False)
class Rotated:
    """Covariances with eigenvectors: full (no floor), or low-rank plus floor."""

    log_w: Tensor
    means: Tensor
    values: Tensor
    basis: Tensor
    beside: Tensor
    rotated: Tensor
    floor: Tensor | None

    def terms(self, x: Tensor, alpha: Tensor, var: Tensor) -> Terms:
        if self.floor is None and x.ndim == 2 and alpha.ndim == var.ndim == 0:
            return self._at_once(x, alpha, var)
        a = alpha[..., None]
        z = (x @ self.beside).unflatten(-1, self.rotated.shape) - a * self.rotated
        V = (a**2 * self.values + var[..., None]).clamp_min(TINY)
        quadratic, log_det = (z.square() / V).sum(-1), V.log().sum(-1)
        data, pull = partial(self._data, z, a * self.values / V), partial(self._back, z, 1 / V)
        floor = self.floor
        if floor is None:
            return Terms(self.log_w - 0.5 * (quadratic + log_det), partial(_nothing, x), data, pull)

        rest = x.unsqueeze(-2) - a * self.means - torch.einsum("...kr,kdr->...kd", z, self.basis)
        F = (alpha**2 * floor + var).clamp_min(TINY)
        D, rank = x.shape[-1], self.values.shape[-1]
        quadratic, log_det = quadratic + rest.square().sum(-1) / F, log_det + (D - rank) * F.log()
        on_data, on_pull = ((gain[..., None], rest) for gain in (alpha * floor / F, 1 / F))
        return Terms(
            self.log_w - 0.5 * (quadratic + log_det),
            partial(_nothing, x),
            lambda r: data(r) + _weighted(*on_data, r),
            lambda r: pull(r) + _weighted(*on_pull, r),
        )

    def _at_once(self, x: Tensor, alpha: Tensor, var: Tensor) -> Terms:
        """The same for full covariances and one time for all samples: what is the same for all goes into the
        matrices, and only `scaled` = V_k^(-1/2) U_k^T d_k is as large as all components side by side."""
        V = (alpha**2 * self.values + var).clamp_min(TINY)
        root = V.rsqrt()
        moved = -(alpha * root * self.rotated).flatten()
        scaled = torch.addmm(moved, x, self.beside * root.flatten()).unflatten(-1, V.shape)
        quadratic = _squares(scaled)
        back = partial(self._unscaled, scaled)
        return Terms(
            self.log_w - 0.5 * (quadratic + V.log().sum(-1)),
            partial(_nothing, x),
            lambda r: r @ self.means + back(alpha * self.values * root, r),
            partial(back, root),
        )

    def _unscaled(self, scaled: Tensor, gain: Tensor, r: Tensor) -> Tensor:
        return (r.unsqueeze(-1) * scaled).flatten(-2) @ (self.beside * gain.flatten()).mT

    def _back(self, z: Tensor, gain: Tensor, r: Tensor) -> Tensor:
        return (r.unsqueeze(-1) * gain * z).flatten(-2) @ self.beside.mT

    def _data(self, z: Tensor, gain: Tensor, r: Tensor) -> Tensor:
        return r @ self.means + self._back(z, gain, r)


@dataclass(frozen=True, eq=False)
class Reduced:
    """Components that differ only inside a common subspace (all means and factors): `frame` (D, R)
    orthonormal, R << D.

    Inside, an engine in R dimensions; outside, every S_k is floor_k I and every mean is the centre.
    """

    inside: Engine
    frame: Tensor
    centre: Tensor
    floor: Tensor
    same_floor: bool

    def terms(self, x: Tensor, alpha: Tensor, var: Tensor) -> Terms:
        y = x - alpha * self.centre
        a = y @ self.frame
        inner = self.inside.terms(a, alpha, var)
        F = (alpha**2 * self.floor + var).clamp_min(TINY)
        outside = partial(self._outside, y, a, F)
        on_data, on_pull = alpha * self.floor / F, 1 / F
        logits, common = inner.logits, inner.common
        if not self.same_floor:
            logits = logits + outside()
        return Terms(
            logits,
            (lambda: common() + outside()[..., 0]) if self.same_floor else common,
            lambda r: self.centre + self._lift(y, a, on_data, r, inner.data(r)),
            lambda r: self._lift(y, a, on_pull, r, inner.pull(r)),
        )

    def _outside(self, y: Tensor, a: Tensor, F: Tensor) -> Tensor:
        # |y|^2 - |a|^2 would cancel far along the frame.
        squares = (y - a @ self.frame.mT).square().sum(-1, keepdim=True)
        return -0.5 * (squares / F + (y.shape[-1] - a.shape[-1]) * F.log())

    def _lift(self, y: Tensor, a: Tensor, gains: Tensor, r: Tensor, part: Tensor) -> Tensor:
        """`part`, known inside the frame, with what gain y is outside of it."""
        gain = (r * gains).sum(-1, keepdim=True)
        return gain * y + (part - gain * a) @ self.frame.mT


def _weighted(gain: Tensor, d: Tensor, r: Tensor) -> Tensor:
    """`sum_k r_k gain_k d_k` for d (B, K, D)."""
    return (r.unsqueeze(-1) * gain * d).sum(-2)


def _squares(z: Tensor) -> Tensor:
    """|z|^2 over the last axis; by the norm, which makes no tensor as large as z but has no second derivative
    at 0, where none can be asked for."""
    return z.square().sum(-1) if torch.is_grad_enabled() else torch.linalg.vector_norm(z, dim=-1).square()


def _nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x[..., 0])
