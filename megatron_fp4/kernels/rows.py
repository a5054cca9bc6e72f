"""The quantizer of a copy that is contracted along the rows of its tensor: blocks lie in one piece in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fp4.kernels.arithmetic import (
    e2m1_code,
    e2m1_code_stochastic,
    e4m3_code,
    e4m3_scale,
    e8m0_scale,
    load_float,
    load_words,
    magnitude,
    noise_of,
    scale_offset,
    sign_code,
)


@triton.jit
def rows_kernel(
    x_ptr, codes_ptr, scales_ptr, amax_ptr, words_ptr, M, K,
    AIM: tl.constexpr, PAPER_ORDER: tl.constexpr, WIDER: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, NOISE: tl.constexpr, CENTRED: tl.constexpr, SWIZZLED: tl.constexpr,
    INSTRUCTION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`x [M, K]` to codes uint8 `[M, K/2]` (or `[M, K]`) and scales uint8 of blocks of BLOCK.

    AIM: what S_enc maps amax to; 0 for power-of-two scales, of which amax is measured here, as bits. BITS: 4 for
    E2M1, 8 for E4M3. NOISE: random bits per element, 0 to round to nearest. INSTRUCTION: see `e2m1_code`. Others: see
    `lanes_kernel`.
    """
    line = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    row = line[:, None].to(tl.int64)
    x = load_float(x_ptr + row * K + column[None, :], (line[:, None] < M) & (column[None, :] < K))
    x = tl.reshape(x, (BM, BN // BLOCK, BLOCK))
    largest = tl.max(magnitude(x), axis=2)
    if AIM > 0.0:
        scale, multiplier = e4m3_scale(largest, tl.load(amax_ptr), AIM, PAPER_ORDER, WIDER)
    else:
        scale, multiplier = e8m0_scale(largest, 6.0 if BITS == 4 else 448.0)
        tl.atomic_max(amax_ptr, tl.max(largest), sem="relaxed")
    q = x * multiplier[:, :, None]
    if BITS == 8:
        code = tl.reshape(e4m3_code(tl.abs(q)) | sign_code(q, 24), (BM, BN)).to(tl.uint8)
        tl.store(codes_ptr + row * K + column[None, :], code, mask=(line[:, None] < M) & (column[None, :] < K))
    else:
        if NOISE > 0:
            row_a, row_b = load_words(words_ptr, line, line < M), load_words(words_ptr + M, line, line < M)
            word = load_words(words_ptr + 2 * M, column, column < K)
            noise = noise_of(row_a[:, None], row_b[:, None], word[None, :], NOISE, CENTRED)
            code = e2m1_code_stochastic(q, tl.reshape(noise, (BM, BN // BLOCK, BLOCK)))
        else:
            code = e2m1_code(q, INSTRUCTION)
        low, high = tl.split(tl.reshape(code, (BM, BN // 2, 2)))
        pair = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
        inside = (line[:, None] < M) & (pair[None, :] < K // 2)
        tl.store(codes_ptr + row * (K // 2) + pair[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)
    block = tl.program_id(1) * (BN // BLOCK) + tl.arange(0, BN // BLOCK)
    at = scale_offset(line[:, None], block[None, :], K // BLOCK, SWIZZLED)
    tl.store(scales_ptr + at, scale.to(tl.uint8), mask=(line[:, None] < M) & (block[None, :] < K // BLOCK))
