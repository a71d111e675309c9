"""Standard normals and Brownian paths that are functions of their coordinates: randomness as an argument.

A normal depends on (seed, sample id, row, element) and on nothing else: not on the batch size, the order of
the samples, the number of processes, the device or the memory layout. No torch generator is read or written.

With G and `mix` the odd increment and the finaliser of SplitMix64, all integers modulo 2^64:

    s_l    = mix(seed + L_l)                        l = 0, 1: two lanes, so that 128 bits name a stream
    base_l = mix(s_l + G id)
    k_l    = mix(base_l + G row)
    w_j    = mix(k_0 + G j), k_1 xor-ed in half way      one word for the elements 2j and 2j + 1
    r_j    = sqrt(-2 log u_j), at most 7.54;  u_j = 1/2 + (upper 40 bits of w_j, signed, + 1/2) / 2^40
    a_j    = 2 pi (lower 24 bits of w_j, unsigned, + 1/2) / 2^24
    z_2j, z_2j+1 = r_j cos(a_j), r_j sin(a_j)            (Box and Muller 1958)

`mix` is a bijection, so streams that differ in only one of seed, id and row differ in both keys; k_1 enters
between the multiplications, so that no stream is a shifted copy of another. The integers are bit-equal on
every device. The normals are float64, cast last: devices differ by the rounding of their log, cos and sin.

Steele, Lea and Flood 2014 (doi 10.1145/2660193.2660195) for SplitMix64; Salmon et al. 2011
(doi 10.1145/2063384.2063405) for random numbers as functions of a counter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["VERSION", "BrownianPath", "Noise", "PathNoise"]

VERSION = "v1"  # names the stream; any change of its numbers is a new version

# Rows 0 .. 2^63 - 1 belong to the caller; negative rows are reserved, so that none of those can meet them.
_ROWS = 2**63
_PRIOR_ROW = -1
_PATH_ROW = -2  # of a path's end point; the tree node with heap index n = 1, 2, ... has the row -2 - n

_RADIUS_BITS, _ANGLE_BITS = 40, 24

# Pairs made at a time. On a CPU the temporaries then stay in its cache. No number depends on it.
_BLOCK_CPU, _BLOCK = 2**17, 2**22

# Normals of rows that are made ahead, and such rows, at most; a GPU takes as long for one row as for several.
# No number depends on them.
_AHEAD_CPU, _AHEAD, _ROWS_AHEAD = 2**16, 2**24, 2**8


def _signed(n: int) -> int:
    """The int64 whose bits are those of n modulo 2^64."""
    return (n + 2**63) % 2**64 - 2**63


_G = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)
_LANES = (0x6A09E667F3BCC908, 0xBB67AE8584CAA73B)  # binary digits of sqrt(2) and sqrt(3)


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    """z ^= z >>> bits in place; the mask makes int64's arithmetic shift a logical one."""
    return z.bitwise_xor_((z >> bits).bitwise_and_(2 ** (64 - bits) - 1))


def _mix(z: Tensor, key: Tensor | None = None) -> Tensor:
    """SplitMix64's finaliser, in place on int64 (products wrap), with a second key xor-ed in half way."""
    _xor_shift(z, 30).mul_(_MULTIPLY_1)
    if key is not None:
        z.bitwise_xor_(key)
    _xor_shift(z, 27).mul_(_MULTIPLY_2)
    return _xor_shift(z, 31)


def _base_keys(seed: int, ids: Tensor) -> Tensor:
    """Keys of (seed, id), shape (2, B)."""
    lanes = torch.tensor([[_signed(seed + lane)] for lane in _LANES], dtype=torch.int64, device="cpu")
    return _mix(_mix(lanes).to(ids.device) + ids * _G)


def _stream_keys(base: Tensor, row: int | Tensor) -> Tensor:
    """Keys of (seed, id, row); a tensor of rows broadcasts against `base` (2, ..., B)."""
    return _mix(base + (row * _G if isinstance(row, Tensor) else _signed(row * _G)))


def _words(keys: Tensor, first: int, count: int) -> Tensor:
    """Words number first .. first + count - 1 of the streams with `keys` (2, ...), shape (..., count)."""
    counter = torch.arange(first, first + count, dtype=torch.int64, device=keys.device) * _G
    k_0, k_1 = keys.unsqueeze(-1)
    return _mix(k_0 + counter, k_1)


def _box_muller(words: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float64 normals for each word."""
    # Every value of u is exact in float64, and none is 0 or 1.
    upper = (words >> _ANGLE_BITS).to(torch.float64)
    u = upper.mul_(2.0**-_RADIUS_BITS).add_(0.5 + 0.5 * 2.0**-_RADIUS_BITS)
    radius = u.log_().mul_(-2.0).sqrt_()
    lower = (words & (2**_ANGLE_BITS - 1)).to(torch.float64)
    angle = lower.add_(0.5).mul_(2.0 * math.pi * 2.0**-_ANGLE_BITS)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def _normal_blocks(keys: Tensor, elements: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(pairs, normals 2j, normals 2j + 1) for j in the slice pairs, block after block."""
    pairs, streams = (elements + 1) // 2, max(1, keys.numel() // 2)
    block = max(1, (_BLOCK_CPU if keys.device.type == "cpu" else _BLOCK) // streams)
    for first in range(0, pairs, block):
        count = min(block, pairs - first)
        yield slice(first, first + count), *_box_muller(_words(keys, first, count))


def _weighted_sum(weights: Tensor, z: Tensor) -> Tensor:
    """Sum over n of weights (n, 1 or B) times z (n, B, P), overwriting z.

    By halving, with elementwise additions only: their order, hence every bit, is the same for any batch.
    """
    z.mul_(weights.unsqueeze(-1))
    n = len(z)
    while n > 1:
        half = n // 2
        z[:half].add_(z[n - half : n])
        n -= half
    return z[0]


def _integer(value: Any, name: str, low: int, high: int) -> int:
    """`value` as a Python int in [low, high)."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"expected an integer for {name}, found {value!r}") from None
    if not low <= number < high:
        raise ValueError(f"expected {low} <= {name} < {high}, found {number}")
    return number


def _checked_ids(ids: Any, device: torch.device | str | None) -> Tensor:
    """A copy of the ids, int64 (B,), on the device (default: where they are)."""
    if not isinstance(ids, Tensor | Iterable):
        raise TypeError(f"expected a sequence or an int64 tensor of sample ids, found {ids!r}")
    if not isinstance(ids, Tensor):
        ids = [_integer(i, "sample id", -(2**63), 2**63) for i in ids]
        ids = torch.tensor(ids, dtype=torch.int64, device="cpu")
    if ids.dtype != torch.int64:
        raise TypeError(f"expected int64 sample ids, found {ids.dtype}; convert them with .long()")
    if ids.ndim != 1:
        raise ValueError(f"expected sample ids of shape (B,), found {tuple(ids.shape)}")
    return ids.to(device or ids.device, copy=True)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple. Raises TypeError for what has no entries, such as one number."""
    if not isinstance(shape, Iterable):
        raise TypeError(f"expected a shape, a sequence of integers, found {shape!r}")
    return tuple(shape)


def _checked_shape(shape: Sequence[int], batch: int) -> tuple[int, ...]:
    sizes = tuple(_integer(n, "each size of a shape", 0, 2**63) for n in _sizes(shape))
    if not sizes or sizes[0] != batch:
        raise ValueError(f"expected a shape ({batch}, ...), a sample for each of {batch} ids, found {sizes}")
    return sizes


def _settle(self: object, **values: object) -> None:
    """Store validated values in a frozen dataclass, from its __post_init__."""
    for name, value in values.items():
        object.__setattr__(self, name, value)


class _Series(NamedTuple):
    """The rows first, first + stride, ... of one shape that were made last: `normals` (count, B, ...), which
    are kept if they are several."""

    first: int
    stride: int
    count: int
    shape: tuple[int, ...]
    normals: Tensor | None

    def find(self, row: int, shape: tuple[int, ...]) -> Tensor | None:
        """A copy of the row, if it is here."""
        i, between = divmod(row - self.first, self.stride)
        if self.normals is None or between or not 0 <= i < self.count or self.shape != shape:
            return None
        return self.normals[i].clone()

    def goes_on(self, row: int) -> int:
        """The stride with which this row continues the series; 0 if it does not."""
        if self.count == 1:
            return max(0, row - self.first)
        return self.stride if row == self.first + self.count * self.stride else 0


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard normals as a function of (seed, sample id, offset + row, element); see the head of the module.

    Elements are numbered in the logical (C) order of the sample shape, and an element keeps its value when
    the sample grows or shrinks. float32 normals are the rounded float64 normals.

    seed: any int in [-2^63, 2^64), taken modulo 2^64: all 64 bits count, and -1 is 2^64 - 1.
    ids: int64, shape (B,). Samples with the same id have the same noise.
    device, dtype: of the normals. The device must have float64, the dtype must be a real floating type.
    offset: number of rows before row 0, in [0, 2^63); see `shift`.

    Raises TypeError or ValueError for anything else.
    """

    seed: int
    ids: Tensor
    device: torch.device | str
    dtype: torch.dtype
    offset: int = 0
    _base: Tensor = field(init=False, repr=False)
    _made: _Series | None = field(
        init=False, repr=False, default=None
    )  # the last rows; no number depends on it

    def __post_init__(self) -> None:
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"expected a real floating dtype such as torch.float32, found {self.dtype!r}")
        seed = _integer(self.seed, "seed", -(2**63), 2**64)
        offset = _integer(self.offset, "offset", 0, _ROWS)
        ids = _checked_ids(self.ids, self.device)
        _settle(self, seed=seed, offset=offset, ids=ids, device=ids.device, _base=_base_keys(seed, ids))

    @classmethod
    def of(
        cls,
        seed: int = 0,
        ids: Tensor | Sequence[int] | None = None,
        *,
        batch: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offset: int = 0,
    ) -> Noise:
        """Noise for `ids` (int64 tensor (B,) or sequence of ints), by default the ids 0 .. batch - 1.

        The device defaults to that of the ids (CPU for a sequence), the dtype to `torch.get_default_dtype()`.
        Raises ValueError if neither ids nor batch is given, or if both are and disagree.
        """
        if ids is None:
            if batch is None:
                raise ValueError("expected ids or batch, found neither; batch=B means the ids 0 .. B - 1")
            ids = torch.arange(_integer(batch, "batch", 0, 2**63), device="cpu")
        ids = _checked_ids(ids, device)
        if batch not in (None, len(ids)):
            raise ValueError(f"expected {batch} ids for batch={batch}, found {len(ids)}; pass one of the two")
        return cls(seed, ids, ids.device, dtype or torch.get_default_dtype(), offset)

    def __call__(self, row: int | Tensor, shape: Sequence[int]) -> Float[Tensor, "b ..."]:
        """Standard normals of `shape` (B, ...), contiguous, for a row with 0 <= offset + row < 2^63.

        The row may be an int64 tensor of shape () or (B,) on the noise's device: a counter that lives there,
        or samples that are at different rows. It is not read back, so its range is the caller's care.
        """
        if isinstance(row, Tensor) or _recording(self._base):
            return self._normals(self._row(row), _checked_shape(shape, len(self.ids)))
        made = self._made
        found = made.find(self.offset + row, _sizes(shape)) if made is not None and type(row) is int else None
        return self._ahead(self._row(row), _checked_shape(shape, len(self.ids))) if found is None else found

    def _ahead(self, row: int, shape: tuple[int, ...]) -> Tensor:
        """A row, together with those that will be asked for next if the last two were two of a series.

        A row by itself is some twenty-five small operations; a series is made in blocks, each four times as
        long as the one before.
        """
        made, count = self._made, 1
        stride = made.goes_on(row) if made is not None and made.shape == shape else 0
        if made is not None and stride:
            most = _AHEAD_CPU if self._base.device.type == "cpu" else _AHEAD
            count = min(4 * made.count, _ROWS_AHEAD, most // max(1, math.prod(shape)))
            count = min(count, (_ROWS - 1 - row) // stride + 1)
        if count <= 1:
            _settle(self, _made=_Series(row, 1, 1, shape, None))
            return self._normals(row, shape)
        rows = torch.arange(count, dtype=torch.int64, device=self.device)[:, None] * stride + row
        normals = self._normals(rows, shape)
        _settle(self, _made=_Series(row, stride, count, shape, normals))
        return normals[0].clone()

    def words(self, row: int | Tensor, count: int) -> Int64[Tensor, "b count"]:
        """The words w_0 .. w_{count - 1} of a row, the integers that are equal on every device."""
        return _words(_stream_keys(self._base, self._row(row)), 0, _integer(count, "count", 0, 2**63))

    def shift(self, rows: int) -> Noise:
        """The noise of a run that starts `rows` rows later: `shift(a)(b, shape)` is `noise(a + b, shape)`."""
        return replace(self, offset=self.offset + _integer(rows, "rows", -_ROWS, _ROWS))

    def prior(self, shape: Sequence[int]) -> Float[Tensor, "b ..."]:
        """Standard normals of `shape` (B, ...) from a stream that no row has, the same for every offset."""
        return self._normals(_PRIOR_ROW, _checked_shape(shape, len(self.ids)))

    def _row(self, row: Any) -> Any:
        """offset + row, checked."""
        if isinstance(row, Tensor):
            if row.dtype != torch.int64 or row.ndim > 1:
                found = f"{row.dtype} of shape {tuple(row.shape)}"
                raise TypeError(
                    f"expected an int or an int64 tensor of shape () or (B,) as row, found {found}"
                )
            return row + self.offset
        return _integer(self.offset + _integer(row, "row", -_ROWS, _ROWS), "offset + row", 0, _ROWS)

    def _normals(self, row: int | Tensor, shape: tuple[int, ...]) -> Tensor:
        """Normals of `shape` for a row, or of (n, *shape) for rows (n, 1)."""
        many = isinstance(row, Tensor) and row.ndim == 2
        keys = _stream_keys(self._base.unsqueeze(1) if many else self._base, row)
        elements = math.prod(shape[1:])
        kernel = None if _recording(keys) or not keys.is_cuda else _kernel(keys.device)
        if kernel is not None and keys.numel() and elements and self.dtype in kernel.DTYPES:
            whole = torch.empty(keys[0].numel(), elements, dtype=self.dtype, device=self.device)
            kernel.fill(whole, keys.flatten(1))
            return whole.view(*keys.shape[1:-1], *shape)
        out = torch.empty(*keys.shape[1:], (elements + 1) // 2, 2, dtype=self.dtype, device=self.device)
        for pairs, even, odd in _normal_blocks(keys, elements):
            out[..., pairs, 0], out[..., pairs, 1] = even, odd
        return out.flatten(-2)[..., :elements].reshape(*keys.shape[1:-1], *shape).contiguous()


@lru_cache
def _kernel(device: torch.device) -> ModuleType | None:
    """`noise_kernel`, where Triton compiles it for this GPU. Without it the same numbers take longer."""
    try:
        from . import noise_kernel

        noise_kernel.fill(
            torch.empty(1, 1, device=device), torch.zeros(2, 1, dtype=torch.int64, device=device)
        )
    except Exception:  # no Triton, no C compiler, a GPU that it does not know: it raises many kinds
        return None
    return noise_kernel


def _recording(x: Tensor) -> bool:
    """Whether operations are recorded to be run again later: then nothing is kept from one to the next."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True, eq=False)
class BrownianPath:
    """Standard Brownian motion W of every element of every sample, on a clock in [start, stop], W(start) = 0.

    A function of (seed, sample id, element), the interval and the depth: ask for any clock value, in any
    order, as often as you like. It is Levy's dyadic construction, the normal of a tree node keyed by the
    node. With u = (c - start) / (stop - start), and 2^d u = k_d + v_d split into its floor and the rest,

        W(c) = sqrt(stop - start) [ u Z_end + sum_{d < depth} 2^{-d/2} min(v_d, 1 - v_d) Z_{d, k_d}
                                    + 2^{-depth/2} sqrt(v (1 - v)) Z_{depth, k} ],   v, k at d = depth.

    The last term gives a point inside a cell of the tree, (stop - start) 2^-depth wide, the variance of the
    missing levels. So any clock values of which no two lie inside one cell have exactly the joint law of
    Brownian motion. Increments within one cell have too little variance; at the default depth a cell is
    4e-15 of the interval wide.

    A query costs depth + 2 normals for each element and keeps nothing: no recursion, no growing memory.
    Steps that are no smaller than 1e-6 of the interval can do with `depth=20`.

    source: gives seed, ids, device and dtype, not the offset. The path is independent of its rows and prior.
    shape: of W, (B, ...). start < stop: finite, in units of the clock. depth: 1 .. 60.

    P. Levy 1948, Processus stochastiques et mouvement brownien; for paths from a tree of keys, Li et al. 2020
    (arXiv:2001.01328, section 4).
    """

    source: Noise
    shape: Sequence[int]
    start: float
    stop: float
    depth: int = 48
    _levels: Tensor = field(init=False, repr=False)  # 2^d for d = 0 .. depth, int64 (depth + 1, 1)

    def __post_init__(self) -> None:
        if not isinstance(self.source, Noise):
            raise TypeError(f"expected a Noise as the source of a path, found {self.source!r}")
        shape = _checked_shape(self.shape, len(self.source.ids))
        start, stop, depth = float(self.start), float(self.stop), _integer(self.depth, "depth", 1, 61)
        if not (start < stop and math.isfinite(stop - start)):
            raise ValueError(f"expected finite clock values start < stop, found start={start}, stop={stop}")
        powers = [[2**d] for d in range(depth + 1)]
        levels = torch.tensor(powers, dtype=torch.int64, device=self.source.device)
        _settle(self, shape=shape, start=start, stop=stop, depth=depth, _levels=levels)

    def __call__(self, c: float | Tensor) -> Float[Tensor, "b ..."]:
        """W(c), of the path's shape, for a float c or a tensor of shape () or (B,) (one for each sample).

        Raises ValueError for a clock value outside [start, stop]. Clock values on an accelerator are not read
        back for that: samples with such a value are NaN.
        """
        return self._value(c).to(self.source.dtype)

    def increment(self, c_a: float | Tensor, c_b: float | Tensor) -> Float[Tensor, "b ..."]:
        """W(c_b) - W(c_a), subtracted in float64: increments over adjoining intervals add up, to rounding."""
        return (self._value(c_b) - self._value(c_a)).to(self.source.dtype)

    def noise(self, clock: Sequence[float] | Tensor) -> PathNoise:
        """The normalised increments between these clock values, a function of (row, shape) like a Noise."""
        return PathNoise(self, clock)

    def _value(self, c: float | Tensor) -> Tensor:
        """W(c) in float64."""
        rows, weights = self._nodes(self._position(c))
        keys = _stream_keys(self.source._base.unsqueeze(1), rows)
        batch, elements = len(self.source.ids), math.prod(self.shape[1:])
        out = torch.empty(batch, (elements + 1) // 2, 2, dtype=torch.float64, device=self.source.device)
        for pairs, even, odd in _normal_blocks(keys, elements):
            out[:, pairs, 0], out[:, pairs, 1] = _weighted_sum(weights, even), _weighted_sum(weights, odd)
        return out.flatten(1)[:, :elements].reshape(self.shape)

    def _position(self, c: float | Tensor) -> Tensor:
        """u(c) in float64, shape (1,) or (B,); NaN for a clock value outside."""
        values = c.detach() if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64, device="cpu")
        values = values.double()
        if tuple(values.shape) not in ((), (len(self.source.ids),)):
            expected = f"() or ({len(self.source.ids)},), one for each sample"
            raise ValueError(f"expected clock values of shape {expected}, found {tuple(values.shape)}")
        inside = (values >= self.start) & (values <= self.stop)
        if values.device.type == "cpu" and not inside.all():
            outside = values[~inside].flatten()[0].item()
            raise ValueError(f"expected clock values in [{self.start}, {self.stop}], found {outside}")
        u = torch.where(inside, (values - self.start) / (self.stop - self.start), math.nan).reshape(-1)
        if u.device.type == "cpu" and len(u) == 1:  # filled in: a copy from the host waits for the device
            return torch.full((1,), u.item(), dtype=u.dtype, device=self.source.device)
        return u.to(self.source.device)

    def _nodes(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (int64) and weights of the normals that W is a sum of, both (depth + 2, 1 or B)."""
        width = self._levels.double().reciprocal_()
        scaled = u * self._levels  # exact, a power of two
        k = scaled.floor()
        v = scaled - k
        bridge = torch.minimum(v, 1 - v)
        bridge[-1] = (v[-1] * (1 - v[-1])).sqrt_()
        weights = torch.cat((u.unsqueeze(0), width.sqrt() * bridge)).mul_(math.sqrt(self.stop - self.start))
        heap = torch.nn.functional.pad(self._levels + k.long(), (0, 0, 1, 0))  # the end point is number 0
        return _PATH_ROW - heap, weights


class PathNoise:
    """The increments (W(c_{i+1}) - W(c_i)) / sqrt|c_{i+1} - c_i| of a Brownian path, i = offset + row.

    Takes the place of a Noise where a sampler has one row between two clock values: standard normals,
    independent over rows, and of the same path whatever the clock values. W at the end of the last row is
    kept (one float64 state), so that rows in order cost one query each; no number depends on it.

    clock: K + 1 clock values of the path, strictly increasing or decreasing, in steps of at least one cell.
    Raises ValueError for others, for offset + row not in 0 .. K - 1, and for a shape that is not the path's.
    """

    def __init__(self, path: BrownianPath, clock: Sequence[float] | Tensor, offset: int = 0) -> None:
        self.path = path
        values = torch.as_tensor(clock, dtype=torch.float64, device="cpu")
        inside = (values >= path.start) & (values <= path.stop)
        if values.ndim != 1 or len(values) < 2 or not inside.all():
            found = values.tolist()
            raise ValueError(f"expected 2 or more values in [{path.start}, {path.stop}], found {found}")
        self.clock: list[float] = values.tolist()
        self.offset = _integer(offset, "offset", 0, len(self.clock))
        self._last: tuple[int, Tensor] | None = None
        steps = [b - a for a, b in zip(self.clock, self.clock[1:], strict=False)]
        if not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
            raise ValueError(f"expected strictly monotone clock values, found {self.clock}")
        cell, shortest = (path.stop - path.start) * 2.0**-path.depth, min(map(abs, steps))
        if shortest < cell:
            remedy = "use a path of larger depth or on a shorter interval"
            raise ValueError(f"expected steps of at least one cell, {cell}, found {shortest}; {remedy}")

    def __call__(self, row: int, shape: Sequence[int]) -> Float[Tensor, "b ..."]:
        """The normalised increment of a row; `shape` must be that of the path."""
        if _sizes(shape) != self.path.shape:
            raise ValueError(f"expected the shape of the path, {self.path.shape}, found {_sizes(shape)}")
        i = self.offset + _integer(row, "row", -_ROWS, _ROWS)
        i = _integer(i, "offset + row", 0, len(self.clock) - 1)
        start = self._last[1] if self._last and self._last[0] == i else self.path._value(self.clock[i])
        stop = self.path._value(self.clock[i + 1])
        self._last = (i + 1, stop)
        scale = math.sqrt(abs(self.clock[i + 1] - self.clock[i]))
        return ((stop - start) / scale).to(self.path.source.dtype)

    def shift(self, rows: int) -> PathNoise:
        """The same increments, seen from `rows` rows later."""
        return PathNoise(self.path, self.clock, self.offset + _integer(rows, "rows", -_ROWS, _ROWS))

    def prior(self, shape: Sequence[int]) -> Float[Tensor, "b ..."]:
        """The prior of the noise that the path is made from."""
        return self.path.source.prior(shape)
