"""Noise and Brownian paths against Python integers, exact covariances and, where they end, statistics.

Statistical assertions are seeded and cannot flicker; on a new stream each would fail with a probability of at
most ALPHA: bounds are Hoeffding's, Dvoretzky-Kiefer-Wolfowitz's or exact laws, shared by the comparisons.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scoresde import noise as module
from scoresde.noise import VERSION, BrownianPath, Noise

ALPHA = 1e-9
MASK = 2**64 - 1

SEEDS = st.integers(-(2**63), 2**64 - 1)
IDS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
ROWS = st.integers(0, 2**63 - 1)


# The stream again, in Python's own integers and from the formulas in the head of the module.


def mix(z: int, key: int = 0) -> int:
    z &= MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z ^= key
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def word(seed: int, sample: int, row: int, j: int) -> int:
    golden = 0x9E3779B97F4A7C15
    lanes = 0x6A09E667F3BCC908, 0xBB67AE8584CAA73B
    k_0, k_1 = (mix(mix(mix(seed + lane) + golden * sample) + golden * row) for lane in lanes)
    return mix(k_0 + golden * j, k_1)


def normal(seed: int, sample: int, row: int, element: int) -> float:
    return box_muller(word(seed, sample, row, element // 2))[element % 2]


def box_muller(w: int) -> tuple[float, float]:
    upper = (w >> 24) - 2**40 * (w >> 63)  # signed
    radius = math.sqrt(-2 * math.log(0.5 + (upper + 0.5) / 2**40))
    angle = 2 * math.pi * ((w & 0xFFFFFF) + 0.5) / 2**24
    return radius * math.cos(angle), radius * math.sin(angle)


def brownian(seed: int, sample: int, element: int, c: float, start: float, stop: float, depth: int) -> float:
    """Levy's midpoint construction, walking down from the whole interval in exact rational arithmetic."""
    length = Fraction(stop) - Fraction(start)
    u = Fraction((c - start) / (stop - start))
    left, right, width, node = 0.0, normal(seed, sample, -2, element), Fraction(1), 1
    for _ in range(depth):
        middle = (left + right) / 2 + math.sqrt(width) / 2 * normal(seed, sample, -2 - node, element)
        width /= 2
        bit = u >= width
        left, right = (middle, right) if bit else (left, middle)
        u, node = u - bit * width, 2 * node + bit
    v = u / width
    bridge = math.sqrt(width * v * (1 - v)) * normal(seed, sample, -2 - node, element)
    return math.sqrt(length) * (left + float(v) * (right - left) + bridge)


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[w & MASK for w in row] for row in words.tolist()]


def bits(words: torch.Tensor) -> torch.Tensor:
    """The 64 bits of each word, 0 or 1, on a new last axis."""
    return (words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1


def hoeffding(n: int, comparisons: int = 1) -> float:
    """|mean of n independent values in [0, 1] - its expectation| exceeds this with probability <= ALPHA."""
    return math.sqrt(math.log(2 * comparisons / ALPHA) / (2 * n))


def correlation_bound(n: int, comparisons: int = 1) -> float:
    """Bound on |sum x y| / n of independent standard normals; log E exp(txy) <= t^2/2/(1 - t^2)."""
    level = math.log(2 * comparisons / ALPHA) / n
    return math.sqrt(2 * level) + level


# The integers


@given(SEEDS, IDS, ROWS, st.integers(0, 5))
def test_words_are_the_formula(seed, ids, row, count):
    found = unsigned(Noise.of(seed, ids).words(row, count))
    assert found == [[word(seed, i, row, j) for j in range(count)] for i in ids]


@given(SEEDS, IDS, st.integers(0, 2**62), st.integers(0, 2**62 - 1), st.integers(-(2**62), 2**62))
def test_rows_only_add(seed, ids, offset, row, back):
    noise = Noise.of(seed, ids, offset=offset)
    expected = Noise.of(seed, ids).words(offset + row, 3)
    assert torch.equal(noise.words(row, 3), expected)
    assert torch.equal(Noise.of(seed, ids).shift(offset).words(row, 3), expected)
    assert torch.equal(Noise.of(seed, ids).shift(row).shift(offset).words(0, 3), expected)
    if offset + back >= 0 and offset + row + back < 2**63:
        assert torch.equal(noise.shift(back).words(row, 3), Noise.of(seed, ids).words(offset + row + back, 3))


def test_version_one_is_pinned(device):
    """These numbers are a promise: to change them is to change VERSION."""
    assert VERSION == "v1"
    noise = Noise.of(0, [0, 1], device=device, dtype=torch.float64)
    assert unsigned(noise.words(0, 2)) == PINNED_WORDS
    assert unsigned(Noise.of(-1, [-(2**63)], device=device).words(2**63 - 1, 2)) == PINNED_EXTREME
    normals = torch.cat((noise(0, (2, 2)), noise.prior((2, 2)), BrownianPath(noise, (2, 2), 0.0, 2.0)(0.3)))
    torch.testing.assert_close(
        normals.cpu().flatten(), torch.tensor(PINNED_NORMALS, dtype=torch.float64), rtol=1e-13, atol=0
    )


PINNED_WORDS = [[0xB601A2E3F348CCB6, 0x4788FA85A53FDE17], [0x2EE7293C1988DA70, 0x1EB54511406E4864]]
PINNED_EXTREME = [[0xDD14994738C244CB, 0xD85BDCC0375A7587]]
PINNED_NORMALS = [
    *(-0.3780545372337023, 1.7231438839622064, -0.8523387467591171, -0.18817754929671118),
    *(-1.2522207325423484, -1.1719076462070284, -1.7581767816673766, -0.5416461174722949),
    *(1.0862772102666765, 0.6901074433695793, -0.049573362922144724, -0.015195289711532126),
]


def test_all_bits_of_the_seed_count():
    def words(seed):
        return unsigned(Noise.of(seed, [5]).words(3, 1))[0][0]

    assert words(-1) == words(2**64 - 1) and words(-(2**63)) == words(2**63)  # modulo 2^64
    assert len({words(0), *(words(1 << b) for b in range(64))}) == 65


def test_rows_ids_and_elements_differ_in_both_keys():
    """Bijections: no two streams of a seed and row, or of a seed and id, share even one of the two keys."""
    noise = Noise.of(7, torch.arange(2000))
    keys = module._stream_keys(noise._base, 11)
    assert all(len(lane.unique()) == 2000 for lane in keys)
    keys = module._stream_keys(Noise.of(7, [3])._base, torch.arange(-1000, 1000))
    assert all(len(lane.unique()) == 2000 for lane in keys)
    assert len(keys.unique()) == 4000


# The normals


@given(SEEDS, IDS, st.integers(0, 2**63 - 1), st.lists(st.integers(0, 3), max_size=3))
def test_normals_are_the_formula(seed, ids, row, sample_shape):
    shape = (len(ids), *sample_shape)
    n = math.prod(sample_shape)
    noise = Noise.of(seed, ids, dtype=torch.float64)
    for z, r in ((noise(row, shape), row), (noise.prior(shape), -1)):
        expected = torch.tensor([normal(seed, i, r, e) for i in ids for e in range(n)], dtype=torch.float64)
        assert z.shape == shape and z.is_contiguous() and not z.requires_grad
        torch.testing.assert_close(z.flatten(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("w", [0, -1, 2**63 - 1, -(2**63), 2**24 - 1, -(2**24), 2**23, 2**23 - 1])
def test_extreme_words(w):
    """The radius stays within (0, 7.54] and the angle off the axes: no zero, no infinity, from any word."""
    even, odd = module._box_muller(torch.tensor([w]))
    assert (even.item(), odd.item()) == pytest.approx(box_muller(w & MASK), rel=1e-9, abs=0)
    assert 0 < math.hypot(even.item(), odd.item()) < 7.54 and even.item() != 0 != odd.item()


@pytest.mark.parametrize("sample_shape", [(), (1,), (5,), (2,), (3, 8, 8), (3, 5, 7)])
def test_a_sample_is_the_same_in_every_batch(device, dtype, sample_shape):
    ids = torch.arange(100, 164, device=device)
    noise = Noise.of(12, ids, dtype=dtype)
    full, prior = noise(4, (64, *sample_shape)), noise.prior((64, *sample_shape))
    path = BrownianPath(noise, (64, *sample_shape), 0.0, 1.0, depth=12)(0.3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(device)
    picks = [
        order,
        order[:7],
        ids[:1] - 100,
        torch.tensor([3, 3, 3], device=device),
        order[:0],
        *order[:3, None],
    ]
    for pick in picks:
        some = Noise.of(12, ids[pick], dtype=dtype)
        shape = (len(pick), *sample_shape)
        assert torch.equal(some(4, shape), full[pick])
        assert torch.equal(some.prior(shape), prior[pick])
        assert torch.equal(BrownianPath(some, shape, 0.0, 1.0, depth=12)(0.3), path[pick])


def test_an_element_is_the_same_in_every_shape_and_layout(device, dtype):
    noise = Noise.of(1, batch=4, device=device, dtype=dtype)
    z = noise(2, (4, 3, 6, 5))
    flat = z.flatten(1)
    assert torch.equal(noise(2, (4, 90)), flat)
    for n in (0, 1, 2, 7, 89):
        assert torch.equal(noise(2, (4, n)), flat[:, :n]) and noise(2, (4, n)).is_contiguous()
    x = torch.zeros(4, 3, 6, 5, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    assert torch.equal(x + noise(2, x.shape), z)
    assert torch.equal(noise(2, torch.Size((4, 3, 6, 5))), z) and torch.equal(noise(2, [4, 3, 6, 5]), z)


def test_ids_in_any_layout_and_container():
    expected = Noise.of(3, torch.tensor([0, 2, 4, 6]))(1, (4, 3))
    ids = torch.arange(8)
    assert torch.equal(Noise.of(3, ids[::2])(1, (4, 3)), expected)
    assert torch.equal(Noise.of(3, range(0, 8, 2))(1, (4, 3)), expected)
    assert torch.equal(Noise.of(3, (0, 2, 4, 6))(1, (4, 3)), expected)
    assert torch.equal(Noise.of(3, batch=8)(1, (8, 3))[::2], expected)
    same = Noise.of(3, ids[:1].expand(4))(1, (4, 3))
    assert torch.equal(same, expected[:1].expand(4, 3))
    noise = Noise.of(3, ids[::2])
    ids += 1
    assert torch.equal(noise.shift(1)(0, (4, 3)), expected)  # the noise keeps its own ids


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_do_not_show(monkeypatch, block):
    noise = Noise.of(3, batch=4)
    path = BrownianPath(noise, (4, 25), 0.0, 1.0, depth=6)
    expected = noise(1, (4, 25)), path(0.7)
    monkeypatch.setattr(module, "_BLOCK_CPU", block)
    assert torch.equal(noise(1, (4, 25)), expected[0]) and torch.equal(path(0.7), expected[1])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([0, 7, 64, 2**16]),
)
def test_rows_made_ahead_do_not_show(series, ahead):
    """Any rows in any order, in series of any stride, of changing shape, written over by the caller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AHEAD_CPU", ahead)
        noise = Noise.of(3, [4, 9], offset=2)
        for first, stride, wide in series:
            for row in range(first, first + 6 * stride, stride):
                shape = (2, 3) if wide else (2, 5)
                z = noise(row, shape)
                assert torch.equal(z, Noise.of(3, [4, 9])(row + 2, shape)) and z.is_contiguous()
                z.zero_()


def test_a_series_is_made_in_few_blocks(monkeypatch):
    """1, 4, 16, ... rows at a time, up to the limit; rows by themselves are not made ahead."""
    made, original = [], Noise._normals

    def counted(self, row, shape):
        made.append(len(row) if isinstance(row, torch.Tensor) else 1)
        return original(self, row, shape)

    monkeypatch.setattr(Noise, "_normals", counted)
    monkeypatch.setattr(module, "_AHEAD_CPU", 8 * 6)
    noise = Noise.of(0, batch=2)
    for row in range(30):
        noise(row, (2, 3))
    assert made == [1, 4, 8, 8, 8, 8]
    made.clear()
    noise = Noise.of(0, batch=2)
    for row in (9, 5, 3, 2, 1):
        noise(row, (2, 3))
    assert made == [1] * 5
    made.clear()
    noise = Noise.of(0, batch=2)
    for row in range(13):
        noise(row, [2, 3])  # a list is a shape too
    assert made == [1, 4, 8]
    last = Noise.of(0, batch=1, offset=2**63 - 4)  # the rows end here
    assert len({float(last(row, (1, 1))) for row in range(4)}) == 4


def test_rows_of_any_integer_type(unchecked):
    noise = Noise.of(3, batch=2)
    for row in range(6):
        expected = Noise.of(3, batch=2)(row, (2, 3))
        for same in (np.int64(row), torch.tensor(row), torch.full((2,), row)):
            assert torch.equal(noise(same, (2, 3)), expected)
        assert torch.equal(noise(row, torch.Size((2, 3))), expected)


def test_threads_do_not_show():
    noise = Noise.of(3, batch=9)
    one = noise(1, (9, 3, 33, 31))
    torch.set_num_threads(3)
    try:
        assert torch.equal(noise(1, (9, 3, 33, 31)), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_normals_are_rounded_float64_normals(device, narrow):
    wide = Noise.of(5, batch=3, device=device, dtype=torch.float64)
    z = Noise.of(5, batch=3, device=device, dtype=narrow)(8, (3, 4, 5))
    assert z.dtype == narrow and z.device.type == device.type
    assert torch.equal(z, wide(8, (3, 4, 5)).to(narrow))


def test_rows_on_the_device(device):
    noise = Noise.of(5, batch=3, device=device).shift(2)
    assert torch.equal(noise(torch.tensor(4, device=device), (3, 5)), noise(4, (3, 5)))
    mixed = noise(torch.tensor([4, 0, 9], device=device), (3, 5))
    assert torch.equal(mixed, torch.stack([noise(r, (3, 5))[i] for i, r in enumerate((4, 0, 9))]))


def test_the_prior_is_reserved():
    noise = Noise.of(5, batch=3)
    prior = noise.prior((3, 4))
    assert torch.equal(noise.shift(7).prior((3, 4)), prior)
    assert not any(torch.equal(noise(r, (3, 4)), prior) for r in (0, 1, 2**63 - 1))
    # Keys are a bijection of the row, and the reserved rows -1, -2, ... lie outside 0 .. 2^63 - 1.
    assert module._PRIOR_ROW == -1 and module._PATH_ROW < module._PRIOR_ROW
    path = BrownianPath(noise, (3, 4), 0.0, 1.0, depth=60)
    rows, _ = path._nodes(torch.tensor([0.0, 1e-12, 0.3, math.nextafter(1.0, 0.0), 1.0]).double())
    assert rows.min() > -(2**63) and rows.max() == -2


def test_no_generator_is_touched(device):
    state = torch.get_rng_state()
    first = Noise.of(5, batch=3, device=device)(1, (3, 4))
    path = BrownianPath(Noise.of(5, batch=3, device=device), (3, 4), 0.0, 1.0)
    value = path(0.4)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert torch.equal(Noise.of(5, batch=3, device=device)(1, (3, 4)), first) and torch.equal(
            path(0.4), value
        )


def test_defaults_of_the_surroundings():
    assert Noise.of(batch=2).dtype == torch.get_default_dtype() and Noise.of(batch=2).device.type == "cpu"
    expected = Noise.of(5, batch=3, dtype=torch.float32)(1, (3, 5))
    with torch.inference_mode():
        inside = Noise.of(5, batch=3, dtype=torch.float32)
    assert torch.equal(inside(1, (3, 5)), expected)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(Noise.of(5, batch=3, dtype=torch.float32)(1, (3, 5)), expected)
        torch.set_default_device("meta")
        assert torch.equal(Noise.of(5, batch=3, dtype=torch.float32)(1, (3, 5)), expected)
        path = BrownianPath(Noise.of(5, batch=3, dtype=torch.float32), (3, 5), 0.0, 1.0)
        path.noise([0.0, 0.5])(0, (3, 5))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0), (2,), (2, 1)])
def test_small_and_empty(device, dtype, shape):
    noise = Noise.of(5, batch=shape[0], device=device, dtype=dtype)
    path = BrownianPath(noise, shape, 0.0, 1.0, depth=4)
    for z in (noise(0, shape), noise.prior(shape), path(0.4), path.increment(0.1, 0.7)):
        assert z.shape == shape and z.dtype == dtype and z.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Noise.of(2**64, batch=1), ValueError, "seed"),
        (lambda: Noise.of(-(2**63) - 1, batch=1), ValueError, "seed"),
        (lambda: Noise.of(0.5, batch=1), TypeError, "seed"),
        (lambda: Noise.of(0), ValueError, "ids or batch"),
        (lambda: Noise.of(0, batch=-1), ValueError, "batch"),
        (lambda: Noise.of(0, [1, 2], batch=3), ValueError, "expected 3 ids"),
        (lambda: Noise.of(0, [1.5]), TypeError, "sample id"),
        (lambda: Noise.of(0, [2**63]), ValueError, "sample id"),
        (lambda: Noise.of(0, torch.ones(2)), TypeError, "int64"),
        (lambda: Noise.of(0, torch.ones(2, dtype=torch.int32)), TypeError, "int64"),
        (lambda: Noise.of(0, torch.ones(2, 1, dtype=torch.int64)), ValueError, r"shape \(B,\)"),
        (lambda: Noise.of(0, batch=1, dtype=torch.int64), TypeError, "floating"),
        (lambda: Noise.of(0, batch=1, dtype=torch.complex64), TypeError, "floating"),
        (lambda: Noise.of(0, [-(2**63) - 1]), ValueError, "sample id"),
        (lambda: Noise.of(0, 3.0), TypeError, "a sequence or an int64 tensor of sample ids, found 3.0"),
        (lambda: Noise(0, torch.zeros(1).long(), "cpu", "float32"), TypeError, "found 'float32'"),
        (lambda: Noise.of(0, batch=1, offset=2**63), ValueError, "<= offset <"),
        (lambda: Noise.of(0, batch=1).shift(-(2**63) - 1), ValueError, "<= rows <"),
        (lambda: Noise.of(0, batch=1)(-(2**63) - 1, (1,)), ValueError, "<= row <"),
        (lambda: Noise.of(0, batch=1)(2**63, (1,)), ValueError, "<= row <"),
        (lambda: BrownianPath(3, (2,), 0.0, 1.0), TypeError, "a Noise as the source of a path, found 3"),
        (lambda: path_of().noise([0.0, 0.5, 1.0]).shift(3), ValueError, "<= offset <"),
        (lambda: path_of().noise([0.0, 0.5]).shift(-(2**63) - 1), ValueError, "<= rows <"),
        (lambda: path_of().noise([0.0, 0.5])(-(2**63) - 1, (2, 3)), ValueError, "<= row <"),
        (lambda: path_of().noise([0.0, 0.5])(2**63, (2, 3)), ValueError, "<= row <"),
        (lambda: Noise.of(0, batch=1, offset=-1), ValueError, "offset"),
        (lambda: Noise.of(0, batch=1).shift(-1), ValueError, "offset"),
        (lambda: Noise.of(0, batch=1).shift(2**63), ValueError, "rows"),
        (lambda: Noise.of(0, batch=1)(-1, (1,)), ValueError, "offset \\+ row"),
        (lambda: Noise.of(0, batch=1, offset=1)(2**63 - 1, (1,)), ValueError, "offset \\+ row"),
        (lambda: Noise.of(0, batch=1)(0.0, (1,)), TypeError, "row"),
        (lambda: Noise.of(0, batch=1)(torch.tensor(0.0), (1,)), TypeError, "row"),
        (lambda: Noise.of(0, batch=1)(torch.zeros(1, 1, dtype=torch.int64), (1,)), TypeError, "row"),
        (lambda: Noise.of(0, batch=2)(0, 2), TypeError, "expected a shape, a sequence of integers, found 2"),
        (lambda: Noise.of(0, batch=2).prior(None), TypeError, "expected a shape"),
        (lambda: BrownianPath(Noise.of(0, batch=2), 2, 0.0, 1.0), TypeError, "expected a shape"),
        (lambda: path_of().noise([0.0, 0.5])(0, 2), TypeError, "expected a shape"),
        (lambda: Noise.of(0, batch=2)(0, ()), ValueError, r"\(2, \.\.\.\)"),
        (lambda: Noise.of(0, batch=2)(0, (3, 4)), ValueError, r"found \(3, 4\)"),
        (lambda: Noise.of(0, batch=2)(0, (2, -1)), ValueError, "size"),
        (lambda: Noise.of(0, batch=2).words(0, -1), ValueError, "count"),
        (lambda: BrownianPath(Noise.of(0, batch=2), (3,), 0.0, 1.0), ValueError, r"\(2, \.\.\.\)"),
        (lambda: path_of(start=1.0, stop=1.0), ValueError, "start < stop"),
        (lambda: path_of(stop=math.inf), ValueError, "finite"),
        (lambda: path_of(start=math.nan), ValueError, "finite"),
        (lambda: path_of(depth=0), ValueError, "depth"),
        (lambda: path_of(depth=61), ValueError, "depth"),
        (lambda: path_of()(1.1), ValueError, r"\[0.0, 1.0\], found 1.1"),
        (lambda: path_of()(-1e-9), ValueError, "clock values in"),
        (lambda: path_of()(math.nan), ValueError, "clock values in"),
        (lambda: path_of()(torch.tensor([0.5, 2.0])), ValueError, "found 2.0"),
        (lambda: path_of()(torch.tensor([0.5, 0.5, 0.5])), ValueError, r"\(2,\)"),
        (lambda: path_of()(torch.zeros(2, 1)), ValueError, r"\(2,\)"),
        (lambda: path_of().noise([0.0]), ValueError, "2 or more"),
        (lambda: path_of().noise([]), ValueError, "2 or more"),
        (lambda: path_of().noise(0.5), ValueError, "2 or more"),
        (lambda: path_of().noise([[0.0, 0.5], [0.5, 1.0]]), ValueError, "2 or more"),
        (lambda: path_of().noise([0.0, 1.5]), ValueError, "2 or more"),
        (lambda: path_of().noise([0.0, math.nan, 1.0]), ValueError, "2 or more"),
        (lambda: path_of().noise([0.0, 0.5, 0.5]), ValueError, "monotone"),
        (lambda: path_of().noise([0.0, 0.5, 0.2]), ValueError, "monotone"),
        (lambda: path_of(depth=4).noise([0.5, 0.56, 0.75]), ValueError, "one cell, 0.0625"),
        (lambda: path_of().noise([0.0, 0.5, 1.0])(2, (2, 3)), ValueError, "offset \\+ row"),
        (lambda: path_of().noise([0.0, 0.5, 1.0])(-1, (2, 3)), ValueError, "offset \\+ row"),
        (lambda: path_of().noise([0.0, 0.5, 1.0]).shift(1)(1, (2, 3)), ValueError, "offset \\+ row"),
        (lambda: path_of().noise([0.0, 0.5, 1.0])(0, (2, 4)), ValueError, "shape of the path"),
    ],
)
def test_errors_say_what_was_found(unchecked, call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_ends_of_what_is_allowed():
    assert Noise.of(-(2**63), [2**63 - 1, -(2**63)], offset=2**63 - 1)(0, (2, 3)).isfinite().all()
    assert Noise.of(2**64 - 1, batch=0)(2**63 - 1, (0, 3)).shape == (0, 3)
    assert Noise.of(0, batch=1, offset=2**63 - 1).shift(-(2**63) + 1).offset == 0
    assert path_of(depth=4).noise([0.5, 0.5625])(0, (2, 3)).isfinite().all()  # one cell
    ended = path_of().noise([0.0, 0.5, 1.0]).shift(2)
    assert torch.equal(ended(-1, (2, 3)), path_of().noise([0.0, 0.5, 1.0])(1, (2, 3)))


def test_noises_are_themselves_and_cannot_be_changed():
    noise, path = Noise.of(3, batch=2), path_of()
    for one, other in ((noise, Noise.of(3, batch=2)), (path, path_of())):
        assert one == one and one != other and hash(one) != hash(other)
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.seed = 4
    assert repr(noise) == (
        "Noise(seed=3, ids=tensor([0, 1]), device=device(type='cpu'), dtype=torch.float32, offset=0)"
    )
    assert repr(path).endswith("shape=(2, 3), start=0.0, stop=1.0, depth=48)")
    for row in range(3):
        noise(row, (2, 3))
    for seed in (3, 5):  # what was made ahead stays behind
        other = dataclasses.replace(noise, seed=seed)
        assert torch.equal(other(3, (2, 3)), Noise.of(seed, batch=2)(3, (2, 3)))


def test_sizes_of_what_is_made_at_once(monkeypatch):
    """Blocks of 2^17 pairs on the CPU and 2^22 elsewhere, shared by the streams; at most 2^16 numbers and
    2^8 rows ahead."""
    sizes, plain, made, original = [], module._box_muller, [], Noise._normals

    def box_muller(words):
        sizes.append(tuple(words.shape))
        return plain(words)

    def normals(self, row, shape):
        made.append(len(row) if isinstance(row, torch.Tensor) else 1)
        return original(self, row, shape)

    monkeypatch.setattr(module, "_box_muller", box_muller)
    for device, batch, elements, known in (
        ("cpu", 1, 2**18 + 9, [2**17, 5]),
        ("cpu", 4, 2**16 + 9, [2**15, 5]),
        ("meta", 1, 2**23 + 9, [2**22, 5]),
        ("cpu", 2**17 + 1, 3, [1, 1]),
    ):
        sizes.clear()
        Noise.of(0, batch=batch, device=device)(0, (batch, elements))
        assert sizes == [(batch, size) for size in known]
    monkeypatch.setattr(Noise, "_normals", normals)
    noise = Noise.of(0, batch=1)
    for row in range(341 + 256):
        noise(row, (1, 1))
    assert made == [1, 4, 16, 64, 256, 256]
    made.clear()
    for row in range(9):
        noise(row, (1, 2**14))
    assert made == [1, 4, 4]
    made.clear()
    monkeypatch.setattr(module, "_AHEAD_CPU", 6)
    noise = Noise.of(0, batch=1)
    for row in (*range(17), 16, 16):
        noise(row, (1, 1))
    assert made == [1, 4, 6, 6]


def test_rows_in_order_cost_one_query_each(monkeypatch):
    asked, plain = [], BrownianPath._value

    def value(self, c):
        asked.append(c)
        return plain(self, c)

    monkeypatch.setattr(BrownianPath, "_value", value)
    noise = path_of().noise([0.0, 0.25, 0.5, 1.0])
    for row in range(3):
        noise(row, (2, 3))
    assert asked == [0.0, 0.25, 0.5, 1.0]


def path_of(batch=2, start=0.0, stop=1.0, depth=48, seed=0):
    return BrownianPath(Noise.of(seed, batch=batch, dtype=torch.float64), (batch, 3), start, stop, depth)


# Statistics of the stream


def test_words_are_uniform(alpha_ledger, device):
    words = Noise.of(2024, batch=64, device=device).words(6, 2**12)
    n = words.numel()
    ones = bits(words).double().mean((0, 1))
    alpha_ledger.spend(ALPHA, "each bit of a word is fair")
    assert (ones - 0.5).abs().max() < hoeffding(n, 64)
    octets = (words.unsqueeze(-1) >> torch.arange(0, 64, 8, device=device)) & 255
    counts = torch.stack([octets[..., b].flatten().bincount(minlength=256) for b in range(8)]).double()
    p = stats.chi2.sf(((counts - n / 256) ** 2 / (n / 256)).sum(1).cpu(), 255)
    assert p.min() > alpha_ledger.spend(ALPHA, "each octet of a word is uniform") / 8
    # Neighbours along each axis: elements, samples, and the next row.
    following = Noise.of(2024, batch=64, device=device).words(7, 2**12)
    pairs = [(words[:, 1:], words[:, :-1]), (words[1:], words[:-1]), (following, words)]
    alpha_ledger.spend(ALPHA, "each bit is independent of that of the next element, sample and row")
    for a, b in pairs:
        assert (bits(a ^ b).double().mean((0, 1)) - 0.5).abs().max() < hoeffding(a.numel(), 3 * 64)
    alpha_ledger.spend(ALPHA, "no word twice among 1e5")  # n^2 / 2^65
    assert len(words[:, :1500].unique()) == 64 * 1500


@pytest.mark.parametrize("argument", ["seed", "id", "row"])
def test_avalanche(alpha_ledger, argument):
    """Flipping any bit of the seed, of an id or of a row flips each bit of the word with probability 1/2."""
    n = 2048
    alpha_ledger.spend(ALPHA, f"avalanche of the {argument}")
    counter = torch.arange(n)
    for b in range(63 if argument == "row" else 64):
        flip = module._signed(1 << b)
        if argument == "seed":
            words = [Noise.of(s, [9]).words(3, n)[0] for s in (77, 77 ^ (1 << b))]
        elif argument == "id":
            words = [Noise.of(77, ids).words(3, 1)[:, 0] for ids in (counter, counter ^ flip)]
        else:
            noise = Noise.of(77, [9] * n)
            words = [noise.words(rows, 1)[:, 0] for rows in (counter, counter ^ flip)]
        rates = bits(words[0] ^ words[1]).double().mean(0)
        assert (rates - 0.5).abs().max() < hoeffding(n, 64 * 64)


def test_normals_are_normal(alpha_ledger, device):
    z = Noise.of(31, batch=256, device=device, dtype=torch.float64)(17, (256, 2048)).cpu()
    n = z.numel()
    for name, values in (("even", z[:, ::2]), ("odd", z[:, 1::2]), ("all", z)):
        x = values.flatten().sort().values
        steps = torch.arange(len(x) + 1).double() / len(x)
        F = torch.special.ndtr(x)
        distance = torch.maximum((F - steps[:-1]).abs().max(), (F - steps[1:]).abs().max())
        alpha_ledger.spend(ALPHA, f"{name} elements are normal (Dvoretzky-Kiefer-Wolfowitz)")
        assert distance < hoeffding(len(x))
    square = z.square().sum().item()
    p = 2 * min(stats.chi2.sf(square, n), stats.chi2.cdf(square, n))
    assert p > alpha_ledger.spend(ALPHA, "variance 1 (chi square)")
    assert abs(z.sum()) / math.sqrt(n) < stats.norm.isf(alpha_ledger.spend(ALPHA, "mean 0") / 2)
    for t in (3.0, 4.0):
        tail = 2 * stats.norm.sf(t)
        count = (z.abs() > t).sum().item()
        p = 2 * min(stats.binom.sf(count - 1, n, tail), stats.binom.cdf(count, n, tail))
        assert p > alpha_ledger.spend(ALPHA, f"tail beyond {t}")


def test_normals_are_uncorrelated(alpha_ledger, device):
    """Lags, samples, rows, seeds (also equal in the lower 32 bits), the prior, and the sizes of a pair."""

    def draw(seed, row, start=0):
        ids = torch.arange(start, start + 64, device=device)
        return Noise.of(seed, ids, dtype=torch.float64)(row, (64, 1024))

    z = draw(9, 5)
    others = {
        "row": draw(9, 6),
        "far row": draw(9, 5 + 2**32),
        "seed": draw(10, 5),
        "upper bits of the seed": draw(9 + 2**32, 5),
        "top bit of the seed": draw(9 + 2**63, 5),
        "upper bits of the id": draw(9, 5, 2**32),
        "seed and row swapped": draw(5, 9),
        "prior": Noise.of(9, batch=64, device=device, dtype=torch.float64).prior((64, 1024)),
        "path": BrownianPath(
            Noise.of(9, batch=64, device=device, dtype=torch.float64), (64, 1024), 0.0, 1.0, depth=2
        )(1.0),
    }
    alpha_ledger.spend(ALPHA, "no correlation with other streams")
    for name, other in others.items():
        assert (z * other).mean().abs() < correlation_bound(z.numel(), len(others)), name
    alpha_ledger.spend(ALPHA, "no correlation at any lag up to 32")
    for lag in range(1, 33):
        # x_i x_{i + lag} of even and odd blocks of length lag: two sums of independent products each
        product = z[:, lag:] * z[:, :-lag]
        block = (torch.arange(product.shape[1], device=device) // lag) % 2
        for parity in (0, 1):
            some = product[:, block == parity]
            assert some.mean().abs() < correlation_bound(some.numel(), 64), lag
    alpha_ledger.spend(ALPHA, "no correlation between any two of 64 samples")
    gram = (z @ z.T / z.shape[1]).fill_diagonal_(0)
    assert gram.abs().max() < correlation_bound(z.shape[1], 64 * 63 // 2)
    # A pair shares its radius: only the angle makes its squares independent.
    even, odd = torch.special.ndtr(z[:, ::2]), torch.special.ndtr(z[:, 1::2])
    alpha_ledger.spend(ALPHA, "the sizes of a pair's two normals are independent")
    both = ((even - 0.5).abs() > 0.25) ^ ((odd - 0.5).abs() > 0.25)
    assert (both.double().mean() - 0.5).abs() < hoeffding(both.numel())


# Brownian paths


@given(
    SEEDS,
    st.floats(0, 1),
    st.sampled_from([(0.0, 1.0), (-3.0, 5.0), (1e-4, 2e4), (0.0, 1e-9)]),
    st.sampled_from([1, 2, 7, 20, 48, 60]),
)
def test_paths_are_levy_s_construction(seed, fraction, interval, depth):
    start, stop = interval
    c = min(max(start + fraction * (stop - start), start), stop)
    path = BrownianPath(Noise.of(seed, [4, -1], dtype=torch.float64), (2, 3), start, stop, depth)
    expected = [[brownian(seed, i, e, c, start, stop, depth) for e in range(3)] for i in (4, -1)]
    scale = math.sqrt(stop - start)
    torch.testing.assert_close(
        path(c) / scale, torch.tensor(expected, dtype=torch.float64) / scale, rtol=0, atol=2e-14
    )


CLOCKS = st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True)


@given(CLOCKS, st.sampled_from([8, 30, 48, 60]), st.floats(1e-6, 1e6))
def test_the_law_of_a_path_is_exact(fractions, depth, length):
    """Covariances from the weights, no sampling: cov(W(s), W(t)) = min(s, t), unless inside one cell."""
    path = path_of(stop=length, depth=depth)
    u = torch.tensor(sorted(fractions), dtype=torch.float64)
    rows, weights = path._nodes(u)
    shared = rows[:, :, None] == rows[:, None, :]
    found = (weights[:, :, None] * weights[:, None, :] * shared).sum(0) / length
    expected = torch.minimum(u[:, None], u[None, :])
    cells = (u * 2.0**depth).floor()
    distinct = (cells[:, None] != cells[None, :]) | torch.eye(len(u), dtype=torch.bool)
    torch.testing.assert_close(found[distinct], expected[distinct], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("h", [2.0**-10, 2.0**-30, 2.0**-44, 3e-14])
@pytest.mark.parametrize("u", [0.0, 1e-9, 0.25, 0.7, 1 - 2.0**-10])
def test_short_increments_have_the_right_variance(u, h):
    """To 1e-9 down to 3e-14 of the interval, from the weights: those of a shared node are subtracted."""
    rows, weights = path_of(depth=48)._nodes(torch.tensor([u, u + h], dtype=torch.float64))
    step = ((u + h) - u) / 1.0
    difference: dict[int, float] = {}
    for sign, column in ((-1, 0), (1, 1)):
        for row, weight in zip(rows[:, column].tolist(), weights[:, column].tolist(), strict=True):
            difference[row] = difference.get(row, 0.0) + sign * weight
    assert math.fsum(w * w for w in difference.values()) == pytest.approx(step, rel=1e-9)


@given(st.tuples(*[st.floats(-2, 3)] * 3))
def test_increments_add_up(clock):
    path = path_of(start=-2.0, stop=3.0)
    s, t, u = clock
    torch.testing.assert_close(
        path.increment(s, t) + path.increment(t, u), path.increment(s, u), rtol=0, atol=1e-14
    )
    assert torch.equal(path.increment(s, t), -path.increment(t, s))
    assert torch.equal(path.increment(s, t), path(t) - path(s))
    assert not path.increment(s, s).any() and not path(-2.0).any()


def test_more_steps_follow_the_same_path():
    path = path_of(batch=5, stop=3.0)
    shape = (5, 3)
    fine_clock = torch.tensor([3.0 * (i / 64) ** 2 for i in range(65)], dtype=torch.float64)
    for clock in (fine_clock, fine_clock.flip(0)):
        fine, coarse = path.noise(clock), path.noise(clock[::2])
        h = clock.diff().abs().sqrt()
        H = clock[::2].diff().abs().sqrt()
        for k in range(32):
            sum_of_two = h[2 * k] * fine(2 * k, shape) + h[2 * k + 1] * fine(2 * k + 1, shape)
            torch.testing.assert_close(H[k] * coarse(k, shape), sum_of_two, rtol=0, atol=1e-13)
    forward, backward = path.noise(fine_clock), path.noise(fine_clock.flip(0))
    assert torch.equal(forward(10, shape), -backward(53, shape))


def test_path_noise_stands_in_for_a_noise():
    path = path_of(batch=5)
    shape = (5, 3)
    noise = path.noise([0.0, 0.1, 0.4, 1.0])
    rows = [noise(k, shape) for k in range(3)]
    assert torch.equal(rows[1], (path(0.4) - path(0.1)) / math.sqrt(0.4 - 0.1))
    for k in (2, 0, 1, 1, 2):  # any order
        assert torch.equal(noise(k, shape), rows[k])
    assert torch.equal(noise.shift(1)(1, shape), rows[2]) and torch.equal(
        noise.shift(2).shift(-1)(0, shape), rows[1]
    )
    assert torch.equal(noise.prior(shape), path.source.prior(shape))
    rows[0].zero_()
    assert torch.equal(noise(1, shape), rows[1])  # what was handed out is not kept
    single = BrownianPath(Noise.of(0, batch=5, dtype=torch.float32), shape, 0.0, 1.0).noise([0.0, 0.1])
    assert torch.equal(single(0, shape), path.noise([0.0, 0.1])(0, shape).float())


def test_each_sample_may_have_its_own_clock(device, dtype):
    path = BrownianPath(Noise.of(4, batch=3, device=device, dtype=dtype), (3, 2, 2), 0.0, 2.0)
    clock = [0.0, 0.7, 2.0]
    expected = torch.stack([path(c)[i] for i, c in enumerate(clock)])
    assert torch.equal(path(torch.tensor(clock, device=device, dtype=torch.float64)), expected)
    assert torch.equal(path(torch.tensor(0.7, device=device, dtype=torch.float64)), path(0.7))
    narrow = torch.tensor(clock, device=device, dtype=torch.float32)  # widened: its own value, not 0.7
    assert torch.equal(path(narrow), path(narrow.double()))
    assert torch.equal(BrownianPath(path.source.shift(5), path.shape, 0.0, 2.0)(0.7), path(0.7))
    assert not path(torch.tensor(0.7, requires_grad=True, device=device)).requires_grad


@pytest.mark.slow
def test_increments_are_independent_normals(alpha_ledger):
    """The same from the numbers themselves: 24 normalised increments over a clock that spans nine decades."""
    clock = [0.0, *(10.0 ** (k * 9 / 23 - 9) for k in range(24))]
    path = BrownianPath(Noise.of(8, batch=256, dtype=torch.float64), (256, 16), 0.0, 1.0)
    noise = path.noise(clock)
    z = torch.stack([noise(k, (256, 16)).flatten() for k in range(24)])
    n = z.shape[1]
    alpha_ledger.spend(ALPHA, "variance of Brownian increments")
    p = [2 * min(stats.chi2.sf(s, n), stats.chi2.cdf(s, n)) for s in z.square().sum(1).tolist()]
    assert min(p) > ALPHA / 24
    alpha_ledger.spend(ALPHA, "independence of Brownian increments")
    gram = (z @ z.T / n).fill_diagonal_(0)
    assert gram.abs().max() < correlation_bound(n, 24 * 23 // 2)
    alpha_ledger.spend(ALPHA, "independence of samples' paths")
    sums = z.view(24, 256, 16).permute(1, 0, 2).flatten(1)
    gram = (sums @ sums.T / sums.shape[1]).fill_diagonal_(0)
    assert gram.abs().max() < correlation_bound(sums.shape[1], 256 * 255 // 2)


@pytest.mark.slow
def test_twenty_thousand_queries_need_no_memory(unchecked):
    path = BrownianPath(Noise.of(8, batch=2), (2, 2), 0.0, 1.0)
    noise = path.noise([k / 20000 for k in range(20001)])
    first = noise(0, (2, 2))
    for k in range(500):
        noise(k, (2, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = torch.zeros(2, 2, dtype=torch.float64)
    for k in range(20000):
        total += noise(k, (2, 2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB
    torch.testing.assert_close(total * math.sqrt(1 / 20000), path(1.0).double(), rtol=0, atol=1e-5)
    assert torch.equal(noise(0, (2, 2)), first)


# Machines


def test_speed(unchecked):
    """At most five times randn for a batch of images: best CPU times of interleaved repetitions."""
    shape = (64, 3, 32, 32)
    noise = Noise.of(0, batch=64, dtype=torch.float32)
    ours, theirs = [], []
    for k in range(40):
        start = time.thread_time()
        noise(k, shape)
        middle = time.thread_time()
        torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(k))
        ours.append(middle - start)
        theirs.append(time.thread_time() - middle)
    assert min(ours) < 5 * min(theirs)


def test_a_step_with_noise_compiles_to_one_graph(unchecked):
    noise = Noise.of(0, batch=4)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x, row):
        return 0.5 * x + noise(row, x.shape)

    x = torch.ones(4, 3, 5)
    for k in (0, 1, 7):
        assert torch.equal(step(x, torch.tensor(k)), 0.5 * x + noise(k, x.shape))


@pytest.mark.cuda
def test_devices_agree():
    """Words bit for bit, float32 normals to one unit in the last place."""
    cpu, cuda = (Noise.of(3, batch=64, device=d, dtype=torch.float32) for d in ("cpu", "cuda"))
    assert torch.equal(cpu.words(5, 4096), cuda.words(5, 4096).cpu())
    a, b = cpu(5, (64, 8192)), cuda(5, (64, 8192)).cpu()
    ulp = torch.nextafter(a.abs(), torch.tensor(math.inf)) - a.abs()
    assert ((a - b).abs() <= ulp).all()
    paths = [BrownianPath(n, (64, 7), 0.0, 1.0) for n in (cpu, cuda)]
    torch.testing.assert_close(paths[0](0.3), paths[1](0.3).cpu(), rtol=1e-6, atol=1e-6)
    outside = paths[1](torch.linspace(0, 2, 64, device="cuda"))
    assert outside[:32].isfinite().all() and outside[32:].isnan().all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 1, 8, 8), (2, 3, 33, 33), (0, 3), (2, 0)])
def test_the_kernel_makes_the_numbers_of_the_operations(shape, dtype, monkeypatch):
    """One row, rows made ahead, rows that the device counts: to the last bit, float64 to its rounding."""
    assert module._kernel(torch.device("cuda")) is not None
    rows = [2**40, 2**40 + 3, 2**40 + 6, 2**40 + 9]
    found = {}
    for way in ("kernel", "operations"):
        if way == "operations":
            monkeypatch.setattr(module, "_kernel", lambda device: None)
        noise = Noise.of(-5, batch=shape[0], device="cuda", dtype=dtype)
        by_device = noise(torch.tensor(rows[1], device="cuda"), shape)
        found[way] = torch.stack([noise.prior(shape), by_device, *(noise(row, shape) for row in rows)])
    rounding = 1e-15 if dtype == torch.float64 else 0.0
    torch.testing.assert_close(found["kernel"], found["operations"], rtol=rounding, atol=rounding)


@pytest.mark.cuda
def test_the_kernel_fills_large_and_many_streams():
    """More pairs than a program has, and more than 2^16 streams."""
    for shape in ((2, 2**20 + 1), (2**17 + 1, 5)):
        noise = Noise.of(1, batch=shape[0], device="cuda", dtype=torch.float32)
        words = noise.words(9, (shape[1] + 1) // 2)
        even, odd = module._box_muller(words)
        wanted = torch.stack([even, odd], -1).flatten(1)[:, : shape[1]].float()
        assert torch.equal(noise(9, shape), wanted)


def test_without_triton_there_is_no_kernel(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "scoresde.noise_kernel", None)
    monkeypatch.delattr("scoresde.noise_kernel", raising=False)
    assert module._kernel.__wrapped__(device) is None
