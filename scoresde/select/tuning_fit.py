"""Least squares of a table's parameters against reference trajectories: Gauss-Newton steps from forward
evaluations of the model alone, robust against samples that end elsewhere.

    minimise over p   mean_i c^2 log(1 + e_i(p)^2/c^2) + r |p|^2,    e_i the distance of sample i from its end

(Cauchy's loss, by weights `1/(1 + e_i^2/c^2)`). c is 5 times the root mean square of the errors that are no
flips, so that the bulk and its tail count, and samples that end in another mode hardly do. Tables are judged
on other noises than they are fitted on, and the best one there is what is found.

Derivatives are forward differences, which are nearly all of the cost. Where every step takes them on a few
noises that no step had before, what these say of the loss near by is added to what earlier ones said
(incremental Gauss-Newton, the extended Kalman filter of Bertsekas 1996, doi 10.1137/S1052623494268522): k
steps are nearly a fit on the noises of all of them, at the price of one step on all. Where steps keep to the
same noises this is Levenberg-Marquardt, which goes further, but in the end to what suits these noises alone.

A few samples in thousands are most of a mean square, and which these are is much the same for all tables:
those between two modes. So the noises of both kinds are drawn from many more by `importance`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..tableau import Tableau
from .comparison import MANY_FLIPS
from .tuning_form import Form, Space
from .tuning_runs import Noises, Trace

WIDTH = 5.0  # c in root mean squares
RIDGE = 1e-5  # a parameter of 1 costs this share of the loss
STRAY = 0.25  # share of the loss by which a step may miss what its noises' own equations say
MEMORY = 32  # steps: the last one is at least one of so many in what is known
IDLE_GAIN = 1e-3
IDLE, STALE = 5, 12  # steps in a row that promise less, or that give no better table on the other noises
FIRST, SMALLEST, LARGEST = 1e-2, 1e-9, 1e6  # damping


class Errors(NamedTuple):
    """Of samples: root mean square without flips, share of flips (distances above a threshold), median."""

    rms: float
    flips: float
    median: float

    @classmethod
    def of(cls, errors: Tensor, flip: float, weight: Tensor | None = None) -> Errors:
        """Of errors (n,), each of them of `weight` (n,) noises."""
        weight = torch.ones_like(errors) if weight is None else weight
        far = errors > flip
        rms = _mean(errors[~far].square(), weight[~far]) ** 0.5 if not bool(far.all()) else math.inf
        order = errors.argsort()
        middle = int((weight[order].cumsum(0) < weight.sum() / 2).sum())
        return cls(rms, _mean(far, weight), errors[order[middle]].item())

    @property
    def rank(self) -> float:
        """What tables are chosen by: one that loses more than a sample in ten is not chosen for the rest."""
        return self.rms if self.flips <= MANY_FLIPS else self.rms + self.flips


NOTHING = Errors(math.inf, 1.0, math.inf)


@dataclass
class Best:
    """The best parameters (P,) so far on the noises that none was fitted on, their errors there, (rms fitted
    on, rms judged on) of every iteration, and whether the fit had time to end."""

    space: Space
    parameters: Tensor
    errors: Errors = NOTHING
    history: list[tuple[float, float]] = field(default_factory=list)
    done: bool = False

    @property
    def table(self) -> Tableau:
        """The table of the parameters."""
        return self.space.table(self.parameters)

    @property
    def form(self) -> Form:
        """The same as a form of one."""
        return self.space.forms(self.parameters[None])


class Point(NamedTuple):
    """Parameters (P,), their run on some noises, and its residuals (n, d)."""

    parameters: Tensor
    noises: Noises
    trace: Trace
    residuals: Tensor

    @property
    def errors(self) -> Tensor:
        """(n,): see `Noises.errors`."""
        return self.residuals.double().norm(dim=1)


@dataclass(frozen=True, eq=False)
class Fit:
    """Noises to fit on, `draw(k)` those of step k, and to judge on, the distance that is a flip, the time (of
    `perf_counter`) to stop at, and who is told of every step."""

    draw: Callable[[int], Noises]
    judge: Noises
    flip: float
    until: float
    tell: Callable[[Best], None]

    def __call__(self, best: Best) -> None:
        """Fit from where `best` is. What is better on the noises that are not fitted on is put there at once,
        whatever ends the fit."""
        space, parameters = best.space, best.parameters
        best.errors = self._judged(best.form)
        known, noises, damping, idle, stale = None, None, FIRST, 0, 0
        for k in itertools.count():
            before, noises, started = noises, self.draw(k), time.perf_counter()
            here = _at(noises, space, parameters)
            # Slopes share half of their runs with `here`. Without time for them there is none for a step.
            enough = (time.perf_counter() - started) * len(space) / 4
            if time.perf_counter() + enough > self.until:
                return
            local = Local.of(here, _slopes(space, here), self.flip)
            # The same noises again say nothing new.
            known = local.equations if noises is before else local.equations.after(known, k)
            there, damping = _step(space, here, local, known, damping)
            if there is None:
                break
            step = there.parameters - parameters
            idle = idle + 1 if known.promised(step) < IDLE_GAIN * local.loss else 0
            parameters, known = there.parameters, known.moved(step)
            errors = self._judged(space.forms(parameters[None]))
            stale = 0 if errors.rank < best.errors.rank else stale + 1
            if errors.rank < best.errors.rank:
                best.parameters, best.errors = parameters, errors
            best.history.append((Errors.of(here.errors, self.flip, noises.weight).rms, errors.rms))
            self.tell(best)
            if idle == IDLE or stale == STALE:
                break
        best.done = True

    def _judged(self, form: Form) -> Errors:
        return Errors.of(self.judge.distances(form), self.flip, self.judge.weight)


def _step(
    space: Space, here: Point, local: Local, known: Equations, damping: float
) -> tuple[Point | None, float]:
    """Where what is known leads, with as much damping as it takes for the loss on the noises at hand to
    change nearly as their own equations say, or if nothing else is known, to fall; nowhere if none is enough.
    And the damping of the next step."""
    while damping < LARGEST:
        step = known.step(damping)
        own = local.equations.promised(step)
        try:
            there = _at(here.noises, space, here.parameters + step)
        except ValueError:  # steps of the grid that vanish
            there = None
        missed = own - (local.loss - local.loss_at(there)) if there else math.inf
        if there and missed < (own if known is local.equations else STRAY * local.loss):
            return there, max(damping / 5, SMALLEST)
        damping *= 4
    return None, damping


def _at(noises: Noises, space: Space, parameters: Tensor) -> Point:
    trace = noises.trace(space.forms(parameters[None]))
    return Point(parameters, noises, trace, _residuals(noises, trace.states[-1])[0])


def _residuals(noises: Noises, ends: Tensor) -> Tensor:
    """(M, n, d) of ends (M, n, ...): a sample's error is the norm of its residuals."""
    flat = (ends - noises.target).flatten(2)
    return flat / flat.shape[2] ** 0.5


def _slopes(space: Space, here: Point) -> Tensor:
    """(P, n, d): forward differences of the residuals by every parameter."""
    width = torch.finfo(here.noises.start.dtype).eps ** (1 / 3)
    around = here.parameters + width * torch.eye(len(here.parameters), dtype=torch.float64)
    ends = here.noises.ends(space.forms(torch.cat([here.parameters[None], around])), here.trace)
    return (_residuals(here.noises, ends[1:]) - here.residuals) / width


class Equations(NamedTuple):
    """A quadratic in steps from a place, `2 gradient s + s curvature s`: (P,), (P, P)."""

    gradient: Tensor
    curvature: Tensor

    def step(self, damping: float) -> Tensor:
        """The damped Gauss-Newton step."""
        return -torch.linalg.solve(
            self.curvature + damping * torch.diag(self.curvature.diag()), self.gradient
        )

    def promised(self, step: Tensor) -> float:
        """By how much the loss should get less."""
        return -float(2 * self.gradient @ step + step @ self.curvature @ step)

    def moved(self, step: Tensor) -> Equations:
        """The same quadratic from another place."""
        return self._replace(gradient=self.gradient + self.curvature @ step)

    def after(self, known: Equations | None, k: int) -> Equations:
        """The mean of these of step k, counted from 0, and those of the steps before, which count the more
        the later they were: in proportion to 1, 2, 3, ..., until these are one in MEMORY."""
        if known is None:
            return self
        new = max(2 / (k + 2), 1 / MEMORY)
        return Equations(*(new * now + (1 - new) * old for now, old in zip(self, known, strict=True)))


class Local(NamedTuple):
    """The loss at a point for its width c, and the normal equations."""

    width: float
    weight: Tensor
    ridge: float
    loss: float
    equations: Equations

    @classmethod
    def of(cls, here: Point, slopes: Tensor, flip: float) -> Local:
        errors, weight = here.errors, here.noises.weight
        weight = torch.ones_like(errors) if weight is None else weight
        width = max(WIDTH * Errors.of(errors, flip, weight).rms, torch.finfo(torch.float64).tiny)
        ridge = RIDGE * _mean(_cauchy(errors, width), weight)
        root = (weight / weight.sum() / (1 + (errors / width) ** 2)).sqrt()[:, None]
        weighted = (slopes.double() * root).flatten(1)
        sums = (weighted @ (here.residuals.double() * root).flatten()).cpu(), (weighted @ weighted.T).cpu()
        gradient = sums[0] + ridge * here.parameters
        curvature = sums[1] + ridge * torch.eye(len(gradient), dtype=torch.float64)
        made = cls(width, weight, ridge, 0.0, Equations(gradient, curvature))
        return made._replace(loss=made.loss_at(here))

    def loss_at(self, point: Point) -> float:
        """What is minimised, by the width and the ridge of this place; NaN if an end is not finite."""
        loss = _mean(_cauchy(point.errors, self.width), self.weight)
        return loss + self.ridge * point.parameters.square().sum().item()


def importance(runs: Sequence[Tensor], flip: float) -> Tensor:
    """(n,) how much each noise matters, by distances (n,) of runs from it: one half is the same for all, the
    other a noise's share of the weighted squares e^2/(1 + e^2/c^2) in a fit's equations, in the mean over
    runs. Drawn with such probabilities (the best ones for a sum are those ~ its terms) no noise weighs more
    than twice what it would if drawn evenly."""
    tiny = torch.finfo(torch.float64).tiny
    shares = torch.zeros_like(runs[0])
    for errors in runs:
        width = min(max(WIDTH * Errors.of(errors, flip).rms, tiny), flip)
        squares = 1 / (1 + (width / errors) ** 2)
        shares += squares / squares.mean().clamp_min(tiny) / len(runs)
    return (1 + shares) / 2


def _cauchy(errors: Tensor, width: float) -> Tensor:
    return width**2 * torch.log1p((errors / width) ** 2)


def _mean(values: Tensor, weight: Tensor) -> float:
    return ((values * weight).sum() / weight.sum()).item()
