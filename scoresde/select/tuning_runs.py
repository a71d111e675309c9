"""Running tables from the same noises, and what their ends depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .. import grids
from ..denoiser import BaseDenoiser, checked
from .tuning_form import Form, flat

GOLDEN = (5**0.5 - 1) / 2
# Derivatives and differences agree to such a share of the larger, and what is less than so much is nothing;
# not asked of networks that round more than that.
AGREEING, FLAT, COARSE, DIRECTIONS = 0.1, 1e-3, 1e-4, 8
REMEDY = "take the model out of torch.no_grad() and .detach() for `tune`"


@dataclass
class Meter:
    """What was asked of the model: calls on a batch, and samples in all of them."""

    calls: int = 0
    samples: int = 0


class Trace(NamedTuple):
    """A run: states x_0..x_K and outputs D_0..D_{K-1}, (n, ...)."""

    states: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True, eq=False)
class Noises:
    """A model, states (n, ...) at t_max, and where the probability flow takes them, or what tells when it is
    asked for; at most `batch` samples in a call of the model. Where they are drawn from more, `weight` (n,)
    is how many each stands for."""

    model: BaseDenoiser
    start: Tensor
    solution: Tensor | Callable[[BaseDenoiser, Tensor], Tensor]
    batch: int
    meter: Meter = field(default_factory=Meter)
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def target(self) -> Tensor:
        """(n, ...): where the probability flow takes the states."""
        known = self.solution
        return known if isinstance(known, Tensor) else known(self.model, self.start)

    def first(self, n: int) -> Noises:
        """The first n."""
        return self._some(torch.arange(min(n, len(self)), device=self.start.device))

    def drawn(self, importance: Tensor, n: int, number: int = 0) -> Noises:
        """n of them, each with a probability ~ importance (N,) but at most 1, which weights make up for: sums
        of `weight * f` are those over all, in the mean over draws (Horvitz & Thompson 1952). Systematically,
        one in each nth of the sum of probabilities (Madow 1949), from another place for another `number`."""
        if n >= len(self):
            return self
        if self.weight is not None:
            importance = importance * self.weight
        chance = _chances(importance.double().cpu(), n)
        reached = (chance.cumsum(0) + GOLDEN * (number + 1) % 1).floor()
        some = reached.diff(prepend=reached.new_zeros(1)).nonzero()[:, 0].to(self.start.device)
        weight = 1 / chance.to(some.device)[some]
        return self._some(some, weight if self.weight is None else weight * self.weight[some])

    def _some(self, some: Tensor, weight: Tensor | None = None) -> Noises:
        known = self.__dict__.get("target", self.solution)
        solution = known[some] if isinstance(known, Tensor) else known
        model = self.model.narrowed(some, len(self))
        return Noises(model, self.start[some], solution, self.batch, self.meter, weight)

    def distances(self, form: Form) -> Tensor:
        """(n,): how far from the target the table of a form of one ends; see `distance`."""
        return distance(self.trace(form).states[-1], self.target)

    def apart(self, forms: Sequence[Form]) -> list[Tensor]:
        """(n,) for every two of some forms of one: how far apart their tables end."""
        ends = [self.trace(form).states[-1] for form in forms]
        return [distance(one, other) for one, other in combinations(ends, 2)]

    @torch.no_grad()
    def trace(self, form: Form) -> Trace:
        """The run of a form of one."""
        keep, weights = form.keep[0].to(self.start), form.weights[0].to(self.start)
        states, outputs = [self.start], []
        for row, t in enumerate(form.times[0, :-1]):
            outputs.append(self._denoised(states[-1], t))
            x = keep[row] * states[-1]
            for weight, output in zip(weights[row], outputs, strict=False):
                x = x + weight * output
            states.append(x)
        return Trace(states, outputs)

    @torch.no_grad()
    def pulled_back(self, form: Form, trace: Trace, along: Tensor) -> Tensor:
        """(C, n, F): derivatives of <along, end>, for C vectors (C, n, ...), by the entries of a form of one
        in the order of `flat`, each sample's own. Backwards through its run, one row at a time: no more than
        the graph of one call on one batch is held."""
        states, outputs, rows = trace.states, trace.outputs, form.keep.shape[1]
        keep, weights = form.keep[0].to(self.start), form.weights[0].to(self.start)
        by = Form(*(along.new_zeros(*along.shape[:2], *part.shape[1:]) for part in form))
        later = along.new_zeros(rows + 1, *along.shape)  # derivatives by the states
        later[rows] = along
        for k in reversed(range(rows)):
            by.keep[..., k] = _dots(later[k + 1], states[k])
            for j in range(k + 1):
                by.weights[..., k, j] = _dots(later[k + 1], outputs[j])
            by_output = torch.einsum("r,r...->...", weights[k:, k], later[k + 1 :])
            # By a difference: most models are faster with one time for all, whose derivative is one for all.
            # The derivative by the state is taken there too, without a call of its own: off by about as much.
            width = self._rounding**0.5 * form.times[0, k]
            before = form.times[0, k] - width
            if k == 0:  # the first state is given
                beside = self._denoised(states[k], before)
            else:
                beside, by_state = self._through(states[k], before, by_output)
                later[k] = keep[k] * later[k + 1] + by_state
            by.times[..., k] = _dots(by_output, (outputs[k] - beside) / width.to(self.start))
        return flat(by)

    @torch.no_grad()
    def check_derivatives(self) -> None:
        """RuntimeError if derivatives by the state are not what differences say: where a network is hidden
        from autograd there is still the graph of what it is multiplied with and added to.

        For random signs s and g the gradient of <s, D(x, t)>, in the middle of the process, the slope of
        <s, D> less <g, e> along random directions e is normal of variance |error of g|^2/dimension."""
        rounding = self._rounding
        if rounding > COARSE:
            return
        sde = self.model.sde
        t = grids.log_snr(sde, 2).t[1]
        x = self.start * ((sde.alpha(t) ** 2 + sde.sigma(t) ** 2).sqrt() / sde.prior_std).to(self.start)
        generator = torch.Generator().manual_seed(0)
        signs = (2 * torch.randint(2, x.shape, generator=generator) - 1).to(x)
        gradient, width = self._through(x, t, signs[None])[1][0], rounding ** (1 / 3) * x.norm()
        lacking, slopes = [], []
        for _ in range(DIRECTIONS):
            e = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            step = width * e / e.norm()
            ahead, behind = self._denoised(x + step, t), self._denoised(x - step, t)
            slopes.append((signs * (ahead - behind)).sum() / (2 * width) * x.numel() ** 0.5)
            lacking.append(slopes[-1] - (gradient * e).sum() / e.norm() * x.numel() ** 0.5)
        error, size = (torch.stack(found).square().mean().sqrt() for found in (lacking, slopes))
        if bool(error > AGREEING * torch.maximum(gradient.norm(), size) + FLAT * signs.norm()):
            raise RuntimeError(
                "expected a model that can be differentiated by its state, found derivatives that "
                f"differences contradict (by {float(error):.2g} of {float(size):.2g}): " + REMEDY
            )

    @property
    def _rounding(self) -> float:
        """A network in float32 rounds as such when the states are float64."""
        return max(torch.finfo(dtype).eps for dtype in (self.start.dtype, self.model.dtype))

    def _through(self, x: Tensor, t: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, t), and derivatives of <along, D(x, t)> by x (C, n, ...)."""
        n, outputs, parts, t = len(self), [], [], t.to(x.device)
        for some in torch.arange(n, device=x.device).split(self.batch):
            model, state = self.model.narrowed(some, n), x[some]
            with torch.enable_grad():
                output = checked(model(state.requires_grad_(), t), state)
                parts.append(_gradients(model, output, state, t, along[:, some]))
            outputs.append(output.detach())
            self.meter.calls += 1
            self.meter.samples += len(some)
        return torch.cat(outputs), torch.cat(parts, 1)

    def _denoised(self, x: Tensor, t: Tensor) -> Tensor:
        made = []
        for some in torch.arange(len(self), device=x.device).split(self.batch):
            model = self.model.narrowed(some, len(self))
            made.append(checked(model(x[some], t.to(x.device)), x[some]))
            self.meter.calls += 1
            self.meter.samples += len(some)
        return torch.cat(made)


def _gradients(model: BaseDenoiser, output: Tensor, state: Tensor, t: Tensor, along: Tensor) -> Tensor:
    """Of <along, output> by the state, for C vectors. Raises RuntimeError for a model that depends on its
    state and has no graph that says how."""
    if output.requires_grad:
        return torch.stack([torch.autograd.grad(output, state, a, retain_graph=True)[0] for a in along])
    if bool((model(1.01 * state, t) != output).any()):
        raise RuntimeError(
            "expected a model that can be differentiated by its state, found an output without a graph: "
            + REMEDY
        )
    return torch.zeros_like(along)


def _dots(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).flatten(2).sum(2)


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
