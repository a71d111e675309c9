"""Energies: models of `E(x, t) = -log p_t(x)` up to a constant, whose score is `-grad E`.

An energy is a denoiser, for every solver, and it has what a score alone has not: densities up to a constant,
so that models can be multiplied, mixed and negated, and Metropolis' test (`solvers.mala`) can be made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .denoiser import DATA, SCORE, BaseDenoiser, Denoiser, Prediction, Rows, determined, some_rows, view
from .gradients import gradient
from .schedules import Time, wide
from .sde import LinearSDE, alike, like

__all__ = ["Energy", "EnergyModel", "log_ratio", "mixture", "potential", "product"]


class EnergyModel(BaseDenoiser):
    """`E(x, t) = -log p_t(x) + const` as a denoiser: `score = -grad E`, `D = (x + sigma^2 score)/alpha`.

    Subclasses define `energy(x, t, **cond) -> (B,)`, in which samples do not depend on each other.
    """

    def energy(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """E(x, t), (B,)."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """`-E(x, t)`, the log-density up to a constant at each t, (B,)."""
        return -self.energy(x, t, **cond)

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.as_view(DATA, x, t, **cond)

    def score(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """-grad E(x, t)."""
        return gradient(lambda x: self.log_prob(x, t, **cond), x)[1]

    def as_view(self, target: Prediction, /, x: Tensor, t: Time, **cond: Any) -> Tensor:
        t = wide(t)
        pair = view(target, SCORE, self.sde.alpha(t), self.sde.sigma(t))
        a, b = determined(*pair, t, f"{target.name} from an energy")
        return like(a, x) * x + like(b, x) * self.score(x, t, **cond)


class Energy(EnergyModel):
    """A function or module `E(x (B, ...), t () or (B,), **cond) -> (B,)` as an `EnergyModel`.

    `Energy(lambda x, t: -exact.log_prob(x, t), sde)` is the energy of an exact denoiser.
    """

    def __init__(self, function: Callable[..., Tensor], sde: LinearSDE) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"expected a function E(x, t), found {type(function).__name__}")
        self.function, self.sde = function, sde

    def energy(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.function(x, t, **cond)

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        return Energy(some_rows(self.function, rows, batch), self.sde)


def potential(denoiser: Denoiser) -> Potential:
    """The energy of a denoiser whose network is a gradient, `networks.Gradient`: the same denoiser, with an
    energy.
    """
    return Potential(denoiser)


class Potential(EnergyModel):
    """See `potential`. With `score = a x + b F(c_in x)` and F the gradient of phi,

    E = -(a/2) |x|^2 - (b/c_in) phi(c_in x).
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        if not hasattr(denoiser.network, "potential"):
            raise TypeError(
                "expected a denoiser whose network is the gradient of a potential, as "
                f"networks.Gradient(network) is; found {type(denoiser.network).__name__}"
            )
        self.denoiser, self.sde = denoiser, denoiser.sde

    def energy(self, x: Float[Tensor, "b ..."], t: Time, **cond: Any) -> Float[Tensor, " b"]:
        t, model = wide(t), self.denoiser
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        a, b = determined(*view(SCORE, model.predicts, alpha, sigma), t, "an energy")
        c_in = model.predicts.c_in(alpha, sigma)
        squares = x.square().flatten(1).sum(1)
        phi = self._phi((x * like(c_in, x)).to(model.dtype), t, **cond).to(x.dtype)
        return -0.5 * like(a, squares) * squares - like(b / c_in, squares) * phi

    def _phi(self, inputs: Tensor, t: Tensor, **cond: Any) -> Tensor:
        time = self.denoiser._label(t).to(inputs.device, torch.promote_types(inputs.dtype, torch.float32))
        network: Any = self.denoiser.network
        return network.potential(inputs, time.expand(len(inputs)), **cond)

    def as_view(self, target: Prediction, /, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.denoiser.as_view(target, x, t, **cond)

    def score(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.denoiser.score(x, t, **cond)

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        return self.denoiser.rows(times, x, **cond)


class Product(EnergyModel):
    """See `product`."""

    def __init__(self, models: Sequence[BaseDenoiser], powers: Sequence[float]) -> None:
        super().__init__()
        self.models, self.powers, self.sde = nn.ModuleList(models), tuple(powers), models[0].sde

    def extra_repr(self) -> str:
        return f"powers={self.powers}"

    def energy(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return -_weighted(self.powers, [_log_prob(model, x, t, **cond) for model in self.models])

    def score(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return _weighted(self.powers, [_score(model, x, t, **cond) for model in self.models])

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        return Product([some_rows(model, rows, batch) for model in self.models], self.powers)


def product(models: Sequence[BaseDenoiser], powers: Sequence[float] | None = None) -> Product:
    """`prod_i p_i(x, t)^powers_i`: energies, and scores, added with the powers (default: all 1).

    A negative power takes a model away ("a but not b": powers 1, -0.5); the energy must still grow outwards.
    At each t it is the product of the models *at that t*, which is not the law of the product's data under
    noise: solvers that follow its score go astray, and Metropolis-adjusted Langevin steps at each t
    (`solvers.mala`) bring them back (Du et al. 2023, arXiv:2302.11552).

    models: energies, or other denoisers with log_prob, on one sde. Raises ValueError and TypeError otherwise.
    """
    powers = [1.0] * len(models) if powers is None else list(powers)
    _check_members(models, powers, "powers")
    return Product(models, powers)


class MixtureModel(EnergyModel):
    """See `mixture`."""

    def __init__(self, models: Sequence[BaseDenoiser], log_weights: Tensor) -> None:
        super().__init__()
        self.models, self.sde = nn.ModuleList(models), models[0].sde
        self.log_weights = log_weights

    def extra_repr(self) -> str:
        return f"weights={self.log_weights.exp().tolist()}"

    def _terms(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        """log w_i + log p_i(x, t), (B, K)."""
        log_p = torch.stack([_log_prob(model, x, t, **cond) for model in self.models], 1)
        return log_p + self.log_weights.to(log_p)

    def energy(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return -self._terms(x, t, **cond).logsumexp(1)

    def score(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        shares = self._terms(x, t, **cond).softmax(1)
        scores = [_score(model, x, t, **cond) for model in self.models]
        return torch.stack([s * like(r, s) for s, r in zip(scores, shares.unbind(1), strict=True)]).sum(0)

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        return MixtureModel([some_rows(model, rows, batch) for model in self.models], self.log_weights)


def mixture(models: Sequence[BaseDenoiser], weights: Sequence[float] | None = None) -> MixtureModel:
    """`sum_i weights_i p_i(x, t)`, by default with equal weights; they need not add up to 1.

    Other than a product, it is a mixture of the data's laws under noise too. An energy is known up to a
    constant, which here is part of its weight: `exp(-E_i)` counts as it stands.

    models: energies, or other denoisers with log_prob, on one sde. Raises ValueError and TypeError otherwise.
    """
    weights = [1.0 / max(len(models), 1)] * len(models) if weights is None else list(weights)
    _check_members(models, weights, "weights")
    if not all(w > 0 for w in weights):
        raise ValueError(f"expected weights > 0, found {weights}")
    return MixtureModel(models, torch.tensor(weights, dtype=torch.float64).log())


def log_ratio(model: BaseDenoiser, x: Tensor, s: Time, t: Time, **cond: Any) -> Tensor:
    """`log p_s(x)/p_t(x)`, (B,): the difference of energies `E(x, t) - E(x, s)` between two times.

    Up to `log Z_t/Z_s`, the same for all x, unless the model is normalised, as exact denoisers are.
    """
    _check_density(model)
    return _log_prob(model, x, s, **cond) - _log_prob(model, x, t, **cond)


def _log_prob(model: Any, x: Tensor, t: Time, **cond: Any) -> Tensor:
    """log p_t(x) of a denoiser that has one."""
    return model.log_prob(x, t, **cond)


def _score(model: Any, x: Tensor, t: Time, **cond: Any) -> Tensor:
    """grad log p_t(x) of a denoiser."""
    return model.score(x, t, **cond)


def _weighted(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum(0)


def _check_members(models: Sequence[BaseDenoiser], numbers: Sequence[float], name: str) -> None:
    if not models or len(models) != len(numbers) or not all(math.isfinite(n) for n in numbers):
        raise ValueError(
            f"expected at least one model, and one of {name}, finite, for each; found {len(models)} models, "
            f"{name}={numbers}"
        )
    for model in models:
        _check_density(model)
    if not all(alike(models[0].sde, model.sde) for model in models[1:]):
        raise ValueError(f"expected models on one SDE, found {[model.sde for model in models]}")


def _check_density(model: object) -> None:
    if not (isinstance(model, BaseDenoiser) and hasattr(model, "log_prob")):
        raise TypeError(
            f"expected energies, or other denoisers with log_prob, found {type(model).__name__}; wrap it as "
            "energy.Energy(function, sde)"
        )
