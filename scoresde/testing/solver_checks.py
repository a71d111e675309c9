"""Checks of tables and solvers: ours, and any object or function that `black_box` describes.

Each is a plain function that raises AssertionError with the worst case, the measured number and the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..denoiser import DATA, FLOW, NOISE, VELOCITY, Prediction, view
from ..grids import quadratic
from ..laws import Gaussian
from ..noise import Noise
from ..schedules import Cosine
from ..sde import EDM, VPSDE, LinearSDE
from ..tableau import FIELDS, Tableau
from . import orders
from .black_box import run_sampler
from .failure import at_most, holds
from .orders import SPAN, Measured, Problem

Variable = Callable[[LinearSDE, Tensor], Tensor]


# Tables


def check_tableau(
    table: Tableau,
    sde: LinearSDE,
    *,
    order: int = 1,
    variable: Variable | None = None,
    calls: int | None = None,
) -> None:
    """A table is finite, moves through time, keeps the law of a point mass, and (with an order, for tables
    without noise) integrates polynomials of degree < `order` in `variable`, half-log-SNR by default:
    `check_finite`, `check_times`, `check_point_mass` and `check_row_order` together. `calls`: what
    `len(table)` should be.
    """
    holds("a row for each call", calls is None or len(table) == calls, rows=len(table), calls=calls)
    check_finite(table)
    check_times(table, sde)
    check_point_mass(table, sde)
    if order > 1:
        check_row_order(table, sde, order, variable)


def check_finite(table: Tableau) -> None:
    """All coefficients are finite, and so is every state as a linear form of start, outputs and noises."""
    for name in FIELDS:
        holds(f"finite {name}", bool(getattr(table, name).isfinite().all()), table=table)
    form = table.canonical()
    for name, value in zip("aBC", form[1:], strict=True):
        holds(f"finite states, {name} of the canonical form", bool(value.isfinite().all()), table=table)


def check_times(table: Tableau, sde: LinearSDE) -> None:
    """Times run from noise to data or back, in t and in log-SNR. Two exceptions: a row that ends with fresh
    noise may lead to a noisier time (churn, restart), and a row may stay where it is, for one more output
    there, if the next one moves on."""
    for name, clock in (("t", -table.nodes), ("log-SNR", sde.log_snr(table.nodes))):
        step = clock.diff().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)  # between and from infinite nodes
        step = step if float(table.nodes[0]) > float(table.nodes[-1]) else -step
        stays = torch.nn.functional.pad(step == 0, (1, 0))
        wrong = ((step < 0) & (table.noise == 0)) | (stays[1:] & stays[:-1])
        holds(
            f"times that move on, in {name}",
            not bool(wrong.any()),
            row=int(wrong.int().argmax()),
            times=table.nodes.tolist(),
        )


def check_point_mass(table: Tableau, sde: LinearSDE, tolerance: float = 1e-12) -> None:
    """On data concentrated at 1 the state keeps mean alpha and standard deviation sigma, row by row
    (`Tableau.defect`), to `tolerance` of the terms that cancel. For tables that remember the data, and
    deterministic ones that remember noise or flow."""
    defect, scale = table.defect(sde).abs(), _terms(table, sde)
    rows = torch.arange(len(table))
    for column, name in enumerate(("mean", "variance")):
        at_most(
            f"the {name} of a point mass is kept",
            defect[:, column],
            tolerance * scale[:, column],
            table=table.name,
            row=rows,
            t=table.times[:-1],
        )


def _terms(table: Tableau, sde: LinearSDE) -> Tensor:
    """(K, 2): the size of what cancels in `Tableau.defect`, at least 1."""
    alpha, sigma, weight = sde.alpha(table.nodes)[:-1], sde.sigma(table.nodes)[:-1], table.mix.abs().sum(1)
    skip = table.skip.abs()
    mean = table.keep.abs() * alpha + weight * (skip * alpha + table.out.abs()).cummax(0).values
    deviation = table.keep.abs() * sigma + weight * (skip * sigma).cummax(0).values
    return torch.stack([mean, deviation.cummax(0).values ** 2], 1).clamp_min(1)


class Linear(NamedTuple):
    """The exact flow where `m = p x_0 + q eps` is remembered: `x = scale y`, `dy = rate m dlam`, functions of
    the process and of times."""

    prediction: Prediction
    scale: Variable
    rate: Variable


def _level(sde: LinearSDE, t: Tensor) -> Tensor:
    return (-0.5 * sde.log_snr(t)).exp()


def _radius(sde: LinearSDE, t: Tensor) -> Tensor:
    return torch.hypot(sde.alpha(t), sde.sigma(t))


# d(x/sigma) = x_0 d(alpha/sigma);   d(x/alpha) = eps d kappa, kappa = sigma/alpha;
# d(x/(alpha + sigma)) = flow d(kappa/(1 + kappa));
# d(x/r) = velocity/r d atan(kappa), r^2 = alpha^2 + sigma^2
LINEAR = (
    Linear(DATA, lambda sde, t: sde.sigma(t), lambda sde, t: 1 / _level(sde, t)),
    Linear(NOISE, lambda sde, t: sde.alpha(t), lambda sde, t: -_level(sde, t)),
    Linear(
        FLOW,
        lambda sde, t: sde.alpha(t) + sde.sigma(t),
        lambda sde, t: -_level(sde, t) / (1 + _level(sde, t)) ** 2,
    ),
    Linear(
        VELOCITY,
        _radius,
        lambda sde, t: -_level(sde, t) / (1 + _level(sde, t) ** 2) / _radius(sde, t),
    ),
)


def half_log_snr(sde: LinearSDE, t: Tensor) -> Tensor:
    """lam = log(alpha/sigma)."""
    return 0.5 * sde.log_snr(t)


def check_row_order(
    table: Tableau,
    sde: LinearSDE,
    order: int,
    variable: Variable | None = None,
    start: int | None = None,
    tolerance: float = 1e-12,
) -> None:
    """Where what the table remembers is a polynomial of degree < `order` in `variable(sde, t)`, the table
    ends on the exact flow, to `tolerance` of the terms that cancel. For the probability-flow ODE.

    What is remembered (data, noise, flow or velocity) is read off `skip, out`; the exact flow is integrated
    by quadrature in lam. Rows up to `start`, by default the length of the history, see the exact state, for
    methods that build up their order. Nodes without signal or without noise are left out.
    """
    variable = variable or half_log_snr
    lam = half_log_snr(sde, table.times)
    regular = lam.isfinite().nonzero().flatten()
    first, last = int(regular[0]), int(regular[-1])
    start = first + (table.mix.shape[1] if start is None else start)
    holds("a table longer than its history", start < last, rows=last - first, start=start)
    holds("a table without noise", not bool(table.noise.any()), noise=table.noise.tolist())
    form = _remembered(table, sde, range(first, last))
    t, u = table.times, variable(sde, table.times)
    middle, half = (u[last] + u[first]) / 2, (u[last] - u[first]) / 2
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(24))
    inner = lam[first:last, None] + (points + 1) / 2 * lam[first : last + 1].diff()[:, None]
    t_inner = sde.time(2 * inner)
    pull = lam[first : last + 1].diff()[:, None] / 2 * weights * form.rate(sde, t_inner)
    scale = form.scale(sde, t)
    for degree in range(order):
        m = ((u - middle) / half) ** degree
        rise = (pull * ((variable(sde, t_inner) - middle) / half) ** degree).sum(1)
        exact = scale[first : last + 1] * (1 + torch.nn.functional.pad(rise.cumsum(0), (1, 0)))
        state, size = exact[start - first], 0.0
        for k in range(start, last):
            lags = range(min(table.mix.shape[1], k - first + 1))
            terms = [table.keep[k] * state, *(table.mix[k, j] * m[k - j] for j in lags)]
            state, size = torch.stack(terms).sum(), max(size, *(abs(float(term)) for term in terms))
        at_most(
            f"polynomials of degree {degree} are integrated exactly",
            abs(float(state - exact[-1])),
            tolerance * max(size, 1.0) * math.sqrt(last - start),
            table=table.name,
            remembers=form.prediction.name,
            times=t.tolist(),
        )


def _remembered(table: Tableau, sde: LinearSDE, rows: Iterable[int]) -> Linear:
    """Which of LINEAR the table remembers. Raises ValueError if it is none of them."""
    alpha, sigma = sde.alpha(table.times[:-1]), sde.sigma(table.times[:-1])
    for form in LINEAR:
        skip, out = view(form.prediction, DATA, alpha, sigma)
        pairs = [(table.skip[k], skip[k]) for k in rows] + [(table.out[k], out[k]) for k in rows]
        if all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs):
            return form
    raise ValueError(
        f"expected a table that remembers data, noise, flow or velocity in every row, found skip = "
        f"{table.skip.tolist()}, out = {table.out.tolist()}; use check_order, which needs no such form"
    )


# Orders


def check_order(
    solver: Any,
    order: int | None = None,
    sde: LinearSDE | None = None,
    *,
    problem: Problem | None = None,
    steps: Sequence[int] = orders.STEPS,
    span: tuple[float, float] = SPAN,
    tolerance: float = 0.15,
) -> Measured:
    """A deterministic solver converges with this order, by default the one on its card; see `orders.order`.
    Returns what was measured."""
    found = orders.order(solver, sde, problem, steps, span)
    return _same_order("order", solver, _claimed(solver, "order", order), found, steps, tolerance)


def check_weak_order(
    solver: Any,
    order: int | None = None,
    sde: LinearSDE | None = None,
    *,
    steps: Sequence[int] = orders.WEAK_STEPS,
    span: tuple[float, float] = SPAN,
    rounding: float = 1e-9,
    tolerance: float = 0.15,
) -> Measured:
    """The mean and variance of a stochastic solver converge with this order (1 or 2), by default the one on
    its card, by its exact law; see `orders.weak_order`. Returns what was measured."""
    found = orders.weak_order(solver, sde, steps, span, rounding)
    return _same_order("weak order", solver, _claimed(solver, "weak_order", order), found, steps, tolerance)


def check_strong_order(
    solver: Any,
    order: float = 1.0,
    sde: LinearSDE | None = None,
    *,
    clock: Variable = orders.snr,
    steps: Sequence[int] = orders.STRONG_STEPS,
    tolerance: float = 0.15,
    **options: Any,
) -> Measured:
    """A stochastic solver converges path by path with this order, on noise that is consistent across step
    counts; see `orders.strong_order` for `clock` and the options. Returns what was measured."""
    found = orders.strong_order(solver, sde, clock, steps=steps, **options)
    return _same_order("strong order", solver, order, found, steps, tolerance)


def _claimed(solver: Any, name: str, order: int | None) -> int:
    claimed = getattr(getattr(solver, "card", None), name, None) if order is None else order
    if claimed is None:
        raise ValueError(f"expected {name} of {solver}, found None: say what is claimed")
    return claimed


def _same_order(
    what: str, solver: Any, claimed: float, found: Measured, steps: Sequence[int], tolerance: float
) -> Measured:
    errors = dict(zip(steps, (float(f"{error:.3g}") for error in found.errors), strict=True))
    at_most(
        f"{what} {claimed:g}, measured {found.order:.2f}: distance from what is claimed",
        abs(found.order - claimed),
        tolerance,
        solver=solver,
        errors_by_steps=errors,
        largest=found.worst,
    )
    return found


# Invariances


def check_rotation(
    solver: Any, sde: LinearSDE, *, times: Tensor | None = None, tolerance: float = 1e-11
) -> None:
    """Rotated data, start and noise give the rotated output."""
    times = _times(sde, times)
    Q = torch.linalg.qr(_normal(3, 3)).Q
    mean, root, noise = _normal(3), _normal(3, 3), Noise.of(0, batch=4, dtype=torch.float64)
    x = noise.prior((4, 3)) * sde.prior_std
    plain = run_sampler(solver, sde, Gaussian(mean, _square(root)).denoiser(sde), x, times, noise)
    turned = run_sampler(
        solver,
        sde,
        Gaussian(Q @ mean, _square(Q @ root)).denoiser(sde),
        x @ Q.T,
        times,
        lambda k, shape: noise(k, shape) @ Q.T,
    )
    _same("rotations commute with sampling", turned, plain @ Q.T, tolerance, solver, sde)


def check_scaling(solver: Any, sde: LinearSDE | None = None, *, tolerance: float = 1e-11) -> None:
    """In terms of noise levels (EDM), data `c x + b` on levels `c sigma` give `c` times the output, plus b.

    Not for solvers that know an absolute scale: noise levels between which something happens, a velocity or
    flow remembered, a polynomial in sigma/(alpha + sigma). `sde` is not used.
    """
    c, shift = 3.0, 0.7
    times = torch.tensor([40.0, 9.0, 2.0, 0.4, 0.1], dtype=torch.float64)
    mean, root, noise = _normal(3), _normal(3, 3), Noise.of(0, batch=4, dtype=torch.float64)
    x = noise.prior((4, 3)) * times[0]
    one, two = EDM(0.002, 200.0), EDM(0.002, 200.0)
    plain = run_sampler(solver, one, Gaussian(mean, _square(root)).denoiser(one), x, times, noise)
    model = Gaussian(c * mean + shift, c**2 * _square(root)).denoiser(two)
    scaled = run_sampler(solver, two, model, c * x + shift, c * times, noise)
    _same("scaling and shifts commute with sampling", scaled, c * plain + shift, tolerance, solver, one)


def check_time_change(
    solver: Any, sde: LinearSDE | None = None, other: LinearSDE | None = None, *, tolerance: float = 1e-9
) -> None:
    """Two clocks of one process, on nodes of the same log-SNR, give the same output: by default the linear
    and the cosine VP schedule. Not for solvers that interpolate in t."""
    sde, other = sde or VPSDE(), other or VPSDE(schedule=Cosine())
    log_snr = torch.linspace(-4, 5, 8, dtype=torch.float64)
    noise, law = Noise.of(0, batch=4, dtype=torch.float64), Gaussian(_normal(3), _square(_normal(3, 3)))
    x = noise.prior((4, 3))
    one, two = (
        run_sampler(solver, process, law.denoiser(process), x, process.time(log_snr), noise)
        for process in (sde, other)
    )
    _same("only the log-SNR of the nodes counts, not the clock", two, one, tolerance, solver, (sde, other))


def check_batch(solver: Any, sde: LinearSDE, *, times: Tensor | None = None, tolerance: float = 0.0) -> None:
    """A sample depends neither on the size of its batch nor on its place nor on the other samples: the whole
    batch, each sample alone, halves, and another order give the same bits, where the denoiser does. Wild
    mates included."""
    times, noise = _times(sde, times), Noise.of(0, batch=7, dtype=torch.float64)
    law = Gaussian(torch.tensor([0.3, -1.0, 0.2]), torch.tensor([0.4, 1.5, 0.05]))
    factor = torch.tensor([1, 1, 0.1, 1, 20, 1, 1], dtype=torch.float64)[:, None]
    x = noise.prior((7, 3)) * sde.prior_std * factor
    whole = _rows(solver, sde, law, x, times, list(range(7)))
    for rows in (*([i] for i in range(7)), [0, 1, 2], [3, 4, 5, 6], [4, 2, 6, 0, 5, 1, 3]):
        found = _rows(solver, sde, law, x[rows], times, rows)
        at_most(
            "a sample is the same in every batch",
            (found - whole[rows]).abs(),
            tolerance * whole[rows].abs().clamp_min(1),
            solver=solver,
            batch=rows,
            sample=torch.tensor(rows)[:, None],
            alone_or_whole=whole[rows],
        )


def _rows(solver: Any, sde: LinearSDE, law: Gaussian, x: Tensor, times: Tensor, ids: list[int]) -> Tensor:
    noise = Noise.of(0, ids, dtype=torch.float64)
    return run_sampler(solver, sde, law.denoiser(sde), x, times, noise)


INVARIANCES = (check_rotation, check_scaling, check_time_change, check_batch)


def check_invariances(
    solver: Any, sde: LinearSDE, checks: Sequence[Callable[..., None]] = INVARIANCES
) -> None:
    """All of `checks`, each called with (solver, sde). A function that is made for one process, as in
    `black_box`, can keep `check_rotation` and `check_batch`."""
    for check in checks:
        check(solver, sde)


def _times(sde: LinearSDE, times: Tensor | None) -> Tensor:
    return quadratic(sde, 6).t if times is None else times


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _square(root: Tensor) -> Tensor:
    S = root @ root.T
    return (S + S.T) / 2


def _same(claim: str, found: Tensor, expected: Tensor, tolerance: float, solver: Any, sde: Any) -> None:
    scale = expected.abs().max().clamp_min(1)
    gap = (found - expected).abs() / scale
    at_most(claim, gap, tolerance, solver=solver, process=sde, found=found, expected=expected)
