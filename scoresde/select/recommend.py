"""Which solver and grid, without a single network call: every candidate is tried on a law that stands for the
data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..guidance.scales import Scale, checked_scale
from ..laws import Gaussian, Law
from ..likelihood import Hutchinson, log_prob
from ..sde import LinearSDE
from ..tableau import Tableau
from .candidates import GRIDS, Candidate, pool
from .reasons import gain, why
from .recommendation import DensityRule, Ranked, Recommendation
from .surrogate import Surrogate, checked_batch, kernel_surrogate, mixture_surrogate
from .trials import SCREEN, Entry, Problem, distances, exact_solution, finite, laws_apart

Need = Literal["samples", "encode", "likelihood", "diversity"]
Data = Tensor | Law | Surrogate | tuple[Tensor, Tensor]

ENOUGH = 20  # samples for each dimension, for a mixture
OVERHEAD = 7  # calls of a likelihood on a fixed grid that are not steps
ORDERS = (2, 3, 4, 5)


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
    noises      of the second trial; the first is on fewer. Laws are compared by 8 times as many samples
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
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"expected a seed, a whole number from -2^63 to 2^64 - 1, found {seed!r}")
    if need not in NEEDS:
        raise ValueError(f"expected a need among {sorted(NEEDS)}, found {need!r}")
    if candidates is not None and not (candidates and all(isinstance(c, Candidate) for c in candidates)):
        raise TypeError(
            "expected candidates such as Candidate(solvers.dpmpp(2), grids.karras, 'karras'), found "
            f"{list(candidates)}"
        )
    law = _surrogate(data, surrogate, guidance)
    problem = Problem(sde, end, law, noises, seed, _guidance(guidance, need, law))
    found = NEEDS[need](problem, calls, candidates)
    if not found.ranking:
        raise ValueError(
            "expected calls that pay for a step of some candidate, and an end where its coefficients are "
            f"finite; found {calls} calls and end={problem.last:g} for {need!r}"
        )
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
        enough = len(data) >= ENOUGH * points.shape[1]  # points are at most as many as a fit looks at
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


class _Found(NamedTuple):
    ranking: tuple[Ranked, ...]
    why: str


def _entries(problem: Problem, calls: int, candidates: Sequence[Candidate], encode: bool) -> list[Entry]:
    """The candidates that fit, the first of those with equal tables."""
    listed: dict[bytes, Entry] = {}
    for candidate in candidates:
        steps = candidate.steps(calls)
        table = candidate.table(problem.sde, calls, problem.end, backwards=encode)
        if table is not None and steps is not None:
            listed.setdefault(_numbers(table), Entry(candidate, steps, table))
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


def _samples(problem: Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
    return _ranked(problem, _entries(problem, calls, candidates or pool(), encode=False), encode=False)


def _encode(problem: Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
    listed = candidates or pool()
    if any(c.solver.card.stochastic for c in listed):
        raise ValueError("expected deterministic candidates to encode with, found stochastic ones")
    return _ranked(problem, _entries(problem, calls, listed, encode=True), encode=True)


def _diversity(problem: Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
    listed = pool(stochastic=True) if candidates is None else candidates
    return _ranked(problem, _entries(problem, calls, listed, encode=False), encode=False)


def _ranked(problem: Problem, entries: list[Entry], encode: bool) -> _Found:
    """Deterministic tables by the distance of samples, stochastic ones by that of laws."""
    noisy = [e for e in entries if bool(e.table.noise.any())]
    still = [e for e in entries if not bool(e.table.noise.any())]
    if noisy and problem.guidance is not None:
        raise ValueError("expected deterministic candidates for guidance, found stochastic ones")
    exact = None
    if still and not isinstance(problem.law, Gaussian):
        exact = exact_solution(problem, max(len(e.table) for e in still), encode)
    errors = list(zip(still, distances(problem, still, exact, encode), strict=True))
    errors += zip(noisy, laws_apart(problem, noisy), strict=True)
    errors.sort(key=lambda pair: pair[1])
    ranking = tuple(Ranked(e.candidate, e.steps, d) for e, d in errors)
    return _Found(ranking, why(problem, errors, exact, encode) if errors else "")


def _likelihood(problem: Problem, calls: int, candidates: Sequence[Candidate] | None) -> _Found:
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
            error = finite((found - wanted).abs()).median() / law.dim
            ranking.append(Ranked(DensityRule(order, grid, grid_name), steps, float(error)))
    ranking.sort(key=lambda r: r.error)
    return _Found(tuple(ranking), gain(ranking))


NEEDS: dict[str, Callable[[Problem, int, Sequence[Candidate] | None], _Found]] = {
    "samples": _samples,
    "encode": _encode,
    "diversity": _diversity,
    "likelihood": _likelihood,
}
