"""Exponential multistep solvers: one family, named presets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..denoiser import DATA, view
from ..grids import Grid
from ..sde import LinearSDE
from ..tableau import Tableau
from .base import Card, TableSolver
from .weights import STORED, Tau, step_weights


def multistep_table(
    sde: LinearSDE, grid: Grid, *, order: int, corrector: int = 0, stored: str = "data", variable: str = "lam", tau: Tau = 0.0, name: str = "exponential"
) -> Tableau:
    """Predictor of the given order, optionally followed by a corrector of order `corrector` that uses the new output; one call a step (PEC).

    The corrector costs no row: it shares base and noise with the predictor, so it only adds `sum_j (c_j - b_j) m_j`, which the next row does before it predicts.
    Order grows from 1 over the first steps. A last step to sigma = 0 returns D; a first step from alpha = 0 is exact for constant D and its output is then forgotten.
    """
    first = int(torch.isinf(grid.lam[0]))
    last = len(grid) - int(torch.isinf(grid.lam[-1]))
    steps, width = len(grid), max(order, corrector)
    keep, noise = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    predict, correct = torch.zeros(steps, width, dtype=torch.float64), torch.zeros(steps, width, dtype=torch.float64)
    options = {"stored": stored, "variable": variable, "tau": tau}
    for p, rows in _by_order(first, last, order):  # step k -> k + 1 from outputs k, k - 1, ...
        keep[rows], predict[rows, :p], noise[rows] = _steps(sde, grid.t, rows, range(0, -p, -1), options)
    for p, rows in _by_order(first, last, corrector):  # step k - 1 -> k from outputs k, k - 1, ...: applied in row k
        before = rows[rows > first] - 1
        if corrector and p > 1 and len(before):
            correct[before + 1, :p] = _steps(sde, grid.t, before, range(1, 1 - p, -1), options)[1]
    mix = predict.clone()
    if corrector:
        corrected = torch.arange(first + 1, last)
        update = correct[corrected]
        update[:, 1:] -= predict[corrected - 1, :-1]
        mix[corrected] += keep[corrected, None] * update
    skip, out = STORED[stored].rows(sde.alpha(grid.t[:-1]), sde.sigma(grid.t[:-1]))
    for k in {*range(first), *range(last, steps)}:
        keep[k], mix[k, 0], noise[k] = singular_step(sde, grid, k, stored, tau)
    return Tableau(grid.t, skip, out, keep, mix, noise, name)


def _by_order(first: int, last: int, order: int) -> list[tuple[int, Tensor]]:
    """Rows grouped by the order that the outputs since `first` allow."""
    ramp = [(p, torch.tensor([first + p - 1])) for p in range(1, order) if first + p - 1 < last]
    full = torch.arange(first + order - 1, last) if order else torch.arange(0)
    return [*ramp, *([(order, full)] if len(full) else [])]


def _steps(sde: LinearSDE, t: Tensor, rows: Tensor, lags: range, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the steps rows -> rows + 1 from the outputs at rows + lags."""
    return step_weights(sde, t[rows], t[rows + 1], t[rows[:, None] + torch.tensor(list(lags))], **options)


def singular_step(sde: LinearSDE, grid: Grid, k: int, stored: str, tau: Tau) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, mix, noise) of a step from alpha = 0 or to sigma = 0, the limits of the first-order data form."""
    s, t = grid.t[k], grid.t[k + 1]
    to_data = sde.sigma(t) == 0
    stochastic = callable(tau) or tau > 0
    ratio = sde.sigma(t) / sde.sigma(s) * float(not stochastic)
    noise = sde.sigma(t) * float(stochastic)
    a, b = view(DATA, STORED[stored].prediction, sde.alpha(s), sde.sigma(s))
    if not bool((a.isfinite() & b.isfinite()).all()):
        raise ValueError(f"expected a start with some signal for a solver that remembers {stored}, found alpha = 0 at t = {s.item()}; remember data or velocity")
    return ratio + sde.alpha(t) * a, sde.alpha(t) * b, torch.where(to_data, 0.0, noise)


def exponential(
    order: int = 2, *, corrector: int = 0, stored: str = "data", variable: str = "lam", tau: Tau = 0.0, name: str = "exponential", options: tuple | None = None, reference: str = ""
) -> TableSolver:
    """The whole family: predictor order, corrector order (0: none), what is remembered, the polynomial's variable, the noise level.

    stored    "data" | "noise" | "velocity" | "flow"
    variable  "lam" | "sigma/alpha" | "sigma" (sigma/(alpha + sigma)) | "t"
    tau       0 is the probability-flow ODE, 1 the reverse SDE; a number or a function of lam

    Raises ValueError for other values.
    """
    _check(order, corrector, stored, variable)
    stochastic = callable(tau) or tau > 0
    properties = {"scale_covariant"}
    if stored == "data":
        properties |= {"marginal_exact"}
    if variable != "t":
        properties |= {"clock_free"}
    card = Card(
        order=None if stochastic else max(order, corrector),
        weak_order=min(2, order) if stochastic else None,
        calls_per_step=1,
        stochastic=stochastic,
        reference=reference,
        properties=frozenset(properties),
        memory=max(order, corrector),
    )

    def build(sde: LinearSDE, grid: Grid) -> Tableau:
        return multistep_table(sde, grid, order=order, corrector=corrector, stored=stored, variable=variable, tau=tau, name=name)

    given = (("order", order), ("corrector", corrector), ("stored", stored), ("variable", variable), ("tau", tau)) if options is None else options
    return TableSolver(name, build, card, given)


def _check(order: int, corrector: int, stored: str, variable: str) -> None:
    from .weights import VARIABLES

    if not (1 <= order <= 8 and 0 <= corrector <= 8):
        raise ValueError(f"expected an order in 1..8 and a corrector order in 0..8, found {order}, {corrector}")
    if stored not in STORED or variable not in VARIABLES:
        raise ValueError(f"expected stored in {sorted(STORED)} and variable in {sorted(VARIABLES)}, found {stored!r}, {variable!r}")


def dpmpp(order: int = 2) -> TableSolver:
    """DPM-Solver++ (multistep): the output D is remembered, polynomial in lam, weights by exact integration (Lu et al. 2022, arXiv:2211.01095).

    Orders 1 to 3; order 1 is DDIM. Published third-order code halves its last term and measures second order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"expected order 1, 2 or 3, found {order}")
    return exponential(order, name="dpmpp", options=(("order", order),), reference="Lu et al. 2022, arXiv:2211.01095")
