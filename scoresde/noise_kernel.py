"""The normals of `noise` as one kernel: a GPU takes longer to start the operations than to do them.

The words, the transform and the casts are those of `noise`, operation by operation; so are the numbers. Needs
Triton, which comes with the CUDA builds of torch, and the C compiler that Triton needs.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 512  # pairs of normals of a program

_G = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLY_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = tl.constexpr(0x94D049BB133111EB)
_HALF_WIDTH, _WIDTH = tl.constexpr(0.5 + 2.0**-41), tl.constexpr(2.0**-40)
_TURN = tl.constexpr(2.0 * math.pi * 2.0**-24)


def fill(out: Tensor, keys: Tensor) -> None:
    """The first E normals of streams with `keys` (2, S), int64, into `out` (S, E), of one of `DTYPES`."""
    streams, elements = out.shape
    pairs = (elements + 1) // 2
    programs: Any = _normals[(triton.cdiv(streams * pairs, _BLOCK),)]  # pyright: ignore[reportIndexIssue]
    with torch.cuda.device_of(out):
        programs(keys, out, streams, pairs, elements, _BLOCK)


@triton.jit(do_not_specialize=["streams", "pairs", "elements"])  # one compilation for all shapes
@no_type_check  # it is source code for Triton
def _normals(keys, out, streams, pairs, elements, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stream = i // pairs
    j = i - stream * pairs
    inside = stream < streams
    k_0 = tl.load(keys + stream, mask=inside, other=0).to(tl.uint64, bitcast=True)
    k_1 = tl.load(keys + streams + stream, mask=inside, other=0).to(tl.uint64, bitcast=True)
    z = k_0 + j.to(tl.uint64) * _G
    z = ((z ^ (z >> 30)) * _MULTIPLY_1) ^ k_1
    z = (z ^ (z >> 27)) * _MULTIPLY_2
    word = (z ^ (z >> 31)).to(tl.int64, bitcast=True)
    u = (word >> 24).to(tl.float64) * tl.full((BLOCK,), _WIDTH, tl.float64)
    u += tl.full((BLOCK,), _HALF_WIDTH, tl.float64)
    angle = ((word & 0xFFFFFF).to(tl.float64) + 0.5) * tl.full((BLOCK,), _TURN, tl.float64)
    radius = tl.sqrt(-2.0 * tl.log(u))
    even, odd = tl.cos(angle) * radius, tl.sin(angle) * radius
    if out.dtype.element_ty != tl.float64:  # through float32, as torch does
        even, odd = even.to(tl.float32), odd.to(tl.float32)
    at = out + stream * elements + 2 * j
    tl.store(at, even.to(out.dtype.element_ty), mask=inside)
    tl.store(at + 1, odd.to(out.dtype.element_ty), mask=inside & (2 * j + 1 < elements))
