"""The primitive behind exponential solvers against high-precision quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from protocol import VP
from work import Work

from scoresde import grids, solvers
from scoresde.sde import EDM, VPSDE, LinearSDE, Rectified
from scoresde.solvers.exponential import er_noise_level
from scoresde.solvers.weights import lagrange, step_weights

# Run-time type checks cost more than the solvers here; test_sampling.py runs every solver with them.
pytestmark = pytest.mark.usefixtures("unchecked")


def oracle_weights(
    sde: LinearSDE, lam_s: float, lam_t: float, nodes: list[float], stored: str, variable: str, tau: float
):
    """A, b, C with 25 digits: closed antiderivatives of the linear rate, adaptive quadrature of the
    polynomial.
    """
    with mp.workdps(25):
        s, t, T = mp.mpf(lam_s), mp.mpf(lam_t), mp.mpf(tau) ** 2
        ratio = {
            EDM: lambda v: mp.mpf(1),
            VPSDE: lambda v: 1 / mp.sqrt(1 + mp.exp(-2 * v)),
            Rectified: lambda v: 1 / (1 + mp.exp(-v)),
        }
        alpha: Callable = ratio[type(sde)]

        def sigma(v):
            return alpha(v) * mp.exp(-v)

        rate_integral = {
            "data": lambda v: T * v,
            "noise": lambda v: -v,
            "velocity": lambda v: T * v - (1 + T) * mp.log(1 + mp.exp(2 * v)) / 2,
            "flow": lambda v: T * v - (1 + T) * mp.log(1 + mp.exp(v)),
        }[stored]
        weight = {
            "data": mp.exp,
            "noise": lambda v: mp.mpf(-1),
            "velocity": lambda v: -1 / (alpha(v) * (1 + mp.exp(-2 * v))),
            "flow": lambda v: -1 / (1 + mp.exp(-v)),
        }[stored]
        u = {
            "lam": lambda v: v,
            "sigma/alpha": lambda v: mp.exp(-v),
            "sigma": lambda v: 1 / (1 + mp.exp(v)),
            "t": lambda v: mp.exp(-v) if type(sde) is EDM else 1 / (1 + mp.exp(v)),
        }[variable]
        end = rate_integral(t)

        def propagator(v):
            return mp.exp(rate_integral(v) - end)

        at = [u(mp.mpf(v)) for v in nodes]

        def basis(j, v):
            return mp.fprod((u(v) - at[i]) / (at[j] - at[i]) for i in range(len(at)) if i != j)

        pieces = mp.linspace(s, t, 2 + int((t - s) / 3))
        A = sigma(t) / sigma(s) * propagator(s)
        b = [
            sigma(t) * mp.quad(lambda v, j=j: propagator(v) * (1 + T) * weight(v) * basis(j, v), pieces)
            for j in range(len(at))
        ]
        C = sigma(t) * mp.sqrt(mp.quad(lambda v: 2 * T * propagator(v) ** 2, pieces))
        return float(A), [float(v) for v in b], float(C)


def at_lam(sde: LinearSDE, values: list[float]) -> tuple[torch.Tensor, list[float]]:
    """Times near the given lam, and their own lam as float64 has it."""
    t = sde.time(2 * torch.tensor(values, dtype=torch.float64))
    return t, (0.5 * sde.log_snr(t)).tolist()


WIDE = EDM(1e-9, 1e9)


@pytest.mark.oracle
@pytest.mark.parametrize("stored", ["data", "noise", "velocity", "flow"])
@pytest.mark.parametrize("h", [1e-4, 1e-2, 0.3, 2.0, 10.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_step_weights_to_rounding(stored: str, h: float) -> None:
    """b relative to the largest of them: single ones may be zero."""
    cases = [(WIDE, "lam", 0.0), (WIDE, "lam", 1.0)]
    if h <= 2:
        cases += [
            (WIDE, "sigma/alpha", 0.0),
            (Rectified(), "t", 0.0),
            (WIDE, "sigma", 0.4),
            (VP, "sigma", 0.0),
        ]
    for sde, variable, tau in cases:
        if stored != "data" and h > 10 and tau:
            continue  # noise of e^h the size of the state: no one takes such a step
        base = -0.45 * h if h > 3 else -1.0
        # one or two nodes behind the base, the base, and one ahead of the target
        values = [base, base + h, base + h, base - 0.8 * h, base - 1.7 * h]
        for chosen in ([0, 3], [1, 0, 3, 4]) if h < 3 else ([1, 0, 3],):
            times, lam = at_lam(sde, values)
            A, b, C = step_weights(
                sde, times[:1], times[1:2], times[chosen][None], stored=stored, variable=variable, tau=tau
            )
            expected = oracle_weights(sde, lam[0], lam[1], [lam[i] for i in chosen], stored, variable, tau)
            # other variables than lam are functions of t, whose lam is a rounding away
            accuracy = 1e-13 * max(1, h / 3) + (1e-15 / h if variable != "lam" else 0)
            assert A.item() == pytest.approx(expected[0], rel=accuracy)
            size = max(map(abs, expected[1]))
            assert b[0].tolist() == pytest.approx(expected[1], rel=0, abs=accuracy * size), (
                variable,
                tau,
                chosen,
            )
            assert C.item() == pytest.approx(expected[2], rel=accuracy)


@pytest.mark.oracle
@pytest.mark.parametrize("variable", ["lam", "sigma/alpha", "sigma", "t"])
@pytest.mark.parametrize("base", [12.0, -12.0])
def test_small_steps_at_small_noise_or_signal_keep_their_digits(variable: str, base: float) -> None:
    times, lam = at_lam(WIDE, [base, base + 0.01, base - 0.007])
    _, b, _ = step_weights(WIDE, times[:1], times[1:2], times[[0, 2]][None], variable=variable)
    expected = oracle_weights(WIDE, lam[0], lam[1], [lam[0], lam[2]], "data", variable, 0.0)[1]
    # lam = 12 is rounded by 1e-15, less than 1e-12 of the step
    assert b[0].tolist() == pytest.approx(expected, rel=2e-12, abs=0)


@pytest.mark.parametrize("stored", ["data", "noise", "velocity", "flow"])
@pytest.mark.parametrize("tau", [3.0, 30.0, 1000.0, lambda lam: 3 * er_noise_level(lam)])
def test_a_long_step_of_strong_noise_is_many_short_ones(stored: str, tau) -> None:
    """With a constant output: what 2,000 steps on one panel each do one after the other."""
    lam = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    if tau == 1000.0:  # finer towards the end, where the propagator falls
        lam = 5 - 10 * (1 - torch.linspace(0, 1, 2001, dtype=torch.float64)) ** 4
    t = VP.time(2 * lam)
    A, b, C = step_weights(VP, t[:-1], t[1:], t[:-1, None], stored=stored, tau=tau)
    one = step_weights(VP, t[:1], t[-1:], t[:1, None], stored=stored, tau=tau)
    later = torch.cat([A.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    assert one[0].item() == pytest.approx(float(A.prod()), rel=1e-11, abs=1e-300)
    assert one[1].item() == pytest.approx(float((later * b[:, 0]).sum()), rel=1e-11)
    assert one[2].item() == pytest.approx(float((later * C).norm()), rel=1e-11)


def test_a_step_has_the_weights_that_it_has_alone() -> None:
    """Short and long steps, and those of weak and strong noise, in one call."""
    t = VP.time(2 * torch.tensor([-4.5, -4.4, -1.0, 3.0, 3.01], dtype=torch.float64))
    tau = torch.tensor([0.5, 0.5, 30.0, 1000.0], dtype=torch.float64)
    together = step_weights(VP, t[:-1], t[1:], t[:-1, None], tau=tau)
    for i in range(4):
        alone = step_weights(VP, t[i : i + 1], t[i + 1 : i + 2], t[i : i + 1, None], tau=tau[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[i], b[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("eta", [100.0, 400.0, 1e6])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_strong_noise_keeps_the_law_of_a_point_mass(eta: float, steps: int) -> None:
    sde = VPSDE()
    table = solvers.sde_dpmpp(1, eta=eta).tableau(sde, grids.log_snr(sde, steps))
    assert float(table.defect(sde).abs().max()) < 1e-12


@pytest.mark.oracle
def test_step_weights_in_closed_form() -> None:
    """Order 1 and 2, data and noise: alpha_t (1 - e^(-a h)) and its next moment; sigma_t (e^h - 1)."""
    for h in (1e-4, 1e-2, 0.5, 5.0, 60.0):
        base = 0.3 - 0.45 * h
        (t, lam) = at_lam(WIDE, [base, base + h, base - h])
        with mp.workdps(40):
            step, back = mp.mpf(lam[1]) - mp.mpf(lam[0]), mp.mpf(lam[0]) - mp.mpf(lam[2])
            sigma_t = mp.exp(-mp.mpf(lam[1]))
            for tau in (0.0, 1.0, 0.3, 10.0, 1000.0):
                a = 1 + mp.mpf(tau) ** 2
                A, b, C = step_weights(WIDE, t[:1], t[1:2], t[[0, 2]][None], tau=tau)
                zeroth, first = -mp.expm1(-a * step), step + mp.expm1(-a * step) / a
                assert A.item() == pytest.approx(float(mp.exp(-a * step)), rel=1e-13)
                assert C.item() == pytest.approx(
                    float(sigma_t * mp.sqrt(-mp.expm1(-2 * (a - 1) * step))), rel=1e-13
                )
                expected = [zeroth + first / back, -first / back]
                assert b[0].tolist() == pytest.approx([float(v) for v in expected], rel=1e-12)
            A, b, C = step_weights(WIDE, t[:1], t[1:2], t[:1, None], stored="noise", tau=1.0)
            assert A.item() == pytest.approx(1, rel=1e-14)
            assert b.item() == pytest.approx(float(-2 * sigma_t * mp.expm1(step)), rel=1e-13)
            assert C.item() == pytest.approx(float(sigma_t * mp.sqrt(mp.expm1(2 * step))), rel=1e-13)


@given(
    st.sampled_from(["data", "noise", "velocity", "flow"]),
    st.sampled_from(["lam", "sigma/alpha", "sigma", "t"]),
    st.integers(1, 5),
    st.floats(0, 1.5),
    st.integers(0, 10**6),
)
def test_polynomials_of_lower_degree_are_integrated_exactly(
    stored: str, variable: str, count: int, tau: float, seed: int
) -> None:
    """sum_j b_j u_j^k is the same for any nodes, one more included: the moment of u^k. Vectorised over steps,
    too.
    """
    rng = np.random.default_rng(seed)
    steps = 3
    s = torch.from_numpy(rng.uniform(-1.5, 0.5, steps))
    nodes = (
        s[:, None]
        + torch.from_numpy(np.sort(rng.uniform(-1.5, 1, (steps, count + 1))))
        + 0.3 * torch.arange(count + 1)
    )
    target = s + torch.from_numpy(rng.uniform(0.2, 1.2, steps))
    at, end, every = (VP.time(2 * lam) for lam in (s, target, nodes))
    options = {"stored": stored, "variable": variable, "tau": tau}
    u = {
        "lam": lambda v: v,
        "sigma/alpha": lambda v: (-v).exp(),
        "sigma": lambda v: (-v).sigmoid(),
        "t": lambda v: VP.time(2 * v),
    }[variable]
    _, few, _ = step_weights(VP, at, end, every[:, :count], **options)
    _, many, _ = step_weights(VP, at, end, every, **options)
    place = u(nodes)
    for k in range(count):
        terms, more = few * place[:, :count] ** k, many * place**k
        scale = 1 + float(terms.abs().max() + more.abs().max())
        assert torch.allclose(terms.sum(1), more.sum(1), rtol=0, atol=1e-12 * scale * 30)
    assert not torch.allclose(
        (few * place[:, :count] ** count).sum(1), (many * place**count).sum(1), rtol=1e-9, atol=0
    )
    for i in range(steps):
        alone = step_weights(VP, at[i : i + 1], end[i : i + 1], every[i : i + 1, :count], **options)[1]
        assert torch.allclose(alone[0], few[i], rtol=1e-12, atol=1e-13)


def test_noise_levels_add_up() -> None:
    """A step with tau split in two: A multiplies, variances add, for any kind of tau."""
    lam = torch.tensor([-1.0, 0.2, 1.1], dtype=torch.float64)
    t = VP.time(2 * lam)

    def tau(v: torch.Tensor) -> torch.Tensor:
        return 0.4 + 0.3 * (2 * v).sin()

    for level in (0.7, tau):
        A, _, C = step_weights(VP, t[[0, 1, 0]], t[[1, 2, 2]], t[[0, 1, 0], None], tau=level)
        assert A[2].item() == pytest.approx((A[0] * A[1]).item(), rel=1e-12)
        assert C[2].item() == pytest.approx(math.hypot(C[1].item(), (A[1] * C[0]).item()), rel=1e-12)
    numbers = step_weights(VP, t[:2], t[1:], t[:2, None], tau=torch.tensor([0.7, 0.2], dtype=torch.float64))
    for i, value in enumerate((0.7, 0.2)):
        single = step_weights(VP, t[i : i + 1], t[i + 1 : i + 2], t[i : i + 1, None], tau=value)
        for a, b in zip(numbers, single, strict=True):
            assert torch.allclose(a[i], b[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("stored", ["data", "noise", "flow"])
@pytest.mark.parametrize("tau", [0.0, 0.7, lambda lam: 0.4 + 0.3 * (2 * lam).sin()])
def test_what_bh1_and_bh2_put_in_place_of_the_moment(stored: str, tau) -> None:
    """`h W(end)/2` and `mu_0/2`, with W(end) = sigma_t alpha/(sigma q) (1 + tau^2) at the end of the step."""
    lam = torch.tensor([-0.6, 0.2, 1.1], dtype=torch.float64)
    t = VP.time(2 * lam)
    alpha, sigma = VP.alpha(t[2]), VP.sigma(t[2])
    options = {"stored": stored, "tau": tau}
    _, exact, _ = step_weights(VP, t[1:2], t[2:], t[[1, 0]][None], **options)
    one, two = (
        step_weights(VP, t[1:2], t[2:], t[[1, 0]][None], rule=rule, **options)[1] for rule in ("bh1", "bh2")
    )
    q = {"data": 1.0, "noise": -alpha / sigma, "flow": -(alpha + sigma) / sigma}[stored]
    level = tau(lam[2]) if callable(tau) else tau
    end, h = alpha / q * (1 + level**2), lam[2] - lam[1]
    share = h / (lam[1] - lam[0])
    expected = (h * end - exact.sum()) / 2 * share
    assert float((one - two)[0, 0]) == pytest.approx(float(expected), rel=1e-10)
    assert float((one - two).sum()) == pytest.approx(0, abs=1e-14)
    shift = (one - exact)[0, 0] / share
    assert float(h * end / 2 - shift) == pytest.approx(float(-exact[0, 1] / share), rel=1e-9)


def test_the_flow_is_the_default() -> None:
    t = VP.time(torch.tensor([-1.0, 1.0, -1.5], dtype=torch.float64))
    plain = step_weights(VP, t[:1], t[1:2], t[[0, 2]][None])
    for found, expected in zip(
        plain,
        step_weights(
            VP, t[:1], t[1:2], t[[0, 2]][None], stored="data", variable="lam", tau=0.0, rule="exact"
        ),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert plain[2].item() == 0


def test_what_needs_a_signal_says_so() -> None:
    for solver in (solvers.dpm(2), solvers.heun(), solvers.deis(2)):
        with pytest.raises(ValueError, match=r"remembers noise, found alpha = 0 at t = 1\.0; remember data"):
            solver.tableau(Rectified(), torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))


def test_the_lagrange_basis_takes_operations_in_proportion_to_its_nodes():
    """One factor for all of them at a time; one by one they would be quadratic in the nodes."""
    taken = []
    for count in (4, 8):
        nodes, u = torch.rand(2, 3, count, dtype=torch.float64).sort().values
        with Work() as work:
            basis = lagrange(u, nodes)
        assert basis.shape == (3, count, count)
        assert torch.allclose(lagrange(nodes, nodes), torch.eye(count, dtype=torch.float64), atol=1e-12)
        taken.append(work.operations)
    assert taken[1] <= 2 * taken[0]
