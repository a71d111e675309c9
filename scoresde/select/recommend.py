"""Which solver and grid, without a single network call: every candidate is tried on a law that stands for the
data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import solvers
from ..denoiser import BaseDenoiser
from ..guidance.scales import Scale, at, checked_scale
from ..laws import ExactDenoiser, Gaussian, Law
from ..likelihood import Hutchinson, log_prob
from ..sampling import default_grid
from ..schedules import Time
from ..sde import LinearSDE, like
from ..solvers.base import TableSolver
from ..tableau import Tableau
from .candidates import GRIDS, Candidate, GridFunction, pool
from .surrogate import Surrogate, checked_batch, kernel_surrogate, mixture_surrogate
from .tables import Stack, maps, run_stack, stack

Need = Literal["samples", "encode", "likelihood", "diversity"]
Data = Tensor | Law | Surrogate | tuple[Tensor, Tensor]

ENOUGH = 20  # samples for each dimension, for a mixture
FINALISTS = 64  # candidates that are tried a second time, on more noises
SCREEN = 16  # noises of the first time
NUMBERS = 2**21  # that are held at a time, about
HOPELESS = 20.0  # times the least error on the Gaussian: such stochastic solvers are not tried further
DIRECTIONS = 64  # that distributions are compared along
QUASI = 21201  # the most dimensions that torch's Sobol sequence has
OVERHEAD = 7  # calls of a likelihood on a fixed grid that are not steps
FLIP = 0.3  # standard deviations: a sample further off has most likely gone to another mode
USUAL = "dpmpp(2) on log_snr"  # what people use
ORDERS = (2, 3, 4, 5)
REFERENCE = solvers.exponential(5, corrector=6, stored="flow", variable="sigma")
REFERENCE_STEPS = 200


class DensityRule(NamedTuple):
    """How `likelihood.log_prob` integrates: the order of its method and a grid."""

    order: int
    grid: GridFunction
    grid_name: str

    @property
    def name(self) -> str:
        return f"log_prob(order={self.order}) on {self.grid_name}"

    def __repr__(self) -> str:
        return self.name


class Ranked(NamedTuple):
    """A candidate, its grid steps, and its expected error."""

    candidate: Candidate | DensityRule
    steps: int
    error: float


@dataclass(frozen=True)
class Recommendation:
    """A ranking of candidates, best first, and why.

    ranking    candidates with their steps and errors: for deterministic solvers the distance from the exact
               solution, root mean square per coordinate, median over noises (on a Gaussian the root mean
               square); for stochastic solvers the 2-Wasserstein distance of the output's law per root of the
               dimension; for likelihoods the median error in nats per dimension
    why        in words
    surrogate  of the data
    """

    sde: LinearSDE
    calls: int
    need: str
    end: float | None
    seed: int
    ranking: tuple[Ranked, ...]
    why: str
    surrogate: Surrogate
    seconds: float

    @property
    def best(self) -> Ranked:
        return self.ranking[0]

    @property
    def solver(self) -> TableSolver:
        """For `sample(model, shape, r.solver, steps=r.steps, grid=r.grid)`."""
        if isinstance(self.best.candidate, DensityRule):
            raise ValueError(
                "expected another need: likelihoods have no solver, but "
                f"log_prob(model, x, order={self.best.candidate.order}, grid=r.grid(sde, r.steps))"
            )
        return self.best.candidate.solver

    @property
    def grid(self) -> GridFunction:
        return self.best.candidate.grid

    @property
    def steps(self) -> int:
        return self.best.steps

    @property
    def table(self) -> Tableau:
        """The best candidate as a table, from noise to data."""
        return self.solver.tableau(self.sde, self.grid(self.sde, self.steps, self.end))

    def __repr__(self) -> str:
        head = f"{self.calls} calls for {self.need}: {self.best.candidate.name}, {self.steps} steps"
        lines = [f"  {r.error:9.2e}  {r.candidate.name}" for r in self.ranking[:8]]
        if len(self.ranking) > 8:
            lines += ["        ...", f"  {self.ranking[-1].error:9.2e}  {self.ranking[-1].candidate.name}"]
        return "\n".join([head, self.why, "", "      error  candidate", *lines])


def recommend(
    sde: LinearSDE,
    data: Data,
    calls: int = 10,
    need: Need = "samples",
    guidance: Scale | None = None,
    *,
    surrogate: Callable[[Tensor], Surrogate] | None = None,
    end: float | None = None,
    candidates: Sequence[Candidate] | None = None,
    noises: int = 128,
    seed: int = 0,
) -> Recommendation:
    """Rank solvers and grids for `calls` network calls by their error on a surrogate of the data, whose
    denoiser is known. Calls no network.

    data        a batch (n, ...), thousands if there are; or its mean and variances along principal axes, two
                tensors (D,), taken for Gaussian; or a law
    need        "samples"     deterministic solvers by the distance of each sample from the exact solution
                "encode"      the same from data to noise
                "likelihood"  orders and grids of `likelihood.log_prob` by the error of log p
                "diversity"   stochastic solvers by the distance of the output's law from the data's
    guidance    the scale of `guidance.classifier_free`, for "samples" and "encode": the components of the
                surrogate stand for the classes, `D + scale (D_k - D)` for a sample of component k
    surrogate   `mixture_surrogate`, `kernel_surrogate`, `gaussian_surrogate`, or another function of a batch.
                By default the first where there are at least 20 samples for each dimension, or guidance; else
                the second, which is close to a network that has learnt few samples
    end         of the process, as in `sample`
    candidates  to choose from; by default `pool()`, or `pool(stochastic=True)` for "diversity". Deterministic
                and stochastic ones may be mixed: each is measured by its own kind of error, and the distance
                of samples bounds that of laws from above
    noises      of the second trial; the first is on fewer
    seed        of the noises

    What it cannot know: errors of the network itself, and structure of the data that the surrogate has not.
    On a Gaussian there are no modes to confuse, so that long steps look harmless; on a mixture fitted to 1000
    images of digits, high orders look better than they are on the network. benchmarks.recommend has numbers.
    `compare` measures on the model.

    Raises ValueError or TypeError for arguments that do not fit.
    """
    started = time.perf_counter()
    if not isinstance(sde, LinearSDE):
        raise TypeError(f"expected an SDE, found {sde!r}")
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        raise ValueError(f"expected a whole number of calls >= 1, found {calls!r}")
    if isinstance(noises, bool) or not isinstance(noises, int) or noises < 2:
        raise ValueError(f"expected a whole number of noises >= 2, found {noises!r}")
    if need not in NEEDS:
        raise ValueError(f"expected a need among {sorted(NEEDS)}, found {need!r}")
    law = _surrogate(data, surrogate, guidance)
    problem = _Problem(sde, end, law, noises, seed, _guidance(guidance, need, law))
    found = NEEDS[need](problem, calls, candidates)
    if not found.ranking:
        raise ValueError(f"expected calls that pay for a step of some candidate, found {calls}")
    return Recommendation(
        sde, calls, need, end, seed, found.ranking, found.why, law, time.perf_counter() - started
    )


def _surrogate(data: Data, fit: Callable[[Tensor], Surrogate] | None, guidance: Scale | None) -> Surrogate:
    if isinstance(data, Surrogate):
        return data
    if isinstance(data, Law):
        return Surrogate(data)
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
            raise ValueError(f"expected (mean, variances), two tensors of one shape, found {data!r}")
        mean, variances = (part.double().flatten() for part in data)
        if mean.shape != variances.shape:
            raise ValueError(
                f"expected a mean and variances of one shape, found {tuple(mean.shape)} and "
                f"{tuple(variances.shape)}"
            )
        return Surrogate(Gaussian(mean, variances))
    points = checked_batch(data)
    if fit is None:
        enough = len(points) >= ENOUGH * points.shape[1]
        fit = mixture_surrogate if enough or guidance is not None else kernel_surrogate
    return fit(data)


def _guidance(scale: Scale | None, need: str, surrogate: Surrogate) -> Scale | None:
    if scale is None:
        return None
    if need not in ("samples", "encode"):
        raise ValueError(
            f"expected guidance with need 'samples' or 'encode', found {need!r}: the law of guided samples "
            "is not known"
        )
    if len(surrogate.law.means) < 2:
        raise ValueError(
            "expected a mixture for guidance, whose components stand for classes; found one component: give "
            "more data, or mixture_surrogate(data, components=...)"
        )
    return checked_scale(scale, "guidance")


class _ByClass(BaseDenoiser):
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


class _Problem(NamedTuple):
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
        return _ByClass(exact, labels[:n], self.guidance)


class _Found(NamedTuple):
    ranking: tuple[Ranked, ...]
    why: str


class _Entry(NamedTuple):
    candidate: Candidate
    steps: int
    table: Tableau


@lru_cache(4096)
def _reversed_table(candidate: Candidate, sde: LinearSDE, steps: int, end: float | None) -> Tableau | None:
    try:
        return candidate.solver.tableau(sde, candidate.grid(sde, steps, end).reversed())
    except ValueError:  # as in Candidate.table
        return None


def _entries(problem: _Problem, calls: int, candidates: Sequence[Candidate], encode: bool) -> list[_Entry]:
    """The candidates that fit, the first of those with equal tables."""
    listed: dict[bytes, _Entry] = {}
    for candidate in candidates:
        table, steps = candidate.table(problem.sde, calls, problem.end), candidate.steps(calls)
        if table is not None and steps is not None and encode:
            table = _reversed_table(candidate, problem.sde, steps, problem.end)
        if table is not None and steps is not None:
            listed.setdefault(_numbers(table), _Entry(candidate, steps, table))
    return list(listed.values())


def _numbers(table: Tableau) -> bytes:
    """The coefficients to ten digits, as a key; columns of zeros at the end do not count."""
    used = (
        table.mix[:, : 1 + int(table.mix.any(0).nonzero().max())]
        if bool(table.mix.any())
        else table.mix[:, :1]
    )
    parts = [table.times, table.skip, table.out, table.keep, table.noise, used.flatten()]
    return (torch.cat(parts) * 1e10).round().numpy().tobytes()


def _samples(problem: _Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
    return _ranked(problem, _entries(problem, calls, candidates or pool(), encode=False), encode=False)


def _encode(problem: _Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
    listed = candidates or pool()
    if any(c.solver.card.stochastic for c in listed):
        raise ValueError("expected deterministic candidates to encode with, found stochastic ones")
    return _ranked(problem, _entries(problem, calls, listed, encode=True), encode=True)


def _diversity(problem: _Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
    listed = pool(stochastic=True) if candidates is None else candidates
    return _ranked(problem, _entries(problem, calls, listed, encode=False), encode=False)


def _ranked(problem: _Problem, entries: list[_Entry], encode: bool) -> _Found:
    """Deterministic tables by the distance of samples, stochastic ones by that of laws."""
    noisy = [e for e in entries if bool(e.table.noise.any())]
    still = [e for e in entries if not bool(e.table.noise.any())]
    if noisy and problem.guidance is not None:
        raise ValueError("expected deterministic candidates for guidance, found stochastic ones")
    exact = None
    if still and not isinstance(problem.law, Gaussian):
        exact = _exact(problem, max(REFERENCE_STEPS, 4 * max(len(e.table) for e in still)), encode)
    errors = list(zip(still, _distances(problem, still, exact, encode), strict=True))
    errors += zip(noisy, _laws(problem, noisy), strict=True)
    errors.sort(key=lambda pair: pair[1])
    ranking = tuple(Ranked(e.candidate, e.steps, d) for e, d in errors)
    return _Found(ranking, _why(problem, errors, exact, encode) if errors else "")


def _exact_squares(problem: _Problem, tables: Stack, mean: Tensor, variances: Tensor, encode: bool) -> Tensor:
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


def _law_squares(problem: _Problem, tables: Stack, mean: Tensor, variances: Tensor) -> Tensor:
    """(T, L) squared 2-Wasserstein distance between the output's law from the prior and that of x_end on
    N(m, v)."""
    sde, table = problem.sde, maps(tables, problem.sde, variances)
    alpha, sigma = sde.alpha(problem.last), sde.sigma(problem.last)
    found = ((table.slope * sde.prior_std) ** 2 + table.spread**2).sqrt()
    wanted = (alpha**2 * variances + sigma**2).sqrt()
    return (found - wanted) ** 2 + (table.constant - alpha) ** 2 * mean**2


def _axes(law: Law) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and variances along the principal axes of a law, and the axes in columns (None: the
    coordinates)."""
    if isinstance(law, Gaussian):
        basis, values = law.eigen()
    else:
        values, basis = torch.linalg.eigh(law.cov)
        values = values.clamp_min(0)
    mean = law.mean.flatten()
    return (mean if basis is None else basis.T @ mean), values, basis


def _finite(errors: Tensor) -> Tensor:
    return torch.where(errors.isfinite(), errors, math.inf)


def _outside(problem: _Problem, tables: Stack, encode: bool, laws: bool) -> Tensor:
    """(T,) the squared error of all coordinates that the surrogate's law leaves out, together."""
    s = problem.surrogate
    if not s.others:
        return torch.zeros(len(tables.times), dtype=torch.float64)
    mean, variances = torch.zeros(1, dtype=torch.float64), torch.tensor([s.rest], dtype=torch.float64)
    squares = (
        _law_squares(problem, tables, mean, variances)
        if laws
        else _exact_squares(problem, tables, mean, variances, encode)
    )
    return s.others * squares[:, 0]


def _distances(problem: _Problem, entries: list[_Entry], exact: _Exact | None, encode: bool) -> list[float]:
    """Of samples from the exact solution; on a Gaussian (where none is given) root mean squares."""
    if not entries:
        return []
    if exact is None:
        mean, variances, _ = _axes(problem.law)
        tables = stack([e.table for e in entries])
        total = _exact_squares(problem, tables, mean, variances, encode).sum(1)
        total = total + _outside(problem, tables, encode, laws=False)
        return _finite((total / problem.surrogate.dim).sqrt()).tolist()

    def medians(listed: list[_Entry], n: int) -> Tensor:
        return _trial(problem, listed, exact, n, encode).each.median(1).values

    return _in_two_trials(entries, medians, SCREEN, problem.noises)


def _in_two_trials(
    entries: list[_Entry], errors_of: Callable[[list[_Entry], int], Tensor], few: int, many: int
) -> list[float]:
    """The errors on a few noises, and those of the finalists on many."""
    errors = errors_of(entries, min(few, many))
    if many > few:
        best = errors.argsort()[:FINALISTS]
        errors[best] = errors_of([entries[int(i)] for i in best], many)
    return errors.tolist()


class _Exact(NamedTuple):
    """States (n, D) and where the exact solution takes them."""

    x: Tensor
    wanted: Tensor


def _exact(problem: _Problem, steps: int, encode: bool) -> _Exact:
    """As many as there are noises, from the prior or from the law of x_end; in so many steps."""
    sde, law, n = problem.sde, problem.law, problem.noises
    grid = default_grid(sde, steps, problem.end)
    if encode:
        x = law.marginal(sde, problem.last).sample(n, generator=problem.generator()).reshape(n, -1)
        grid = grid.reversed()
    else:
        x = _normals(n, law.dim, problem.seed) * sde.prior_std
    return _Exact(x, REFERENCE.solve(problem.model(n), x.view(n, *law.event_shape), grid).x.reshape(n, -1))


class _Trial(NamedTuple):
    """Distances (T, n) of each sample, per root of the dimension, and errors (T, n, R)."""

    each: Tensor
    errors: Tensor


def _trial(problem: _Problem, entries: list[_Entry], exact: _Exact, n: int, encode: bool) -> _Trial:
    """Every table from the first n states against the exact solution."""
    model, errors, squares = _flat(problem.model(n), problem.law), [], []
    for part in _parts(entries, n, problem.law):
        tables = stack([e.table for e in part])
        errors.append(run_stack(tables, model, exact.x[:n]) - exact.wanted[:n])
        squares.append(errors[-1].square().sum(2) + _outside(problem, tables, encode, laws=False)[:, None])
    each = _finite((torch.cat(squares) / problem.surrogate.dim).sqrt())
    return _Trial(each, torch.cat(errors))


def _flat(model: BaseDenoiser, law: Law) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser on states (n, D)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return model(x.view(len(x), *law.event_shape), t).reshape(x.shape)

    return denoise


def _parts(entries: list[_Entry], n: int, law: Law) -> list[list[_Entry]]:
    size = max(1, NUMBERS // (n * law.dim * (1 + min(len(law.means), 32))))
    return [entries[i : i + size] for i in range(0, len(entries), size)]


def _normals(n: int, count: int, seed: int) -> Tensor:
    """(n, count) standard normals, evenly spread: a scrambled Sobol sequence, as far as there is one."""
    quasi = min(count, QUASI)
    u = torch.quasirandom.SobolEngine(quasi, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    rest = torch.rand(n, count - quasi, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.special.ndtri(torch.cat([u, rest], 1).clamp(1e-12, 1 - 1e-12))


def _laws(problem: _Problem, entries: list[_Entry]) -> list[float]:
    """2-Wasserstein distances of the outputs' laws.

    On a Gaussian they are exact. On a mixture: of samples, along random directions, as far as it exceeds that
    of true samples; below which the exact distance on the Gaussian of the same mean and covariance decides.
    Those that are among the worse half there, and hopeless, are not run."""
    if not entries:
        return []
    mean, variances, _ = _axes(problem.law)
    tables = stack([e.table for e in entries])
    gaussian = _finite(_law_squares(problem, tables, mean, variances).sum(1)) / problem.surrogate.dim
    outside = _finite(_outside(problem, tables, encode=False, laws=True)) / problem.surrogate.dim
    errors = (gaussian + outside).sqrt()
    if isinstance(problem.law, Gaussian):
        return errors.tolist()
    limit = torch.maximum(HOPELESS**2 * gaussian.min(), gaussian.median())
    hopeful = (gaussian <= limit).nonzero()[:, 0].tolist()

    def errors_of(listed: list[int], n: int) -> Tensor:
        chosen = [entries[j] for j in listed]
        sliced = _sliced(problem, n, max(len(e.table) for e in chosen))
        found = [sliced.beyond(stack([e.table for e in part])) for part in _parts(chosen, n, problem.law)]
        share = problem.law.dim / problem.surrogate.dim
        return (
            torch.cat(found) * share + gaussian[listed].clamp(max=sliced.floor * share) + outside[listed]
        ).sqrt()

    errors[hopeful] = errors_of(hopeful, 4 * min(SCREEN, problem.noises))
    for finalists, samples in ((FINALISTS, 4 * problem.noises), (FINALISTS // 4, 16 * problem.noises)):
        best = errors.argsort()[:finalists].tolist()
        errors[best] = errors_of(best, samples)
    return errors.tolist()


class _Sliced(NamedTuple):
    """The mean squared sliced 2-Wasserstein distance that n true samples have from the law of x_end, and a
    function that gives by how much the outputs of each table exceed it, (T,) >= 0."""

    floor: float
    beyond: Callable[[Stack], Tensor]


def _sliced(problem: _Problem, n: int, rows: int) -> _Sliced:
    """For n samples of tables of at most so many rows."""
    law, generator = problem.law, problem.generator()
    directions = torch.randn(law.dim, DIRECTIONS, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    target = law.marginal(problem.sde, problem.last)

    def drawn() -> Tensor:
        return (target.sample(n, generator=generator).reshape(n, -1) @ directions).sort(0).values

    expected = sum((drawn() for _ in range(15)), drawn()) / 16
    floor = sum(float((drawn() - expected).square().mean()) for _ in range(8)) / 8
    normals = _normals(n, law.dim * (rows + 1), problem.seed).view(n, rows + 1, law.dim).transpose(0, 1)
    model = _flat(problem.model(n), law)

    def beyond(tables: Stack) -> Tensor:
        found = run_stack(tables, model, normals[0] * problem.sde.prior_std, list(normals[1:]))
        squares = ((found @ directions).sort(1).values - expected).square().mean((1, 2))
        return _finite((squares - floor).clamp_min(0))

    return _Sliced(floor, beyond)


def _likelihood(problem: _Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
    """Orders and grids of `log_prob` with fixed nodes, against its adaptive integration, with the same
    probes."""
    if candidates is not None:
        raise ValueError("expected no candidates for a likelihood, which has orders and grids of its own")
    steps = calls - OVERHEAD
    if steps < 1:
        raise ValueError(
            f"expected at least {OVERHEAD + 1} calls for a likelihood, {OVERHEAD} of which start it; "
            f"found {calls}"
        )
    n, law = SCREEN, problem.law
    x = law.marginal(problem.sde, problem.last).sample(n, generator=problem.generator())
    model = law.denoiser(problem.sde)

    def value(**how: Any) -> Tensor:
        return log_prob(model, x, end=problem.end, divergence=Hutchinson(1), seed=problem.seed, **how).value

    wanted = value(tolerance=1e-7, max_calls=10_000)
    ranking = []
    for grid_name, grid in GRIDS.items():
        for order in ORDERS:
            found = value(grid=grid(problem.sde, steps, problem.end), order=order)
            error = _finite((found - wanted).abs()).median() / law.dim
            ranking.append(Ranked(DensityRule(order, grid, grid_name), steps, float(error)))
    ranking.sort(key=lambda r: r.error)
    return _Found(tuple(ranking), _gain(ranking))


NEEDS: dict[str, Callable[[_Problem, int, Sequence[Candidate] | None], _Found]] = {
    "samples": _samples,
    "encode": _encode,
    "diversity": _diversity,
    "likelihood": _likelihood,
}


def _why(problem: _Problem, errors: list[tuple[_Entry, float]], exact: _Exact | None, encode: bool) -> str:
    """What the choice gains, and where its error is."""
    ranking = [Ranked(e.candidate, e.steps, d) for e, d in errors]
    best = errors[0][0]
    told = [_gain(ranking)]
    if bool(best.table.noise.any()):
        mean, variances, _ = _axes(problem.law)
        squares = _law_squares(problem, stack([best.table]), mean, variances)[0]
        told.append(_where(squares, variances))
    elif exact is None:
        mean, variances, _ = _axes(problem.law)
        told.append(
            _where(_exact_squares(problem, stack([best.table]), mean, variances, encode)[0], variances)
        )
    else:
        _, variances, axes = _axes(problem.law)
        trial = _trial(problem, [best], exact, problem.noises, encode)
        flipped = trial.each[0] > FLIP * float(problem.law.variance.mean().sqrt())
        kept = trial.errors[0][~flipped]
        told.append(_where((kept if axes is None else kept @ axes).square().mean(0), variances))
        if bool(flipped.any()):
            told.append(
                f"{100 * float(flipped.double().mean()):.1f} % of the samples end far from the exact "
                "solution, most of them in another mode: more calls help."
            )
    return " ".join(filter(None, told))


def _gain(ranking: Sequence[Ranked]) -> str:
    """How much worse other grids are for the same solver, and other solvers on the same grid."""
    best = ranking[0]
    unit = max(best.error, 1e-300)

    def median(errors: list[float]) -> float:
        return sorted(errors)[len(errors) // 2] / unit

    def solver_of(candidate: Candidate | DensityRule) -> Any:
        return candidate.solver if isinstance(candidate, Candidate) else candidate.order

    grids = [r.error for r in ranking[1:] if solver_of(r.candidate) == solver_of(best.candidate)]
    others = [r.error for r in ranking[1:] if r.candidate.grid_name == best.candidate.grid_name]
    told = [f"Best of {len(ranking)}"]
    if grids:
        told.append(f"the same on other grids has {median(grids):.2g} times its error (median)")
    if others:
        told.append(f"others on the same grid {median(others):.2g} times")
    usual = next((r for r in ranking if r.candidate.name == USUAL), None)
    if usual is not None and usual is not best:
        told.append(f"{USUAL} {usual.error / unit:.2g} times")
    return ", ".join(told) + "."


def _where(squares: Tensor, variances: Tensor) -> str:
    """Which third of the principal axes has most of the squared error."""
    if len(variances) < 3 or not float(squares.sum()) > 0:
        return ""
    order = variances.argsort(descending=True)
    names = ["widest", "middle", "narrowest"]
    thirds = dict(zip(names, order.tensor_split(3), strict=True))
    shares = {name: float(squares[part].sum() / squares.sum()) for name, part in thirds.items()}
    name = max(shares, key=shares.__getitem__)
    stds = variances[thirds[name]].sqrt()
    return (
        f"{100 * shares[name]:.0f} % of its squared error lies in the {name} third of the data's principal "
        f"axes (standard deviations {float(stds.min()):.2g} to {float(stds.max()):.2g})."
    )
