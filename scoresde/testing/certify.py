"""A sampler's certificate: what it does, measured without Monte Carlo, in under a minute.

The sampler is a function as in `black_box`, or a solver of this library's form.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grids import log_snr
from ..laws import Gaussian
from ..schedules import Time
from ..sde import LinearSDE
from . import orders
from .black_box import is_stochastic, run_sampler, sampler_law, zero_noise
from .solver_checks import check_batch, check_rotation

STEPS = 10
LEAST_ORDER = 0.5  # of what converges at all
Finding = tuple[str, str, str]  # verdict, measured, expected


class Line(NamedTuple):
    """A property, its verdict, what was measured, what it should be. Verdicts are "pass", "FAIL", "no" (a
    right sampler need not have the property) and "-" (nothing was claimed)."""

    what: str
    verdict: str
    measured: str
    expected: str


@dataclass(frozen=True)
class Certificate:
    """The verdicts on a sampler; prints as a table."""

    name: str
    lines: tuple[Line, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(line.verdict != "FAIL" for line in self.lines)

    def __str__(self) -> str:
        rows = [Line("property", "verdict", "measured", "expected"), *self.lines]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        outcome = "passed" if self.passed else "FAILED"
        return "\n".join([f"{self.name}: {outcome}, {self.seconds:.1f} s", *table])


def certify(
    sampler: Any,
    sde: LinearSDE,
    *,
    order: int | None = None,
    tolerance: float = 1e-9,
    name: str | None = None,
) -> Certificate:
    """Measure a sampler under a process: calls and noises, finiteness, point-mass law, order (weak order, by
    exact law, of a stochastic one), exact law on Gaussian data, dependence on the batch, rotations.

    order      what is claimed, by default what the sampler's card says, if it has one
    tolerance  of everything that should hold to rounding; about 1e-4 if the sampler works in float32

    Whatever the sampler raises is a verdict, not an error of this function.
    """
    started = time.perf_counter()
    checks: dict[str, Callable[[], Finding]] = {
        f"calls, noises in {STEPS} steps": lambda: _counts(sampler, sde),
        "finite in 1, 2, 3, 10, 100 steps": lambda: _finite(sampler, sde),
        "law of a point mass kept": lambda: _point_mass(sampler, sde, tolerance),
        "order (weak, if stochastic)": lambda: _order(sampler, sde, order, tolerance),
        "exact law, error in 25, 100 steps": lambda: _law(sampler, sde, tolerance),
        "a sample is the same in any batch": lambda: _holds(check_batch, sampler, sde, tolerance, "FAIL"),
        "rotations commute with it": lambda: _holds(check_rotation, sampler, sde, tolerance, "no"),
    }
    lines: list[Line] = []
    for what, check in checks.items():
        try:
            lines.append(Line(what, *check()))
        except Exception as error:  # of code that is not ours: what it did is the finding
            lines.append(Line(what, "FAIL", _short(error), "no error"))
    return Certificate(name or repr(sampler), tuple(lines), time.perf_counter() - started)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _data() -> Gaussian:
    return Gaussian(torch.tensor(orders.MEANS), torch.tensor(orders.VARIANCES))


def _counts(sampler: Any, sde: LinearSDE) -> Finding:
    exact, calls, noises = _data().denoiser(sde), [], []

    def denoise(x: Tensor, t: Time) -> Tensor:
        calls.append(t)
        return exact(x, t)

    def noise(k: int, shape: Any) -> Tensor:
        noises.append(k)
        return zero_noise(k, shape)

    run_sampler(sampler, sde, denoise, torch.ones(1, 5, dtype=torch.float64), log_snr(sde, STEPS).t, noise)
    return "-", f"{len(calls)}, {len(noises)}", ""


def _finite(sampler: Any, sde: LinearSDE) -> Finding:
    denoise, wrong = _data().denoiser(sde), []
    x = sde.prior_std * torch.ones(1, 5, dtype=torch.float64)
    for steps in (1, 2, 3, 10, 100):
        noise = partial(_ones, steps)
        out = run_sampler(sampler, sde, denoise, x, log_snr(sde, steps).t, noise)
        wrong += [] if bool(out.isfinite().all()) and out.shape == x.shape else [steps]
    return ("FAIL", f"not in {wrong}", "yes") if wrong else ("pass", "yes", "yes")


def _ones(steps: int, k: int, shape: Any) -> Tensor:
    return torch.ones(tuple(shape), dtype=torch.float64) * (-1) ** k


def _point_mass(sampler: Any, sde: LinearSDE, tolerance: float) -> Finding:
    """On data concentrated at 1, started from its own marginal."""
    point, times = Gaussian(torch.ones(2), 0.0), log_snr(sde, STEPS).t
    start, truth = point.marginal(sde, times[0]), point.marginal(sde, times[-1])
    found = sampler_law(sampler, point, sde, times, start=start, tolerance=tolerance)
    gap = max(float((found.mean - truth.mean).abs().max()), float((found.cov - truth.cov).abs().max()))
    return "pass" if gap <= tolerance else "no", f"{gap:.1e}", f"<= {tolerance:g}"


def _order(sampler: Any, sde: LinearSDE, claimed: int | None, tolerance: float) -> Finding:
    x, times = torch.ones(1, 5, dtype=torch.float64), log_snr(sde, STEPS).t
    stochastic = is_stochastic(sampler, sde, _data().denoiser(sde), x, times)
    weak = partial(orders.weak_order, rounding=tolerance)
    measure, name = (weak, "weak_order") if stochastic else (orders.order, "order")
    if claimed is None:
        claimed = getattr(getattr(sampler, "card", None), name, None)
    found = measure(sampler, sde)
    if claimed is None:  # errors that do not get small (NaN is not), though they may pass 0 on their way
        lost = not found.order >= LEAST_ORDER and not found.errors[-1] <= tolerance
        return "FAIL" if lost else "-", f"{found.order:.2f}", f">= {LEAST_ORDER}"
    good = abs(found.order - claimed) <= 0.15
    return "pass" if good else "FAIL", f"{found.order:.2f}", f"{claimed} +- 0.15"


def _law(sampler: Any, sde: LinearSDE, tolerance: float) -> Finding:
    """Mean and variance on Gaussian data, started from the marginal, in 25 and in 100 steps."""
    law, gaps = _data(), []
    for steps in (25, 100):
        times = log_snr(sde, steps).t
        start, truth = law.marginal(sde, times[0]), law.marginal(sde, times[-1])
        found = sampler_law(sampler, law, sde, times, start=start, tolerance=tolerance)
        gaps.append(
            max(float((found.mean - truth.mean).abs().max()), float((found.cov - truth.cov).abs().max()))
        )
    good = gaps[1] <= max(0.5 * gaps[0], tolerance)
    return "pass" if good else "FAIL", f"{gaps[0]:.1e}, {gaps[1]:.1e}", "at least halved"


def _holds(
    check: Callable[..., None], sampler: Any, sde: LinearSDE, tolerance: float, otherwise: str
) -> Finding:
    try:
        check(sampler, sde, tolerance=tolerance)
    except AssertionError as failure:
        return otherwise, _short(failure), f"to {tolerance:g}"
    return "pass", "yes", f"to {tolerance:g}"
