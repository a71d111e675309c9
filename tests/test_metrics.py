"""Distances between sets of samples, against plain loops and known values."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from work import Work

from scoresde import metrics
from scoresde.laws import Empirical, Gaussian, Mixture
from scoresde.metrics import (
    energy_distance,
    floor,
    frechet,
    median_distance,
    mmd,
    mode_coverage,
    nearest_distance,
    sliced_wasserstein,
    wasserstein,
)


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


# ---- Wasserstein


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 100))
def test_one_dimension_is_sorted_against_sorted(n: int, m: int, seed: int):
    """Against scipy, also for sets of different sizes; p = 2 against every value repeated."""
    from scipy.stats import wasserstein_distance

    x, y = normal(n, seed=seed), 1 + 2 * normal(m, seed=seed + 1)
    assert sliced_wasserstein(x, y, p=1) == pytest.approx(wasserstein_distance(x.numpy(), y.numpy()))
    repeated = x.sort().values.repeat_interleave(m) - y.sort().values.repeat_interleave(n)
    assert sliced_wasserstein(x, y) == pytest.approx(float(repeated.square().mean().sqrt()))


@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([1.0, 2.0, 3.0]), st.integers(0, 100))
def test_wasserstein_is_the_best_permutation(n: int, d: int, p: float, seed: int):
    x, y = normal(n, d, seed=seed), normal(n, d, seed=seed + 1)
    best = min(
        sum(math.dist(a, b) ** p for a, b in zip(x.tolist(), order, strict=True)) / n
        for order in itertools.permutations(y.tolist())
    )
    assert wasserstein(x, y, p=p) == pytest.approx(best ** (1 / p))
    assert wasserstein(x, x[torch.randperm(n)], p=p) == 0


def test_wasserstein_of_a_shift_is_its_length():
    x, shift = normal(50, 1, 2, 2), torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    assert wasserstein(x, x + shift) == pytest.approx(float(shift.norm()))
    assert wasserstein(x, 3 * x, p=1) == pytest.approx(2 * float(x.flatten(1).norm(dim=1).mean()))


def test_sliced_wasserstein_of_normals(alpha_ledger):
    """Between N(0, S) and N(m, s^2 S): along u it is |u.m|^2 + (s - 1)^2 u^T S u, in the mean over u
    (|m|^2 + (s - 1)^2 tr S)/D."""
    from scipy import stats

    m, s = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64), 1.5
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    exact = float((m.square().sum() + (s - 1) ** 2 * scale.square().sum()) / 3)
    values = []
    for seed in range(16):
        x, y = (scale * normal(n, 3, seed=2 * seed + i) for i, n in enumerate((4000, 3000)))
        values.append(sliced_wasserstein(x, m + s * y, directions=64, seed=seed) ** 2)
    alpha_ledger.spend(1e-9, "sliced Wasserstein distance of normals")
    assert stats.ttest_1samp(values, exact).pvalue > 1e-9
    assert stats.ttest_1samp(values, 1.5 * exact).pvalue < 1e-6


def test_directions_are_of_length_one_and_of_the_seed():
    x = normal(40, 5)
    assert sliced_wasserstein(x, x + 1, directions=4000) == pytest.approx(1, rel=0.05)  # |1|^2/D
    assert sliced_wasserstein(x, x + 1, seed=1) != sliced_wasserstein(x, x + 1, seed=2)
    assert sliced_wasserstein(x, x + 1, seed=1) == sliced_wasserstein(x, x + 1, seed=1)
    assert sliced_wasserstein(2 * x, 2 * x + 2) == pytest.approx(2 * sliced_wasserstein(x, x + 1))


# ---- maximum mean discrepancy


def mmd_by_loops(x: list[list[float]], y: list[list[float]], scale: float) -> float:
    def k(a: list[float], b: list[float]) -> float:
        return math.exp(-(math.dist(a, b) ** 2) / (2 * scale**2))

    across = [k(a, b) for a in x for b in y]
    within = [[k(a, b) for a, b in itertools.permutations(z, 2)] for z in (x, y)]
    return sum(sum(w) / len(w) for w in within) - 2 * sum(across) / len(across)


@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 3), st.integers(0, 100))
def test_mmd_is_its_definition(n: int, m: int, d: int, seed: int):
    x, y = normal(n, d, seed=seed), 1 + normal(m, d, seed=seed + 1)
    assert mmd(x, y, bandwidth=0.7) == pytest.approx(mmd_by_loops(x.tolist(), y.tolist(), 0.7), abs=1e-12)
    both = [*x.tolist(), *y.tolist()]
    median = statistics.median(math.dist(a, b) for a, b in itertools.combinations(both, 2))
    assert mmd(x, y) == pytest.approx(mmd_by_loops(x.tolist(), y.tolist(), median), abs=1e-12)


@pytest.mark.parametrize("metric", [wasserstein, sliced_wasserstein])
def test_a_high_power_is_the_largest_distance(metric):
    x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    assert metric(x, x, p=800.0) == metric(0 * x, 0 * x, p=800.0) == 0
    assert metric(x, x + 0.5, p=800.0) == pytest.approx(0.5, rel=1e-12)


def test_the_median_distance_is_numpys():
    assert median_distance(torch.tensor([0.0, 1.0, 3.0, 10.0])) == 5.0  # of 1, 2, 3, 7, 9, 10
    assert median_distance(torch.tensor([0.0, 1.0, 5.0])) == 4.0 and median_distance(torch.zeros(1)) == 0.0
    for n in (2, 3, 4, 5, 8, 9):
        x = normal(n, 3, seed=n)
        expected = np.median([math.dist(a, b) for a, b in itertools.combinations(x.tolist(), 2)])
        assert median_distance(x) == pytest.approx(float(expected), rel=1e-14)
    n = 4096  # of the integers below it n - d distances are d; of more, as many that are drawn count
    d = np.repeat(np.arange(1, n), np.arange(n - 1, 0, -1))
    assert median_distance(torch.arange(n).float()) == np.median(d)
    assert median_distance(torch.arange(2 * n).float()) == pytest.approx(2 * np.median(d), rel=0.03)
    assert median_distance(torch.arange(2 * n).float() % 4) == 1  # of four classes in turn, not two of them


def test_mmd_makes_one_tensor_of_each_set_of_pairs():
    x, y = normal(200, 2), normal(200, 2, seed=1)
    with Work() as work:
        mmd(x, y, bandwidth=1.0)
    assert work.large(8 * 200 * 200) == 3


def test_mmd_is_unbiased():
    points = normal(8, 2).exp()
    parts = list(itertools.combinations(range(8), 3))
    rest = [[i for i in range(8) if i not in part] for part in parts]
    values = [mmd(points[list(p)], points[r], bandwidth=1) for p, r in zip(parts, rest, strict=True)]
    assert sum(values) / len(values) == pytest.approx(0, abs=1e-13)
    assert max(map(abs, values)) > 0.1


# ---- Frechet


def test_frechet_is_the_distance_of_gaussians():
    """Against scipy's root of the product of the covariances; it is also W_2^2 where a sample is moved by a
    positive linear map."""
    from scipy.linalg import sqrtm

    x, y = normal(50, 4), normal(60, 4, seed=1) @ normal(4, 4, seed=2) + 1
    S, R = (z.mT.cov().numpy() for z in (x, y))
    root = float(sqrtm(S @ R).trace().real)
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + S.trace() + R.trace() - 2 * root
    assert frechet(x, y) == pytest.approx(float(expected))
    centred = x - x.mean(0)
    assert frechet(centred, 3 * centred + 1) == pytest.approx(4 + 4 * float(S.trace()))
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert min(frechet(z, z) for z in (normal(9, 3, seed=seed) for seed in range(20))) >= 0  # has a root


def test_frechet_of_few_samples_in_many_dimensions():
    x, y = normal(5, 40), normal(7, 40, seed=1)
    embedded = frechet(torch.nn.functional.pad(x, (0, 9)), torch.nn.functional.pad(y, (0, 9)))
    assert embedded == pytest.approx(frechet(x, y)) and embedded > 0
    assert frechet(x, x.flip(0)) == pytest.approx(0, abs=1e-10)


def test_frechet_of_features():
    x, y = normal(30, 1, 4, 4), normal(20, 1, 4, 4, seed=1)
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    assert frechet(x, y, features) == pytest.approx(frechet(features(x).detach(), features(y).detach()))
    with pytest.raises(ValueError, match=r"features of shape \(n, d\)"):
        frechet(x, y, lambda z: z)


# ---- modes


def test_coverage_counts_modes():
    law = Mixture([0.5, 0.25, 0.25, 0.0], [[-9.0], [0.0], [9.0], [30.0]], 0.01)
    x = torch.tensor([[-9.0], [-9.1], [-8.9], [0.1]], dtype=torch.float64)
    found = mode_coverage(x, law)
    assert found.covered == pytest.approx(2 / 3)
    torch.testing.assert_close(found.shares, torch.tensor([0.75, 0.25, 0, 0], dtype=torch.float64))
    assert found.distance == pytest.approx(0.25)


def test_responsibilities_are_bayes():
    law = Mixture([0.3, 0.7], [[0.0, 0.0], [1.0, 1.0]], torch.tensor([[0.5, 2.0], [1.0, 0.3]]))
    x = normal(20, 2)
    parts = [Gaussian(m, v).log_prob(x) for m, v in zip(law.means, [[0.5, 2.0], [1.0, 0.3]], strict=True)]
    joint = torch.stack([math.log(w) + part for w, part in zip([0.3, 0.7], parts, strict=True)], 1)
    torch.testing.assert_close(law.responsibilities(x), joint.softmax(1))
    with pytest.raises(ValueError, match="a law with a density"):
        Empirical([[0.0], [1.0]]).responsibilities(torch.zeros(3, 1))


# ---- the floor


@pytest.mark.parametrize("metric", [energy_distance, mmd, sliced_wasserstein, frechet, wasserstein])
def test_the_floor_is_what_true_samples_have(metric, alpha_ledger):
    """True samples of the law are near the floor, samples of a wider one above it."""
    data = normal(900, 2)
    against = 300 if metric is wasserstein else None
    lowest = floor(metric, data, 300, against=against)
    other = data[:300] if against else data
    alpha_ledger.spend(1e-9, f"true samples are within 9 deviations of the floor of {metric.__name__}")
    assert abs(metric(normal(300, 2, seed=7), other) - lowest.mean) < 9 * lowest.std
    assert metric(2 * normal(300, 2, seed=7), other) > lowest.mean + 9 * lowest.std


def test_the_floor_takes_different_samples():
    """A metric that counts: sizes, and that no sample is on both sides."""

    def seen(x: Tensor, y: Tensor) -> float:
        assert len({*x.tolist()} & {*y.tolist()}) == 0
        return 100.0 * len(x) + len(y)

    data = torch.arange(30.0)
    assert floor(seen, data, 10) == (1020, 0)
    assert floor(seen, data, 10, against=5) == (1005, 0)
    assert floor(lambda x, y: float(x.sum()), data, 10).std > 0  # not the same split every time
    for n, against in ((1, None), (29, None), (20, 11)):
        with pytest.raises(ValueError, match="at least 2 samples on both sides"):
            floor(seen, data, n, against=against)
    with pytest.raises(ValueError, match="at least 2 splits"):
        floor(seen, data, 10, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: wasserstein(x, x[1:]), "as many samples on both sides, found 5 and 4"),
        (lambda x: wasserstein(x, x, p=0.5), "p >= 1"),
        (lambda x: sliced_wasserstein(x, x, p=math.nan), "p >= 1"),
        (lambda x: wasserstein(x, x + 9, p=800.0), "found p = 800.0 and a largest distance of 1[0-9]"),
        (lambda x: sliced_wasserstein(x, x + 9, p=800.0), "take a smaller p"),
        (lambda x: wasserstein(x[:1], x[:1] + 1e-3, p=150.0), "take a smaller p"),
        (lambda x: sliced_wasserstein(x, x[:0]), "at least one sample on both sides, found 5 and 0"),
        (lambda x: sliced_wasserstein(x, x, directions=0), "at least one direction"),
        (lambda x: sliced_wasserstein(x, x[:, :1]), "samples of one shape"),
        (lambda x: energy_distance(x[:, 0], x[0, 0]), "samples of one shape"),
        (lambda x: mmd(x, x[:1]), "at least two samples"),
        (lambda x: mmd(x, x, bandwidth=0.0), "bandwidth > 0"),
        (lambda x: mmd(0 * x, 0 * x), "bandwidth > 0"),
        (lambda x: frechet(x[:1], x), "at least two samples"),
        (lambda x: frechet(x / 0, x), "finite"),
        (lambda x: mode_coverage(x[:0], Gaussian([0.0, 0.0], 1.0)), "at least one sample"),
        (lambda x: mode_coverage(x / 0, Gaussian([0.0, 0.0], 1.0)), "finite"),
        (lambda x: mode_coverage(x * math.nan, Gaussian([0.0, 0.0], 1.0)), "finite"),
    ],
)
def test_what_the_others_cannot_measure(call, message: str, unchecked: None):
    with pytest.raises(ValueError, match=message):
        call(normal(5, 2))


def test_the_others_on_any_device_and_dtype(device: torch.device, dtype: torch.dtype):
    x, y = normal(20, 3).to(device, dtype), normal(20, 3, seed=1).to(device, dtype)
    wide = [z.double().cpu() for z in (x, y)]
    for metric in (mmd, sliced_wasserstein, wasserstein, frechet):
        assert metric(x, y) == pytest.approx(metric(*wide), abs=1e-12)
