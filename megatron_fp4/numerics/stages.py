"""The stages of quantize-dequantize, as functions of tensors that `fused.Passes` runs eagerly or compiles.

They are separate on purpose: one big kernel was measured to be slower than four small ones (inductor recomputes scales
per element and spills registers).

    max_of_*       x            -> max |x| per tile
    nvfp4_scales   max |x|      -> E4M3 scale and the factor that takes x to code units
    address_words  key, indices -> random words of rows and columns
    noise_*        these words  -> random bits
    apply_*        x            -> code * scale

The arithmetic is explained in docs/numerics.md and spelled out readably in `block_scale`, which is the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.numerics import rounding
from megatron_fp4.numerics.random import Key, column_words, combine, row_words

HEADROOM = 17.0 / 16.0  # E4M3 rounds a scale down by at most 1/17 of it


class BlockScales(NamedTuple):
    """How each tile is rounded, FP32 `[R/r, C/c]`: x * multiplier is in code units, code * scale is the operand."""

    scale: Tensor
    multiplier: Tensor


class Noise(NamedTuple):
    """The random bits of a tensor `[R, C]`, by their address: int32 `[R]`, `[R]`, `[C]`.

    bits: per element, 8 or 20. centred: k of them stand for (k + 1/2) / 2^bits instead of k / 2^bits, whose mean is
    half a unit too low.
    """

    row_a: Tensor
    row_b: Tensor
    column: Tensor
    bits: int
    centred: bool

    @staticmethod
    def at(key: int, rows: Tensor, cols: Tensor, bits: int = 8, *, centred: bool = False) -> Noise:
        """The bits of the elements with global indices rows `[R]` and cols `[C]`, int64; key: see `random.key_of`."""
        return Noise(*address_words(key, rows, cols), bits, centred)


def encode_scale(amax: Tensor, aim: float) -> tuple[Tensor, Tensor]:
    """Global encode scale S_enc = aim / amax and decode scale 1 / S_enc, FP32, of amax's shape; aim: 2688 in NVFP4.

    A true division of tensors: PyTorch computes `2688.0 / amax` as a reciprocal times 2688, which has other bits.
    """
    encode = (torch.full_like(amax, aim) / amax).clamp(max=rounding.FLT_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    return encode, torch.ones_like(encode) / encode


def power_of_two_amax(amax: Tensor, aim: float) -> Tensor:
    """The smallest number from `amax` on for which aim / amax is a power of two, exact; 0, NaN and Inf stay."""
    fraction, _ = math.frexp(aim)
    mantissa, power = torch.frexp(amax)
    larger = torch.ldexp(torch.full_like(amax, fraction), power + (mantissa > fraction))
    return torch.where(torch.isfinite(larger) & torch.isfinite(amax) & (amax != 0), larger, amax)


def max_of_row_lanes(x: Tensor, lanes: int) -> Tensor:
    """max |x| of each `lanes` consecutive elements of `x [n]`, in x's dtype; NaN propagates."""
    if x.dtype == torch.bfloat16:  # compared as integers, two elements in a word
        words = x.view(torch.int32).unflatten(0, (-1, lanes // 2))
        pairs = torch.maximum((words >> 16) & 0x7FFF, words & 0x7FFF)
        return _largest(pairs.unbind(1)).to(torch.int16).view(torch.bfloat16)
    return x.unflatten(0, (-1, lanes)).abs().amax(1)


def max_of_column_lanes(x: Tensor, lanes: int) -> Tensor:
    """max |x| of each `lanes` consecutive rows of `x [R, C]`: `[R/lanes, C]` in x's dtype; NaN propagates."""
    return _largest(x.unflatten(0, (-1, lanes)).abs().unbind(1))


def _largest(lanes: Sequence[Tensor]) -> Tensor:
    """Elementwise, by a tree."""
    while len(lanes) > 1:
        lanes = [torch.maximum(a, b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0]


def largest_of(block_maxima: Tensor) -> Tensor:
    """The largest of the block maxima, an FP32 scalar; NaN propagates."""
    return block_maxima.to(torch.float32).amax()


def nvfp4_scales(
    largest: Tensor, amax: Tensor, aim: float, scale_order: str, headroom: bool, least: float
) -> BlockScales:
    """E4M3 block scale and 1 / (scale * S_dec) of the block maxima `largest`; amax: broadcastable, aim: see above.

    least: the smallest scale of a block that is not all zeros, an E4M3 number.
    """
    encode, decode = encode_scale(amax, aim)
    if scale_order == "te":
        target = largest.to(torch.float32) * (encode * (1.0 / 6.0))
    else:
        target = (largest.to(torch.float32) / torch.full_like(largest, 6.0, dtype=torch.float32)) * encode
    if headroom:
        target = target * HEADROOM
    scale = at_least(rounding.round_e4m3(target), largest, least)
    return BlockScales(scale, block_encode(scale, decode))


def at_least(scale: Tensor, largest: Tensor, least: float) -> Tensor:
    """`scale`, but no less than `least` where the maximum of the block is not zero."""
    return torch.where(largest > 0, scale.clamp(min=least), scale) if least else scale


def block_encode(scale: Tensor, decode: Tensor) -> Tensor:
    """1 / (scale * S_dec), from the rounded block scale; FLT_MAX where the scale is zero."""
    product = scale * decode
    return (torch.ones_like(product) / product).clamp(max=rounding.FLT_MAX)


def power_scales(largest: Tensor, element_max: float) -> BlockScales:
    """Power-of-two block scale, rounded up so that no element saturates (paper section 2), and its exact inverse."""
    largest = largest.to(torch.float32)
    scale = rounding.power_of_two_at_least(largest / torch.full_like(largest, element_max))
    return BlockScales(scale, rounding.power_of_two_inverse(scale))


def address_words(key: Key, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the elements of each row `[R]` (two words) and of each column `[C]` share, int32."""
    return *row_words(key, rows), column_words(key, cols)


def random_words(row_a: Tensor, row_b: Tensor, column: Tensor) -> Tensor:
    """The random word of each element, int32 `[R, C]`."""
    return combine(row_a[:, None], row_b[:, None], column)


def noise_bytes(row_a: Tensor, row_b: Tensor, column: Tensor) -> Tensor:
    """The top byte of the random word of each element, uint8 `[R, C]`."""
    return (combine(row_a[:, None], row_b[:, None], column) >> 24).to(torch.uint8)


def noise_words(row_a: Tensor, row_b: Tensor, column: Tensor) -> Tensor:
    """The top 20 bits of the random word of each element, int32 `[R, C]`."""
    return (combine(row_a[:, None], row_b[:, None], column) >> 12) & 0xFFFFF


# The three below take `x [n]` (blocks of `lanes` elements) or `x [R, C]` (blocks of `lanes` rows); scale and multiplier
# are FP32 and broadcast to `[n/lanes, lanes]` or `[R/lanes, lanes, C]`. The size of a block is an argument, so that it
# is a constant of the compiled kernel: with a symbolic one the loops over it are not vectorized.


def apply_e2m1(x: Tensor, scale: Tensor, multiplier: Tensor, lanes: int, dtype: torch.dtype) -> Tensor:
    """Nearest-even E2M1 code * scale."""
    blocked = x.unflatten(0, (-1, lanes)).to(torch.float32)
    return (rounding.round_e2m1(blocked * multiplier) * scale).to(dtype)


def apply_e2m1_stochastic(
    x: Tensor,
    scale: Tensor,
    multiplier: Tensor,
    noise: Tensor,
    noise_unit: float,
    centred: bool,
    lanes: int,
    dtype: torch.dtype,
) -> Tensor:
    """Stochastically rounded E2M1 code * scale. noise: integers of x's shape, in `noise_unit`; centred: see `Noise`."""
    blocked = x.unflatten(0, (-1, lanes)).to(torch.float32)
    uniform = noise.unflatten(0, (-1, lanes)).to(torch.float32) * noise_unit
    if centred:
        uniform = uniform + noise_unit * 0.5
    return (rounding.round_e2m1(blocked * multiplier, uniform) * scale).to(dtype)


def apply_e4m3(x: Tensor, scale: Tensor, multiplier: Tensor, lanes: int, dtype: torch.dtype) -> Tensor:
    """Nearest-even E4M3 code * scale."""
    blocked = x.unflatten(0, (-1, lanes)).to(torch.float32)
    return (rounding.round_e4m3(blocked * multiplier) * scale).to(dtype)
