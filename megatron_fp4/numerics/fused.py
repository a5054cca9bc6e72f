"""Quantize-dequantize in few passes: the kernels that the emulated backend runs, eager or compiled.

One idea: the operand of an emulated GEMM is `code * block_scale` without the global scale, which BF16 holds exactly (at
most 6 significant bits). These functions go from the high-precision tensor to that operand without making codes. A tile
is given in *storage* order (rows, columns of the tensor as it lies in memory), so a copy that is contracted along its
rows needs no transposition. What a kernel computes is in `stages` and `four_over_six`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.numerics import four_over_six as over
from megatron_fp4.numerics import rounding, stages
from megatron_fp4.numerics.hadamard import hadamard_lanes
from megatron_fp4.numerics.stages import Words

# Triton divides approximately and contracts multiply-adds: on CUDA these stages stay eager. They are small (per block).
_DIVIDING = (stages.nvfp4_scales, stages.power_scales, over.candidates, over.errors)


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
            largest = self.run(stages.max_of_column_lanes, x, tile[0])
        if tile[1] > 1:
            largest = self.run(stages.max_of_row_lanes, largest.view(-1), tile[1])
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
            return self.run(stages.apply_e4m3, x, scale, multiplier, lanes, dtype).view(shape)
        if words is None:
            return self.run(stages.apply_e2m1, x, scale, multiplier, lanes, dtype).view(shape)
        noise = self.run(stages.noise_bytes if noise_bits == 8 else stages.noise_words, *words).view(x.shape)
        unit = 2.0**-noise_bits
        return self.run(stages.apply_e2m1_stochastic, x, scale, multiplier, noise, unit, lanes, dtype).view(shape)

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
        encode, decode = stages.encode_scale(amax, rounding.E2M1_MAX * bound)
        if amax.dim() == 0:
            encode, decode = encode.view(1, 1), decode.view(1, 1)
        if four_over_six == "off":
            scales = self.run(stages.nvfp4_scales, largest, encode, decode, scale_order, headroom)
        else:
            aimed = rounding.E2M1_MAX * bound
            scales = self._four_over_six(x, amax, largest, encode, decode, tile, along, aimed, four_over_six)
        return self.apply(x, scales, tile, "e2m1", words, noise_bits, dtype or x.dtype)

    def _four_over_six(
        self,
        x: Tensor,
        amax: Tensor,
        largest: Tensor,
        encode: Tensor,
        decode: Tensor,
        tile: tuple[int, int],
        along: int,
        aimed: float,
        measure: str,
    ) -> tuple[Tensor, Tensor]:
        """As `stages.nvfp4_scales`, of the better candidate of each tile."""
        to_six, to_four, *multipliers = self.run(over.candidates, largest, encode, decode)
        lines, other, lanes = (x.view(-1) if along == 1 else x), 1 - along, tile[along]
        errors = []
        for scale, multiplier in zip((to_six, to_four), multipliers, strict=True):
            spread = [t.repeat_interleave(tile[other], other) if tile[other] > 1 else t for t in (scale, multiplier)]
            shape = spread[0].shape  # one entry per line
            per_line = [*spread, amax if amax.dim() == 0 else amax.expand(shape)]
            flat = [(t.reshape(-1, 1) if along == 1 else t[:, None]) if t.dim() else t for t in per_line]
            error = self.run(over.errors, lines, *flat, aimed, measure, lanes)
            sums = self.run(over.sum_along_lines, error, lanes).view(shape)
            errors.append(over.sum_of_lines(sums.unflatten(other, (-1, tile[other])), other + 1).squeeze(other + 1))
        better = errors[1] < errors[0]
        return torch.where(better, to_four, to_six), torch.where(better, multipliers[1], multipliers[0])

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
        scales = self.run(stages.power_scales, largest, element_max)
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
