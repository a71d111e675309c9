"""Least squares of a table's parameters against reference trajectories: Levenberg-Marquardt from forward
evaluations of the model alone, robust against samples that end elsewhere.

    minimise over p   mean_i c^2 (1 - exp(-e_i(p)^2/c^2)) + r |p|^2,     e_i the distance of sample i

from its end (Welsch's loss, by weights `exp(-e_i^2/c^2)`; Holland & Welsch 1977, doi
10.1080/03610927708827533), with c 0.3 of the distance that is a flip: errors up to there count as they do in
a root mean square, and flips do not. A loss that goes on growing, such as Cauchy's, turns a flip into a
sample that nearly is one, for which the root mean square of the others pays. Tables are judged on other
noises than they are fitted on, and the best one there is what is found.

A few samples in thousands are most of a mean square, and which these are is much the same for all tables:
those between two modes. So the noises of both kinds are drawn from many more by `importance`.

Derivatives are forward differences; between them Broyden's rank-one updates (1965, doi
10.1090/S0025-5718-1965-0198670-6), which cost no call of the model, as long as they predict what happens.
"""

from __future__ import annotations

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

WIDTH = 0.3  # c as a share of the distance that is a flip,
BULK = 2.0, 1e3  # and at least and at most so many root mean squares of the errors that are no flips
SPREAD = 5.0  # root mean squares up to which a larger error is drawn more often
RIDGE = 1e-5  # a parameter of 1 costs this share of the loss
TRUST = 0.5  # share of the predicted gain with which an updated Jacobian is used again
IDLE_GAIN = 1e-3
IDLE, STALE = 5, 12  # iterations in a row that gain less, or that give no better table on the other noises
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
    """Parameters (P,), their run on the noises that are fitted on, and its residuals (n, d)."""

    parameters: Tensor
    trace: Trace
    residuals: Tensor

    @property
    def errors(self) -> Tensor:
        """(n,): see `Noises.errors`."""
        return self.residuals.double().norm(dim=1)


@dataclass(frozen=True, eq=False)
class Fit:
    """Noises to fit on and to judge on, the distance that is a flip, the time (of `perf_counter`) to stop at,
    and who is told of every iteration."""

    train: Noises
    judge: Noises
    flip: float
    until: float
    tell: Callable[[Best], None]

    def __call__(self, best: Best) -> None:
        """Fit from where `best` is. What is better on the noises that are not fitted on is put there at once,
        whatever ends the fit."""
        space, started = best.space, time.perf_counter()
        here, best.errors = self._at(space, best.parameters), self._judged(best.form)
        # Slopes share half of their runs with `here`: if there is no time for them, there is none for a step.
        enough = (time.perf_counter() - started) * len(space) / 4
        damping, idle, stale = FIRST, 0, 0
        slopes, exact = None, False
        while idle < IDLE and stale < STALE and damping < LARGEST:
            if time.perf_counter() + (enough if slopes is None else 0) > self.until:
                return
            if slopes is None:
                slopes, exact = self._slopes(space, here), True
            local = Local.of(here, slopes, self.flip, self.train.weight)
            step, promised = local.step(damping)
            try:
                there = self._at(space, here.parameters + step)
            except ValueError:  # steps of the grid that vanish
                there = None
            gain = local.loss - local.loss_at(there) if there else -math.inf
            if there and gain > 0:
                change = there.residuals - here.residuals
                here, damping = there, max(damping / 5, SMALLEST)
                errors = self._judged(space.forms(here.parameters[None]))
                stale = 0 if errors.rank < best.errors.rank else stale + 1
                if errors.rank < best.errors.rank:
                    best.parameters, best.errors = here.parameters, errors
                idle = 0 if gain > IDLE_GAIN * local.loss else idle + exact
                fitted = Errors.of(here.errors, self.flip, self.train.weight)
                best.history.append((fitted.rms, errors.rms))
                self.tell(best)
                if gain > max(TRUST * promised, IDLE_GAIN * local.loss):
                    slopes, exact = _updated(slopes, step, change), False
                    continue
            elif exact:
                damping *= 4
                continue
            slopes = None
        best.done = True

    def _judged(self, form: Form) -> Errors:
        return Errors.of(self.judge.distances(form), self.flip, self.judge.weight)

    def _at(self, space: Space, parameters: Tensor) -> Point:
        trace = self.train.trace(space.forms(parameters[None]))
        return Point(parameters, trace, self._residuals(trace.states[-1])[0])

    def _residuals(self, ends: Tensor) -> Tensor:
        """(M, n, d) of ends (M, n, ...): a sample's error is the norm of its residuals."""
        flat = (ends - self.train.target).flatten(2)
        return flat / flat.shape[2] ** 0.5

    def _slopes(self, space: Space, here: Point) -> Tensor:
        """(P, n, d): forward differences of the residuals by every parameter."""
        width = torch.finfo(self.train.start.dtype).eps ** (1 / 3)
        around = here.parameters + width * torch.eye(len(here.parameters), dtype=torch.float64)
        ends = self.train.ends(space.forms(torch.cat([here.parameters[None], around])), here.trace)
        return (self._residuals(ends[1:]) - here.residuals) / width


def _updated(slopes: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Slopes that give `change` (n, d) along `step` (P,), and are otherwise as they were (Broyden)."""
    along = (step / step.square().sum()).to(slopes.device, slopes.dtype)
    missed = change - torch.einsum("p,pnd->nd", step.to(slopes.device, slopes.dtype), slopes)
    return slopes + along[:, None, None] * missed


class Local(NamedTuple):
    """The loss at a point for its width c and samples of some weight (n,), and the normal equations: gradient
    (P,) and curvature (P, P), both halved."""

    width: float
    weight: Tensor
    ridge: float
    loss: float
    gradient: Tensor
    curvature: Tensor

    @classmethod
    def of(cls, here: Point, slopes: Tensor, flip: float, weight: Tensor | None = None) -> Local:
        errors = here.errors
        weight = torch.ones_like(errors) if weight is None else weight
        width = _width(Errors.of(errors, flip, weight).rms, flip)
        ridge = RIDGE * _mean(_welsch(errors, width), weight)
        root = (weight / weight.sum() * torch.exp(-((errors / width) ** 2))).sqrt()[:, None]
        weighted = (slopes.double() * root).flatten(1)
        sums = (weighted @ (here.residuals.double() * root).flatten()).cpu(), (weighted @ weighted.T).cpu()
        gradient = sums[0] + ridge * here.parameters
        curvature = sums[1] + ridge * torch.eye(len(gradient), dtype=torch.float64)
        made = cls(width, weight, ridge, 0.0, gradient, curvature)
        return made._replace(loss=made.loss_at(here))

    def loss_at(self, point: Point) -> float:
        """What is minimised, by the width and the ridge of this place; NaN if an end is not finite."""
        if not bool(point.errors.isfinite().all()):
            return math.nan
        loss = _mean(_welsch(point.errors, self.width), self.weight)
        return loss + self.ridge * point.parameters.square().sum().item()

    def step(self, damping: float) -> tuple[Tensor, float]:
        """The damped Gauss-Newton step, and what the loss should gain by it."""
        damped = self.curvature + damping * torch.diag(self.curvature.diag())
        step = -torch.linalg.solve(damped, self.gradient)
        return step, -float(2 * self.gradient @ step + step @ self.curvature @ step)


def importance(runs: Sequence[Tensor], flip: float) -> Tensor:
    """(n,) how much each noise matters, by distances (n,) of runs from it: one half is the same for all, the
    other a noise's share of the squares e^2/(1 + e^2/w^2), w of 5 root mean squares, in the mean over runs,
    for what flips in one of them may count in another. Drawn with such probabilities (the best ones for a sum
    are those ~ its terms) no noise weighs more than twice what it would if drawn evenly."""
    tiny = torch.finfo(torch.float64).tiny
    shares = torch.zeros_like(runs[0])
    for errors in runs:
        width = min(max(SPREAD * Errors.of(errors, flip).rms, tiny), flip)
        squares = 1 / (1 + (width / errors) ** 2)
        shares += squares / squares.mean().clamp_min(tiny) / len(runs)
    return (1 + shares) / 2


def _width(rms: float, flip: float) -> float:
    low, high = (max(k * rms, torch.finfo(torch.float64).tiny) for k in BULK)
    return min(max(WIDTH * flip, low), high)


def _welsch(errors: Tensor, width: float) -> Tensor:
    return -(width**2) * torch.expm1(-((errors / width) ** 2))


def _mean(values: Tensor, weight: Tensor) -> float:
    return ((values * weight).sum() / weight.sum()).item()
