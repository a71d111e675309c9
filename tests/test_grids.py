"""Time grids: exact ends, N + 1 strictly monotone nodes, spacings by independent formulas, errors."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scoresde import grids
from scoresde.grids import Grid
from scoresde.schedules import Cosine, Learned, Sigmoid
from scoresde.sde import EDM, VESDE, VPSDE, LinearSDE, Rectified, SubVPSDE

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SDES: dict[str, LinearSDE] = {
    "linear": VPSDE(),
    "cosine": VPSDE(schedule=Cosine()),
    "sigmoid": VPSDE(schedule=Sigmoid()),
    "learned": VPSDE(schedule=Learned()),
    "table": VPSDE.from_betas(BETAS),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDM(),
    "rectified": Rectified(),
}
GRIDS = {
    "uniform": grids.uniform,
    "quadratic": grids.quadratic,
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "karras3": partial(grids.karras, rho=3.0),
    "power": grids.power,
    "power1.5": partial(grids.power, exponent=1.5),
    "blend": partial(grids.blend, one=grids.power, other=grids.karras, weight=0.85),
}
DDPM = SDES["table"]


def check(grid: Grid, sde: LinearSDE, steps: int, end: float) -> None:
    assert len(grid) == steps
    assert grid.t.shape == grid.lam.shape == grid.label.shape == (steps + 1,)
    assert grid.t.dtype == grid.lam.dtype == grid.label.dtype == torch.float64
    assert (grid.t.diff() < 0).all() and (grid.lam.diff() > 0).all() and (grid.label.diff() < 0).all()
    assert float(grid.t[0]) == sde.t_max and float(grid.t[-1]) == end
    assert torch.equal(grid.lam, 0.5 * sde.log_snr(grid.t))


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("spacing", GRIDS)
def test_every_grid_has_its_nodes_and_its_ends(name: str, spacing: str) -> None:
    sde = SDES[name]
    for steps in (1, 2, 3, 5, 20, 1000):
        for end in (None, 0.0, 1e-5):
            if end == 1e-5 and end < sde.t_min:
                with pytest.raises(ValueError, match="expected an end in"):
                    GRIDS[spacing](sde, steps, end)
            else:
                check(GRIDS[spacing](sde, steps, end), sde, steps, sde.default_end if end is None else end)


@given(
    st.sampled_from(sorted(SDES)), st.sampled_from(sorted(GRIDS)), st.integers(1, 300), st.floats(1e-6, 0.9)
)
def test_any_number_of_steps_and_any_end(name: str, spacing: str, steps: int, fraction: float) -> None:
    sde = SDES[name]
    end = sde.t_min + fraction * (sde.t_max - sde.t_min)
    check(GRIDS[spacing](sde, steps, end), sde, steps, end)


@pytest.mark.oracle
def test_the_grid_of_edm() -> None:
    t = grids.karras(EDM(0.002, 80.0), 17).t
    assert len(t) == 18
    assert t[:4].tolist() == pytest.approx([80, 57.586, 40.7856, 28.3746], abs=6e-5)
    i = np.arange(18)
    published = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(t.numpy(), published, rtol=1e-13)


@pytest.mark.parametrize("name", ["linear", "cosine", "table", "subvp", "ve", "edm"])
def test_spacings_by_formula(name: str) -> None:
    """What a grid is equidistant in, in numpy; the nodes themselves by the definition of each coordinate."""
    sde, n = SDES[name], 13
    start, end = sde.t_max, sde.default_end
    i = np.arange(n + 1) / n
    np.testing.assert_allclose(
        grids.uniform(sde, n).t.numpy(), start + i * (end - start), rtol=1e-12, atol=1e-15 * start * 10
    )
    root = math.sqrt(start) + i * (math.sqrt(end) - math.sqrt(start))
    np.testing.assert_allclose(grids.quadratic(sde, n).t.numpy(), root**2, rtol=1e-12, atol=1e-16)
    for exponent in (2.5, 4.0):
        ends = start ** (1 / exponent), end ** (1 / exponent)
        nodes = grids.power(sde, n, exponent=exponent).t.numpy()
        np.testing.assert_allclose(
            nodes, (ends[0] + i * (ends[1] - ends[0])) ** exponent, rtol=1e-11, atol=1e-16
        )
    assert torch.equal(grids.power(sde, n).t, grids.power(sde, n, exponent=2.5).t)
    first, last = (float(sde.log_snr(t)) / 2 for t in (start, end))
    np.testing.assert_allclose(grids.log_snr(sde, n).lam.numpy(), first + i * (last - first), atol=1e-11)
    for rho in (7.0, 2.5):
        ends = math.exp(-first / rho), math.exp(-last / rho)
        level = np.exp(-grids.karras(sde, n, rho=rho).lam.numpy())
        np.testing.assert_allclose(level, (ends[0] + i * (ends[1] - ends[0])) ** rho, rtol=1e-10)


def test_blend_is_between_two_grids() -> None:
    sde, blend = SDES["linear"], partial(grids.blend, one=grids.power, other=grids.karras)
    one, other = grids.power(sde, 9).t, grids.karras(sde, 9).t
    np.testing.assert_allclose(blend(sde, 9, weight=0.25).t.numpy(), 0.25 * one + 0.75 * other, rtol=1e-14)
    assert torch.equal(blend(sde, 9, weight=1).t, one) and torch.equal(blend(sde, 9, weight=0).t, other)
    assert torch.equal(blend(sde, 9).t, blend(sde, 9, weight=0.5).t)
    assert torch.equal(blend(sde, 9, 1e-4).t[[0, -1]], torch.tensor([1.0, 1e-4], dtype=torch.float64))
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"a weight in \[0, 1\], found"):
            blend(sde, 9, weight=weight)


def test_blend_is_of_functions(unchecked) -> None:
    with pytest.raises(TypeError, match=r"other: expected a function such as grids\.karras, found 5"):
        grids.blend(SDES["linear"], 9, one=grids.power, other=5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="weight: expected a number, found 'a'"):
        grids.blend(SDES["linear"], 9, one=grids.power, other=grids.power, weight="a")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("end", [0.999, 0.9995])
def test_an_end_before_the_first_node_of_finite_lam(spacing: str, end: float) -> None:
    with pytest.raises(ValueError, match=r"expected an end below 0\.999, .*, found 0\.999.*grids\.uniform"):
        GRIDS[spacing](Rectified(), 5, end)
    assert GRIDS[spacing](Rectified(), 1, end).t.tolist() == [1.0, end]
    assert GRIDS[spacing](Rectified(), 5, 0.99).t[[0, -1]].tolist() == [1.0, 0.99]


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
def test_nodes_of_infinite_lam_stand_alone(spacing: str) -> None:
    make = GRIDS[spacing]
    # no noise at the end: the default end comes before it, and the rest is that grid
    for sde in (VPSDE(), EDM(), SubVPSDE()):
        to_data = make(sde, 8, 0.0)
        assert torch.equal(to_data.t[:-1], make(sde, 7).t) and to_data.lam[-1] == math.inf
    # no signal at the start: the first regular node mirrors the default end
    sde = Rectified()
    whole = make(sde, 9, 0.0)
    assert whole.lam[0] == -math.inf and whole.lam[-1] == math.inf
    lam = 0.5 * float(sde.log_snr(sde.default_end))
    assert float(whole.lam[1]) == pytest.approx(-lam, abs=1e-9)
    assert float(whole.lam[-2]) == pytest.approx(lam, abs=1e-9)
    inner = whole.lam[1:-1]
    if spacing == "log_snr":
        np.testing.assert_allclose(inner.diff().numpy(), 2 * lam / 7, rtol=1e-8)
    else:
        np.testing.assert_allclose((-inner / 7).exp().diff(n=2).numpy(), 0, atol=1e-9)
    assert torch.equal(make(sde, 8).t, whole.t[:-1])
    # too few nodes to space anything
    assert make(sde, 1, 0.0).t.tolist() == [1.0, 0.0]
    assert make(sde, 1).t.tolist() == [1.0, sde.default_end]
    assert make(sde, 2, 0.0).t.tolist() == [1.0, sde.default_end, 0.0]
    assert make(VPSDE(), 1, 0.0).t.tolist() == [1.0, 0.0]
    assert make(VPSDE(), 2, 0.0).t.tolist() == [1.0, 1e-3, 0.0]


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 16, 50, 999, 1000])
def test_labels_of_public_ddpm_grids(steps: int) -> None:
    """The label lists documented by public schedulers, in their own numpy formulas."""
    k, n = np.arange(steps), 1000
    lists = {
        "leading": (k * (n // steps))[::-1],
        "linspace": np.linspace(0, n - 1, steps).round()[::-1] if steps > 1 else np.array([n - 1]),
        "trailing": np.round(np.arange(n, 0, -n / steps))[:steps] - 1,
    }
    for spacing, expected in lists.items():
        grid = grids.ddpm(DDPM, steps, spacing=spacing)
        assert grid.label[:-1].round().tolist() == expected.tolist(), spacing
        np.testing.assert_allclose(grid.label[:-1].numpy(), expected, atol=1e-9)
        np.testing.assert_allclose(grid.t[:-1].numpy(), (expected + 1) / n, rtol=1e-15)
        assert grid.t[-1] == 0 and grid.lam[-1] == math.inf and len(grid) == steps
    if steps == 10:
        assert lists["leading"].tolist() == list(range(900, -1, -100))
        assert lists["linspace"].tolist() == list(range(999, -1, -111))
        assert lists["trailing"].tolist() == list(range(999, 98, -100))


def test_ddpm_grid_ends_where_it_is_told() -> None:
    assert grids.ddpm(DDPM, 10).t.tolist() == pytest.approx([1 - i / 10 for i in range(10)] + [0.0])
    grid = grids.ddpm(DDPM, 10, 1e-4)
    assert float(grid.t[-1]) == 1e-4 and float(grid.t[-2]) == 0.1 and len(grid) == 10
    with pytest.raises(ValueError, match="strictly decreasing"):
        grids.ddpm(DDPM, 10, 0.3)


@pytest.mark.parametrize("make", [grids.uniform, grids.quadratic])
def test_zero_below_the_range_stands_alone(make) -> None:
    sde = EDM()
    grid = make(sde, 30, 0.0)
    assert torch.equal(grid.t[:-1], make(sde, 29).t) and grid.t[-1] == 0 and grid.t[-2] == sde.t_min
    assert make(sde, 1, 0.0).t.tolist() == [80.0, 0.0]


def test_labels() -> None:
    table = grids.uniform(DDPM, 10, 0.0)
    np.testing.assert_allclose(table.label.numpy(), 1000 * table.t.numpy() - 1, atol=1e-12)
    small = VPSDE.from_betas(BETAS[:40])
    assert grids.ddpm(small, 4).label.tolist() == pytest.approx([39, 29, 19, 9, -1])
    other = grids.uniform(VPSDE(), 10)
    assert torch.equal(other.label, other.t) and other.label is not other.t


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, False, "3", None])
@pytest.mark.parametrize("spacing", [*GRIDS, "ddpm"])
def test_steps_must_be_a_whole_number(unchecked, spacing: str, steps) -> None:
    make = {**GRIDS, "ddpm": grids.ddpm}[spacing]
    with pytest.raises(ValueError, match="whole number of steps"):
        make(DDPM, steps)


@pytest.mark.parametrize("end", [-0.1, 1.0, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("spacing", [*GRIDS, "ddpm"])
def test_end_must_lie_in_the_range(spacing: str, end: float) -> None:
    with pytest.raises(ValueError, match=r"expected (an end in \[0.0, 1|times t >= 0)"):
        {**GRIDS, "ddpm": grids.ddpm}[spacing](DDPM, 5, end)


def test_end_below_the_noise_floor_of_edm() -> None:
    sde = EDM()
    with pytest.raises(ValueError, match=r"or 0, found 0\.001"):
        grids.karras(sde, 5, 1e-3)
    assert float(grids.karras(sde, 5, 0.002).t[-1]) == 0.002


def test_ddpm_refuses_what_is_no_chain() -> None:
    with pytest.raises(TypeError, match="from_betas"):
        grids.ddpm(VPSDE(), 5)
    with pytest.raises(TypeError, match="from_betas"):
        grids.ddpm(EDM(), 5)
    with pytest.raises(ValueError, match="at most 1000 steps"):
        grids.ddpm(DDPM, 1001)
    with pytest.raises(ValueError, match=r"\['leading', 'linspace', 'trailing'\], found 'middle'"):
        grids.ddpm(DDPM, 5, spacing="middle")
    for rho in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rho > 0"):
            grids.karras(EDM(), 5, rho=rho)
        with pytest.raises(ValueError, match="exponent > 0"):
            grids.power(EDM(), 5, exponent=rho)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 0.5, 0.5, 0.1], "strictly decreasing"),  # k-diffusion's [1, 0, 0], and equal last levels
        ([1.0, 0.0, 0.0], "strictly decreasing"),
        ([0.1, 0.5, 1.0], "strictly decreasing"),
        ([1.0, math.nan, 0.1], "strictly decreasing"),
        ([1.5, 0.5, 0.1], "expected times in"),
        ([math.inf, 0.5, 0.1], "expected times in"),
        ([1.0], "at least two times"),
        ([], "at least two times"),
        ([[1.0, 0.5]], "one-dimensional"),
        (0.5, "one-dimensional"),
    ],
)
def test_times_that_are_no_grid(times, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid.of(VPSDE(), torch.tensor(times))


def test_times_outside_the_range_or_too_fine() -> None:
    with pytest.raises(ValueError, match=r"t >= 0|expected times in"):
        Grid.of(VPSDE(), torch.tensor([1.0, -0.1]))
    with pytest.raises(ValueError, match="expected times in"):
        Grid.of(EDM(), torch.tensor([80.0, 0.001]))
    with pytest.raises(ValueError, match="expected times in"):
        Grid.of(EDM(), torch.tensor([80.0, 0.001, 0.0]))  # only the last node may be noiseless
    with pytest.raises(ValueError, match="fewer steps or a later end"):
        Grid.of(VESDE(), torch.tensor([1.0, 1e-18, 0.0], dtype=torch.float64))


def test_own_times_and_grids_are_taken_as_they_are() -> None:
    sde = VPSDE()
    t = torch.tensor([0.7, 0.4, 0.1], dtype=torch.float32, requires_grad=True)
    grid = Grid.of(sde, t)
    assert torch.equal(grid.t, t.detach().double()) and not grid.t.requires_grad
    assert Grid.of(sde, grid) is grid and Grid.of(VPSDE(), grid) is grid
    assert Grid.of(EDM(), torch.tensor([80.0, 0.002, 0.0], dtype=torch.float64)).lam[-1] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ends_of_narrow_dtypes_are_those_of_the_range(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for low, high in ((0.01, 80.0), (0.002, 80.1), (0.03, 1e3), (0.001, 0.7)):
        sde = EDM(low, high)
        for tail in ([], [0.0]):
            t = torch.tensor([high, (low + high) / 2, low, *tail]).to(dtype)
            given = t.clone()
            grid = Grid.of(sde, t)
            assert float(grid.t[0]) == high and float(grid.t[2]) == low
            assert torch.equal(grid.t[1], t[1].double()) and grid.t[3:].tolist() == tail
            assert torch.equal(grid.lam, 0.5 * sde.log_snr(grid.t))
            assert torch.equal(t, given)
        wide = torch.tensor([high, low * (1 - 0.9 * eps)], dtype=torch.float64)
        for outside in (wide, torch.tensor([high, low * (1 - 3 * eps)]).to(dtype)):
            with pytest.raises(ValueError, match="expected times in"):
                Grid.of(sde, outside)
    assert Grid.of(VPSDE(), torch.tensor([1.0, 1e-7]).to(dtype)).t[-1] != 0  # is not close to t_min = 0
    whole = Grid.of(EDM(1.0, 3.0), torch.tensor([3, 2, 1]))
    assert whole.t.tolist() == [3.0, 2.0, 1.0]


def test_times_outside_are_shown_with_all_digits() -> None:
    message = r"expected times in \[0.01, 80.0\] .*, from 80.0 to 0.0099999$"
    with pytest.raises(ValueError, match=message):
        Grid.of(EDM(0.01, 80.0), torch.tensor([80.0, 0.0099999], dtype=torch.float64))


def test_a_grid_of_another_process_is_refused() -> None:
    grid = grids.uniform(VPSDE(), 5)
    for other in (Rectified(), SubVPSDE(), VPSDE(schedule=Cosine()), VPSDE(0.1, 10.0)):
        with pytest.raises(ValueError, match="expected a grid made for"):
            Grid.of(other, grid)


def test_reversed() -> None:
    sde = VPSDE()
    grid = grids.karras(sde, 6)
    back = grid.reversed()
    assert torch.equal(back.t.flip(0), grid.t) and torch.equal(back.lam.flip(0), grid.lam)
    assert torch.equal(back.label.flip(0), grid.label) and len(back) == 6
    assert Grid.of(sde, back) is back


def test_repr_shows_the_nodes() -> None:
    sde = EDM()
    assert "t=[1.0, 0.8, 0.6, 0.4, 0.2, 0.0], lam=" in repr(grids.uniform(VPSDE(), 5, 0.0))
    assert "t=[1.0, 0.833333, 0.666667, 0.166667, 0.0], lam=" in repr(grids.uniform(VPSDE(), 6, 0.0))
    assert (
        repr(grids.uniform(VPSDE(), 2, 0.0))
        == "Grid(2 steps, t=[1.0, 0.5, 0.0], lam=[-5.024978, -1.227568, inf])"
    )
    assert "Grid(17 steps, t=[80.0, 57.585985, 40.785574, 0.007528, 0.002]" in repr(grids.karras(sde, 17))
