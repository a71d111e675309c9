"""Schedules: against high precision, against each other's definitions, and at the ends."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle

import mpmath as mp
import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from scoresde.schedules import (
    Cosine,
    Learned,
    Linear,
    Schedule,
    Sigmoid,
    Tabulated,
    beta_table,
    tabulated_betas,
    unit_interval,
    wide,
)
from scoresde.sde import VPSDE, SubVPSDE
from scoresde.testing.strategies import RandomLearned, beta_tables, cosines, learneds, sigmoids

EPS = 2.0**-52
TIMES = [1e-8, 1e-6, 1e-4, 1e-3, 0.03, 0.1, 0.3, 0.4999, 0.5, 0.5001, 0.7, 0.9, 0.99, 1.0]


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


EXAMPLES = [
    Linear(),
    Linear(0.0, 1.0),
    Linear(5.0, 0.1),
    Linear(3.0, 3.0),
    Cosine(),
    Cosine(0.0, -100.0),
    Cosine(0.3, -2.0),
    Sigmoid(),
    Sigmoid(0.0, 3.0, 0.3, -30.0),
    Sigmoid(-3.0, 1.0, 1.1, -100.0),
    tabulated_betas([0.3]),
    tabulated_betas([0.2, 0.01]),
    tabulated_betas([1e-8, 1e-3, 0.9, 0.999, 0.4, 0.001]),
    tabulated_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
    RandomLearned(0),
    Learned(log_snr_max=9.0, log_snr_min=-20.0).requires_grad_(False),
]


def name(schedule: Schedule) -> str:
    shown = f"Tabulated-{schedule.steps}" if isinstance(schedule, Tabulated) else repr(schedule)
    return shown.replace(" ", "")


def exact_B(schedule: Schedule, t: float) -> mp.mpf:
    """B(t) from the definition, in the precision of mpmath."""
    if isinstance(schedule, Linear):
        return reference.linear_B(t, schedule.beta_min, schedule.beta_max)
    if isinstance(schedule, Cosine):
        return reference.cosine_B(t, schedule.s, schedule.log_snr_min)
    if isinstance(schedule, Sigmoid):
        return reference.sigmoid_B(t, schedule.start, schedule.end, schedule.tau, schedule.log_snr_min)
    if isinstance(schedule, Tabulated):
        return reference.tabulated_B(t, schedule.nodes)
    assert isinstance(schedule, Learned)
    parameters = [p.tolist() for p in (schedule.linear, schedule.weight, schedule.slope, schedule.center)]
    return reference.learned_B(t, schedule.log_snr_max, schedule.log_snr_min, *parameters)


def check_against_high_precision(schedule: Schedule, t: float, of_sigma: float = 1e-12) -> None:
    """sigma to `of_sigma`, B, alpha, log_snr to 1e-12; the rounding of B counts for alpha."""
    sde, at = VPSDE(schedule=schedule), f64(t)
    with mp.workdps(160):
        B = exact_B(schedule, t)
        sigma, alpha = mp.sqrt(-mp.expm1(-B)), mp.exp(-B / 2)
        log_snr = -mp.log(mp.expm1(B))
        assert abs(sde.sigma(at).item() / sigma - 1) < of_sigma
        assert abs(sde.B(at).item() / B - 1) < 1e-12
        assert abs(sde.alpha(at).item() / alpha - 1) < 1e-12 * max(1, B)
        assert abs(sde.log_snr(at).item() - log_snr) < 1e-12 * max(1, abs(log_snr))


@pytest.mark.oracle
@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
@pytest.mark.parametrize("t", TIMES)
def test_schedule_in_high_precision(schedule: Schedule, t: float) -> None:  # PROPERTIES 3, FAULTS A7
    check_against_high_precision(schedule, t)


@pytest.mark.oracle
@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
def test_beta_in_high_precision(schedule: Schedule) -> None:
    for t in (1.1e-3, 0.2002, 0.4097, 0.6003, 0.7711, 0.9805):
        with mp.workdps(50):
            slope = mp.diff(lambda u: exact_B(schedule, u), t, h=mp.mpf(10) ** -20)
            assert abs(schedule.beta(f64(t)).item() / slope - 1) < 1e-10


@pytest.mark.parametrize(
    "schedule", [*EXAMPLES, Cosine(0.1, -100.0), Sigmoid(0.0, 1.0, 1.0, -300.0)], ids=name
)
def test_gradient_is_finite_at_the_ends(schedule: Schedule) -> None:
    at = f64(0.0, 1.0).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.B(at).sum(), at)
    torch.testing.assert_close(slope, schedule.beta(at.detach()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
def test_time_inverts_B_to_relative_precision(schedule: Schedule) -> None:
    if isinstance(schedule, Learned):
        return  # its B does not vanish at 0, so B says nothing of a tiny t
    t = torch.tensor(TIMES, dtype=torch.float64)
    allowed = 1e-13 * t + 8 * EPS * schedule.B(t) / schedule.beta(t)
    assert ((schedule.time(schedule.B(t)) - t).abs() <= allowed).all()


@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
def test_ends_are_exact(schedule: Schedule) -> None:
    ends = f64(0.0, 1.0)
    back = schedule.time(schedule.B(ends))
    assert back[0] == 0 and abs(back[1] - 1) < 1e-14
    if not isinstance(schedule, Learned):
        assert schedule.B(ends)[0] == 0
        sde = VPSDE(schedule=schedule)
        assert sde.alpha(0.0) == 1 and sde.sigma(0.0) == 0
        assert sde.log_snr(0.0) == math.inf and sde.time(math.inf) == 0


@given(sigmoids())
@example(Sigmoid(log_snr_min=-2.0))
@example(Sigmoid(tau=0.05))  # flat at its end: to rounding it is there long before
@example(Sigmoid(-0.4, 0.4, 0.001, 9.0))
def test_beyond_a_sigmoid_is_its_end(schedule: Sigmoid) -> None:
    sde = VPSDE(schedule=schedule)
    beyond = f64(schedule.log_snr_min - 1e-9, schedule.log_snr_min - 3.0, -800.0, -math.inf)
    for process in (sde, SubVPSDE(schedule=schedule)):
        assert float((process.time(beyond) - 1).abs().max()) < 1e-7
        t = process.time(torch.linspace(-20.0, 20.0, 401, dtype=torch.float64))
        assert bool((t.diff() <= 1e-12).all()) and 0 <= float(t.min()) <= float(t.max()) <= 1
    t = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)
    allowed = 1e-13 + 8 * EPS * (schedule.B(t) + 1) / schedule.beta(t)
    assert bool(((schedule.time(schedule.B(t)) - t).abs() <= allowed).all())


@given(st.one_of(cosines(), sigmoids(), learneds()))
def test_log_snr_ends_where_stated(schedule: Cosine | Sigmoid | Learned) -> None:
    assert abs(VPSDE(schedule=schedule).log_snr(1.0) - schedule.log_snr_min) < 1e-12


@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
def test_values_do_not_depend_on_what_stands_beside_them(
    unchecked: None, schedule: Schedule, device: torch.device
) -> None:
    """Bit by bit: 259 times together, and three by three. Torch's sigmoid fails this, by a last digit in
    forty."""
    t = torch.rand(259, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    log_snr = VPSDE(schedule=schedule).log_snr(t).detach()
    functions = [(schedule.B, t), (schedule.beta, t), (VPSDE(schedule=schedule).time, log_snr)]
    for function, values in functions:
        parts = torch.cat([function(part) for part in values.split(3)])
        assert torch.equal(function(values), parts)


def test_learned_schedule_begins_where_stated() -> None:
    sde = VPSDE(schedule=RandomLearned(3))
    assert abs(sde.log_snr(0.0) - 13.3) < 1e-9
    assert abs(sde.schedule.log_snr(f64(1.0)) + 10).item() < 1e-12  # pyright: ignore


def test_learned_schedule_learns() -> None:
    schedule = Learned(hidden=4)
    VPSDE(schedule=schedule).sigma(f64(0.3, 0.6)).sum().backward()
    for parameter in schedule.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    fresh = Learned()
    assert fresh.linear == 0 and fresh.weight.equal(torch.full((32,), -3.0, dtype=torch.float64))
    assert fresh.slope.equal(torch.full((32,), 2.0, dtype=torch.float64))
    assert fresh.center.equal(torch.linspace(0, 1, 32, dtype=torch.float64))
    assert {p.dtype for p in Learned().parameters()} == {torch.float64}


def test_ends_of_a_learned_schedule_are_numbers_or_learned_too() -> None:
    fixed, free = Learned(), Learned(5.0, -4.0, hidden=2, learn_ends=True)
    assert (fixed.log_snr_max, fixed.log_snr_min) == (13.3, -10.0) and len(list(fixed.parameters())) == 4
    assert abs(fixed.log_snr(f64(0.0)) - 13.3) < 1e-12 and abs(fixed.log_snr(f64(1.0)) + 10) < 1e-12
    assert isinstance(free.log_snr_max, nn.Parameter) and free.log_snr_max.dtype == torch.float64
    assert free.log_snr_max == 5 and free.log_snr_min == -4
    free.log_snr(f64(0.0, 1.0)).sum().backward()
    assert free.log_snr_max.grad == 1 == free.log_snr_min.grad  # pyright: ignore


def test_the_price_of_an_inverse(monkeypatch) -> None:
    asked, schedule, plain = [], RandomLearned(0), Learned.B
    monkeypatch.setattr(Learned, "B", lambda self, t: asked.append(t) or plain(self, t))
    schedule.time(f64(0.3, 0.7))
    assert len(asked) == 90


def test_nodes_of_a_table_are_a_tuple_of_floats(unchecked: None) -> None:
    for nodes in ([0, 1, 2], torch.tensor([0, 1, 2]), iter((0, 1, 2))):
        table = Tabulated(nodes)  # pyright: ignore[reportArgumentType]
        assert repr(table) == "Tabulated(nodes=(0.0, 1.0, 2.0))" and hash(table) == hash(Tabulated((0, 1, 2)))


def test_defaults() -> None:
    assert Linear() == Linear(0.1, 20.0) and Cosine().s == 0.008
    assert Sigmoid() == Sigmoid(-3.0, 3.0, 1.0, Sigmoid().log_snr_min)
    assert -30 < Cosine().log_snr_min == Sigmoid().log_snr_min < -9


# The oracles of the linear schedule.


@pytest.mark.oracle
def test_linear_oracles() -> None:  # ORACLES, Schedules
    sde = VPSDE(0.1, 20.0)
    assert abs(sde.alpha(1.0) - 0.0065715865) < 5e-11
    assert abs(sde.alpha(1.0) ** 2 - 4.3185749e-5) < 5e-13
    assert abs(sde.log_snr(1.0) / 2 + 5.0249784) < 5e-8
    kappa = (-0.5 * sde.log_snr(f64(1e-3, 1.0))).exp()
    assert abs(kappa[0] - 0.010485993) < 5e-10 and abs(kappa[1] - 152.16697) < 5e-6


@pytest.mark.oracle
def test_ddpm_table_oracles() -> None:  # ORACLES, Schedules
    sde = VPSDE.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    alpha_bar = sde.alpha(f64(0.5, 1.0)) ** 2
    assert abs(alpha_bar[0] - 0.0785872) < 5e-8 and abs(alpha_bar[1] - 4.0358298e-5) < 5e-13
    kappa = (-0.5 * sde.log_snr(f64(0.001, 1.0))).exp()
    assert abs(kappa[0] - 0.0100005) < 5e-8 and abs(kappa[1] - 157.40728) < 5e-6


# Tabulated


@given(beta_tables())
def test_table_is_exact_at_its_nodes_and_increasing_between(betas: list[float]) -> None:
    schedule, n = tabulated_betas(betas), len(betas)
    nodes = torch.arange(n + 1, dtype=torch.float64) / n
    assert schedule.steps == n and schedule.B(nodes).tolist() == list(schedule.nodes)
    fine = torch.linspace(0, 1.5, 40 * n + 1, dtype=torch.float64)
    assert (schedule.beta(fine) > 0).all()
    assert (schedule.B(fine).diff() > -4 * EPS * schedule.nodes[-1]).all()


@given(beta_tables(low=1e-4))
def test_table_is_continuously_differentiable(betas: list[float]) -> None:
    schedule, n = tabulated_betas(betas), len(betas)
    nodes = torch.arange(1, n + 1, dtype=torch.float64) / n
    before, after = schedule.beta(nodes * (1 - 2 * EPS)), schedule.beta(nodes)
    curvature = 12 * n**2 * max(schedule.B(f64(1.0)).item(), 1)  # of the cubics, per unit of t
    assert ((before - after).abs() <= 16 * EPS * curvature).all()


def test_table_continues_linearly() -> None:
    schedule = tabulated_betas([0.1, 0.3, 0.2])
    rate, end = schedule.beta(f64(1.0)), schedule.nodes[-1]
    torch.testing.assert_close(schedule.B(f64(1.25)), end + 0.25 * rate)
    torch.testing.assert_close(schedule.time(end + 0.25 * rate), f64(1.25))
    torch.testing.assert_close(schedule.beta(f64(1.25)), rate)


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_table_of_equal_betas_is_the_constant_rate(n: int) -> None:
    schedule = tabulated_betas([0.1] * n)
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    torch.testing.assert_close(schedule.B(t), -n * math.log(0.9) * t, rtol=1e-14, atol=0)


def test_table_interpolates_smooth_rates_closely() -> None:
    """Halving the table's steps cuts the error about eightfold."""
    t = torch.linspace(0, 1, 701, dtype=torch.float64)
    errors = []
    for n in (50, 100, 200):
        table = VPSDE.from_betas(VPSDE(2.0, 20.0).betas(n))
        errors.append((table.B(t) - VPSDE(2.0, 20.0).B(t)).abs().max().item())
    assert errors[-1] < 1e-4
    assert all(fine < coarse / 6 for coarse, fine in itertools.pairwise(errors))


def test_table_from_ints_floats_and_tensors() -> None:
    assert Tabulated((0.0, 1.0, 2.5)).nodes == (0.0, 1.0, 2.5)
    single = torch.tensor([0.1, 0.2])
    assert tabulated_betas(single) == tabulated_betas(single.tolist())
    assert tabulated_betas([0.1]) != tabulated_betas([0.2])
    assert hash(tabulated_betas([0.1])) == hash(tabulated_betas([0.1]))


@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
def test_copies_are_equal(schedule: Schedule) -> None:
    t = f64(0.1, 0.77)
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin.B(t).equal(schedule.B(t))  # type: ignore[attr-defined]


@pytest.mark.parametrize("schedule", [e for e in EXAMPLES if not isinstance(e, Learned)], ids=name)
def test_schedules_are_values(schedule: Schedule) -> None:
    twin = copy.deepcopy(schedule)
    assert twin == schedule and hash(twin) == hash(schedule) and "_tables" not in repr(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        twin.beta_min = 1.0  # pyright: ignore


# Arguments


@pytest.mark.parametrize("schedule", EXAMPLES, ids=name)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_shapes_and_dtypes(schedule: Schedule, shape: tuple[int, ...], device: torch.device) -> None:
    schedule = copy.deepcopy(schedule).to(device) if isinstance(schedule, Learned) else schedule
    t = torch.full(shape, 0.37, dtype=torch.float64, device=device)
    for value in (schedule.B(t), schedule.beta(t), schedule.time(t)):
        assert value.shape == shape and value.dtype == torch.float64 and value.device.type == device.type
    if t.ndim == 2:
        assert schedule.B(t.t()).equal(schedule.B(t).t())  # strided input
        assert schedule.time(t.t()).equal(schedule.time(t).t())
    if t.numel():
        assert (schedule.time(schedule.B(t)) - 0.37).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_times_are_widened(dtype: torch.dtype) -> None:
    t = torch.tensor([0.1, 1e-3], dtype=dtype)
    assert wide(t).dtype == torch.float64 and wide(t).equal(t.to(torch.float64))
    sde = VPSDE()
    assert sde.sigma(t).equal(sde.sigma(f64(*t.tolist())))
    assert wide(0.1).item() == 0.1 and wide(0.1).shape == ()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_times_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:  # FAULTS E5, E5b
    with pytest.raises(TypeError, match=r"expected floating times, found .*i/N"):
        VPSDE().alpha(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(-0.1, 20.0),
        lambda: Linear(math.nan, 20.0),
        lambda: Linear(0.1, 0.0),
        lambda: Linear(0.1, math.inf),
        lambda: Linear(math.inf, 1.0),
        lambda: Cosine(-0.1),
        lambda: Cosine(0.008, 10.0),
        lambda: Cosine(0.008, -700.0),
        lambda: Cosine(0.008, -math.inf),
        lambda: Cosine(math.nan),
        lambda: Sigmoid(1.0, 1.0),
        lambda: Sigmoid(tau=0.0),
        lambda: Sigmoid(tau=-1.0),
        lambda: Sigmoid(tau=0.001),
        lambda: Sigmoid(-1.0, 500.0),
        lambda: Sigmoid(-500.0, 1.0),
        lambda: Sigmoid(log_snr_min=-700.0),
        lambda: Sigmoid(log_snr_min=10.0),
        lambda: Tabulated(()),
        lambda: Tabulated((0.0,)),
        lambda: Tabulated((0.1, 0.2)),
        lambda: Tabulated((0.0, 0.2, 0.2)),
        lambda: Tabulated((0.0, 0.2, math.inf)),
        lambda: Tabulated((0.0, math.nan)),
        lambda: Learned(1.0, 1.0),
        lambda: Learned(hidden=0),
        lambda: beta_table([]),
        lambda: beta_table(torch.tensor([[0.1]])),
        lambda: beta_table([0.1, 1.0]),
        lambda: beta_table([0.0]),
        lambda: beta_table([0.1, math.nan]),
        lambda: tabulated_betas([-0.1]),
    ],
)
def test_errors_say_what_was_expected(make) -> None:  # FAULTS F10
    with pytest.raises(ValueError, match=r"expected .*found"):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linear("1", 2.0), "beta_min: expected a number, found '1'"),
        (lambda: Linear(1.0, None), "beta_max: expected a number, found None"),
        (lambda: Cosine("1"), "s: expected a number"),
        (lambda: Cosine(0.1, "1"), "log_snr_min: expected a number"),
        (lambda: Sigmoid("1"), "start: expected a number"),
        (lambda: Sigmoid(end="1"), "end: expected a number"),
        (lambda: Sigmoid(tau="1"), "tau: expected a number"),
        (lambda: Sigmoid(log_snr_min="1"), "log_snr_min: expected a number"),
        (lambda: Learned("1"), "log_snr_max: expected a number"),
        (lambda: Learned(1.0, "1"), "log_snr_min: expected a number"),
        (lambda: wide("0.5"), "time: expected a number, found '0.5'"),
        (lambda: Tabulated("012"), "expected the numbers .* as nodes, found '012'"),
        (lambda: Tabulated(2.0), "expected the numbers .* as nodes, found 2.0"),
        (lambda: beta_table("0.1"), "expected a table of numbers as betas, found '0.1'"),
    ],
)
def test_what_is_no_number_is_refused(unchecked: None, make, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()


def test_hidden_is_a_whole_number(unchecked: None) -> None:
    with pytest.raises(ValueError, match="a whole number hidden >= 1"):
        Learned(hidden=2.0)  # pyright: ignore[reportArgumentType]
    assert Learned(hidden=np.int64(2)).center.shape == (2,)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("schedule", [Cosine(), Sigmoid()], ids=name)
def test_schedules_end_at_one(schedule: Cosine | Sigmoid) -> None:
    """But for rounding; where values cannot be looked at, the caller is believed."""
    assert schedule.B(f64(1 + 1e-9)).isfinite() and schedule.beta(f64(1 + 1e-9)).isfinite()
    for quantity in (schedule.B, schedule.beta):
        with pytest.raises(ValueError, match=r"expected times t <= 1, where .* ends, found 1\.0+15"):
            quantity(f64(0.5, 1 + 1.5e-9))
        assert quantity(torch.full((3,), 2.0, dtype=torch.float64, device="meta")).shape == (3,)
        mapped = torch.func.vmap(quantity)(f64(0.1, 0.9))
        torch.testing.assert_close(mapped, quantity(f64(0.1, 0.9)))


def test_checks_are_left_out_of_a_trace(unchecked: None) -> None:
    checked = torch.compile(unit_interval, fullgraph=True, backend="eager")
    assert checked(f64(0.5)).equal(f64(0.5))


def test_tables_follow_times_to_their_device() -> None:
    schedule, away = tabulated_betas([0.1, 0.2]), torch.full((3,), 0.3, dtype=torch.float64, device="meta")
    for value in (schedule.B(away), schedule.beta(away), schedule.time(away)):
        assert value.device.type == "meta" and value.shape == (3,)


@pytest.mark.parametrize("log_snr_min", [-699.0, -0.5, 0.0, 3.0, 9.5])
def test_log_snr_ends_where_stated_also_where_signal_is_left(log_snr_min: float) -> None:
    for schedule in (Cosine(0.1, log_snr_min), Sigmoid(log_snr_min=log_snr_min)):
        close_to = VPSDE(schedule=schedule).log_snr(f64(1.0)).item()
        assert close_to == pytest.approx(log_snr_min, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.008, 0.1, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("log_snr_min", [-699.0, -300.0, -80.0, -70.0, -40.0, -10.0])
def test_time_of_a_cosines_end_is_not_beyond_it(s: float, log_snr_min: float) -> None:
    schedule = Cosine(s, log_snr_min)
    sde = VPSDE(schedule=schedule)
    end = torch.stack([sde.time(log_snr_min), schedule.time(schedule.B(f64(1.0)))[0]])
    assert bool((end <= 1).all()) and bool((end > 1 - 1e-13).all())
    assert bool((schedule.B(end) > 0).all()) and bool((schedule.beta(end) > 0).all())


def test_what_lies_beyond_a_cosine_stays_there() -> None:
    schedule = Cosine()
    beyond = schedule.time(f64(float(schedule.B(f64(1.0))) + 1e-9, 30.0, math.inf))
    assert bool((beyond.diff() > 0).all()) and 1 + 1e-12 < float(beyond[0]) < 1 + 1e-11
    with pytest.raises(ValueError, match="t <= 1, where this process ends"):
        schedule.B(beyond[1:])


def test_extreme_but_legal_arguments() -> None:
    assert Linear(0.0, 1e-3).B(f64(1.0)) == 5e-4
    assert Cosine(0.0, 9.9).B(f64(1.0)) > 0
    assert Sigmoid(-499.0, 499.0, 1.0, -699.0).B(f64(0.0, 1.0)).isfinite().all()
    assert Learned(1.0, 0.999, 1).B(f64(0.5)) > 0
    falling = Linear(5.0, 1e-12)
    assert falling.time(falling.B(f64(1.0))).isfinite().all()
    assert falling.time(falling.B(f64(1.0)) * (1 + 1e-15)).isfinite().all()
