"""What a quantizer must know before it starts: the largest magnitude of the whole tensor, and the words of its noise.

Maxima are taken of bits and meet in one atomic maximum, so their order is free and a NaN, which is above Inf, survives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fp4.kernels.arithmetic import hash_index, load_float, magnitude
from megatron_fp4.kernels.hadamard import hadamard, lanes_amax, load_lanes


@triton.jit
def amax_kernel(x_ptr, amax_ptr, n, BLOCK: tl.constexpr, LOOPS: tl.constexpr):
    """max |x| of `x [n]` as bits into int32 `amax[0]`, which is zero before."""
    base = tl.program_id(0).to(tl.int64) * (BLOCK * LOOPS)
    best = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(LOOPS):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        best = tl.maximum(best, magnitude(load_float(x_ptr + at, at < n)))
    tl.atomic_max(amax_ptr, tl.max(best, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["signs"])
def transformed_amax_kernel(
    x_ptr, amax_ptr, M, K, signs,
    ALONG: tl.constexpr, RHT: tl.constexpr, LANES: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """In one reading: max |x| into `amax[0]`, and that of x transformed along its contraction into `amax[1]`.

    Arguments as of `lanes_kernel`.
    """
    group = tl.program_id(0) * G + tl.arange(0, G)
    line = tl.program_id(1) * L + tl.arange(0, L)
    x = load_lanes(x_ptr, group, line, M, K, ALONG, LANES)
    tl.atomic_max(amax_ptr, tl.max(lanes_amax(x, LANES)), sem="relaxed")
    rounds: tl.constexpr = x_ptr.dtype.element_ty == tl.int16
    x = hadamard(x, signs, RHT, LANES, rounds)
    tl.atomic_max(amax_ptr + 1, tl.max(lanes_amax(x, LANES)), sem="relaxed")


@triton.jit(do_not_specialize=["row_key", "other_row_key", "column_key"])
def words_kernel(rows_ptr, cols_ptr, words_ptr, row_key, other_row_key, column_key, R, C, BLOCK: tl.constexpr):
    """`random.row_words` and `column_words` as int32 `words [2 R + C]`: two of each row, then one of each column.

    Hashed inside the quantizer they would cost 20 instructions an element.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(rows_ptr + at, mask=at < R, other=0)
    tl.store(words_ptr + at, hash_index(rows, row_key).to(tl.int32, bitcast=True), mask=at < R)
    tl.store(words_ptr + R + at, hash_index(rows, other_row_key).to(tl.int32, bitcast=True), mask=at < R)
    cols = tl.load(cols_ptr + at, mask=at < C, other=0)
    tl.store(words_ptr + 2 * R + at, hash_index(cols, column_key).to(tl.int32, bitcast=True), mask=at < C)
