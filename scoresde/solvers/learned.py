"""Ancestral sampling with a learned variance, which depends on the data and so is no table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, evaluating
from ..grids import Grid
from ..tableau import NoiseSource, Step
from ..variance import log_ratio, with_variance
from .base import Callback, Samples, check_calls
from .onestep import posterior
from .watch import Watch


@dataclass(frozen=True)
class LearnedAncestral:
    """See `ddpm_learned`."""

    def __repr__(self) -> str:
        return "ddpm_learned()"

    def calls(self, steps: int) -> int:
        return steps

    def steps_for(self, calls: int) -> int:
        """The largest number of grid steps that takes at most `calls` network calls: all of them."""
        check_calls(calls, 1, self)
        return calls

    def solve(
        self,
        model: BaseDenoiser,
        x: Tensor,
        times: Grid | Tensor,
        *,
        noise: NoiseSource | None = None,
        callback: Callback | None = None,
    ) -> Samples:
        """Run from `x` (B, ...) at times[0] to times[-1]. `noise(k, shape)` gives the normals of step k.
        Raises TypeError for a model without a variance, ValueError for times that rise or no noise."""
        started = time.perf_counter()
        inner, cond = with_variance(model)
        grid = Grid.of(model.sde, times)
        if float(grid.t[0]) < float(grid.t[-1]):
            raise ValueError(
                f"{self} is stochastic and cannot run from data to noise: encode with a deterministic solver"
            )
        if noise is None:
            raise ValueError(f"{self} is stochastic: expected a noise source, found None")
        watch, path = Watch(repr(self), x), list[Any]()
        steps = [c.tolist() for c in posterior(model.sde, grid.t[1:], grid.t[:-1])]
        gaps, clock = log_ratio(model.sde, grid.t[1:], grid.t[:-1]).tolist(), grid.t.to(x.device)
        with torch.no_grad(), evaluating(model):
            for k, (keep, mix, std) in enumerate(zip(*steps, strict=True)):
                D, v = inner.data_and_share(x, clock[k], **cond)
                watch(D, float(grid.t[k]))
                if callback is not None:
                    kept = callback(Step(k, float(grid.t[k]), x, D))
                    path.extend([] if kept is None else [kept])
                x = keep * x + mix * D
                if std:  # none is left at sigma = 0, where beta-tilde is 0
                    x = x + std * (0.5 * gaps[k] * v).exp() * noise(k, x.shape).to(x.dtype)
        return Samples(
            x, watch.finish(), time.perf_counter() - started, path=tuple(path), end=float(grid.t[-1])
        )


def ddpm_learned() -> LearnedAncestral:
    """Ancestral sampling with the variance of a `LearnedVariance` model, on the grid it was trained on:

        x_s = mean of q(x_s | x_t, x_0 = D) + Sigma^(1/2) z

    v = 0 is `ddpm("small")`, v = 1 `ddpm("large")`. A last step to sigma = 0 returns D. Nichol and Dhariwal
    2021, arXiv:2102.09672, section 3.1.
    """
    return LearnedAncestral()
