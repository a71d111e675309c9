"""Running many tables that differ in a few rows, from the same noises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..denoiser import BaseDenoiser, checked
from .tuning_form import Form


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
    in a call of the model."""

    model: BaseDenoiser
    start: Tensor
    target: Tensor
    batch: int
    meter: Meter = field(default_factory=Meter)

    def __len__(self) -> int:
        return len(self.start)

    def first(self, n: int) -> Noises:
        """The first n."""
        some = torch.arange(min(n, len(self)), device=self.start.device)
        model = self.model.narrowed(some, len(self))
        return Noises(model, self.start[some], self.target[some], self.batch, self.meter)

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
        n, flat = len(self), x.flatten(0, 1)
        clock = t.to(x.device).repeat_interleave(n)
        made = []
        for some in torch.arange(len(flat), device=x.device).split(self.batch):
            model = self.model.narrowed(some % n, n)
            made.append(checked(model(flat[some], clock[some]), flat[some]))
            self.meter.calls += 1
            self.meter.samples += len(some)
        return torch.cat(made).view(x.shape)


def distance(ends: Tensor, target: Tensor) -> Tensor:
    """(n,) root mean square of the difference over all but the first axis; infinite if it is not finite."""
    each = (ends - target).double().flatten(1).square().mean(1).sqrt()
    return torch.where(each.isfinite(), each, torch.inf)
