"""Quantize-dequantize in one pass: what the emulated backend compiles.

One idea: the operand of an emulated GEMM is `code * block_scale` without the global scale, which BF16 holds exactly (at
most 6 significant bits). These functions go from the high-precision tensor to that operand without making codes. A tile
is given in *storage* order (rows, columns of the tensor as it lies in memory), so a copy that is contracted along its
rows needs no transposition.

The arithmetic is documented in docs/numerics.md and spelled out readably in `block_scale`, which serves as the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.numerics import rounding
from megatron_fp4.numerics.random import combine

HEADROOM = 17.0 / 16.0  # E4M3 rounds a scale down by at most 1/17 of it


def amax_of(x: Tensor) -> Tensor:
    """max |x| as an FP32 scalar; NaN if any element is NaN."""
    return x.abs().amax().to(torch.float32)


def row_amax_of(x: Tensor, dim: int) -> Tensor:
    """max |x| along `dim`, kept as a dimension of 1, FP32."""
    return x.abs().amax(dim, keepdim=True).to(torch.float32)


def encode_scale(amax: Tensor, element_times_scale_max: float) -> tuple[Tensor, Tensor]:
    """Global encode scale S_enc = 2688 / amax and decode scale 1 / S_enc, FP32, of amax's shape.

    A true division of tensors: PyTorch computes `2688.0 / amax` as a reciprocal times 2688, which has other bits.
    """
    limit = torch.full_like(amax, element_times_scale_max)
    encode = (limit / amax).clamp(max=rounding.FLT_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    return encode, torch.ones_like(encode) / encode


def blocks(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """`[R, C]` as `[R/r, r, C/c, c]` for tiles of r x c."""
    return x.view(x.shape[0] // tile[0], tile[0], x.shape[1] // tile[1], tile[1])


def block_amax(blocked: Tensor) -> Tensor:
    """max |x| per tile, FP32, `[R/r, 1, C/c, 1]`."""
    return blocked.abs().amax((1, 3), keepdim=True).to(torch.float32)


def noise_of(words: tuple[Tensor, Tensor, Tensor], tile: tuple[int, int], bits: int) -> Tensor:
    """Addressed noise in [0, 1), multiples of 2^-bits, blocked like the tensor.

    words: int32 `[R]`, `[R]`, `[C]` of `random.row_words` and `random.column_words`.
    """
    row_a, row_b, column = words
    word = combine(row_a.view(-1, tile[0], 1, 1), row_b.view(-1, tile[0], 1, 1), column.view(1, 1, -1, tile[1]))
    return ((word >> (32 - bits)) & ((1 << bits) - 1)).to(torch.float32) * 2.0**-bits


def two_level_operand(
    x: Tensor,
    amax: Tensor,
    words: tuple[Tensor, Tensor, Tensor] | None,
    *,
    tile: tuple[int, int],
    along: int,
    scale_order: str = "te",
    headroom: bool = False,
    noise_bits: int = 8,
    four_over_six: str = "off",
    bound: float = rounding.E4M3_MAX,
) -> Tensor:
    """NVFP4 operand `code * block_scale` of `x [R, C]`, in x's shape and dtype (BF16 or FP32; exact in both).

    amax: FP32 global amax, a scalar, or `[R, 1]` or `[1, C]` for one scale per row of the operand.
    along: the storage dimension that is contracted (orders the error sums of four-over-six). bound: largest block scale.
    """
    blocked = blocks(x, tile)
    encode, decode = encode_scale(amax, rounding.E2M1_MAX * bound)
    encode, decode = _per_block(encode), _per_block(decode)
    largest = block_amax(blocked)
    values = blocked.to(torch.float32)
    noise = None if words is None else noise_of(words, tile, noise_bits)
    if scale_order == "te" and four_over_six == "off":
        target = largest * (encode * (1.0 / 6.0))
    else:
        target = (largest / torch.full_like(largest, 6.0)) * encode
    if headroom:
        target = target * HEADROOM
    scale = rounding.round_e4m3(target)
    if four_over_six != "off":
        wider = rounding.round_e4m3(target * 1.5)
        global_scale = (_per_block(amax), rounding.E2M1_MAX * bound)
        narrow_error = _block_error(values, scale, decode, global_scale, four_over_six, along)
        wide_error = _block_error(values, wider, decode, global_scale, four_over_six, along)
        scale = torch.where(wide_error < narrow_error, wider, scale)
    codes = rounding.round_e2m1(values * _block_encode(scale, decode), noise)
    return (codes * scale).to(x.dtype).view(x.shape)


def power_of_two_operand(
    x: Tensor,
    words: tuple[Tensor, Tensor, Tensor] | None,
    *,
    tile: tuple[int, int],
    element: str,
    noise_bits: int = 8,
) -> Tensor:
    """Operand of the formats with one power-of-two scale per block (mxfp4, mxfp8, fp8_block), in x's shape and dtype.

    element: "e2m1" or "e4m3". The scale is rounded up, so that no element saturates (paper section 2).
    """
    blocked = blocks(x, tile)
    largest = block_amax(blocked)
    element_max = rounding.E2M1_MAX if element == "e2m1" else rounding.E4M3_MAX
    scale = rounding.power_of_two_at_least(largest / torch.full_like(largest, element_max))
    scaled = blocked.to(torch.float32) * rounding.power_of_two_inverse(scale)
    if element == "e2m1":
        codes = rounding.round_e2m1(scaled, None if words is None else noise_of(words, tile, noise_bits))
    else:
        codes = rounding.round_e4m3(scaled)
    return (codes * scale).to(x.dtype).view(x.shape)


def _per_block(global_scale: Tensor) -> Tensor:
    """A scalar, `[R, 1]` or `[1, C]` made broadcastable to tiles of one row (or column)."""
    return global_scale if global_scale.dim() == 0 else global_scale[:, None, :, None]


def _block_encode(scale: Tensor, decode: Tensor) -> Tensor:
    """1 / (block_scale * S_dec), from the rounded block scale; FLT_MAX where that is infinite."""
    product = scale * decode
    return (torch.ones_like(product) / product).clamp(max=rounding.FLT_MAX)


def _block_error(
    values: Tensor, scale: Tensor, decode: Tensor, global_scale: tuple[Tensor, float], measure: str, along: int
) -> Tensor:
    """Error of the nearest-even codes with this block scale, summed per tile in a fixed order, `[R/r, 1, C/c, 1]`."""
    amax, divisor = global_scale
    codes = rounding.round_e2m1(values * _block_encode(scale, decode))
    decoded = (codes * scale) * amax
    difference = decoded / torch.full_like(decoded, divisor) - values
    error = difference * difference if measure == "mse" else difference.abs()
    contracted, other = (1, 3) if along == 0 else (3, 1)
    total = torch.zeros_like(error.narrow(contracted, 0, 1))
    for i in range(error.shape[contracted]):  # one after the other, as Transformer Engine sums
        total = total + error.narrow(contracted, i, 1)
    while total.shape[other] > 1:  # then a tree over the rows of a 2-D tile
        half = total.shape[other] // 2
        total = total.narrow(other, 0, half) + total.narrow(other, half, half)
    return total
