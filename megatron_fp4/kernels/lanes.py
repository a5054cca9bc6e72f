"""The quantizer of every copy that is not simple: transposed, transformed, in 16x16 tiles, four over six.

A program holds G blocks of L lines. Element i of every block is a tensor `[G, L]` of its own, so that what happens
between the elements of a block (butterflies, maxima, packing) is arithmetic between registers, whichever way the copy
lies in memory, and the codes of a block leave as whole words.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fp4.kernels.arithmetic import (
    as_float,
    block_encode,
    e2m1_code,
    e2m1_code_stochastic,
    e2m1_rounded,
    e4m3_code,
    e4m3_scale,
    e4m3_value,
    e8m0_scale,
    encode_scale,
    load_words,
    noise_of,
    scale_offset,
    sign_code,
)
from megatron_fp4.kernels.hadamard import hadamard, lanes_amax, load_lanes


@triton.jit
def error_of(x, scale, multiplier, amax, AIM: tl.constexpr, SQUARED: tl.constexpr, SQUARE: tl.constexpr,
             G: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """`four_over_six.errors` with these scales, summed in its order: `[G, L]`, of a tile repeated in its lines."""
    total = tl.zeros((G, L), tl.float32)
    for i in tl.static_range(16):
        decoded = (e2m1_rounded(x[i] * multiplier) * e4m3_value(scale)) * amax
        difference = tl.div_rn(decoded, tl.zeros_like(decoded) + AIM) - x[i]
        total = total + (difference * difference if SQUARED else tl.abs(difference))
    if SQUARE:
        total = tl.reshape(total, (G, L // 16, 16))
        total = sum_of_halves(sum_of_halves(sum_of_halves(sum_of_halves(total, G, L, 8), G, L, 4), G, L, 2), G, L, 1)
        total = tl.reshape(tl.broadcast_to(total, (G, L // 16, 16)), (G, L))
    return total


@triton.jit
def sum_of_halves(x, G: tl.constexpr, L: tl.constexpr, HALF: tl.constexpr):
    """`[G, L/16, 2 HALF]` to `[G, L/16, HALF]`."""
    low, high = tl.split(tl.permute(tl.reshape(x, (G, L // 16, 2, HALF)), (0, 1, 3, 2)))
    return low + high


@triton.jit
def four_over_six_scale(x, largest, amax, AIM: tl.constexpr, SQUARED: tl.constexpr, SQUARE: tl.constexpr,
                        G: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """The scale that maps a block's maximum to 6, or that for 4 where its error is smaller."""
    encode, decode = encode_scale(amax, AIM)
    target = tl.div_rn(as_float(largest), tl.zeros((G, L), tl.float32) + 6.0) * encode
    six, four = e4m3_code(target), e4m3_code(target * 1.5)
    six_multiplier, four_multiplier = block_encode(six, decode), block_encode(four, decode)
    six_error = error_of(x, six, six_multiplier, amax, AIM, SQUARED, SQUARE, G, L)
    better = error_of(x, four, four_multiplier, amax, AIM, SQUARED, SQUARE, G, L) < six_error
    return tl.where(better, four, six), tl.where(better, four_multiplier, six_multiplier)


@triton.jit
def word_of(codes, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Eight E2M1 or four E4M3 codes from FIRST on as an int64 of 32 bits."""
    word = codes[FIRST]
    for i in tl.static_range(1, 32 // BITS):
        word = word | (codes[FIRST + i] << (BITS * i))
    return word.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def codes_of(x, multiplier, words_ptr, group, line, M, K,
             ALONG: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr, NOISE: tl.constexpr,
             CENTRED: tl.constexpr, INSTRUCTION: tl.constexpr):  # fmt: skip
    """LANES int32 tensors of codes. The noise is that of the tensor's rows and columns, whichever are lines."""
    if NOISE > 0:
        rows = K if ALONG == 0 else M
        if ALONG == 0:
            column = load_words(words_ptr + 2 * rows, line, line < M)[None, :]
        else:
            row_a = load_words(words_ptr, line, line < M)[None, :]
            row_b = load_words(words_ptr + rows, line, line < M)[None, :]
    codes = ()
    for i in tl.static_range(LANES):
        q = x[i] * multiplier
        if BITS == 8:
            codes = codes + ((e4m3_code(tl.abs(q)) | sign_code(q, 24)),)
        elif NOISE == 0:
            codes = codes + (e2m1_code(q, INSTRUCTION),)
        else:
            at = group * LANES + i
            if ALONG == 0:
                row_a = load_words(words_ptr, at, at < K)[:, None]
                row_b = load_words(words_ptr + rows, at, at < K)[:, None]
            else:
                column = load_words(words_ptr + 2 * rows, at, at < K)[:, None]
            codes = codes + (e2m1_code_stochastic(q, noise_of(row_a, row_b, column, NOISE, CENTRED)),)
    return codes


@triton.jit
def store_turned(codes, scale, codes_ptr, scales_ptr, group, lines, M, K, SWIZZLED: tl.constexpr, G: tl.constexpr,
                 L: tl.constexpr):  # fmt: skip
    """The same codes of 16x16 tiles for a contraction over the lines: `[K, M/2]`, and their scales `[K, M/16]`."""
    pair = lines * (L // 2) + tl.arange(0, L // 2)
    tile = lines * (L // 16) + tl.arange(0, L // 16)
    scale = tl.max(tl.reshape(scale, (G, L // 16, 16)), axis=2).to(tl.uint8)
    for i in tl.static_range(16):
        row = group[:, None] * 16 + i
        low, high = tl.split(tl.reshape(codes[i], (G, L // 2, 2)))
        at = row.to(tl.int64) * (M // 2) + pair[None, :]
        tl.store(codes_ptr + at, (low | (high << 4)).to(tl.uint8), mask=(row < K) & (pair[None, :] < M // 2))
        at = scale_offset(row, tile[None, :], M // 16, SWIZZLED)
        tl.store(scales_ptr + at, scale, mask=(row < K) & (tile[None, :] < M // 16))


@triton.jit(do_not_specialize=["signs"])
def lanes_kernel(
    x_ptr, codes_ptr, scales_ptr, turned_codes_ptr, turned_scales_ptr, amax_ptr, words_ptr, M, K, signs,
    ALONG: tl.constexpr, RHT: tl.constexpr, SQUARE: tl.constexpr, TURNED: tl.constexpr, OVER: tl.constexpr,
    AIM: tl.constexpr, PAPER_ORDER: tl.constexpr, WIDER: tl.constexpr,
    BITS: tl.constexpr, LANES: tl.constexpr, NOISE: tl.constexpr, CENTRED: tl.constexpr, SWIZZLED: tl.constexpr,
    INSTRUCTION: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """A copy `[M, K]` of x: codes as int64 words `[M, K/16]` (E4M3: `[M, K/8]`), scales of blocks of LANES.

    ALONG: 1 if x is `[M, K]`; 0 if it is `[K, M]`. RHT: size of the transform, 0 for none; signs: its mask. SQUARE:
    16x16 tiles. TURNED: write `[K, M]` too. OVER: four over six by absolute (1) or squared (2) errors, 0 for off.
    amax: FP32 of the whole tensor after its transform; the others as in `rows_kernel`.
    """
    group = tl.program_id(0) * G + tl.arange(0, G)
    line = tl.program_id(1) * L + tl.arange(0, L)
    x = load_lanes(x_ptr, group, line, M, K, ALONG, LANES)
    if RHT > 0:
        rounds: tl.constexpr = x_ptr.dtype.element_ty == tl.int16
        x = hadamard(x, signs, RHT, LANES, rounds)
    largest = lanes_amax(x, LANES)
    if SQUARE:
        tile = tl.max(tl.reshape(largest, (G, L // 16, 16)), axis=2)
        largest = tl.reshape(tl.broadcast_to(tile[:, :, None], (G, L // 16, 16)), (G, L))
    if AIM == 0.0:
        scale, multiplier = e8m0_scale(largest, 6.0 if BITS == 4 else 448.0)
        tl.atomic_max(amax_ptr, tl.max(largest), sem="relaxed")
    elif OVER > 0:
        scale, multiplier = four_over_six_scale(x, largest, tl.load(amax_ptr), AIM, OVER == 2, SQUARE, G, L)
    else:
        scale, multiplier = e4m3_scale(largest, tl.load(amax_ptr), AIM, PAPER_ORDER, WIDER)
    codes = codes_of(x, multiplier, words_ptr, group, line, M, K, ALONG, BITS, LANES, NOISE, CENTRED, INSTRUCTION)
    inside = (group[:, None] * LANES < K) & (line[None, :] < M)
    per_word: tl.constexpr = 64 // BITS
    words: tl.constexpr = LANES // per_word
    at = line[None, :].to(tl.int64) * (K // per_word) + group[:, None] * words
    for i in tl.static_range(words):
        low, high = word_of(codes, i * per_word, BITS), word_of(codes, i * per_word + per_word // 2, BITS)
        tl.store(codes_ptr + at + i, low | (high << 32), mask=inside)
    at = scale_offset(line[None, :], group[:, None], K // LANES, SWIZZLED)
    tl.store(scales_ptr + at, scale.to(tl.uint8), mask=inside)
    if TURNED:
        store_turned(codes, scale, turned_codes_ptr, turned_scales_ptr, group, tl.program_id(1), M, K, SWIZZLED, G, L)
