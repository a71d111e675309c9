"""Why a candidate is recommended, in words: what the choice gains, and where its error is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .candidates import Candidate
from .measures import FLIP
from .recommendation import DensityRule, Ranked
from .tables import stack
from .trials import Entry, Exact, Problem, axes_of, exact_squares, law_squares, trial

USUAL = "dpmpp(2) on log_snr"  # what people use


def why(problem: Problem, errors: list[tuple[Entry, float]], exact: Exact | None, encode: bool) -> str:
    """What the choice gains, and where its error is."""
    ranking = [Ranked(e.candidate, e.steps, d) for e, d in errors]
    best = errors[0][0]
    told = [gain(ranking)]
    if bool(best.table.noise.any()):
        mean, variances, _ = axes_of(problem.law)
        squares = law_squares(problem, stack([best.table]), mean, variances)[0]
        told.append(_where(squares, variances))
    elif exact is None:
        mean, variances, _ = axes_of(problem.law)
        told.append(
            _where(exact_squares(problem, stack([best.table]), mean, variances, encode)[0], variances)
        )
    else:
        _, variances, axes = axes_of(problem.law)
        tried = trial(problem, [best], exact, problem.noises, encode)
        flipped = tried.each[0] > FLIP * _spread(problem, exact, encode)
        kept = tried.errors[0][~flipped]
        told.append(_where((kept if axes is None else kept @ axes).square().mean(0), variances))
        if bool(flipped.any()):
            where = "" if encode else ", most of them in another mode"
            told.append(
                f"{100 * float(flipped.double().mean()):.1f} % of the samples end far from the exact "
                f"solution{where}: more calls help."
            )
    return " ".join(filter(None, told))


def _spread(problem: Problem, exact: Exact, encode: bool) -> float:
    """Standard deviation per coordinate where the exact solution ends, those outside the law included."""
    sde, s = problem.sde, problem.surrogate
    end = sde.t_max if encode else problem.last
    outside = sde.alpha(end) ** 2 * s.rest + sde.sigma(end) ** 2
    inside = (exact.wanted - exact.wanted.mean(0)).square().mean(0).sum()
    return float(((inside + s.others * outside) / s.dim).sqrt())


def gain(ranking: Sequence[Ranked]) -> str:
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
