"""Least squares of a table's parameters against the probability flow's ends: Levenberg-Marquardt, robust
against samples that end elsewhere.

    minimise over p   mean_i c^2 (1 - exp(-e_i(p)^2/c^2)) + r |p|^2,     e_i the distance of sample i

from its end (Welsch's loss, by weights `exp(-e_i^2/c^2)`; Holland & Welsch 1977, doi
10.1080/03610927708827533), with c 0.3 of the distance that is a flip: errors up to there count as they do in
a root mean square, and flips do not. A loss that goes on growing, such as Cauchy's, turns a flip into a
sample that nearly is one, for which the root mean square of the others pays. Tables are judged on other
noises than they are fitted on, and the best one there is what is found.

A few samples in thousands are most of a mean square, and which these are is much the same for all tables:
those between two modes. So the noises of both kinds are drawn from many more by `importance`.

The normal equations are those of Gauss and Newton by back-propagation: for an end x_i, its residuals r_i and
Jacobian J_i the gradient takes J_i^T r_i of every sample, and the curvature J_i^T J_i, which is the mean of
J_i^T s s^T J_i over random signs s (Hutchinson 1990, doi 10.1080/03610919008812866; all axes in place of
signs where these are not more). So an iteration costs the same however many parameters there are.
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
PROBES = 2  # random vectors of signs for each sample
IDLE_GAIN = 1e-3
IDLE, STALE = 15, 30  # iterations in a row that gain less, or that give no better table on the other noises
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
    """Parameters (P,) and their form, its run on the noises that are fitted on, and the residuals (n, d)."""

    parameters: Tensor
    form: Form
    trace: Trace
    residuals: Tensor

    @property
    def errors(self) -> Tensor:
        """(n,): as `distance`."""
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
        here = self._at(space, best.parameters)
        best.errors = self._judged(here.form)
        # If there is no time for derivatives and a run, there is none for a step.
        enough = (time.perf_counter() - started) * 3
        damping, idle, stale, local = FIRST, 0, 0, None
        while idle < IDLE and stale < STALE and damping < LARGEST:
            if time.perf_counter() + (enough if local is None else 0) > self.until:
                return
            if local is None:
                local = self._local(space, here, len(best.history))
            step = local.step(damping)
            try:
                there = self._at(space, here.parameters + step)
            except ValueError:  # steps of the grid that vanish
                there = None
            gain = local.loss - local.loss_at(there) if there else -math.inf
            if not (there and gain > 0):
                damping *= 4
                continue
            here, damping = there, max(damping / 5, SMALLEST)
            errors = self._judged(here.form)
            stale = 0 if errors.rank < best.errors.rank else stale + 1
            if errors.rank < best.errors.rank:
                best.parameters, best.errors = here.parameters, errors
            idle = 0 if gain > IDLE_GAIN * local.loss else idle + 1
            fitted = Errors.of(here.errors, self.flip, self.train.weight)
            best.history.append((fitted.rms, errors.rms))
            self.tell(best)
            local = None
        best.done = True

    def _judged(self, form: Form) -> Errors:
        return Errors.of(self.judge.distances(form), self.flip, self.judge.weight)

    def _at(self, space: Space, parameters: Tensor) -> Point:
        form = space.forms(parameters[None])
        trace = self.train.trace(form)
        return Point(parameters, form, trace, self._residuals(trace.states[-1]))

    def _residuals(self, ends: Tensor) -> Tensor:
        """(n, d) of ends (n, ...): a sample's error is the norm of its residuals."""
        off = (ends - self.train.target).flatten(1)
        return off / off.shape[1] ** 0.5

    def _local(self, space: Space, here: Point, number: int) -> Local:
        """The normal equations, by other signs for another number."""
        start = self.train.start
        along = torch.cat([here.residuals.view_as(start)[None], probes(start, number)])
        pulled = self.train.pulled_back(here.form, here.trace, along)
        slopes = pulled.double().cpu() @ space.jacobian(here.parameters) / start[0].numel() ** 0.5
        return Local.of(here, slopes[0], slopes[1:], self.flip, self.train.weight)


def probes(like: Tensor, number: int) -> Tensor:
    """(C, n, ...) vectors s for samples (n, ...), with s s^T summed over C of mean 1: random signs, or all
    axes of what has no more of these."""
    d = like[0].numel()
    if d <= PROBES:
        axes = torch.eye(d, dtype=like.dtype, device=like.device)
        return axes.view(d, 1, *like.shape[1:]).expand(d, *like.shape)
    generator = torch.Generator().manual_seed(number)
    signs = 2 * torch.randint(2, (PROBES, *like.shape), generator=generator) - 1
    return (signs / PROBES**0.5).to(like)


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
    def of(
        cls, here: Point, slopes: Tensor, probed: Tensor, flip: float, weight: Tensor | None = None
    ) -> Local:
        """From J_i^T r_i (n, P) of every sample, and J_i^T s (C, n, P)."""
        errors = here.errors
        weight = torch.ones_like(errors) if weight is None else weight
        width = _width(Errors.of(errors, flip, weight).rms, flip)
        ridge = RIDGE * _mean(_welsch(errors, width), weight)
        share = (weight / weight.sum() * torch.exp(-((errors / width) ** 2))).cpu()
        rooted = (share.sqrt()[:, None] * probed).flatten(0, 1)
        gradient = share @ slopes + ridge * here.parameters
        curvature = rooted.T @ rooted + ridge * torch.eye(len(gradient), dtype=torch.float64)
        made = cls(width, weight, ridge, 0.0, gradient, curvature)
        return made._replace(loss=made.loss_at(here))

    def loss_at(self, point: Point) -> float:
        """What is minimised, by the width and the ridge of this place; NaN if an end is not finite."""
        if not bool(point.errors.isfinite().all()):
            return math.nan
        loss = _mean(_welsch(point.errors, self.width), self.weight)
        return loss + self.ridge * point.parameters.square().sum().item()

    def step(self, damping: float) -> Tensor:
        """The damped Gauss-Newton step."""
        damped = self.curvature + damping * torch.diag(self.curvature.diag())
        return -torch.linalg.solve(damped, self.gradient)


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
