"""Quantize-dequantize in few passes: how the emulated backend makes an operand, on any device, eager or compiled.

The operand of an emulated GEMM is `code * block_scale` without the global scale, which BF16 holds exactly (at most 6
significant bits). Codes are never made. A tensor `x [R, C]` becomes one like this:

    hadamard        x                    -> x, transformed along the contraction (where the recipe asks for it)
    block_maxima    x                    -> max |x| of each tile `[R/r, C/c]`
    ..._scales      block maxima, amax   -> scale and multiplier of each tile
    rounded         x, scales, noise     -> code * scale, in x's shape

A tile is given in *storage* order (rows, columns of the tensor as it lies in memory), so a copy that is contracted
along its rows needs no transposition: its tiles are 16x1.

Not here: the arithmetic of a pass (`stages`, `four_over_six`, `eden`), and compiling it (`compiled`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.numerics import eden, rounding, stages
from megatron_fp4.numerics import four_over_six as over
from megatron_fp4.numerics.compiled import StageRunner
from megatron_fp4.numerics.hadamard import hadamard_lanes
from megatron_fp4.numerics.stages import BlockScales, Noise

Tile = tuple[int, int]


class Passes:
    """The passes over a tensor. compile: run each as a compiled kernel; results are equal, bit for bit."""

    def __init__(self, compile: bool) -> None:
        self._run = StageRunner(compile)

    def hadamard(self, x: Tensor, size: int, signs: Tensor | None, dim: int) -> Tensor:
        """See `hadamard.hadamard`."""
        signs = torch.ones(size, device=x.device) if signs is None else signs
        shape = (x.shape[0] // size, size, x.shape[1]) if dim == 0 else (x.numel() // size, size)
        return self._run(hadamard_lanes, grouped=x.view(shape), signs=signs, size=size).view(x.shape)

    def block_maxima(self, x: Tensor, tile: Tile) -> Tensor:
        """max |x| per tile, `[R/r, C/c]`, in x's dtype; NaN propagates."""
        rows, cols = x.shape[0] // tile[0], x.shape[1] // tile[1]
        maxima = x
        if tile[0] > 1:
            maxima = self._run(stages.max_of_column_lanes, x=x, lanes=tile[0])
        if tile[1] > 1:
            maxima = self._run(stages.max_of_row_lanes, x=maxima.view(-1), lanes=tile[1])
        return maxima.view(rows, cols)

    def amax(self, block_maxima: Tensor) -> Tensor:
        """The largest of the block maxima, an FP32 scalar; NaN propagates."""
        return self._run(stages.largest_of, block_maxima=block_maxima)

    def two_level_scales(
        self,
        block_maxima: Tensor,
        amax: Tensor,
        *,
        scale_order: str = "te",
        headroom: bool = False,
        bound: float = rounding.E4M3_MAX,
        least: float = 0.0,
    ) -> BlockScales:
        """E4M3 scales of NVFP4 below the FP32 scale that `amax` gives.

        amax: FP32, a scalar, or `[R, 1]` or `[1, C]` for one global scale per row of the operand, or one per block.
        scale_order: "te" or "paper". headroom: enlarge the block scales by 17/16. bound, least: the largest and the
        smallest block scale.
        """
        return self._run(
            stages.nvfp4_scales,
            largest=block_maxima,
            amax=_broadcastable(amax),
            aim=rounding.E2M1_MAX * bound,
            scale_order=scale_order,
            headroom=headroom,
            least=least,
        )

    def four_over_six_scales(
        self,
        x: Tensor,
        block_maxima: Tensor,
        amax: Tensor,
        *,
        tile: Tile,
        along: int,
        bound: float,
        measure: str,
        least: float = 0.0,
    ) -> BlockScales:
        """The scales of each tile that have the smaller error, of those that map its maximum to 6 and to 4.

        along: the dimension of x that is contracted. measure: "mae" or "mse".
        """
        aim = rounding.E2M1_MAX * bound
        to_six, to_four = self._run(
            over.candidates, largest=block_maxima, amax=_broadcastable(amax), aim=aim, least=least
        )
        error_of_six, error_of_four = (
            self._errors(x, scales, amax, tile=tile, along=along, aim=aim, measure=measure)
            for scales in (to_six, to_four)
        )
        better = error_of_four < error_of_six
        return BlockScales(
            torch.where(better, to_four.scale, to_six.scale), torch.where(better, to_four.multiplier, to_six.multiplier)
        )

    def _errors(
        self, x: Tensor, scales: BlockScales, amax: Tensor, *, tile: Tile, along: int, aim: float, measure: str
    ) -> Tensor:
        """Error per tile `[R/r, C/c]`, summed in Transformer Engine's order: along each line, then over the lines.

        A line is the part of a tile that is contracted together. aim: the value that the global scale maps amax to.
        """
        across = 1 - along
        lanes, lines = tile[along], tile[across]
        if lines > 1 and amax.dim() and amax.shape[across] > 1:  # one per row of tiles
            amax = amax.repeat_interleave(lines, across)
        scale, multiplier = (part if lines == 1 else part.repeat_interleave(lines, across) for part in scales)
        shape = scale.shape  # one entry per line

        def beside_lanes(part: Tensor) -> Tensor:
            return part.reshape(-1, 1) if along == 1 else part[:, None]

        error = self._run(
            over.errors,
            x=x.view(-1) if along == 1 else x,
            scale=beside_lanes(scale),
            multiplier=beside_lanes(multiplier),
            amax=amax if amax.dim() == 0 else beside_lanes(amax.expand(shape)),
            aim=aim,
            measure=measure,
            lanes=lanes,
        )
        per_line = self._run(over.sum_along_lines, error=error, lanes=lanes).view(shape)
        return over.sum_of_lines(per_line.unflatten(across, (-1, lines)), across + 1).squeeze(across + 1)

    def corrected_scales(self, x: Tensor, scales: BlockScales, words: Noise, *, along: int, group: int) -> BlockScales:
        """The scales by which nearest codes have no bias behind a random rotation (`eden`); multipliers stay.

        Blocks are of 16 elements along `along`, groups are `group` elements long. words: of the first element of each
        block.
        """
        lanes = 16
        multiplier = scales.multiplier.view(-1, 1) if along == 1 else scales.multiplier[:, None]
        lines = x.view(-1) if along == 1 else x
        terms = self._run(eden.terms, x=lines, multiplier=multiplier, lanes=lanes)
        sums = (self._run(over.sum_along_lines, error=part, lanes=lanes).view(scales.scale.shape) for part in terms)
        energy, product = (
            over.sum_of_lines(
                self._run(eden.weighted, total=part, scale=scales.scale).unflatten(along, (-1, group // lanes)),
                along + 1,
            ).squeeze(along + 1)
            for part in sums
        )
        factor = self._run(eden.correction, energy=energy, product=product).repeat_interleave(group // lanes, along)
        word = self._run(stages.random_words, row_a=words.row_a, row_b=words.row_b, column=words.column)
        return BlockScales(self._run(eden.round_scale, scale=scales.scale, factor=factor, word=word), scales.multiplier)

    def power_of_two_scales(self, block_maxima: Tensor, element: str) -> BlockScales:
        """Power-of-two scales (mxfp4, mxfp8, fp8_block), rounded up. element: "e2m1" or "e4m3"."""
        element_max = rounding.E2M1_MAX if element == "e2m1" else rounding.E4M3_MAX
        return self._run(stages.power_scales, largest=block_maxima, element_max=element_max)

    def noise(self, key: int, rows: Tensor, cols: Tensor, bits: int, *, centred: bool) -> Noise:
        """See `Noise.at`. A key differs from tensor to tensor and from step to step: a compiled kernel gets it as a
        tensor, which is filled on the device and not copied there."""
        argument = torch.full((), key, dtype=torch.int64, device=rows.device) if self._run.compiles else key
        words = self._run(stages.address_words, key=argument, rows=rows, cols=cols)
        return Noise(*words, bits, centred)

    def rounded(
        self,
        x: Tensor,
        scales: BlockScales,
        *,
        tile: Tile,
        element: str = "e2m1",
        noise: Noise | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """`code * scale` of every element, in x's shape; noise: for stochastic rounding, of e2m1 only.

        dtype: type of the result, by default x's; BF16 and FP32 hold it exactly.
        """
        dtype = dtype or x.dtype
        if tile[0] == 1:  # a block lies in one piece in memory
            lines, lanes = x.view(-1), tile[1]
            scale, multiplier = (part.view(-1, 1) for part in scales)
        else:  # a block spans rows; each of its columns is a block by itself, with the same scale
            lines, lanes = x, tile[0]
            wide = tile[1] > 1
            scale, multiplier = (part.repeat_interleave(tile[1], 1) if wide else part for part in scales)
            scale, multiplier = scale[:, None], multiplier[:, None]
        if element == "e4m3":
            result = self._run(stages.apply_e4m3, x=lines, scale=scale, multiplier=multiplier, lanes=lanes, dtype=dtype)
        elif noise is None:
            result = self._run(stages.apply_e2m1, x=lines, scale=scale, multiplier=multiplier, lanes=lanes, dtype=dtype)
        else:
            result = self._run(
                stages.apply_e2m1_stochastic,
                x=lines,
                scale=scale,
                multiplier=multiplier,
                noise=self._random(noise).view(lines.shape),
                noise_unit=2.0**-noise.bits,
                centred=noise.centred,
                lanes=lanes,
                dtype=dtype,
            )
        return result.view(x.shape)

    def _random(self, noise: Noise) -> Tensor:
        """The random integers of all elements, `[R, C]`."""
        words = stages.noise_bytes if noise.bits == 8 else stages.noise_words
        return self._run(words, row_a=noise.row_a, row_b=noise.row_b, column=noise.column)


def _broadcastable(amax: Tensor) -> Tensor:
    """`[1, 1]` instead of a scalar, so that one compiled kernel serves both kinds of global scale."""
    return amax.view(1, 1) if amax.dim() == 0 else amax
