"""Quantize-dequantize in few passes: the kernels that the emulated backend runs, eager or compiled.

One idea: the operand of an emulated GEMM is `code * block_scale` without the global scale, which BF16 holds exactly (at
most 6 significant bits). These functions go from the high-precision tensor to that operand without making codes. A tile
is given in *storage* order (rows, columns of the tensor as it lies in memory), so a copy that is contracted along its
rows needs no transposition.

The stages are separate on purpose: one big kernel was measured to be slower than four small ones (inductor recomputes
scales per element and spills registers). Each does one thing to `[blocks..., elements]` views:

    block_amax     x            -> max |x| per tile
    block_scales   max |x|      -> E4M3 scale and the factor that takes x to code units
    noise_bytes    addresses    -> random bytes
    apply_scales   x            -> code * scale

The arithmetic is explained in docs/numerics.md and spelled out readably in `block_scale`, which is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.numerics import rounding
from megatron_fp4.numerics.hadamard import hadamard_lanes
from megatron_fp4.numerics.random import combine

HEADROOM = 17.0 / 16.0  # E4M3 rounds a scale down by at most 1/17 of it
Words = tuple[Tensor, Tensor, Tensor]  # int32 [R], [R], [C]: random.row_words and random.column_words


def encode_scale(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Global encode scale S_enc = largest / amax (2688 / amax) and decode scale 1 / S_enc, FP32, of amax's shape.

    A true division of tensors: PyTorch computes `2688.0 / amax` as a reciprocal times 2688, which has other bits.
    """
    encode = (torch.full_like(amax, largest) / amax).clamp(max=rounding.FLT_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    return encode, torch.ones_like(encode) / encode


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
    largest: Tensor, encode: Tensor, decode: Tensor, scale_order: str, headroom: bool
) -> tuple[Tensor, Tensor]:
    """E4M3 block scale and 1 / (scale * S_dec), FP32, of the block maxima's shape. encode, decode: broadcastable."""
    if scale_order == "te":
        target = largest.to(torch.float32) * (encode * (1.0 / 6.0))
    else:
        target = (largest.to(torch.float32) / torch.full_like(largest, 6.0, dtype=torch.float32)) * encode
    if headroom:
        target = target * HEADROOM
    scale = rounding.round_e4m3(target)
    return scale, block_encode(scale, decode)


def block_encode(scale: Tensor, decode: Tensor) -> Tensor:
    """1 / (scale * S_dec), from the rounded block scale; FLT_MAX where the scale is zero."""
    product = scale * decode
    return (torch.ones_like(product) / product).clamp(max=rounding.FLT_MAX)


def power_scales(largest: Tensor, element_max: float) -> tuple[Tensor, Tensor]:
    """Power-of-two block scale, rounded up so that no element saturates (paper section 2), and its exact inverse."""
    largest = largest.to(torch.float32)
    scale = rounding.power_of_two_at_least(largest / torch.full_like(largest, element_max))
    return scale, rounding.power_of_two_inverse(scale)


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
    x: Tensor, scale: Tensor, multiplier: Tensor, noise: Tensor, noise_unit: float, lanes: int, dtype: torch.dtype
) -> Tensor:
    """Stochastically rounded E2M1 code * scale. noise: integers of x's shape, multiplied by `noise_unit`."""
    blocked = x.unflatten(0, (-1, lanes)).to(torch.float32)
    uniform = noise.unflatten(0, (-1, lanes)).to(torch.float32) * noise_unit
    return (rounding.round_e2m1(blocked * multiplier, uniform) * scale).to(dtype)


def apply_e4m3(x: Tensor, scale: Tensor, multiplier: Tensor, lanes: int, dtype: torch.dtype) -> Tensor:
    """Nearest-even E4M3 code * scale."""
    blocked = x.unflatten(0, (-1, lanes)).to(torch.float32)
    return (rounding.round_e4m3(blocked * multiplier) * scale).to(dtype)


def choose_four_over_six(
    blocked: Tensor,
    largest: Tensor,
    amax: Tensor,
    encode: Tensor,
    decode: Tensor,
    bound: float,
    measure: str,
    along: int,
) -> tuple[Tensor, Tensor]:
    """Per tile, of the scale that maps its maximum to 6 and the one that maps it to 4, that with the smaller error.

    blocked: `[R/r, r, C/c, c]`; the other tensors broadcast to it. Result as `nvfp4_scales`, `[R/r, 1, C/c, 1]`.
    """
    values = blocked.to(torch.float32)
    target = (largest.to(torch.float32) / torch.full_like(largest, 6.0, dtype=torch.float32)) * encode
    best = rounding.round_e4m3(target)
    wider = rounding.round_e4m3(target * 1.5)
    errors = []
    for scale in (best, wider):
        codes = rounding.round_e2m1(values * block_encode(scale, decode))
        decoded = (codes * scale) * amax
        difference = decoded / torch.full_like(decoded, rounding.E2M1_MAX * bound) - values
        errors.append(_sum_in_order(difference * difference if measure == "mse" else difference.abs(), along))
    scale = torch.where(errors[1] < errors[0], wider, best)
    return scale, block_encode(scale, decode)


def _sum_in_order(error: Tensor, along: int) -> Tensor:
    """Sum per tile in Transformer Engine's order: along the contraction one by one, then a tree over the other rows."""
    contracted, other = (1, 3) if along == 0 else (3, 1)
    total = torch.zeros_like(error.narrow(contracted, 0, 1))
    for i in range(error.shape[contracted]):
        total = total + error.narrow(contracted, i, 1)
    while total.shape[other] > 1:
        half = total.shape[other] // 2
        total = total.narrow(other, 0, half) + total.narrow(other, half, half)
    return total


# Triton divides approximately and contracts multiply-adds: on CUDA these stages stay eager. They are small (per block).
_DIVIDING = (nvfp4_scales, power_scales, choose_four_over_six)


class Kernels:
    """The stages above, run eagerly or each compiled once, at its first use. Results are equal, bit for bit.

    Compiled kernels are made for symbolic sizes, so that a model with many shapes compiles about a dozen of them; they
    are cached on disk by inductor, and ranks that compile at once are kept apart by its file locks.
    """

    def __init__(self, compile: bool) -> None:
        self.compile = compile
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def run(self, stage: Callable[..., Any], *args: Any) -> Any:
        """`stage(*args)`. Arguments that are not tensors select the kernel; they are constants in it."""
        if not self.compile or (stage in _DIVIDING and args[0].is_cuda):
            return stage(*args)
        constants = tuple((i, arg) for i, arg in enumerate(args) if not isinstance(arg, Tensor))
        ranks = tuple((arg.dim(), arg.dtype, arg.device.type) for arg in args if isinstance(arg, Tensor))
        compiled = self._compiled.get((stage, constants, ranks))
        if compiled is None:
            compiled = self._compiled[stage, constants, ranks] = _compile(stage, dict(constants), len(args))
        return compiled(*(arg for arg in args if isinstance(arg, Tensor)))

    def block_amax(self, x: Tensor, tile: tuple[int, int]) -> Tensor:
        """max |x| per tile, `[R/r, C/c]`, in x's dtype."""
        rows, cols = x.shape[0] // tile[0], x.shape[1] // tile[1]
        largest = x
        if tile[0] > 1:
            largest = self.run(max_of_column_lanes, x, tile[0])
        if tile[1] > 1:
            largest = self.run(max_of_row_lanes, largest.view(-1), tile[1])
        return largest.view(rows, cols)

    def hadamard(self, x: Tensor, size: int, signs: Tensor | None, dim: int) -> Tensor:
        """See `hadamard.hadamard`."""
        signs = torch.ones(size, device=x.device) if signs is None else signs
        shape = (x.shape[0] // size, size, x.shape[1]) if dim == 0 else (x.numel() // size, size)
        return self.run(hadamard_lanes, x.view(shape), signs, size).view(x.shape)

    def apply(
        self,
        x: Tensor,
        scales: tuple[Tensor, Tensor],
        tile: tuple[int, int],
        element: str,
        words: Words | None,
        noise_bits: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """code * scale in x's shape. scales: (scale, multiplier) `[R/r, C/c]`. element: "e2m1" or "e4m3"."""
        shape, lanes = x.shape, tile[0]
        if tile[0] == 1:
            x, lanes = x.view(-1), tile[1]
            scale, multiplier = (part.view(-1, 1) for part in scales)
        else:
            if tile[1] > 1:
                scales = (scales[0].repeat_interleave(tile[1], 1), scales[1].repeat_interleave(tile[1], 1))
            scale, multiplier = (part[:, None] for part in scales)
        if element == "e4m3":
            return self.run(apply_e4m3, x, scale, multiplier, lanes, dtype).view(shape)
        if words is None:
            return self.run(apply_e2m1, x, scale, multiplier, lanes, dtype).view(shape)
        noise = self.run(noise_bytes if noise_bits == 8 else noise_words, *words).view(x.shape)
        unit = 2.0**-noise_bits
        return self.run(apply_e2m1_stochastic, x, scale, multiplier, noise, unit, lanes, dtype).view(shape)

    def two_level_operand(
        self,
        x: Tensor,
        amax: Tensor,
        words: Words | None = None,
        *,
        tile: tuple[int, int] = (1, 16),
        along: int = 1,
        largest: Tensor | None = None,
        scale_order: str = "te",
        headroom: bool = False,
        noise_bits: int = 8,
        four_over_six: str = "off",
        bound: float = rounding.E4M3_MAX,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """NVFP4 operand `code * block_scale` of `x [R, C]`, in x's shape; dtype: BF16 or FP32 (exact in both).

        amax: FP32 global amax, a scalar, or `[R, 1]` or `[1, C]` for one scale per row of the operand. along: the
        dimension that is contracted. largest: `block_amax(x, tile)` if it is at hand. bound: largest block scale.
        """
        largest = self.block_amax(x, tile) if largest is None else largest
        encode, decode = encode_scale(amax, rounding.E2M1_MAX * bound)
        if amax.dim() == 0:
            encode, decode = encode.view(1, 1), decode.view(1, 1)
        if four_over_six == "off":
            scales = self.run(nvfp4_scales, largest, encode, decode, scale_order, headroom)
        else:
            blocked = x.view(largest.shape[0], tile[0], largest.shape[1], tile[1])
            per_block = [t[:, None, :, None] for t in (largest, amax.view(encode.shape), encode, decode)]
            chosen = self.run(choose_four_over_six, blocked, *per_block, bound, four_over_six, along)
            scales = (chosen[0].view(largest.shape), chosen[1].view(largest.shape))
        return self.apply(x, scales, tile, "e2m1", words, noise_bits, dtype or x.dtype)

    def power_of_two_operand(
        self,
        x: Tensor,
        words: Words | None = None,
        *,
        tile: tuple[int, int],
        element: str,
        largest: Tensor | None = None,
        noise_bits: int = 8,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Operand of the formats with one power-of-two scale per block (mxfp4, mxfp8, fp8_block), in x's shape."""
        element_max = rounding.E2M1_MAX if element == "e2m1" else rounding.E4M3_MAX
        largest = self.block_amax(x, tile) if largest is None else largest
        scales = self.run(power_scales, largest, element_max)
        return self.apply(x, scales, tile, element, words, noise_bits, dtype or x.dtype)


def _compile(stage: Callable[..., Any], constants: dict[int, Any], count: int) -> Callable[..., Any]:
    """`stage` as a compiled function of its tensor arguments."""

    def call(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return stage(*(constants[i] if i in constants else next(rest) for i in range(count)))

    # isolated: all kernels share the code of `call`, and dynamo counts recompilations per code object
    return torch.compile(  # type: ignore[no-any-return, call-overload]
        call, dynamic=True, fullgraph=True, recompile_limit=64, isolate_recompiles=True
    )
