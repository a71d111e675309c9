"""Distances between sets of samples, against plain loops and known values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoresde import metrics
from scoresde.metrics import energy_distance, nearest_distance


def normal(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy_by_loops(x: list[list[float]], y: list[list[float]]) -> float:
    across = [math.dist(a, b) for a in x for b in y]
    within = [[math.dist(a, b) for a, b in itertools.permutations(z, 2)] for z in (x, y)]
    return 2 * sum(across) / len(across) - sum(sum(w) / len(w) for w in within)


@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 4), st.integers(0, 100))
def test_energy_distance_is_its_definition(n: int, m: int, d: int, seed: int):
    x, y = normal(n, d, seed=seed), 1 + 2 * normal(m, d, seed=seed + 1)
    assert energy_distance(x, y) == pytest.approx(energy_by_loops(x.tolist(), y.tolist()), abs=1e-12)
    assert energy_distance(y, x) == pytest.approx(energy_distance(x, y), abs=1e-12)
    assert energy_distance(3 * x, 3 * y) == pytest.approx(3 * energy_distance(x, y), abs=1e-12)


def test_energy_distance_is_unbiased():
    """Over all ways to part eight points in 3 and 5, two sets from one law, the mean is exactly 0."""
    points = normal(8, 2).exp()
    parts = list(itertools.combinations(range(8), 3))
    values = [energy_distance(points[list(p)], points[[i for i in range(8) if i not in p]]) for p in parts]
    assert sum(values) / len(values) == pytest.approx(0, abs=1e-13)
    assert max(map(abs, values)) > 0.1


def test_energy_distance_of_point_masses():
    x, y = torch.zeros(5, 1, 2, 2), torch.full((4, 1, 2, 2), 3.0)
    assert energy_distance(x, y) == pytest.approx(2 * 6)  # |(3, 3, 3, 3)| = 6
    assert energy_distance(x, x) == 0


def test_energy_distance_of_normals(alpha_ledger):
    """N(0, 1) and N(1, 1): 2 E|N(1, 2)| - 2 E|N(0, 2)|, by Student's t."""
    from scipy import stats

    def mean_abs(mu: float, s: float) -> float:
        return s * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * s**2)) + mu * math.erf(
            mu / (s * math.sqrt(2))
        )

    exact = 2 * mean_abs(1, math.sqrt(2)) - 2 * mean_abs(0, math.sqrt(2))
    values = [energy_distance(normal(500, seed=2 * i), 1 + normal(400, seed=2 * i + 1)) for i in range(16)]
    p = stats.ttest_1samp(values, exact).pvalue
    assert p > alpha_ledger.spend(1e-9, "energy distance of normals")
    assert stats.ttest_1samp(values, exact * 1.5).pvalue < 1e-6  # it would notice a lost factor


@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 100))
def test_nearest_distance_is_its_definition(n: int, m: int, seed: int):
    x, y = normal(n, 1, 2, 2, seed=seed), normal(m, 1, 2, 2, seed=seed + 1)
    expected = [min(math.dist(a, b) for b in y.flatten(1).tolist()) for a in x.flatten(1).tolist()]
    torch.testing.assert_close(nearest_distance(x, y), torch.tensor(expected, dtype=torch.float64))


def test_small_distances_survive():
    x = 1000 + normal(4, 64)
    assert nearest_distance(x + 1e-9, x) == pytest.approx(8e-9, rel=1e-3)
    assert nearest_distance(x, x).max() == 0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    x, y = normal(11, 3), normal(7, 3, seed=1)
    whole = energy_distance(x, y), nearest_distance(x, y)
    monkeypatch.setattr(metrics, "_BLOCK", 15)
    assert energy_distance(x, y) == pytest.approx(whole[0], abs=1e-13)
    assert nearest_distance(x, y).equal(whole[1])


def test_any_device_and_dtype(device: torch.device, dtype: torch.dtype):
    x, y = normal(20, 3).to(device, dtype), normal(30, 3, seed=1).to(device, dtype)
    wide = [z.double().cpu() for z in (x, y)]
    assert energy_distance(x, y) == pytest.approx(energy_distance(*wide), abs=1e-12)
    torch.testing.assert_close(nearest_distance(x, y).cpu(), nearest_distance(*wide))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(5, 2), "at least two samples on both sides, found 1 and 5"),
        (torch.zeros(3, 2), torch.zeros(5, 3), "samples of one shape"),
        (torch.full((3, 2), math.nan), torch.zeros(5, 2), "finite"),
        (torch.zeros(3, 2), torch.full((5, 2), math.inf), "finite"),
    ],
)
def test_what_cannot_be_measured(x: Tensor, y: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        energy_distance(x, y)
    if len(x) > 1:
        with pytest.raises(ValueError, match=message):
            nearest_distance(x, y)


def test_no_reference():
    with pytest.raises(ValueError, match="at least one sample in reference"):
        nearest_distance(torch.zeros(3, 2), torch.zeros(0, 2))
