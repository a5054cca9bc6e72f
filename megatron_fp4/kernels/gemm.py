"""Products of codes: by FP4 tensor cores, or decoded in registers, which is exact as well.

`tl.dot_scaled` on E2M1 codes with E4M3 scales becomes tcgen05.mma or mma.sync `mxf4nvf4` on Blackwell. Elsewhere codes
are decoded to FP16, which holds code * scale of NVFP4 exactly (6 significant bits in 2^-10..2688), in a quarter of the
memory traffic of a BF16 GEMM. The sum is FP32; alpha is applied to it before the one rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fp4.kernels.arithmetic import as_float, bf16_bits, scale_offset, to_bf16


@triton.jit
def tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Row and column of a program's tile, in groups of eight rows of tiles, so that neighbours share operands in L2."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = program // (8 * columns)
    height = tl.minimum(rows - 8 * group, 8)
    inside = program % (8 * columns)
    return 8 * group + inside % height, inside // height


@triton.jit
def decoded(codes, scales, ROWS: tl.constexpr, COLS: tl.constexpr):
    """NVFP4 codes uint8 `[ROWS, COLS/2]` and scales `[ROWS, COLS/16]` as FP16 `[ROWS, COLS]`: exact.

    The bits of a code, moved to the fields of an FP16 number, are its value times 2^-14; those of a scale, times 2^-8.
    """
    wide = codes.to(tl.uint16)
    low, high = ((wide & 7) << 9) | ((wide & 8) << 12), ((wide & 0x70) << 5) | ((wide & 0x80) << 8)
    values = tl.reshape(tl.join(low, high).to(tl.float16, bitcast=True) * 16384.0, (ROWS, COLS // 16, 16))
    scale = (scales.to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 256.0
    return tl.reshape(values * scale[:, :, None], (ROWS, COLS))


@triton.jit
def store_product(
    sums, out_ptr, a_amax_ptr, b_amax_ptr, row, column, M, N,
    DIVISOR: tl.constexpr, ACCUMULATE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """alpha * sums, alpha = amax_a * amax_b / DIVISOR (0: no alpha), rounded to BF16 for ROUND, into `out [M, N]`.

    ACCUMULATE: the product, once rounded, is added to FP32 `out`: two operations, which must not be contracted.
    """
    if DIVISOR > 0.0:
        product = tl.load(a_amax_ptr) * tl.load(b_amax_ptr)
        sums = sums * tl.div_rn(product, tl.zeros_like(product) + DIVISOR)
    at = out_ptr + row[:, None].to(tl.int64) * N + column[None, :]
    inside = (row[:, None] < M) & (column[None, :] < N)
    if ACCUMULATE:
        if ROUND:
            sums = as_float(bf16_bits(sums))
        tl.store(at, tl.load(at, mask=inside, other=0.0) + sums, mask=inside)
    elif ROUND:
        tl.store(at, to_bf16(sums), mask=inside)
    else:
        tl.store(at, sums, mask=inside)


@triton.jit
def gemm_kernel(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, out_ptr, a_amax_ptr, b_amax_ptr, M, N, K,
    DIVISOR: tl.constexpr, ACCUMULATE: tl.constexpr, ROUND: tl.constexpr, SWIZZLED: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out [M, N] (+)= alpha * a @ b.T` from codes `[M, K/2]`, `[N, K/2]` (e4m3: `[., K]`) and their scales; any sizes.

    FORMAT: "e2m1" or "e4m3". BLOCK: 16 for E4M3 scales, 32 for powers of two. NATIVE: by `dot_scaled`; else nvfp4 is
    decoded. BK: a multiple of BLOCK.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN)
    row, column = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    per_byte: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    width = K // per_byte
    a_row = a_ptr + row[:, None].to(tl.int64) * width
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        byte = k // per_byte + tl.arange(0, BK // per_byte)
        block = k // BLOCK + tl.arange(0, BK // BLOCK)
        a = tl.load(a_row + byte[None, :], mask=(row[:, None] < M) & (byte[None, :] < width), other=0)
        a_scale = load_scales(a_scales_ptr, row, block, M, K // BLOCK, SWIZZLED)
        b_scale = load_scales(b_scales_ptr, column, block, N, K // BLOCK, SWIZZLED)
        if NATIVE:
            b = tl.load(b_ptr + column[None, :].to(tl.int64) * width + byte[:, None],
                        mask=(column[None, :] < N) & (byte[:, None] < width), other=0)  # fmt: skip
            if BLOCK == 16:  # E4M3 scales; a byte stands for a power of two
                a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
                b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
            sums = tl.dot_scaled(a, a_scale, FORMAT, b, b_scale, FORMAT, sums)
        else:
            b = tl.load(b_ptr + column[:, None].to(tl.int64) * width + byte[None, :],
                        mask=(column[:, None] < N) & (byte[None, :] < width), other=0)  # fmt: skip
            sums = tl.dot(decoded(a, a_scale, BM, BK), tl.trans(decoded(b, b_scale, BN, BK)), sums)
    store_product(sums, out_ptr, a_amax_ptr, b_amax_ptr, row, column, M, N, DIVISOR, ACCUMULATE, ROUND)


@triton.jit
def load_scales(pointer, line, block, lines, blocks, SWIZZLED: tl.constexpr):
    at = scale_offset(line[:, None], block[None, :], blocks, SWIZZLED)
    return tl.load(pointer + at, mask=(line[:, None] < lines) & (block[None, :] < blocks), other=0)


@triton.jit
def persistent_gemm_kernel(
    a_codes, a_scales, b_codes, b_scales, out_ptr, a_amax_ptr, b_amax_ptr, M, N, K,
    DIVISOR: tl.constexpr, ACCUMULATE: tl.constexpr, ROUND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`gemm_kernel` for nvfp4 on Blackwell, by programs that stay: operands and scales arrive by TMA.

    The first four are descriptors made on the host: codes uint8 `[M, K/2]` in blocks `[BM, BK/2]`; scales float8e4nv
    (as bytes they would not be copied to tensor memory directly) `[1, M/128, K/64, 2, 256]` in the 128x4 layout.
    """
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=False):
        pid_m, pid_n = tile_of(tile, M, N, BM, BN)
        sums = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BK), num_stages=STAGES):
            a, b = a_codes.load([pid_m * BM, k * (BK // 2)]), b_codes.load([pid_n * BN, k * (BK // 2)])
            a_scale = a_scales.load([0, pid_m * (BM // 128), k * (BK // 64), 0, 0])
            b_scale = b_scales.load([0, pid_n * (BN // 128), k * (BK // 64), 0, 0])
            a_scale, b_scale = unswizzled(a_scale, BM, BK), unswizzled(b_scale, BN, BK)
            sums = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", sums)
        row, column = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
        store_product(sums, out_ptr, a_amax_ptr, b_amax_ptr, row, column, M, N, DIVISOR, ACCUMULATE, ROUND)


@triton.jit
def unswizzled(scales, LINES: tl.constexpr, BK: tl.constexpr):
    """A block of scales in the 128x4 layout as `[LINES, BK/16]`."""
    tiles = scales.reshape(LINES // 128, BK // 64, 32, 4, 4).trans(0, 3, 2, 1, 4)
    return tiles.reshape(LINES, BK // 16)
