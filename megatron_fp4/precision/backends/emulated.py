"""The emulated backend: the operands that an FP4 tensor core would multiply, on any device.

One idea: an operand is kept as `code * block_scale` without the global scale, which BF16 (and FP32) hold exactly; a
BF16 GEMM with FP32 accumulation multiplies them, and the product of the two global scales is applied in FP32 before the
one rounding to the output type. Codes are never made (the `reference` backend makes them).

Copies stay in the layout of their source: a copy that is contracted along the rows is used as a transposed view.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.numerics.fused import Passes
from megatron_fp4.numerics.stages import BlockScales, Noise
from megatron_fp4.precision.backends import (
    Copy,
    NonFiniteWatch,
    Prepared,
    Source,
    check_shape,
    noise_key,
    reduce_and_check,
    scale_bound,
    signs_for,
)
from megatron_fp4.precision.backends.product import GlobalScale, scaled_matmul, widens
from megatron_fp4.precision.operand import AmaxScope, Format, FourOverSix, Operand, Rounding


@dataclass(frozen=True, eq=False)
class _Ready:
    """tensors = (values,) or (values, amax): the operand is values (or values.T), scaled by amax / divisor."""

    along: int
    divisor: float = 1.0


@dataclass(frozen=True, eq=False)
class _Deferred:
    """tensors = (x, amax): the operand is still to be made."""

    source: Source
    copy: Copy


def compile_obstacle(torch_path: str = torch.__file__) -> str:
    """Why torch.compile cannot work on this machine's CPU; empty if it can. The eager kernels give the same bits."""
    if any(character.isspace() for character in torch_path):
        return f"torch lies under a path with a space ({torch_path}), which it does not quote for the compiler"
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "there is no C++ compiler (g++ or clang++) on PATH"
    return ""


class _Blocks(NamedTuple):
    """A tensor as its copy sees it, transformed where the copy asks for it, with max |x| of each tile."""

    x: Tensor
    maxima: Tensor


class EmulatedBackend:
    """Quantize-dequantize in a few fused passes, and GEMMs in the compute dtype.

    compile: fuse the passes with torch.compile (needs a C++ compiler on CPUs); results are equal, bit for bit.
    """

    def __init__(self, compile: bool = False, watch: NonFiniteWatch | None = None) -> None:
        self.passes = Passes(compile)
        self._watch = watch

    def quantize(self, x: Tensor, source: Source, copies: Sequence[Copy]) -> tuple[Prepared, ...]:
        """See `Backend.quantize`. A deferred copy keeps (x, amax); the others hold values of x's shape and dtype."""
        for copy in copies:
            check_shape(x, source, copy)
        scaled = [copy for copy in copies if copy.operand.quantized]
        blocks: dict[Copy, _Blocks] = {}
        local = []
        for copy in scaled:
            measured = self._blocks(x, source, copy)
            local.append(self._amax(measured, copy))
            if not copy.deferred:
                blocks[copy] = measured
        amaxes = dict(zip(scaled, reduce_and_check(local, source, scaled, self._watch), strict=True))
        values: dict[Operand, Tensor] = {}
        prepared = []
        for copy in copies:
            operand = copy.operand
            if not operand.quantized:
                prepared.append(Prepared((x,), _Ready(copy.along)))
            elif copy.deferred:
                prepared.append(Prepared((x, amaxes[copy]), _Deferred(source, copy)))
            else:
                if (
                    operand not in values or not operand.transposes
                ):  # the codes of the transpose are the transposed ones
                    values[operand] = self._values(blocks[copy], amaxes[copy], source, copy, x.dtype)
                prepared.append(_ready(values[operand], amaxes[copy], copy))
        return tuple(prepared)

    def matmul(
        self, a: Prepared, b: Prepared, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        # operands that are still to be made are made in the type in which they will be multiplied
        wide = widens(a.tensors[0].device, out_dtype)
        left, left_scale = self._operand(a, torch.float32 if wide else a.tensors[0].dtype)
        right, right_scale = self._operand(b, torch.float32 if wide else b.tensors[0].dtype)
        return scaled_matmul(
            left,
            right,
            a_scale=left_scale,
            b_scale=right_scale,
            out_dtype=out_dtype,
            accumulate_into=accumulate_into,
        )

    def _blocks(self, x: Tensor, source: Source, copy: Copy) -> _Blocks:
        size = copy.operand.rht_size
        if size:
            x = self.passes.hadamard(x, size, signs_for(source, copy.operand, x.device), copy.along)
        return _Blocks(x, self.passes.block_maxima(x, _storage_tile(copy)))

    def _amax(self, blocks: _Blocks, copy: Copy) -> Tensor:
        """The local amax of a copy, an FP32 scalar or one per row of the operand."""
        if copy.operand.amax_scope is AmaxScope.row:
            return blocks.maxima.amax(copy.along, keepdim=True).to(torch.float32)
        return self.passes.amax(blocks.maxima)

    def _values(self, blocks: _Blocks, amax: Tensor, source: Source, copy: Copy, dtype: torch.dtype) -> Tensor:
        """code * block_scale in x's shape."""
        operand = copy.operand
        noise = None
        if operand.stochastic:
            noise = Noise.at(noise_key(source, copy), source.rows, source.cols, operand.noise_bits)
        element = "e2m1" if operand.format in (Format.nvfp4, Format.mxfp4) else "e4m3"
        scales = self._scales(blocks, amax, copy, element)
        return self.passes.rounded(
            blocks.x, scales, tile=_storage_tile(copy), element=element, noise=noise, dtype=dtype
        )

    def _scales(self, blocks: _Blocks, amax: Tensor, copy: Copy, element: str) -> BlockScales:
        operand = copy.operand
        if operand.format is not Format.nvfp4:
            return self.passes.power_of_two_scales(blocks.maxima, element)
        if operand.four_over_six is FourOverSix.off:
            return self.passes.two_level_scales(
                blocks.maxima,
                amax,
                scale_order=operand.scale_order.name,
                headroom=operand.rounding is Rounding.sr_headroom,
                bound=scale_bound(operand),
            )
        return self.passes.four_over_six_scales(
            *blocks,
            amax,
            tile=_storage_tile(copy),
            along=copy.along,
            bound=scale_bound(operand),
            measure=operand.four_over_six.name,
        )

    def _operand(self, prepared: Prepared, dtype: torch.dtype) -> tuple[Tensor, GlobalScale | None]:
        """The operand as `[M, K]`, and its global scale."""
        meaning = prepared.meaning
        if isinstance(meaning, _Deferred):
            x, amax = prepared.tensors
            values = self._values(
                self._blocks(x, meaning.source, meaning.copy), amax, meaning.source, meaning.copy, dtype
            )
            prepared = _ready(values, amax, meaning.copy)
        values, *amaxes = prepared.tensors
        scale = GlobalScale(amaxes[0], prepared.meaning.divisor) if amaxes else None
        return (values if prepared.meaning.along == 1 else values.T), scale


def _storage_tile(copy: Copy) -> tuple[int, int]:
    assert copy.operand.tile is not None
    rows, cols = copy.operand.tile
    return (rows, cols) if copy.along == 1 else (cols, rows)


def _ready(values: Tensor, amax: Tensor, copy: Copy) -> Prepared:
    if copy.operand.format is not Format.nvfp4:  # the other formats have no global scale
        return Prepared((values,), _Ready(copy.along))
    return Prepared((values, amax), _Ready(copy.along, 6.0 * scale_bound(copy.operand)))
