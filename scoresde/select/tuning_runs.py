"""Running many tables that differ in a few rows, from the same noises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, checked
from .tuning_form import Form

GOLDEN = (5**0.5 - 1) / 2
ALONE = 1 / 4  # share of a batch that is large enough to go by itself, so that one time is that of all


@dataclass
class Meter:
    """What was asked of the model: calls on a batch, and samples in all of them."""

    calls: int = 0
    samples: int = 0


class Trace(NamedTuple):
    """A run: states x_0..x_K and outputs D_0..D_{K-1}, of M tables: (M, n, ...)."""

    states: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True, eq=False)
class Noises:
    """A model, states (n, ...) at t_max, and where the probability flow takes them; at most `batch` samples
    in a call of the model. Where they are drawn from more, `weight` (n,) is how many each stands for."""

    model: BaseDenoiser
    start: Tensor
    target: Tensor
    batch: int
    meter: Meter = field(default_factory=Meter)
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.start)

    def first(self, n: int) -> Noises:
        """The first n."""
        return self._some(torch.arange(min(n, len(self)), device=self.start.device))

    def drawn(self, importance: Tensor, n: int, number: int = 0) -> Noises:
        """n of them, each with a probability ~ importance (N,) but at most 1, which weights make up for: sums
        of `weight * f` are those over all, in the mean over draws (Horvitz & Thompson 1952). Systematically,
        one in each nth of the sum of probabilities (Madow 1949), from another place for another `number`."""
        if n >= len(self):
            return self
        chance = _chances(importance.double().cpu(), n)
        reached = (chance.cumsum(0) + GOLDEN * (number + 1) % 1).floor()
        some = reached.diff(prepend=reached.new_zeros(1)).nonzero()[:, 0].to(self.start.device)
        return self._some(some, 1 / chance.to(some.device)[some])

    def _some(self, some: Tensor, weight: Tensor | None = None) -> Noises:
        model = self.model.narrowed(some, len(self))
        return Noises(model, self.start[some], self.target[some], self.batch, self.meter, weight)

    def distances(self, form: Form) -> Tensor:
        """(n,): how far from the target the table of a form of one ends; see `distance`."""
        return distance(self.trace(form).states[-1][0], self.target)

    @torch.no_grad()
    def trace(self, form: Form) -> Trace:
        """The whole run."""
        return self._run(form, Trace([self.start[None]], []))

    @torch.no_grad()
    def ends(self, form: Form, base: Trace) -> Tensor:
        """(M, n, ...): where the tables end. Rows before a table's first change are not run again, but taken
        from `base`, the run of table 0; so is the output of that row itself where its time is the same."""
        first, rows = form.first_change(), form.keep.shape[1]
        found = base.states[-1].repeat(len(first), *[1] * self.start.ndim)
        order = first.argsort(stable=True)[: int((first < rows).sum())]
        for some in order.split(max(1, self.batch // len(self))):
            k = int(first[some].min())
            known = k + bool((form.times[some, k] == form.times[0, k]).all())
            shared = Trace(base.states[: k + 1], base.outputs[:known])
            found[some] = self._run(form.some(some), shared).states[-1]
        return found

    def _run(self, form: Form, base: Trace) -> Trace:
        """On from where `base` ends, whose last output may be missing."""
        M, ones = len(form.keep), [1] * (self.start.ndim - 1)
        keep, weights = (part.to(self.start.device, self.start.dtype) for part in (form.keep, form.weights))
        x = base.states[-1].expand(M, *self.start.shape)
        states, outputs = [*base.states[:-1], x], base.outputs
        for row in range(len(states) - 1, form.keep.shape[1]):
            if len(outputs) == row:
                outputs = [*outputs, self._denoised(x, form.times[:, row])]
            x = keep[:, row].view(M, 1, *ones) * x
            for j, output in enumerate(outputs):
                x = x + weights[:, row, j].view(M, 1, *ones) * output
            states.append(x)
        return Trace(states, outputs)

    def _denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """D of states (M, n, ...) at times (M,)."""
        n, flat, made = len(self), x.flatten(0, 1), []
        if len(self) >= ALONE * self.batch and bool((t != t[0]).any()):
            alone = zip(x.split(1), t.split(1), strict=True)
            return torch.cat([self._denoised(one, time) for one, time in alone])
        clock = t.repeat_interleave(n).split(self.batch)
        for some, times in zip(
            torch.arange(len(flat), device=x.device).split(self.batch), clock, strict=True
        ):
            # One time for all costs some models less than one for each.
            at = times[0] if bool((times == times[0]).all()) else times
            model = self.model.narrowed(some % n, n)
            made.append(checked(model(flat[some], at.to(x.device)), flat[some]))
            self.meter.calls += 1
            self.meter.samples += len(some)
        return torch.cat(made).view(x.shape)


def _chances(importance: Tensor, n: int) -> Tensor:
    """min(1, c importance) (N,) with the c for which they sum to n < N: if the k largest are certain, c is
    (n - k)/(sum of the others)."""
    largest = importance.sort(descending=True).values
    others = largest.flip(0).cumsum(0).flip(0)
    scale = (n - torch.arange(n)) / others[:n]
    certain = int((scale * largest[:n] > 1).sum())
    return (scale[min(certain, n - 1)] * importance).clamp(max=1)


def distance(ends: Tensor, target: Tensor) -> Tensor:
    """(n,) root mean square of the difference over all but the first axis; infinite if it is not finite."""
    each = (ends - target).double().flatten(1).square().mean(1).sqrt()
    return torch.where(each.isfinite(), each, torch.inf)
