"""Guidance by the difference of one model with and without its condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoiser import DATA, BaseDenoiser, Pair, Prediction, Rows, checked, some_rows
from ..schedules import Time, wide
from ..sde import like
from ..variance import with_variance
from .base import Guided
from .scales import Scale, at, checked_scale


def classifier_free(
    model: BaseDenoiser,
    scale: Scale,
    *,
    null: Mapping[str, Any],
    rescale: float = 0.0,
    doubled: bool = False,
) -> ClassifierFree:
    """The denoiser `D_null + scale (D_cond - D_null)`, where D_cond has the conditions of the call and D_null
    has those of `null` in their place.

    model    a denoiser trained with conditions and without: `train.fit(..., label_dropout=0.1)`
    scale    0 is the unconditional model, 1 the conditional one, more is guidance (the "guidance scale" of
             most code); `ho_salimans(w)` is the paper's w, by which 0 is the conditional one. Numbers or
             functions of noise level: outside an `interval` use `outside=1`
    null     the conditions that mean "none": numbers, or tensors with a batch axis of 1 or B, e.g.
             {"label": -1}, {"vector": 0.0}, or for a condition that is a mapping {"text": {"tokens": 0}};
             None leaves a condition out. A *negative* condition, in its place, is one to get away from:
             {"label": 3}
    rescale  phi in [0, 1]: shrinks D towards the standard deviation of D_cond over the elements of a sample,
             `D ((1 - phi) + phi std(D_cond)/std(D))` (Lin et al. 2023, arXiv:2305.08891, section 3.4)
    doubled  call the network once with the batch and its null twin, rather than twice: faster where batches
             are small, at twice the memory. Every condition must then be a tensor with one entry a sample

    Exactly the null or the conditional model, and one call, where a number (or, in a solver with fixed steps,
    a function) says 0 or 1. Otherwise affine in the scale, in every view. Guidance "at scale 1" by
    `classifier` is scale 1 here, and the laws at other scales are the ones stated there, with D_cond in place
    of the guided one.

    Ho and Salimans 2022, arXiv:2207.12598. Raises ValueError for a call without conditions to replace.
    """
    return ClassifierFree(model, scale, null, rescale, doubled)


class ClassifierFree(Guided):
    """See `classifier_free`."""

    def __init__(
        self,
        model: BaseDenoiser,
        scale: Scale,
        null: Mapping[str, Any],
        rescale: float = 0.0,
        doubled: bool = False,
    ) -> None:
        super().__init__(model)
        if not isinstance(null, Mapping) or not null:
            raise TypeError(
                "null: expected the conditions that mean 'none' by name, as in {'label': -1}, found "
                f"{null!r}"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale: expected a number from 0 to 1, found {rescale}")
        self.scale, self.rescale, self.doubled = checked_scale(scale), rescale, doubled
        with torch.inference_mode(False):  # a tensor made in inference mode could not be kept for backward
            self.null = {
                k: v.clone().to(model.device) if isinstance(v, Tensor) else v for k, v in null.items()
            }

    def extra_repr(self) -> str:
        return f"scale={self.scale}, null={self.null}, rescale={self.rescale}, doubled={self.doubled}"

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Tensor:
        return self.as_view(DATA, x, t, **cond)

    def as_view(self, target: Prediction, /, x: Tensor, t: Time, **cond: Any) -> Tensor:
        null, t = self._null(cond), wide(t)
        if self.rescale and target != DATA:
            return super().as_view(target, x, t, **cond)
        if self.scale in (0, 1):
            return self.model.as_view(target, x, t, **(cond if self.scale else null))
        strength = like(at(self.scale, self.sde, t), x)
        if self.doubled:
            times = t.to(x.device).expand(len(x)).repeat(2)
            both = self.model.as_view(target, twice(x), times, **paired(null, cond, len(x)))
            without, given = both.chunk(2)
        else:
            without = self.model.as_view(target, x, t, **null)
            given = self.model.as_view(target, x, t, **cond)
        return self._rescaled(torch.lerp(without, given, strength), given, strength)

    def data_and_share(self, x: Tensor, t: Time, **cond: Any) -> Pair:
        """(D, v) of a `LearnedVariance`, D guided and v that of the conditional model. A scale that is a
        function of noise level costs both calls everywhere."""
        inner, given = with_variance(self.model)
        null, t = {**given, **self._null(cond)}, wide(t)
        cond = {**given, **cond}
        if self.scale in (0, 1):
            return inner.data_and_share(x, t, **(cond if self.scale else null))
        if self.doubled:
            times = t.to(x.device).expand(len(x)).repeat(2)
            both = inner.data_and_share(twice(x), times, **paired(null, cond, len(x)))
            (without, free_v), (D, v) = zip(*(one.chunk(2) for one in both), strict=True)
        else:
            without, free_v = inner.data_and_share(x, t, **null)
            D, v = inner.data_and_share(x, t, **cond)
        strength = like(at(self.scale, self.sde, t), x)
        guided = self._rescaled(torch.lerp(without, D, strength), D, strength)
        return guided, torch.where(strength == 0, free_v, v)

    def rows(self, times: Tensor, x: Tensor, /, **cond: Any) -> Rows:
        if self.rescale:  # of D, and not of the network's output
            return super().rows(times, x, **cond)
        null, strength = self._null(cond), at(self.scale, self.sde, times).tolist()
        without, given = self.model.rows(times, x, **null), self.model.rows(times, x, **cond)
        twin = self.model.rows(times, twice(x), **paired(null, cond, len(x))) if self.doubled else None

        def evaluate(state: Tensor, k: int) -> Tensor:
            if strength[k] in (0, 1):
                return (given if strength[k] else without).evaluate(state, k)
            if twin is None:
                # a copy, for a network may write its next output where this one is
                F_null = checked(without.evaluate(state, k), state).clone()
                F = given.evaluate(state, k)
            else:
                F_null, F = twin.evaluate(twice(state), k).chunk(2)
            return torch.lerp(checked(F_null, state), checked(F, state), strength[k])

        # D = a x + b F with the same a and b for both: what is affine in D is affine in F.
        return Rows(evaluate, given.a, given.b)

    def _null(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions of the null call: those given, with the ones in `null` replaced."""
        missing = set(self.null) - set(cond)
        if missing:
            raise ValueError(
                f"expected the condition {sorted(missing)} that null={self.null} replaces, found "
                f"{sorted(cond) or 'none'}; pass condition={{...}} to sample, or null= what the model takes"
            )
        replaced = {name: _shaped(value, cond[name]) for name, value in self.null.items()}
        return {k: v for k, v in {**cond, **replaced}.items() if v is not None}

    def _rescaled(self, D: Tensor, given: Tensor, strength: Tensor) -> Tensor:
        if not self.rescale:
            return D
        ratio = spread(given) / spread(D)
        factor = 1 + self.rescale * (torch.where(ratio.isfinite(), ratio, 1) - 1)
        return torch.where(strength == 0, D, like(factor, D) * D)

    def narrowed(self, rows: Tensor | slice, batch: int) -> BaseDenoiser:
        null = {name: some_rows(value, rows, batch) for name, value in self.null.items()}
        return ClassifierFree(self.model.narrowed(rows, batch), self.scale, null, self.rescale, self.doubled)


def _shaped(value: Any, like_this: Any) -> Any:
    """A null condition in the shape, dtype and place of the condition that it replaces; of a mapping each
    part by itself, and what it does not name as given."""
    if isinstance(value, Mapping) and isinstance(like_this, Mapping):
        return {**like_this, **{k: _shaped(v, like_this.get(k)) for k, v in value.items()}}
    if value is None or not isinstance(like_this, Tensor):
        return value
    if isinstance(value, (int, float)):
        return torch.full_like(like_this, value)
    made = torch.as_tensor(value).to(like_this.device, like_this.dtype)
    if made.ndim and (made.ndim != like_this.ndim or len(made) not in (1, len(like_this))):
        raise ValueError(
            f"null: expected numbers, or tensors with a batch axis like conditions {tuple(like_this.shape)}, "
            f"found shape {tuple(made.shape)}"
        )
    return made.expand(like_this.shape)


def spread(x: Tensor) -> Tensor:
    """The standard deviation of the elements of each sample, (B,)."""
    return x.flatten(1).std(1, correction=0)


def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])


def paired(null: Mapping[str, Any], cond: Mapping[str, Any], batch: int) -> dict[str, Tensor]:
    """The conditions of a batch and its null twin, null first. ValueError unless they have one entry a
    sample.
    """
    for name, value in cond.items():
        if not (isinstance(value, Tensor) and value.ndim and len(value) == batch and name in null):
            raise ValueError(
                f"{name}: expected a tensor with {batch} entries, one a sample, and its null, to double the "
                f"batch; found {value!r}; use doubled=False"
            )
    return {name: torch.cat([null[name], value]) for name, value in cond.items()}
