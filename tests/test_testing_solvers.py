"""The checks of scoresde.testing find planted mistakes in samplers, with no knowledge of where to look.

Every sampler here is a plain function, as a user would write it; where the mistake is a number, the same
function without it passes the same check.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import protocol
import pytest
import torch
from torch import Tensor

import scoresde
from scoresde import grids, solvers
from scoresde.laws import Gaussian, Mixture
from scoresde.noise import Noise
from scoresde.sde import EDM, VPSDE, LinearSDE
from scoresde.solvers.base import Samples, TableSolver
from scoresde.tableau import Tableau
from scoresde.testing import __main__ as command
from scoresde.testing import certify, orders, solver_checks
from scoresde.testing.black_box import Injected, check_same_law, check_sampler_exact_law, sampler_law
from scoresde.testing.solver_checks import (
    check_batch,
    check_finite,
    check_invariances,
    check_order,
    check_point_mass,
    check_rotation,
    check_row_order,
    check_scaling,
    check_strong_order,
    check_tableau,
    check_time_change,
    check_times,
    check_weak_order,
)

pytestmark = pytest.mark.usefixtures("unchecked")

VP = VPSDE()
TABLES = protocol.table_solvers()
DATA = Gaussian(torch.tensor([0.7, -0.3]), torch.tensor([[0.5, 0.2], [0.2, 1.3]]))


def nodes(times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and half-log-SNR of VP at the nodes of a grid."""
    return VP.alpha(times), VP.sigma(times), 0.5 * VP.log_snr(times)


# Samplers as users write them, with a place for a mistake


def multistep_3(denoise, x, times, noise, *, second: float = 1.0):
    """DPM-Solver++(3M) in lam; `second` multiplies the term of the second difference."""
    alpha, sigma, lam = nodes(times)
    outputs: list[Tensor] = []
    for k in range(len(times) - 1):
        outputs = [denoise(x, times[k]), *outputs[:2]]
        h = lam[k + 1] - lam[k]
        # moments of e^(lam - lam_t) over the step: int (lam - lam_s)^i
        mu = [-torch.expm1(-h)]
        for i in (1, 2):
            mu.append(h**i - i * mu[-1])
        change = mu[0] * outputs[0]
        if len(outputs) > 1:
            slope = (outputs[0] - outputs[1]) / (lam[k] - lam[k - 1])
            change = change + mu[1] * slope
        if len(outputs) > 2:
            before = (outputs[1] - outputs[2]) / (lam[k - 1] - lam[k - 2])
            curve = (slope - before) / (lam[k] - lam[k - 2])
            change = change + second * (mu[2] + mu[1] * (lam[k] - lam[k - 1])) * curve
        x = sigma[k + 1] / sigma[k] * x + alpha[k + 1] * change
    return x


def trapezoid(denoise, x, times, noise, *, mistaken: bool = False):
    """Heun's method in sigma/alpha; mistaken: sigma_t in place of sigma_s in the second stage."""
    alpha, sigma, _ = nodes(times)
    for k in range(len(times) - 1):
        rise = sigma[k + 1] / alpha[k + 1] - sigma[k] / alpha[k]
        D = denoise(x, times[k])
        first = (x - alpha[k] * D) / sigma[k]
        y = alpha[k + 1] * (x / alpha[k] + rise * first)
        second = (y - alpha[k + 1] * denoise(y, times[k + 1])) / sigma[k + 1]
        first = (x - alpha[k] * D) / (sigma[k + 1] if mistaken else sigma[k])
        x = alpha[k + 1] * (x / alpha[k] + rise * (first + second) / 2)
    return x


def stochastic_3(denoise, x, times, noise, *, first: float = 1.0, second: float = 1.0):
    """SDE-DPM-Solver++(3M); signs of the terms of the first and of the second difference."""
    alpha, sigma, lam = nodes(times)
    outputs: list[Tensor] = []
    for k in range(len(times) - 1):
        outputs = [denoise(x, times[k]), *outputs[:2]]
        h = lam[k + 1] - lam[k]
        mu = [-torch.expm1(-2 * h)]
        for i in (1, 2):
            mu.append(h**i - i * mu[-1] / 2)
        change = mu[0] * outputs[0]
        if len(outputs) > 1:
            slope = (outputs[0] - outputs[1]) / (lam[k] - lam[k - 1])
            change = change + (first if len(outputs) > 2 else 1.0) * mu[1] * slope
        if len(outputs) > 2:
            before = (outputs[1] - outputs[2]) / (lam[k - 1] - lam[k - 2])
            curve = (slope - before) / (lam[k] - lam[k - 2])
            change = change + second * (mu[2] + mu[1] * (lam[k] - lam[k - 1])) * curve
        x = sigma[k + 1] / sigma[k] * (-h).exp() * x + alpha[k + 1] * change
        x = x + sigma[k + 1] * (-torch.expm1(-2 * h)).sqrt() * noise()
    return x


def ipndm(denoise, x, times, noise, *, uniform: bool = True):
    """Adams-Bashforth in sigma/alpha of order 3, with the weights of a uniform grid or of the actual one."""
    alpha, sigma, _ = nodes(times)
    kappa = sigma / alpha
    outputs: list[Tensor] = []
    for k in range(len(times) - 1):
        outputs = [(x - alpha[k] * denoise(x, times[k])) / sigma[k], *outputs[:2]]
        n, rise = len(outputs), kappa[k + 1] - kappa[k]
        if uniform:
            weights = rise * torch.tensor([[1], [3 / 2, -1 / 2], [23 / 12, -4 / 3, 5 / 12]][n - 1]).double()
        else:
            at = (kappa[[k, k - 1, k - 2][:n]] - kappa[k]) / rise  # int_0^1 theta^i = 1/(i + 1)
            powers = torch.arange(n).double()
            weights = rise * torch.linalg.solve(at[None] ** powers[:, None], 1 / (powers + 1))
        slope = sum(w * m for w, m in zip(weights, outputs, strict=True))
        x = alpha[k + 1] * (x / alpha[k] + slope)
    return x


def ancestral(denoise, x, times, noise, *, corrector: str = ""):
    """DDPM, and after each step one of Langevin with a fixed step, or with that of the batch's mean norm."""
    alpha, sigma, _ = nodes(times)
    for k in range(len(times) - 1):
        a = alpha[k] / alpha[k + 1]
        kept = 1 - (a * sigma[k + 1] / sigma[k]) ** 2
        x = a * (sigma[k + 1] / sigma[k]) ** 2 * x + alpha[k + 1] * kept * denoise(x, times[k])
        x = x + sigma[k + 1] * kept.sqrt() * noise()
        if corrector:
            z, score = noise(), (alpha[k + 1] * denoise(x, times[k + 1]) - x) / sigma[k + 1] ** 2
            ratio = z.norm(dim=1) / score.norm(dim=1)
            eps = 0.02 * ratio.mean() ** 2 if corrector == "batch" else 0.02 * sigma[k + 1] ** 2
            x = x + eps * score + (2 * eps).sqrt() * z
    return x


# 1 to 6: mistakes, and the check that raises

FINDS = {
    "the second difference halved": (
        partial(multistep_3, second=0.5), multistep_3,
        lambda s: check_order(s, 3), r"order 3, measured (1\.9|2\.0|2\.1)",
    ),
    "sigma_t for sigma_s": (
        partial(trapezoid, mistaken=True), trapezoid,
        lambda s: check_order(s, 2), r"order 2, measured (0\.9|1\.0)",
    ),
    "a wrong sign in a third-order stochastic coefficient": (
        partial(stochastic_3, first=-1.0), stochastic_3,
        lambda s: check_weak_order(s, 2, steps=(80, 160, 320)), r"weak order 2, measured (0\.9|1\.0)",
    ),
    "constant weights on an uneven grid": (
        ipndm, partial(ipndm, uniform=False),
        lambda s: check_order(s, 3), r"order 3, measured (1\.9|2\.0)",
    ),
    "a corrector with a batch-mean step": (
        partial(ancestral, corrector="batch"), partial(ancestral, corrector="fixed"),
        lambda s: check_batch(s, VP), "a sample is the same in every batch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", FINDS)
def test_planted_mistakes_are_found(mistake: str) -> None:
    wrong, right, check, message = FINDS[mistake]
    check(right)
    with pytest.raises(AssertionError, match=message) as found:
        check(wrong)
    assert "measured" in str(found.value) and "bound" in str(found.value) and "worst case" in str(found.value)


def test_a_wrong_sign_that_leaves_the_order_is_found_by_the_exact_law() -> None:
    """In the term of the second difference a sign does not change the weak order: against the same method
    here, it shows."""
    times = grids.log_snr(VP, 20).t
    expected = solvers.sde_dpmpp(3).tableau(VP, times).law(DATA, VP)
    check_sampler_exact_law(stochastic_3, expected, DATA, VP, times, tolerance=1e-12)
    wrong = partial(stochastic_3, second=-1.0)
    check_weak_order(wrong, 2, steps=(80, 160, 320), tolerance=0.3)
    with pytest.raises(AssertionError, match=r"of the output is the expected one: measured \d"):
        check_sampler_exact_law(wrong, expected, DATA, VP, times)


def accepting(n: int, seed: int, *, redraw: bool) -> Tensor:
    """The reverse SDE of N(0, 1), an Ornstein-Uhlenbeck process, in 20 steps; a step with a large increment
    is rejected and done as two halves, whose noises are parts of the one seen before, or are drawn anew."""
    noise = Noise.of(seed, batch=n, dtype=torch.float64)
    x, a, rows = noise.prior((n, 1)), math.exp(-0.05), iter(range(10**6))

    def z() -> Tensor:
        return noise(next(rows), (n, 1))

    fresh = math.sqrt(1 - a**2)
    whole = math.sqrt(1 - a**4)
    for _ in range(20):
        w = z()
        rejected = w.abs() > 1.5
        # the whole step's noise is whole w = a fresh z_1 + fresh z_2
        z_1, z_2 = z(), z()
        if not redraw:
            share = a * fresh / whole
            z_1 = share * w + math.sqrt(1 - share**2) * z_1
            z_2 = (whole * w - a * fresh * z_1) / fresh
        halves = a * (a * x + fresh * z_1) + fresh * z_2
        x = torch.where(rejected, halves, a**2 * x + whole * w)
    return x


def test_noise_redrawn_after_a_rejected_step_is_found(alpha_ledger) -> None:
    law = Gaussian(torch.zeros(1), 1.0)
    alpha_ledger.spend(1e-9, "a rejected step whose noise is kept has the right law")
    right = check_same_law(partial(accepting, redraw=False), law)
    assert right.draws == 100_000 and right.p_value > 1e-9
    with pytest.raises(AssertionError, match=r"draws have the law, by (variance|distribution function)"):
        check_same_law(partial(accepting, redraw=True), law)


def test_a_sampler_that_looks_at_its_noise_has_no_exact_law() -> None:
    def redraws(denoise, x, times, noise):
        for k in range(len(times) - 1):
            z = noise()
            x = 0.9 * x + torch.where(z.abs() > 1.5, noise(), z) + denoise(x, times[k])
        return x

    with pytest.raises(AssertionError, match="a sampler is affine on Gaussian data"):
        sampler_law(redraws, DATA, VP, grids.uniform(VP, 4).t)


def noisy(denoise, x, times, noise, *, share: float = 1.0):
    """Ancestral sampling with too little or too much noise: it does not converge."""
    for t, s in pairwise(times):
        mean, std = VP.bridge(denoise(x, t), x, s, t)
        x = mean + share * std * noise()
    return x


def test_certify_says_which_property_fails() -> None:
    """The same mistakes, seen by the certificate alone."""
    for wrong, claimed, line in (
        (partial(multistep_3, second=0.5), 3, "order (weak, if stochastic)"),
        (partial(ancestral, corrector="batch"), None, "a sample is the same in any batch"),
    ):
        certificate = certify(wrong, VP, order=claimed)
        assert not certificate.passed and line in [v.what for v in certificate.lines if v.verdict == "FAIL"]
    for share in (0.95, 1.05):  # the second one's error passes 0 near 100 steps
        certificate = certify(partial(noisy, share=share), VP)
        assert "order (weak, if stochastic)" in [v.what for v in certificate.lines if v.verdict == "FAIL"]
    assert certify(noisy, VP).passed

    def overflows(denoise, x, times, noise):  # where the other lines do not look
        return multistep_3(denoise, x, times, noise) * (math.nan if len(times) > 300 else 1.0)

    certificate = certify(overflows, VP)
    assert [v.what for v in certificate.lines if v.verdict == "FAIL"] == ["order (weak, if stochastic)"]
    certificate = certify(multistep_3, VP, order=3)
    assert certificate.passed and {line.verdict for line in certificate.lines} == {"pass", "-"}, certificate


# The machinery of black boxes


class Only:
    """A solver without its table."""

    def __init__(self, inner: TableSolver) -> None:
        self.inner = inner

    def solve(self, *args, **kwargs) -> Samples:
        return self.inner.solve(*args, **kwargs)


class Bare:
    """Nothing but a table."""

    def __init__(self, inner: TableSolver) -> None:
        self.inner = inner

    def tableau(self, sde: LinearSDE, times) -> Tableau:
        return self.inner.tableau(sde, times)


@pytest.mark.parametrize("name", TABLES)
def test_the_law_of_a_black_box_is_that_of_its_table(name: str) -> None:
    solver = TABLES[name]
    for sde, start, box in ((VP, None, Only(solver)), (EDM(0.02, 30.0), DATA, Bare(solver))):
        times = grids.karras(sde, 4).t
        prior = start and start.marginal(sde, times[0])
        expected = solver.tableau(sde, times).law(DATA, sde, prior)
        found = check_sampler_exact_law(box, expected, DATA, sde, times, start=prior, tolerance=1e-9)
        assert torch.equal(found.cov, found.cov.T) and found.event_shape == (2,)


ORDERED = [solvers.ddim(), solvers.dpmpp(2), solvers.dpmpp(3), solvers.unipc(3), solvers.unipc(4),
           solvers.heun(), solvers.deis(4), solvers.dpm(3, True), solvers.adams(4, "adams")]  # fmt: skip


@pytest.mark.parametrize("solver", ORDERED, ids=repr)
def test_orders_of_black_boxes_are_those_of_tables(solver: TableSolver) -> None:
    """Tiny first steps do for a black box what the exact history does for a table."""
    table, box = orders.order(Bare(solver)), orders.order(Only(solver))
    assert box.order == pytest.approx(table.order, abs=0.06)
    assert box.errors[-1] == pytest.approx(table.errors[-1], rel=0.3)
    assert check_order(solver).order == table.order


def test_orders_need_a_claim_and_the_right_kind_of_solver() -> None:
    with pytest.raises(ValueError, match=r"expected order of .*: say what is claimed"):
        check_order(multistep_3)
    with pytest.raises(ValueError, match="expected weak_order"):
        check_weak_order(solvers.dpmpp(2))
    for stochastic in (solvers.ddpm(), Only(solvers.ddpm()), ancestral):
        with pytest.raises(ValueError, match="expected a deterministic solver, found noise"):
            check_order(stochastic, 1)
    with pytest.raises(
        AssertionError, match=r"order 3, measured 1\.99.*errors_by_steps=\{40: .*N\(.* from z"
    ):
        check_order(solvers.dpmpp(2), 3)
    exact = orders.order(lambda denoise, x, times, noise: x * 0, steps=(4, 8))
    assert exact.order == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("draw", [
    lambda x: torch.randn_like(x), lambda x: torch.randn(x.shape, dtype=x.dtype),
    lambda x: torch.randn_like(input=x),
    lambda x: torch.randn(*x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    lambda x: torch.randn(size=x.shape, dtype=x.dtype), lambda x: torch.empty_like(x).normal_(),
    lambda x: (torch.empty_like(x).normal_(1.0, std=2.0) - 1) / 2,
    lambda x: (torch.normal(torch.ones_like(x), 2.0) - 1) / 2,
    lambda x: torch.normal(0.0, 1.0, x.shape, dtype=x.dtype),
    lambda x: torch.normal(mean=0.0, std=1.0, size=x.shape),
])  # fmt: skip
def test_normals_of_torch_are_replaced(draw: Callable[[Tensor], Tensor]) -> None:
    """A sampler that draws for itself gets the injected noise, and the generator is not touched."""

    def sampler(denoise, x, times, noise):
        for k in range(len(times) - 1):
            x = 0.7 * x + 0.2 * draw(x) + 0.1 * denoise(x, times[k])
        return x

    def given(denoise, x, times, noise):
        for k in range(len(times) - 1):
            x = 0.7 * x + 0.2 * noise(x, "anything", why=None) + 0.1 * denoise(x, times[k])
        return x

    times, state = grids.uniform(VP, 3).t, torch.get_rng_state()
    expected = sampler_law(given, DATA, VP, times)
    check_sampler_exact_law(sampler, expected, DATA, VP, times)
    assert torch.equal(torch.get_rng_state(), state)
    with Injected(lambda shape: torch.full(shape, 3.0, dtype=torch.float64)):
        assert torch.randn_like(torch.zeros(2, dtype=torch.float32)).dtype == torch.float32
        assert torch.randn(2, 1).tolist() == [[3.0], [3.0]] and torch.randn(2).dtype == torch.float32
        assert torch.normal(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])).tolist() == [7.0, 2.0]
        assert torch.rand(2).max() < 1


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match="a request for noise has the shape of the state"):
        sampler_law(lambda denoise, x, times, noise: x + torch.randn(2), DATA, VP, grids.uniform(VP, 2).t)


def test_same_law(alpha_ledger) -> None:
    """Right laws pass with all draws, wrong ones of the stated size fail, and grossly wrong ones early."""
    mixture = Mixture([0.3, 0.7], torch.tensor([[-1.0, 0.5], [1.2, 0.0]]), torch.tensor([0.25, 0.64]))
    gaussian = Gaussian(torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.2, 1.0, 3.0]).diag())
    asked: list[int] = []

    def drawn(law, shift: float, scale: float, n: int, seed: int) -> Tensor:
        asked.append(n)
        return shift + scale * law.sample(n, generator=torch.Generator().manual_seed(seed))

    for law in (mixture, gaussian):
        asked.clear()
        alpha_ledger.spend(1e-9, f"draws of {law} have their law")
        found = check_same_law(partial(drawn, law, 0.0, 1.0), law, seed=1)
        assert found.draws == sum(asked) == 100_000 and found.p_value > 1e-9
        assert 0.02 < found.detectable < 0.03
        again = check_same_law(partial(drawn, law, 0.0, 1.0), law, seed=1)
        assert again == found
        for shift, scale in ((0.2, 1.0), (0.0, 1.2)):
            with pytest.raises(AssertionError, match="minus log10 of a p-value"):
                check_same_law(partial(drawn, law, shift, scale), law)
        asked.clear()
        with pytest.raises(AssertionError, match=r"draws have the law.*draws=3703.*seed=0"):
            check_same_law(partial(drawn, law, 1.5, 1.0), law)
        assert asked == [3703]
    # a single Gaussian's mean and variance are held against their exact laws, which is sharper
    normal = Gaussian(torch.zeros(1), 1.0)
    for shift, scale, name in ((0.0245, 1.0, "mean"), (0.0, 1.02, "variance")):
        with pytest.raises(AssertionError, match=f"by {name}"):
            check_same_law(partial(drawn, normal, shift, scale), normal)
    # dependent coordinates with the right marginals: the random directions see them
    turned = Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.3], [0.3, 1.0]]))
    with pytest.raises(AssertionError, match="draws have the law"):
        check_same_law(partial(drawn, turned, 0.0, 1.0), Gaussian(torch.zeros(2), 1.0))
    with pytest.raises(AssertionError, match="as many draws as asked for"):
        check_same_law(lambda n, seed: torch.zeros(n, 2), gaussian)


# Checks of tables


def table(steps: int = 8, **changes) -> Tableau:
    made = solvers.dpmpp(3).tableau(VP, grids.log_snr(VP, steps))
    fields = {key: getattr(made, key).clone() for key in ("times", "skip", "out", "keep", "mix", "noise")}
    return Tableau(
        **{**fields, **{key: change(fields[key]) for key, change in changes.items()}}, name="planted"
    )


def at(row: int, factor: float, lag: int | None = None) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        value[row if lag is None else (row, lag)] *= factor
        return value

    return change


def test_tables_pass_and_planted_mistakes_in_rows_are_found() -> None:
    check_tableau(table(), VP, order=3, calls=8)
    with pytest.raises(AssertionError, match=r"integrated exactly.*remembers='data'"):
        check_tableau(table(), VP, order=4)
    with pytest.raises(AssertionError, match="a row for each call: found rows=8, calls=9"):
        check_tableau(table(), VP, calls=9)
    with pytest.raises(AssertionError, match=r"the mean of a point mass is kept.*table='planted', row=5"):
        check_tableau(table(keep=at(5, 1.001)), VP)
    with pytest.raises(AssertionError, match=r"the variance of a point mass is kept"):
        check_point_mass(solvers.ddpm("large").tableau(VP, grids.uniform(VP, 6)), VP)

    def moved(mix: Tensor) -> Tensor:  # keeps every row's sum
        mix[6, 2] += 1e-6
        mix[6, 0] -= 1e-6
        return mix

    check_point_mass(table(mix=moved), VP)
    with pytest.raises(AssertionError, match="polynomials of degree 1 are integrated exactly"):
        check_tableau(table(mix=moved), VP, order=3)

    def halved(mix: Tensor) -> Tensor:  # of the last difference, row 7
        d = mix[7, 2] / 2
        lam = 0.5 * VP.log_snr(table().times)
        r = (lam[7] - lam[6]) / (lam[6] - lam[5])
        mix[7] += torch.stack([-d / r, d * (1 + 1 / r), -d])
        return mix

    check_row_order(table(mix=halved), VP, 2)
    with pytest.raises(AssertionError, match="polynomials of degree 2 are integrated exactly"):
        check_row_order(table(mix=halved), VP, 3)


def test_what_check_row_order_needs() -> None:
    with pytest.raises(AssertionError, match="a table longer than its history"):
        check_row_order(table(3), VP, 3)
    with pytest.raises(AssertionError, match="a table without noise"):
        check_row_order(solvers.ddpm().tableau(VP, grids.uniform(VP, 6)), VP, 1)
    with pytest.raises(ValueError, match="expected a table that remembers data, noise, flow or velocity"):
        check_row_order(table(skip=lambda v: v + 0.3), VP, 1)


def test_times_of_tables() -> None:
    for name in (
        "heun()",
        "restart(intervals=((0.1, 0.3, 2, 4),))",
        "edm(churn=40.0, low=0.05, high=50.0, spread=1.003)",
    ):
        check_times(TABLES[name].tableau(VP, grids.karras(VP, 9)), VP)
    for end in (0.0, 1e-3):
        check_times(solvers.dpmpp(3).tableau(VP, grids.karras(VP, 5, end)), VP)
    check_times(solvers.dpmpp(2).tableau(VP, grids.uniform(VP, 5).reversed()), VP)

    def swapped(t: Tensor) -> Tensor:
        return t[[0, 1, 3, 2, 4, 5, 6, 7, 8]]

    def stuck(t: Tensor) -> Tensor:
        return t[[0, 1, 2, 2, 2, 5, 6, 7, 8]]

    for change in (swapped, stuck):
        with pytest.raises(AssertionError, match=r"times that move on, in t: found row=[23]"):
            check_times(table(times=change), VP)
    with pytest.raises(AssertionError, match="finite states, a of the canonical form"):
        check_finite(table(keep=lambda v: v * 1e60))


# Invariances


class Wrong:
    """dpmpp(2), and a mistake at the end: a function of (x, process, times)."""

    def __init__(self, change: Callable) -> None:
        self.change = change

    def solve(self, model, x, times, *, noise=None, callback=None):
        done = solvers.dpmpp(2).solve(model, x, times, noise=noise)
        return Samples(
            self.change(done.x, model.sde, torch.as_tensor(times)), done.network_calls, done.seconds
        )


BROKEN = {
    "clipped to a box": (lambda x, sde, t: x.clamp(-1, 1), check_rotation, "rotations commute"),
    "an offset": (lambda x, sde, t: x + 1e-3, check_scaling, "scaling and shifts commute"),
    "looks at the clock": (lambda x, sde, t: x * (1 + 1e-6 * t[1]), check_time_change, "only the log-SNR"),
    "divided by the batch's spread": (
        lambda x, sde, t: x / (1 + 1e-9 * x.std()),
        check_batch,
        "in every batch",
    ),
    "sorted": (lambda x, sde, t: x.sort(0).values, check_batch, "in every batch"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_broken_invariances_are_found(mistake: str) -> None:
    change, check, message = BROKEN[mistake]
    for right in (solvers.dpmpp(2), solvers.ddpm(), solvers.unipc(3), Wrong(lambda x, sde, t: x)):
        check_invariances(right, VP)
    with pytest.raises(AssertionError, match=message):
        check(Wrong(change), VP)
    with pytest.raises(AssertionError, match=message):
        check_invariances(Wrong(change), VP, (check,))


def test_every_invariance_is_checked() -> None:
    assert set(solver_checks.INVARIANCES) == {check_rotation, check_scaling, check_time_change, check_batch}


def test_strong_order() -> None:
    """One path for all step counts; noise that is drawn anew for each does not converge."""
    check_strong_order(solvers.ddpm(), steps=(16, 32, 64), tolerance=0.2)

    class Anew:
        def solve(self, model, x, times, *, noise=None, callback=None):
            fresh = Noise.of(len(times), batch=len(x), dtype=torch.float64)
            return solvers.ddpm().solve(model, x, times, noise=fresh)

    with pytest.raises(AssertionError, match=r"strong order 1, measured -?0\.\d"):
        check_strong_order(Anew(), steps=(16, 32, 64))


# The command

MODULE = """
import torch
from scoresde import EDM, solvers

def euler(denoise, x, sigmas, noise):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        x = x + (t - s) * (x - denoise(x, s)) / s
    return x

def broken(denoise, x, sigmas, noise):
    return euler(denoise, x, sigmas, noise) * float("nan")

def raises(denoise, x, sigmas, noise):
    raise RuntimeError("no such\\nthing")

multistep = solvers.dpmpp(2)
process = EDM(0.01, 20.0)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "their_samplers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_samplers", raising=False)
    return "their_samplers"


def test_the_command(module: str, capsys) -> None:
    assert command.main([f"{module}:euler", "--process", "scoresde:EDM", "--order", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("their_samplers:euler: passed, ")
    assert printed[1].split() == ["property", "verdict", "measured", "expected"] and len(printed) == 9
    assert any("1 +- 0.15" in line and "pass" in line for line in printed)
    assert command.main([f"{module}:euler", "--process", f"{module}:process", "--order", "2"]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert command.main([f"{module}:multistep"]) == 0
    assert "2 +- 0.15" in capsys.readouterr().out  # from its card
    assert command.main([f"{module}:broken", "--process", "scoresde:EDM"]) == 1
    assert "not in [1, 2, 3, 10, 100]" in capsys.readouterr().out
    assert command.main([f"{module}:raises", "--process", "scoresde:EDM"]) == 1
    assert capsys.readouterr().out.count("no such thing") >= 5
    # the strict tolerance is not met by a state in float32, the stated one is
    for text in ("their_samplers", "their_samplers:euler:x", "their_samplers:missing", "no_such_module_x:f"):
        with pytest.raises(SystemExit) as ended:
            command.main([text])
        assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_command_as_people_run_it(tmp_path: Path) -> None:
    (tmp_path / "their_samplers.py").write_text(MODULE)
    root = str(Path(scoresde.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-m", "scoresde.testing", "their_samplers:euler", "--process", "scoresde:EDM"],
        cwd=tmp_path, env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0 and "their_samplers:euler: passed" in run.stdout, run.stdout + run.stderr


def test_a_float32_sampler_is_certified_at_its_tolerance() -> None:
    def single(denoise, x, times, noise):
        x = x.float()
        alpha, sigma, _ = (v.float() for v in nodes(times))
        for k in range(len(times) - 1):
            ratio = sigma[k + 1] / sigma[k]
            x = ratio * x + (alpha[k + 1] - ratio * alpha[k]) * denoise(x, times[k]).float()
        return x

    strict, stated = certify(single, VP, order=1), certify(single, VP, order=1, tolerance=1e-4)
    assert not strict.passed and stated.passed and str(stated).startswith("<function")
