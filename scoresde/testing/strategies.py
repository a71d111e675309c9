"""Hypothesis strategies for what a user may write or pass: valid cases, and the adversarial among them.

Steep, flat and falling rates, a terminal signal that is nearly gone, tiny and huge steps, duplicated modes,
components without weight, degenerate covariances. What is drawn shrinks to short numbers and prints as code
that makes it again, in the words of `scoresde`, its `schedules`, `laws` and `grids`, and of this module.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from .. import grids as spacings
from .. import solvers
from ..denoiser import PREDICTIONS, BaseDenoiser, Denoiser, Karras, Prediction
from ..grids import Grid
from ..laws import Empirical, Gaussian, Law, LowRank, Mixture
from ..schedules import Cosine, Learned, Linear, Schedule, Sigmoid, Tabulated, tabulated_betas
from ..sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE, like
from ..tableau import Tableau

Strategy = st.SearchStrategy

# Strategies are made once (functools.cache): hypothesis learns about each as it goes.


@functools.cache
def legal(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, drawing another case where this one cannot be made: where float64 cannot tell the nodes of a
    grid apart, or no signal is left for a solver that remembers noise."""

    @functools.wraps(make, updated=())
    def made(*arguments: Any, **options: Any) -> Any:
        try:
            return make(*arguments, **options)
        except ValueError:
            reject()

    return made


# Numbers


@functools.cache
def floats(low: float, high: float) -> Strategy[float]:
    """Floats in [low, high] without subnormal ones."""
    return st.floats(low, high, allow_subnormal=False)


@functools.cache
def magnitudes(low: float, high: float) -> Strategy[float]:
    """Numbers of at most three digits in [low, high], 0 < low, log-uniform in size."""
    exponents = st.integers(math.floor(math.log10(low)) - 2, math.ceil(math.log10(high)))
    return st.builds(_decimal, st.integers(1, 999), exponents).map(lambda x: min(max(x, low), high))


def _decimal(digits: int, exponent: int) -> float:
    return float(f"{digits}e{exponent}")


@functools.cache
def times(low: float = 1e-6) -> Strategy[float]:
    """Times in [low, 1], half of them log-uniform."""
    return st.one_of(floats(low, 1.0), magnitudes(low, 1.0))


@functools.cache
def shares(n: int) -> Strategy[list[float]]:
    """n increasing numbers in (0, 1), at least 2e-3 apart; `at` makes times of them."""
    spread = st.lists(st.integers(1, 498), min_size=n, max_size=n, unique=True).map(sorted)
    return st.builds(lambda slots, u: [(slot + u) / 500 for slot in slots], spread, floats(0.0, 1.0))


def at(sde: LinearSDE, share: float) -> float:
    """The time a share of the way, evenly in t (in log t for EDM)."""
    if isinstance(sde, EDM):
        return sde.t_min * (sde.t_max / sde.t_min) ** share
    return sde.t_min + share * (sde.t_max - sde.t_min)


# Schedules


class RandomLearned(Learned):
    """A `Learned` schedule with parameters drawn from a seed, without gradients; prints as its call."""

    def __init__(
        self,
        seed: int,
        hidden: int = 8,
        spread: float = 0.7,
        log_snr_max: float = 13.3,
        log_snr_min: float = -10.0,
    ) -> None:
        super().__init__(log_snr_max, log_snr_min, hidden)
        self._call = f"RandomLearned({seed}, {hidden}, {spread}, {log_snr_max}, {log_snr_min})"
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def __repr__(self) -> str:
        return self._call


@functools.cache
def linears() -> Strategy[Linear]:
    """Rising rates; flat, falling and steep ones (B(1) up to 250)."""
    ordinary = st.builds(Linear, floats(0.0, 1.0), floats(1.0, 50.0))
    return st.one_of(ordinary, st.builds(Linear, magnitudes(1e-3, 50.0), magnitudes(1e-3, 500.0)))


@functools.cache
def terminal_log_snrs() -> Strategy[float]:
    """log-SNRs at t = 1: as usual, nearly all signal left, and nearly none (alpha(1) about 1e-65)."""
    return st.one_of(floats(-30.0, -2.0), st.sampled_from([-300.0, -100.0, 0.0, 3.0]))


@functools.cache
def cosines() -> Strategy[Cosine]:
    return st.builds(Cosine, floats(0.0, 0.5), terminal_log_snrs())


@functools.cache
def sigmoids() -> Strategy[Sigmoid]:
    """Flat (tau 1.5) to steep (tau 0.3, w from -17 to 17)."""
    return st.builds(Sigmoid, floats(-5.0, 0.0), floats(0.5, 5.0), floats(0.3, 1.5), terminal_log_snrs())


@functools.cache
def beta_tables(low: float = 1e-8, high: float = 0.999, longest: int = 30) -> Strategy[list[float]]:
    """DDPM tables as lists: anything in [low, high]^N, 1 <= N <= longest, log-uniform towards 0 and 1; equal
    betas."""
    small = magnitudes(low, 0.5)
    large = magnitudes(1 - high, 0.5).map(lambda x: 1 - x)
    beta = st.one_of(small, large)
    flat = st.builds(lambda value, n: [value] * n, beta, st.integers(1, longest))
    mixed = st.lists(beta, min_size=1, max_size=longest)
    return st.one_of(mixed, mixed, flat)


@functools.cache
def tabulateds() -> Strategy[Tabulated]:
    return st.builds(tabulated_betas, beta_tables(low=1e-4))


@functools.cache
def learneds() -> Strategy[RandomLearned]:
    return st.builds(RandomLearned, st.integers(0, 99))


@functools.cache
def schedules() -> Strategy[Schedule]:
    """Every kind of schedule."""
    return st.one_of(linears(), cosines(), sigmoids(), tabulateds(), learneds())


# Processes


@functools.cache
def noise_ranges() -> Strategy[tuple[float, float]]:
    """(sigma_min, sigma_max) of VE processes."""
    return st.tuples(magnitudes(1e-3, 0.1), magnitudes(1.0, 100.0))


@functools.cache
def sdes() -> Strategy[LinearSDE]:
    """Every kind of process, each as often as the others."""
    kinds: list[Strategy[LinearSDE]] = [
        st.builds(VPSDE, schedule=schedules()),
        st.builds(SubVPSDE, schedule=schedules()),
        noise_ranges().map(lambda ends: VESDE(*ends)),
        noise_ranges().map(lambda ends: EDM(*ends)),
        st.just(Rectified()),
    ]
    # Not one_of: it would flatten the many kinds of VP, and the others would hardly be drawn.
    return st.integers(0, len(kinds) - 1).flatmap(lambda i: kinds[i])


def grids(sde: LinearSDE, longest: int = 30) -> Strategy[Grid]:
    """Grids of the process: every spacing, one step, tiny beside huge steps, a noiseless end."""
    steps = st.integers(1, longest)
    ends = [st.none(), st.floats(1e-3, 0.5).map(lambda share: at(sde, share))]
    if float(sde.sigma(0.0)) == 0:
        ends.append(st.just(0.0))
    end = st.one_of(ends)
    plain = [
        st.builds(legal(spacing), st.just(sde), steps, end)
        for spacing in (spacings.uniform, spacings.quadratic, spacings.log_snr)
    ]
    return st.one_of(
        *plain,
        st.builds(legal(spacings.karras), st.just(sde), steps, end, rho=magnitudes(1.0, 20.0)),
        st.builds(legal(spacings.power), st.just(sde), steps, end, exponent=magnitudes(0.5, 5.0)),
        st.builds(uneven_grid, st.just(sde), _gaps(longest)),
    )


def uneven_grid(sde: LinearSDE, gaps: Sequence[float]) -> Grid:
    """The grid from t_max to the default end whose steps are to each other as `gaps` (evenly in t, or in log
    t for EDM)."""
    whole = torch.tensor(gaps, dtype=torch.float64).cumsum(0)
    left = torch.cat([whole.new_ones(1), 1 - whole / whole[-1]]).tolist()
    first = 1e-3 if sde.default_end > sde.t_min else 0.0
    nodes = [at(sde, first + (1 - first) * share) for share in left]
    return Grid.of(sde, torch.tensor([sde.t_max, *nodes[1:-1], sde.default_end], dtype=torch.float64))


@functools.cache
def _gaps(longest: int) -> Strategy[list[float]]:
    return st.lists(magnitudes(1e-4, 1.0), min_size=1, max_size=longest)


# Laws


@functools.cache
def laws(dim: int | None = None, degenerate: bool = True) -> Strategy[Law]:
    """Gaussians, mixtures and weighted points on `dim` (None: 1 to 4) coordinates.

    With modes that coincide and weights of 0; `degenerate` admits variances of 0 and singular covariances, so
    that there is no density.
    """
    dims = st.integers(1, 4) if dim is None else st.just(dim)
    return dims.flatmap(lambda d: _laws_on(d, degenerate))


@functools.cache
def _laws_on(d: int, degenerate: bool) -> Strategy[Law]:
    kinds = [gaussians(d, degenerate), mixtures(d, degenerate)]
    if degenerate:
        kinds.append(empiricals(d))
    return st.one_of(kinds)


@functools.cache
def gaussians(dim: int = 1, degenerate: bool = True) -> Strategy[Gaussian]:
    return st.builds(Gaussian, _points(dim), _covariances(dim, None, degenerate))


@functools.cache
def mixtures(dim: int = 1, degenerate: bool = True, most: int = 4) -> Strategy[Mixture]:
    return st.integers(1, most).flatmap(lambda K: _mixtures_of(K, dim, degenerate))


@functools.cache
def _mixtures_of(K: int, dim: int, degenerate: bool) -> Strategy[Mixture]:
    distinct = st.lists(_points(dim), min_size=K, max_size=K)
    repeated = st.builds(lambda point, n: [point] * n, _points(dim), st.just(K))
    means = st.one_of(distinct, distinct, repeated)
    return st.builds(Mixture, _weights(K), means, _covariances(dim, K, degenerate))


@functools.cache
def empiricals(dim: int = 1, most: int = 8) -> Strategy[Empirical]:
    points = st.lists(_points(dim), min_size=1, max_size=most)
    return points.flatmap(lambda x: st.builds(Empirical, st.just(x), st.one_of(st.none(), _weights(len(x)))))


@functools.cache
def _points(dim: int) -> Strategy[list[float]]:
    coordinate = st.integers(-24, 24).map(lambda k: k / 8)
    return st.lists(coordinate, min_size=dim, max_size=dim)


@functools.cache
def _weights(K: int) -> Strategy[list[float]]:
    counts = st.lists(st.integers(0, 9), min_size=K, max_size=K).filter(any)
    return counts.map(lambda n: [k / sum(n) for k in n])


@functools.cache
def _covariances(dim: int, K: int | None, degenerate: bool) -> Strategy[Any]:
    """A variance, diagonals, matrices or a LowRank, for one Gaussian (K None) or K of them."""
    variance = magnitudes(1e-3, 4.0)
    if degenerate:
        variance = st.one_of(variance, variance, st.just(0.0))
    diagonal = st.lists(variance, min_size=dim, max_size=dim)
    matrix = st.builds(_matrix, _factors(dim, dim), st.just(0.0) if degenerate else magnitudes(1e-3, 1.0))
    low_rank = st.integers(1, dim).flatmap(lambda r: _factors(dim, r))
    if K is None:
        return st.one_of(variance, diagonal, matrix, st.builds(low_rank_of, variance, low_rank))
    stack = functools.partial(st.lists, min_size=K, max_size=K)
    ranked = st.integers(1, dim).flatmap(lambda r: stack(_factors(dim, r)))
    return st.one_of(
        variance, stack(diagonal), stack(matrix), st.builds(low_rank_of, stack(variance), ranked)
    )


@functools.cache
def _factors(dim: int, rank: int) -> Strategy[list[list[float]]]:
    entry = st.integers(-4, 4).map(lambda k: k / 4)
    return st.lists(st.lists(entry, min_size=rank, max_size=rank), min_size=dim, max_size=dim)


def _matrix(factor: list[list[float]], floor: float) -> list[list[float]]:
    """F F^T + floor I."""
    return [
        [
            sum(x * y for x, y in zip(a, b, strict=True)) + (floor if i == j else 0.0)
            for j, b in enumerate(factor)
        ]
        for i, a in enumerate(factor)
    ]


def low_rank_of(variance: float | list[float], factor: list[Any]) -> LowRank:
    """`LowRank` of plain numbers."""
    many = variance if isinstance(variance, float) else torch.tensor(variance, dtype=torch.float64)
    return LowRank(many, torch.tensor(factor, dtype=torch.float64))


# Denoisers


class AsNetwork(Denoiser):
    """An exact denoiser in the shape of one that was trained: a network that is right, and predicts
    `predicts`."""

    def __init__(
        self, model: BaseDenoiser, predicts: str | Prediction = "noise", time_input: str = "t"
    ) -> None:
        super().__init__(_RightNetwork(model, predicts), model.sde, predicts, time_input)

    def __repr__(self) -> str:
        chosen = self.predicts if self.predicts.config else repr(self.predicts.name)
        return f"AsNetwork({self.network.model}, {chosen}, {self.time_input!r})"


class _RightNetwork(torch.nn.Module):
    """F = p E[x_0|x_t] + q E[eps|x_t] of the input c_in x, told the time in any of the known ways."""

    def __init__(self, model: BaseDenoiser, predicts: str | Prediction) -> None:
        super().__init__()
        self.model = model
        self.predicts = predicts if isinstance(predicts, Prediction) else PREDICTIONS[predicts]
        # A parameter of float64, so that input and time come in float64.
        self.witness = torch.nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, inputs: Tensor, time: Tensor) -> Tensor:
        sde = self.model.sde
        alpha, sigma = sde.alpha(time), sde.sigma(time)
        x = inputs / like(self.predicts.c_in(alpha, sigma), inputs)
        return self.model.as_view(self.predicts, x, time)


@functools.cache
def predictions() -> Strategy[str | Prediction]:
    return st.one_of(st.sampled_from(sorted(PREDICTIONS)), st.builds(Karras, magnitudes(0.1, 3.0)))


def denoisers(
    law: Strategy[Law] | None = None, sde: Strategy[LinearSDE] | None = None
) -> Strategy[BaseDenoiser]:
    """Exact denoisers of laws under processes, half of them as networks that predict something else."""
    exact = st.builds(exact_denoiser, laws() if law is None else law, sdes() if sde is None else sde)
    return st.one_of(exact, st.builds(AsNetwork, exact, predictions()))


def exact_denoiser(law: Law, sde: LinearSDE) -> BaseDenoiser:
    return law.denoiser(sde)


# Tables


def tableaus(sde: Strategy[LinearSDE] | None = None, longest: int = 12) -> Strategy[Tableau]:
    """Tables of every fixed-grid solver in `solvers.examples()`, on any process and grid."""
    names = [name for name, solver in _examples().items() if hasattr(solver, "tableau")]
    return (sdes() if sde is None else sde).flatmap(
        lambda drawn: st.builds(legal(table), st.sampled_from(names), st.just(drawn), grids(drawn, longest))
    )


def table(solver: str, sde: LinearSDE, grid: Grid) -> Tableau:
    """The table of the solver in `solvers.examples()` that prints so."""
    return _examples()[solver].tableau(sde, grid)


@functools.cache
def _examples() -> dict[str, Any]:
    return solvers.examples()


@functools.cache
def shapes_and_dtypes() -> Strategy[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes of states, batches of none and of one too, and their dtypes."""
    events = st.one_of(
        st.tuples(st.integers(1, 16)),
        st.tuples(st.integers(1, 3), st.integers(1, 8)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    )
    shapes = st.builds(lambda batch, event: (batch, *event), st.integers(0, 4), events)
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    return st.tuples(shapes, dtypes)
