"""The quantizers as functions of tensors: amaxes, noise, copies."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megatron_fp4.kernels.lanes import lanes_kernel
from megatron_fp4.kernels.layout import swizzled_bytes
from megatron_fp4.kernels.measure import amax_kernel, transformed_amax_kernel, words_kernel
from megatron_fp4.kernels.rows import rows_kernel
from megatron_fp4.kernels.values import INTERPRETED, OPTIONS, Coding, Constants, PackedOperand, Target

MAX_PROGRAMS = 65535
"""Of the second dimension of a grid: CUDA's limit."""
_WORD = 0xFFFFFFFF


def bits_of(x: Tensor) -> Tensor:
    """x `[R, C]`, BF16 or FP32, as the kernels take it."""
    assert x.is_contiguous()
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def measure(x: Tensor, amax: Tensor) -> None:
    """max |x| of `x` into `amax`, int32 bits, zero before."""
    block, loops = (1 << 16, 1) if INTERPRETED else (4096, 4)
    grid = (triton.cdiv(x.numel(), block * loops),)
    amax_kernel[grid](bits_of(x), amax, x.numel(), BLOCK=block, LOOPS=loops, **OPTIONS)


def measure_transformed(x: Tensor, along: int, how: Coding, signs: int, amax: Tensor) -> None:
    """max |x| into `amax[0]` and that of its transform along dimension `along` into `amax[1]`; int32 bits, zero before.

    signs: bit i is set where element i of a group is negated.
    """
    lines, length = x.shape[1 - along], x.shape[along]
    tile = lanes_tile(how)
    grid = grid_of(length // how.block, tile["G"], lines, tile["L"])
    transformed_amax_kernel[grid](
        bits_of(x), amax, lines, length, signs, ALONG=along, RHT=how.rht, LANES=how.block, **tile, **OPTIONS
    )


def grid_of(first: int, first_tile: Any, second: int, second_tile: Any) -> tuple[int, int]:
    """Programs along two dimensions. Raises ValueError for more of the second than CUDA launches."""
    if second > (largest := MAX_PROGRAMS * second_tile):
        raise ValueError(
            f"the quantizers of precision.backend=triton take at most {largest:,} lines along a dimension, got"
            f" {second:,}; use a smaller micro batch, more parallel ranks, or precision.backend=emulated"
        )
    return triton.cdiv(first, first_tile), triton.cdiv(second, second_tile)


def noise_words(key: int, rows: Tensor, cols: Tensor) -> Tensor:
    """int32 `[2 R + C]`: what the rows and the columns of a tensor share of its noise (`numerics.random`)."""
    words = torch.empty(2 * len(rows) + len(cols), dtype=torch.int32, device=rows.device)
    parts = (key & _WORD, (key >> 32 & _WORD) ^ 0x5BD1E995, (key >> 16 & _WORD) ^ 0x3C6EF372)
    signed = (part - (1 << 32) if part >> 31 else part for part in parts)
    block = 4096 if INTERPRETED else 256
    grid = (triton.cdiv(max(len(rows), len(cols)), block),)
    words_kernel[grid](rows, cols, words, *signed, len(rows), len(cols), BLOCK=block, **OPTIONS)
    return words


def quantize(
    x: Tensor,
    along: int,
    how: Coding,
    amax: Tensor,
    *,
    target: Target,
    words: Tensor | None = None,
    signs: int = 0,
    both: bool = False,
) -> tuple[PackedOperand, ...]:
    """The copy of `x [R, C]` that is contracted along `along`; for both also the other one, of the same codes.

    amax: FP32 scalar, of the whole logical tensor; int32 bits, zero before, where there is no global scale: the local
    amax is then the result. words: see `noise_words`. signs: see `measure_transformed`.
    """
    lines, length = x.shape[1 - along], x.shape[along]
    codes, scales = _empty(lines, length, how, x.device, target)
    turned_codes, turned_scales = _empty(length, lines, how, x.device, target) if both else (codes, scales)
    words = scales if words is None else words
    if along == 1 and how.simple and not both:
        constants = rows_constants(how, target)
        grid = grid_of(lines, constants["BM"], length, constants["BN"])
        rows_kernel[grid](bits_of(x), codes, scales, amax, words, lines, length, **constants, **OPTIONS)
    else:
        constants = lanes_constants(how, target, along=along, both=both)
        grid = grid_of(length // how.block, constants["G"], lines, constants["L"])
        lanes_kernel[grid](
            bits_of(x), codes.view(torch.int64), scales, turned_codes, turned_scales, amax, words, lines, length, signs,
            **constants, **OPTIONS,
        )  # fmt: skip
    scale = amax if how.aim else None
    copy = PackedOperand(codes, scales, scale, how)
    return (copy, PackedOperand(turned_codes, turned_scales, scale, how)) if both else (copy,)


def _empty(lines: int, length: int, how: Coding, device: torch.device, target: Target) -> tuple[Tensor, Tensor]:
    """Codes and scales to be written. In the 128x4 layout, blocks that no line has are zero, for 0 * NaN is NaN."""
    codes = torch.empty(lines, length * how.bits // 8, dtype=torch.uint8, device=device)
    blocks = length // how.block
    if not target.native:
        return codes, torch.empty(lines, blocks, dtype=torch.uint8, device=device)
    make = torch.zeros if blocks % 4 else torch.empty
    return codes, make(swizzled_bytes(lines, blocks), dtype=torch.uint8, device=device)


def _scale_constants(how: Coding, target: Target) -> Constants:
    return {
        "AIM": how.aim,
        "PAPER_ORDER": how.paper_order,
        "WIDER": how.wider,
        "BITS": how.bits,
        "NOISE": how.noise_bits,
        "CENTRED": how.centred,
        "SWIZZLED": target.native,
        "INSTRUCTION": target.native and not INTERPRETED,
    }


def rows_constants(how: Coding, target: Target) -> Constants:
    """What `rows_kernel` is compiled for."""
    size = {"BM": 128, "BN": 256} if INTERPRETED else {"BM": 32, "BN": 128}
    return {"BLOCK": how.block, **size, **_scale_constants(how, target)}


def lanes_tile(how: Coding) -> dict[str, int]:
    """Blocks and lines of a program of lanes: half as many where a block fills more registers."""
    if INTERPRETED:
        return {"G": 8, "L": 128}
    return {"G": 4 if how.over or how.noise_bits or how.block > 16 else 8, "L": 64}


def lanes_constants(how: Coding, target: Target, *, along: int, both: bool) -> Constants:
    """What `lanes_kernel` is compiled for."""
    return {
        "ALONG": along,
        "RHT": how.rht,
        "SQUARE": how.square,
        "TURNED": both,
        "OVER": how.over,
        "LANES": how.block,
        **lanes_tile(how),
        **_scale_constants(how, target),
    }
