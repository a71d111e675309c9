"""Exact data laws: Gaussians, Gaussian mixtures and weighted points, and their laws under noise.

If x_0 ~ sum_k w_k N(m_k, S_k) then x_t = alpha x_0 + sigma eps has the law

    p_t = sum_k w_k N(alpha m_k, V_k),   V_k = alpha^2 S_k + sigma^2 I,
    E[x_0 | x_t = x] = sum_k r_k (m_k + alpha S_k V_k^-1 (x - alpha m_k)),
    r_k = w_k N(x; alpha m_k, V_k) / p_t(x).

All arithmetic is float64 on the law's device; results are cast to the dtype of the argument at the end.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from .denoiser import SCORE, BaseDenoiser, Prediction
from .engines import Engine, Terms, engine_of, shares
from .schedules import Time, holds, wide
from .sde import LinearSDE, like
from .spectrum import Covariance, LowRank, Numbers, Spectrum, real, spectrum_of, stack

__all__ = ["Empirical", "ExactDenoiser", "Gaussian", "Law", "LowRank", "Mixture"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHOWN = 64  # numbers that a law prints


class Law:
    """A finite mixture of Gaussians on events of shape `event_shape` (D numbers). Immutable; made by
    `Gaussian`, `Mixture`, `Empirical`.

    `dtype` is that of samples, float64 unless `.to(dtype)` changed it; whatever the dtype, the law itself is
    kept in float64.
    """

    def __init__(
        self,
        log_w: Tensor,
        means: Tensor,
        spectrum: Spectrum,
        event: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if means.numel() == 0:
            raise ValueError(
                f"expected at least one component and one dimension, found shape {tuple(means.shape)}"
            )
        self._log_w, self._means, self._spectrum = log_w, means, spectrum
        self._event, self._dtype = event, dtype

    def _make(self, kind: type[Any], log_w: Tensor, means: Tensor, spectrum: Spectrum) -> Any:
        made = object.__new__(kind)
        Law.__init__(made, log_w, means, spectrum, self._event, self._dtype)
        return made

    def __repr__(self) -> str:
        """Code that makes the law again, to rounding, if it is small; else what it is made of."""
        K = len(self._means)
        if self._means.numel() * (1 if self._spectrum.basis is None else self.dim) <= SHOWN:
            place = [repr(self._dtype)] if self._dtype != torch.float64 else []
            place += [repr(str(self.device))] if self.device.type != "cpu" else []
            moved = f".to({', '.join(place)})" if place else ""
            return f"{type(self).__name__}({', '.join(self._arguments())}){moved}"
        what = f"{K} x {self._spectrum.kind}" if K > 1 else self._spectrum.kind
        where = f"dtype={self._dtype}, device={self.device}"
        return f"{type(self).__name__}(event_shape={self._event}, cov={what}, {where})"

    def _arguments(self) -> list[str]:
        """What the constructor was given, as code."""
        raise NotImplementedError

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self._event

    @property
    def dim(self) -> int:
        """D, the number of coordinates of one sample."""
        return self._means.shape[1]

    @property
    def device(self) -> torch.device:
        return self._means.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of samples."""
        return self._dtype

    @property
    def weights(self) -> Float[Tensor, " k"]:
        """Weights of the components, float64."""
        return self._log_w.exp()

    @property
    def means(self) -> Float[Tensor, "k ..."]:
        """Means of the components, float64."""
        return self._means.reshape(-1, *self._event).clone()

    @property
    def mean(self) -> Tensor:
        """E[x], of the event's shape, float64."""
        return (self.weights @ self._means).reshape(self._event)

    @property
    def cov(self) -> Float[Tensor, "d d"]:
        """Cov[x] of the flattened event, float64. (D, D) whatever the kind; `variance` is its diagonal."""
        d = self._means - self.weights @ self._means
        within = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        if self._spectrum.basis is None:
            within = torch.diag(self.weights @ self._spectrum.diagonal())
        else:
            for k, w in enumerate(self.weights):
                root = self._spectrum.root(k)
                within = within + w * root @ root.mT
        return within + (self.weights[:, None] * d).mT @ d

    @property
    def variance(self) -> Tensor:
        """Var[x] of every coordinate, of the event's shape, float64."""
        d = self._means - self.weights @ self._means
        return (self.weights @ (self._spectrum.diagonal() + d**2)).reshape(self._event)

    def to(self, *where: torch.device | str | torch.dtype) -> Any:
        """This law on another device and/or with samples of another dtype."""
        device: Any = self.device
        dtype = self._dtype
        for item in where:
            if isinstance(item, torch.dtype):
                dtype = item
            else:
                device = item
        if not dtype.is_floating_point:
            raise TypeError(f"expected a floating dtype for samples, found {dtype}")
        moved = self._make(
            type(self), self._log_w.to(device), self._means.to(device), self._spectrum.to(device)
        )
        moved._dtype = dtype
        return moved

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "n ..."]:
        """n independent draws; the generator, if given, lives on the law's device."""
        if isinstance(n, bool) or not isinstance(n, Integral) or int(n) < 0:
            raise ValueError(f"expected a whole number of draws n >= 0, found {n!r}")
        k = torch.zeros(n, dtype=torch.long, device=self.device)
        if len(self._means) > 1 and n > 0:
            k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, dtype=torch.float64, device=self.device, generator=generator)
        x = self._means[k] + self._spectrum.color(z, k)
        return x.reshape(n, *self._event).to(self._dtype)

    def log_prob(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
        """log p(x), nats. Raises ValueError if the law is degenerate (a variance is 0), for then there is no
        density."""
        return _log_density(self._own_terms(x), self.dim).to(x.dtype)

    def responsibilities(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b k"]:
        """The posterior probability of every component, `w_k N(x; m_k, S_k)/p(x)`; float64. Raises ValueError
        if the law is degenerate."""
        return self._own_terms(x).logits.softmax(-1)

    def denoiser(self, sde: LinearSDE) -> ExactDenoiser:
        """The exact E[x_0 | x_t] of this law under `sde`."""
        return ExactDenoiser(self, sde)

    def marginal(self, sde: LinearSDE, t: Time) -> Any:
        """The law of x_t, t a single time: means alpha m_k, covariances alpha^2 S_k + sigma^2 I. A Mixture
        for Empirical, else of the same class."""
        t = wide(t).to(self.device)
        if t.ndim != 0:
            raise ValueError(f"expected a single time, found shape {tuple(t.shape)}")
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        kind = Mixture if isinstance(self, Empirical) else type(self)
        return self._make(kind, self._log_w, alpha * self._means, self._spectrum.affine(alpha**2, sigma**2))

    def posterior(self, y: Numbers, A: Numbers, noise_var: float) -> Any:
        """The law of x given `y = A x + N(0, noise_var I)`; y (m,), A (m, D) acting on the flattened event,
        noise_var > 0. Of the same class.

        Kalman's update of every component, weights times the evidence N(y; A m_k, A S_k A^T + noise_var I).
        """
        y, A, noise_var = self._observation(y, A, noise_var)
        if not len(y):
            return self
        log_w, means, spectra = [], [], []
        for k, mean in enumerate(self._means):
            gain, spectrum, seen, U = self._spectrum.condition(k, A, noise_var)
            error = y - A @ mean
            log_w.append(-0.5 * ((U.mT @ error).square() / seen + seen.log()).sum())
            means.append(mean + gain @ error)
            spectra.append(spectrum)
        weights = (self._log_w + torch.stack(log_w)).log_softmax(0)
        return self._make(type(self), weights, torch.stack(means), stack(spectra))

    def _own_terms(self, x: Tensor) -> Terms:
        """The terms without noise. Raises ValueError if the law has no density."""
        if self._spectrum.singular:
            raise ValueError(
                f"expected a law with a density, found {self} with a zero variance;"
                " use .marginal(sde, t) at a time with noise, or add variance"
            )
        one, zero = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
        return self._engine().terms(self._flat(x), one, zero)

    def _observation(self, y: Numbers, A: Numbers, noise_var: float) -> tuple[Tensor, Tensor, float]:
        y, A, variance = real(y, "y", self.device), real(A, "A", self.device), _variance(noise_var)
        y = y.reshape(1) if y.ndim == 0 else y
        if A.ndim != 2 or A.shape[1] != self.dim or y.shape != A.shape[:1]:
            raise ValueError(
                f"expected y of shape (m,) and A of shape (m, {self.dim}),"
                f" found shapes {tuple(y.shape)} and {tuple(A.shape)}"
            )
        return y, A, variance

    def _flat(self, x: Tensor) -> Tensor:
        """x (B, *event) as float64 (B, D)."""
        if not x.is_floating_point() or x.shape[1:] != self._event:
            raise ValueError(
                f"expected floating x of shape (B, {', '.join(map(str, self._event))}),"
                f" found {x.dtype} of shape {tuple(x.shape)}"
            )
        return x.double().reshape(len(x), self.dim)

    def _engine(self) -> Engine:
        return engine_of(self._log_w, self._means, self._spectrum)


class Eigen(NamedTuple):
    """Orthonormal eigenvectors in columns, None for the identity, and eigenvalues (D,)."""

    basis: Tensor | None
    values: Tensor


class Gaussian(Law):
    """N(mean, cov). The event has the mean's shape; a number (shape ()) gives events of shape (1,).

    `cov`: a variance, a tensor of the event's shape (diagonal), a symmetric positive semidefinite (D, D)
    matrix, or `LowRank(variance, factor)`.
    Raises ValueError for other shapes, asymmetric or indefinite matrices, NaN and infinity. Eigenvalues of a
    full matrix
    below D 2^-52 of the largest count as 0.
    """

    def __init__(self, mean: Numbers, cov: Covariance) -> None:
        m = real(mean, "the mean")
        m = m.reshape(1) if m.ndim == 0 else m
        event = tuple(m.shape)
        spectrum = spectrum_of(cov, (), event, m.device)
        super().__init__(
            torch.zeros(1, dtype=torch.float64, device=m.device), m.reshape(1, -1), spectrum, event
        )

    def _arguments(self) -> list[str]:
        return [_listed(self.mean), _covariance_code(self._spectrum, (), self._event)]

    def eigen(self) -> Eigen:
        """`cov = basis diag(values) basis^T`: (basis (D, D) or None for the identity, values (D,)),
        float64."""
        spectrum = self._spectrum
        if spectrum.basis is None:
            return Eigen(None, spectrum.values[0].expand(self.dim).clone())
        if spectrum.floor is None:
            return Eigen(spectrum.basis[0].clone(), spectrum.values[0].clone())
        basis = torch.linalg.qr(spectrum.basis[0], mode="complete").Q
        rest = spectrum.floor.expand(self.dim - spectrum.values.shape[1])
        return Eigen(basis, torch.cat((spectrum.values[0], rest)))

    @classmethod
    def from_eigen(cls, basis: Tensor | None, mean: Tensor, values: Tensor) -> Gaussian:
        """The Gaussian with this mean (in the event's own coordinates and shape) and covariance `basis
        diag(values) basis^T`, values (D,)."""
        law = cls(mean, 0.0)
        v = real(values, "the eigenvalues", law.device)
        if v.shape != (law.dim,) or bool((v < 0).any()):
            raise ValueError(
                f"expected eigenvalues >= 0 of shape ({law.dim},),"
                f" found shape {tuple(v.shape)}: {v.flatten().tolist()[:8]}"
            )
        if basis is None:
            return law._make(cls, law._log_w, law._means, Spectrum(law.dim, v[None]))
        Q = real(basis, "the basis", law.device)
        eye = torch.eye(law.dim, dtype=torch.float64, device=law.device)
        if Q.shape != eye.shape or bool((Q.mT @ Q - eye).abs().max() > 1e-8):
            raise ValueError(
                f"expected orthonormal columns of shape {tuple(eye.shape)},"
                f" found shape {tuple(Q.shape)}, or columns that are not orthonormal"
            )
        return law._make(cls, law._log_w, law._means, Spectrum(law.dim, v[None], Q[None]))


class Mixture(Law):
    """sum_k weights_k N(means_k, covs_k). means (K, *event); shape (K,) gives events of shape (1,).

    `covs`: a variance for all, (K,) variances, (K, *event) diagonals, (K, D, D) matrices, or
    `LowRank(variance () or (K,), factor (K, D, r))`.
    Raises ValueError as `Gaussian` does, and unless the weights are >= 0 with sum 1 to 1e-6 (they are then
    normalised to rounding).
    """

    def __init__(self, weights: Numbers, means: Numbers, covs: Covariance) -> None:
        m = _stacked(means, "means")
        event = tuple(m.shape[1:])
        spectrum = spectrum_of(covs, (len(m),), event, m.device)
        super().__init__(_log_weights(weights, len(m), m.device), m.reshape(len(m), -1), spectrum, event)

    def _arguments(self) -> list[str]:
        lead = (len(self._means),)
        return [
            _listed(self.weights),
            _listed(self.means),
            _covariance_code(self._spectrum, lead, self._event),
        ]


class Empirical(Law):
    """The law that puts weights (N,), by default 1/N, on points (N, *event); shape (N,) gives events of shape
    (1,).

    It has no density, but at times with noise its marginal has one, and its denoiser is the one a network
    trained on these points aims at.
    """

    def __init__(self, points: Numbers, weights: Numbers | None = None) -> None:
        x = _stacked(points, "points")
        N, event = len(x), tuple(x.shape[1:])
        log_w = _log_weights([1 / max(N, 1)] * N if weights is None else weights, N, x.device)
        zero = torch.zeros(N, 1, dtype=torch.float64, device=x.device)
        super().__init__(log_w, x.reshape(N, -1), Spectrum(math.prod(event), zero), event)

    def _arguments(self) -> list[str]:
        return [_listed(self.points), _listed(self.weights)]

    @property
    def points(self) -> Float[Tensor, "n ..."]:
        """The points, float64."""
        return self.means

    def posterior(self, y: Numbers, A: Numbers, noise_var: float) -> Empirical:
        """The same points, weights times N(y; A x, noise_var I)."""
        y, A, noise_var = self._observation(y, A, noise_var)
        errors = y - self._means @ A.mT
        log_w = (self._log_w - 0.5 * errors.square().sum(-1) / noise_var).log_softmax(0)
        return self._make(type(self), log_w, self._means, self._spectrum)


class ExactDenoiser(BaseDenoiser):
    """E[x_0 | x_t] of a law, and its views, in closed form; `t` is a float or has shape () or (B,).

    Computed in float64 and returned in the dtype of x. The score is computed by itself, not as (alpha D -
    x)/sigma^2: it loses nothing as sigma -> 0.
    At sigma = 0 the value is the limit: x/alpha for a law with a density, the nearest point for `Empirical`;
    at alpha = 0 it is the mean.
    `.to(...)` moves the law and sets `dtype` (what `sample` uses by default); the law stays in float64.
    """

    def __init__(self, law: Law, sde: LinearSDE) -> None:
        super().__init__()
        self.sde = sde
        # An empty buffer carries device and dtype, also for wrappers; the law itself must not be cast.
        self.register_buffer("state", torch.empty(0, dtype=law.dtype, device=law.device), persistent=False)
        self._place(law)

    def _place(self, law: Law) -> None:
        self.law = law
        self._engine, self._singular = law._engine(), law._spectrum.singular

    def _apply(self, *how: Any, **options: Any) -> ExactDenoiser:
        super()._apply(*how, **options)
        self._place(self.law.to(self.device, self.dtype))
        return self

    def extra_repr(self) -> str:
        return f"{self.law}, {self.sde}"

    def _terms(self, x: Tensor, t: Time) -> Terms:
        flat, t = self.law._flat(x), wide(t).to(x.device)
        return self._engine.terms(flat, like(self.sde.alpha(t), flat), like(self.sde.sigma(t) ** 2, flat))

    def forward(self, x: Float[Tensor, "b ..."], t: Time) -> Float[Tensor, "b ..."]:
        terms = self._terms(x, t)
        return terms.data(shares(terms.logits)).reshape(x.shape).to(x.dtype)

    def of_component(
        self, x: Float[Tensor, "b ..."], t: Time, k: Integer[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """E[x_0 | x_t = x, x_0 from component k], one component for each sample. Raises ValueError for a
        component that there is not, where the host knows it."""
        terms = self._terms(x, t)
        K = terms.logits.shape[-1]
        alone = torch.nn.functional.one_hot(_components(k, len(x), K), K).double()
        return terms.data(alone).reshape(x.shape).to(x.dtype)

    def score(self, x: Float[Tensor, "b ..."], t: Time) -> Float[Tensor, "b ..."]:
        """grad log p_t(x) = -sum_k r_k V_k^-1 (x - alpha m_k)."""
        terms = self._terms(x, t)
        return -terms.pull(shares(terms.logits)).reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Float[Tensor, "b ..."], t: Time) -> Float[Tensor, " b"]:
        """log p_t(x), nats; NaN at sigma = 0 if the law is degenerate."""
        log_p = _log_density(self._terms(x, t), self.law.dim)
        if self._singular:
            log_p = torch.where(self.sde.sigma(wide(t).to(x.device)) > 0, log_p, torch.nan)
        return log_p.to(x.dtype)

    def as_view(self, target: Prediction, x: Tensor, t: Time, **cond: Any) -> Tensor:
        if target == SCORE:
            return self.score(x, t, **cond)
        terms, t = self._terms(x, t), wide(t).to(x.device)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        p, q = (like(c, x.double()) for c in target.pq(alpha, sigma))
        r = shares(terms.logits)
        noise = like(sigma, x.double()) * terms.pull(r).reshape(x.shape)
        return (p * terms.data(r).reshape(x.shape) + q * noise).to(x.dtype)


def _variance(noise_var: float) -> float:
    given = real(noise_var, "noise_var")
    if given.numel() != 1 or not given > 0:
        raise ValueError(f"expected one noise_var > 0 and finite, found {noise_var}")
    return given.item()


def _components(k: Tensor, batch: int, count: int) -> Tensor:
    """k as int64 (batch,), checked against 0..count - 1 where the host knows it."""
    if not isinstance(k, Tensor) or k.dtype not in INTEGERS or k.shape != (batch,):
        found = f"{k.dtype} of shape {tuple(k.shape)}" if isinstance(k, Tensor) else repr(k)
        raise ValueError(f"expected a tensor of integers of shape ({batch},) as components, found {found}")
    if not holds((k >= 0) & (k < count)):
        raise ValueError(
            f"expected components from 0 to {count - 1}, found {k.min().item()} to {k.max().item()}"
        )
    return k.long()


def _log_density(terms: Terms, dim: int) -> Tensor:
    return terms.logits.logsumexp(-1) + terms.common() - 0.5 * dim * math.log(2 * math.pi)


def _listed(values: Tensor) -> str:
    """The numbers as nested lists, to 15 digits, which is what float64 holds of a decimal number."""
    if values.ndim:
        return f"[{', '.join(map(_listed, values))}]"
    return repr(float(f"{values.item():.15g}"))


def _covariance_code(spectrum: Spectrum, lead: tuple[int, ...], event: tuple[int, ...]) -> str:
    """The covariance argument (`lead` is () for one Gaussian, (K,) for a mixture) that gives the spectrum."""
    if spectrum.basis is None:
        numbers = spectrum.values
        if bool((numbers == numbers[0, 0]).all()):
            return _listed(numbers[0, 0])
        return _listed(numbers.reshape(lead if spectrum.kind == "isotropic" else (*lead, *event)))
    # A posterior has variances below the floor, which no real factor gives.
    if spectrum.floor is None or bool((spectrum.values < spectrum.floor[:, None]).any()):
        return _listed(spectrum.dense().reshape(*lead, spectrum.dim, spectrum.dim))
    factor = spectrum.basis * (spectrum.values - spectrum.floor[:, None]).sqrt()[:, None, :]
    variance = spectrum.floor.reshape(lead)
    variance = f"torch.tensor({_listed(variance)}, dtype=torch.float64)" if lead else _listed(variance)
    factor = _listed(factor.reshape(*lead, *factor.shape[1:]))
    return f"LowRank({variance}, torch.tensor({factor}, dtype=torch.float64))"


def _stacked(value: Numbers, name: str) -> Tensor:
    tensor = real(value, f"the {name}")
    if tensor.ndim == 0:
        raise ValueError(f"expected {name} of shape (K, *event), found a single number")
    return tensor[:, None] if tensor.ndim == 1 else tensor


def _log_weights(weights: Numbers, count: int, device: torch.device) -> Tensor:
    w = real(weights, "the weights", device)
    if w.shape != (count,) or bool((w < 0).any()):
        raise ValueError(
            f"expected {count} weights >= 0, found shape {tuple(w.shape)}: {w.flatten().tolist()[:8]}"
        )
    total = w.sum().item()
    if abs(total - 1) > 1e-6:
        raise ValueError(f"expected weights with sum 1, found sum {total}; divide them by it")
    return (w / w.sum()).log()
