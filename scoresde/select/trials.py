"""Candidates on a law whose denoiser is known: deterministic tables by the distance of samples from the exact
solution, stochastic ones by that of the output's law from the data's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import solvers
from ..denoiser import BaseDenoiser
from ..guidance.scales import Scale, at
from ..laws import ExactDenoiser, Gaussian, Law
from ..sampling import default_grid
from ..schedules import Time
from ..sde import LinearSDE, like
from ..tableau import Tableau
from .candidates import Candidate
from .coupling import NUMBERS, law_distances
from .surrogate import Surrogate
from .tables import Stack, maps, run_stack, stack

FINALISTS = 64  # candidates that are tried a second time, on more noises
SCREEN = 16  # noises of the first time
HOPELESS = 20.0  # times the least error on the Gaussian: such stochastic solvers are not tried further
QUASI = 21201  # the most dimensions that torch's Sobol sequence has
REFERENCE = solvers.exponential(5, corrector=6, stored="flow", variable="sigma")
REFERENCE_STEPS = 200


class ByClass(BaseDenoiser):
    """`D + scale (D_k - D)` of a mixture, sample i of component `labels[i]`; batches of a multiple of their
    number repeat them."""

    def __init__(self, exact: ExactDenoiser, labels: Tensor, scale: Scale) -> None:
        super().__init__()
        self.exact, self.sde, self.labels, self.scale = exact, exact.sde, labels, scale

    def forward(self, x: Tensor, t: Time) -> Tensor:
        labels = self.labels.repeat(len(x) // len(self.labels))
        without, of_class = self.exact(x, t), self.exact.of_component(x, t, labels)
        scale = at(self.scale, self.sde, torch.as_tensor(t, dtype=torch.float64))
        return without + like(scale, x) * (of_class - without)


class Problem(NamedTuple):
    """What candidates are tried on."""

    sde: LinearSDE
    end: float | None
    surrogate: Surrogate
    noises: int
    seed: int
    guidance: Scale | None

    @property
    def law(self) -> Law:
        return self.surrogate.law

    @property
    def last(self) -> float:
        return float(self.sde.default_end if self.end is None else self.end)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def model(self, n: int) -> BaseDenoiser:
        """The denoiser of the first `n` of all samples."""
        exact = self.law.denoiser(self.sde)
        if self.guidance is None:
            return exact
        count = max(n, self.noises)
        labels = torch.multinomial(self.law.weights, count, replacement=True, generator=self.generator())
        return ByClass(exact, labels[:n], self.guidance)


class Entry(NamedTuple):
    candidate: Candidate
    steps: int
    table: Tableau


def exact_squares(problem: Problem, tables: Stack, mean: Tensor, variances: Tensor, encode: bool) -> Tensor:
    """(T, L) mean squared distance from the probability-flow solution on N(m, v), from the prior, or from
    data.

    The flow keeps `(x - alpha m)/V^(1/2)`, V = alpha^2 v + sigma^2."""
    sde = problem.sde
    times = torch.tensor([float(sde.t_max), problem.last], dtype=torch.float64)
    start, stop = times.flip(0) if encode else times
    table = maps(tables, sde, variances)
    V_start, V_stop = (sde.alpha(t) ** 2 * variances + sde.sigma(t) ** 2 for t in (start, stop))
    slope = (V_stop / V_start).sqrt()
    shift = sde.alpha(stop) - slope * sde.alpha(start)
    center, spread = (sde.alpha(start), V_start) if encode else (0.0, sde.prior_std**2)
    off = table.slope - slope
    return off**2 * spread + (off * center + table.constant - shift) ** 2 * mean**2


def law_squares(problem: Problem, tables: Stack, mean: Tensor, variances: Tensor) -> Tensor:
    """(T, L) squared 2-Wasserstein distance between the output's law from the prior and that of x_end on
    N(m, v)."""
    sde, table = problem.sde, maps(tables, problem.sde, variances)
    alpha, sigma = sde.alpha(problem.last), sde.sigma(problem.last)
    found = ((table.slope * sde.prior_std) ** 2 + table.spread**2).sqrt()
    wanted = (alpha**2 * variances + sigma**2).sqrt()
    return (found - wanted) ** 2 + (table.constant - alpha) ** 2 * mean**2


def axes_of(law: Law) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and variances along the principal axes of a law, and the axes in columns (None: the
    coordinates)."""
    if isinstance(law, Gaussian):
        basis, values = law.eigen()
    else:
        values, basis = torch.linalg.eigh(law.cov)
        values = values.clamp_min(0)
    mean = law.mean.flatten()
    return (mean if basis is None else basis.T @ mean), values, basis


def finite(errors: Tensor) -> Tensor:
    return torch.where(errors.isfinite(), errors, math.inf)


def _outside(problem: Problem, tables: Stack, encode: bool, laws: bool) -> Tensor:
    """(T,) the squared error of all coordinates that the surrogate's law leaves out, together."""
    s = problem.surrogate
    if not s.others:
        return torch.zeros(len(tables.times), dtype=torch.float64)
    mean, variances = torch.zeros(1, dtype=torch.float64), torch.tensor([s.rest], dtype=torch.float64)
    squares = (
        law_squares(problem, tables, mean, variances)
        if laws
        else exact_squares(problem, tables, mean, variances, encode)
    )
    return s.others * squares[:, 0]


def distances(problem: Problem, entries: list[Entry], exact: Exact | None, encode: bool) -> list[float]:
    """Of samples from the exact solution; on a Gaussian (where none is given) root mean squares."""
    if not entries:
        return []
    if exact is None:
        mean, variances, _ = axes_of(problem.law)
        tables = stack([e.table for e in entries])
        total = exact_squares(problem, tables, mean, variances, encode).sum(1)
        total = total + _outside(problem, tables, encode, laws=False)
        return finite((total / problem.surrogate.dim).sqrt()).tolist()

    def medians(listed: list[Entry], n: int) -> Tensor:
        return trial(problem, listed, exact, n, encode).each.median(1).values

    return _in_two_trials(entries, medians, SCREEN, problem.noises)


def _in_two_trials(
    entries: list[Entry], errors_of: Callable[[list[Entry], int], Tensor], few: int, many: int
) -> list[float]:
    """The errors on a few noises, and those of the finalists on many."""
    errors = errors_of(entries, min(few, many))
    if many > few:
        best = errors.argsort()[:FINALISTS]
        errors[best] = errors_of([entries[int(i)] for i in best], many)
    return errors.tolist()


class Exact(NamedTuple):
    """States (n, D) and where the exact solution takes them."""

    x: Tensor
    wanted: Tensor


def exact_solution(problem: Problem, calls: int, encode: bool) -> Exact:
    """As many as there are noises, from the prior or from the law of x_end; by far more than `calls` of the
    candidates."""
    sde, law, n = problem.sde, problem.law, problem.noises
    grid = default_grid(sde, max(REFERENCE_STEPS, 4 * calls), problem.end)
    if encode:
        x = law.marginal(sde, problem.last).sample(n, generator=problem.generator()).reshape(n, -1)
        grid = grid.reversed()
    else:
        x = _normals(n, law.dim, problem.seed) * sde.prior_std
    return Exact(x, REFERENCE.solve(problem.model(n), x.view(n, *law.event_shape), grid).x.reshape(n, -1))


class Trial(NamedTuple):
    """Distances (T, n) of each sample, per root of the dimension, and errors (T, n, R)."""

    each: Tensor
    errors: Tensor


def trial(problem: Problem, entries: list[Entry], exact: Exact, n: int, encode: bool) -> Trial:
    """Every table from the first n states against the exact solution."""
    model, errors, squares = _flat(problem.model(n), problem.law), [], []
    for part in _parts(entries, n, problem.law):
        tables = stack([e.table for e in part])
        errors.append(run_stack(tables, model, exact.x[:n]) - exact.wanted[:n])
        squares.append(errors[-1].square().sum(2) + _outside(problem, tables, encode, laws=False)[:, None])
    each = finite((torch.cat(squares) / problem.surrogate.dim).sqrt())
    return Trial(each, torch.cat(errors))


def _flat(model: BaseDenoiser, law: Law) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser on states (n, D)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return model(x.view(len(x), *law.event_shape), t).reshape(x.shape)

    return denoise


def _parts(entries: list[Entry], n: int, law: Law) -> list[list[Entry]]:
    size = max(1, NUMBERS // (n * law.dim * (1 + min(len(law.means), 32))))
    return [entries[i : i + size] for i in range(0, len(entries), size)]


def _normals(n: int, count: int, seed: int) -> Tensor:
    """(n, count) standard normals, evenly spread: a scrambled Sobol sequence, as far as there is one."""
    quasi = min(count, QUASI)
    u = torch.quasirandom.SobolEngine(quasi, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    rest = torch.rand(n, count - quasi, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.special.ndtri(torch.cat([u, rest], 1).clamp(1e-12, 1 - 1e-12))


def laws_apart(problem: Problem, entries: list[Entry]) -> list[float]:
    """2-Wasserstein distances of the outputs' laws.

    On a Gaussian they are exact. On a mixture they are measured on samples; below the standard error, where
    chance decides, the exact distance on the Gaussian of the same mean and covariance does. Those that are
    among the worse half there, and hopeless, are not run."""
    if not entries:
        return []
    mean, variances, _ = axes_of(problem.law)
    tables = stack([e.table for e in entries])
    gaussian = finite(law_squares(problem, tables, mean, variances).sum(1)) / problem.surrogate.dim
    outside = finite(_outside(problem, tables, encode=False, laws=True)) / problem.surrogate.dim
    errors = (gaussian + outside).sqrt()
    if isinstance(problem.law, Gaussian):
        return errors.tolist()
    limit = torch.maximum(HOPELESS**2 * gaussian.min(), gaussian.median())
    share = problem.law.dim / problem.surrogate.dim

    def errors_of(listed: list[int], n: int) -> Tensor:
        listed_tables = [entries[j].table for j in listed]
        found = law_distances(problem.sde, problem.law, listed_tables, n, problem.generator())
        least = torch.minimum(gaussian[listed], finite(found.errors * share))
        return (torch.maximum(finite(found.squares * share), least) + outside[listed]).sqrt()

    for finalists, samples in ((len(entries), 2 * problem.noises), (FINALISTS, 8 * problem.noises)):
        best = [j for j in errors.argsort()[:finalists].tolist() if gaussian[j] <= limit]
        errors[best] = errors_of(best, samples)
    return errors.tolist()
