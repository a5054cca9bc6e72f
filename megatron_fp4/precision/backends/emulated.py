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
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.numerics import fused, stages
from megatron_fp4.numerics.random import column_words, row_words
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
from megatron_fp4.precision.backends.product import Scale, scaled_matmul, widens
from megatron_fp4.precision.operand import AmaxScope, Format, Operand, Rounding


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


class EmulatedBackend:
    """Quantize-dequantize in a few fused passes, and GEMMs in the compute dtype.

    compile: fuse the passes with torch.compile (needs a C++ compiler on CPUs); results are equal, bit for bit.
    """

    def __init__(self, compile: bool = False, watch: NonFiniteWatch | None = None) -> None:
        self.kernels = fused.Kernels(compile)
        self._watch = watch

    def quantize(self, x: Tensor, source: Source, copies: Sequence[Copy]) -> tuple[Prepared, ...]:
        """See `Backend.quantize`. A deferred copy keeps (x, amax); the others hold values of x's shape and dtype."""
        for copy in copies:
            check_shape(x, source, copy)
        scaled = [copy for copy in copies if copy.operand.quantized]
        measured = [self._measure(x, source, copy) for copy in scaled]
        amaxes = reduce_and_check([amax for amax, _ in measured], source, scaled, self._watch)
        found = {copy: (amax, kept) for copy, amax, (_, kept) in zip(scaled, amaxes, measured, strict=True)}
        made: dict[Operand, Tensor] = {}
        prepared = []
        for copy in copies:
            if not copy.operand.quantized:
                prepared.append(Prepared((x,), _Ready(copy.along)))
                continue
            amax, kept = found[copy]
            if copy.deferred:
                prepared.append(Prepared((x, amax), _Deferred(source, copy)))
                continue
            values = made.get(copy.operand) if copy.operand.transposes else None
            if values is None:  # otherwise the transposed codes are the codes of the transpose
                values = made[copy.operand] = self._values(x, amax, source, copy, x.dtype, kept)
            prepared.append(_ready(values, amax, copy))
        return tuple(prepared)

    def matmul(
        self, a: Prepared, b: Prepared, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        # operands that are still to be made are made in the type in which they will be multiplied
        wide = widens(a.tensors[0].device, out_dtype)
        left, left_scale = self._operand(a, torch.float32 if wide else a.tensors[0].dtype)
        right, right_scale = self._operand(b, torch.float32 if wide else b.tensors[0].dtype)
        return scaled_matmul(left, right, left_scale, right_scale, out_dtype, accumulate_into)

    def _measure(self, x: Tensor, source: Source, copy: Copy) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The local amax of a copy, and (transformed x, block maxima) to go on with unless it is deferred."""
        x = self._transformed(x, source, copy)
        largest = self.kernels.block_amax(x, _storage_tile(copy))
        if copy.operand.amax_scope is AmaxScope.row:
            amax = largest.amax(copy.along, keepdim=True).to(torch.float32)
        else:
            amax = self.kernels.run(stages.largest_of, largest)
        return amax, None if copy.deferred else (x, largest)

    def _transformed(self, x: Tensor, source: Source, copy: Copy) -> Tensor:
        size = copy.operand.rht_size
        if size == 0:
            return x
        return self.kernels.hadamard(x, size, signs_for(source, copy.operand, x.device), copy.along)

    def _values(
        self,
        x: Tensor,
        amax: Tensor,
        source: Source,
        copy: Copy,
        dtype: torch.dtype,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """code * block_scale in x's shape. kept: what `_measure` has already made."""
        operand, tile = copy.operand, _storage_tile(copy)
        if kept is None:
            x = self._transformed(x, source, copy)
            kept = x, self.kernels.block_amax(x, tile)
        x, largest = kept
        words = None
        if operand.stochastic:
            key = noise_key(source, copy)
            words = (*row_words(key, source.rows), column_words(key, source.cols))
        common: dict[str, Any] = {"tile": tile, "largest": largest, "noise_bits": operand.noise_bits, "dtype": dtype}
        if operand.format is not Format.nvfp4:
            element = "e2m1" if operand.format is Format.mxfp4 else "e4m3"
            return self.kernels.power_of_two_operand(x, words, element=element, **common)
        return self.kernels.two_level_operand(
            x,
            amax,
            words,
            along=copy.along,
            scale_order=operand.scale_order.name,
            headroom=operand.rounding is Rounding.sr_headroom,
            four_over_six=operand.four_over_six.name,
            bound=scale_bound(operand),
            **common,
        )

    def _operand(self, prepared: Prepared, dtype: torch.dtype) -> tuple[Tensor, Scale | None]:
        """The operand as `[M, K]`, and its global scale."""
        meaning = prepared.meaning
        if isinstance(meaning, _Deferred):
            x, amax = prepared.tensors
            prepared = _ready(self._values(x, amax, meaning.source, meaning.copy, dtype), amax, meaning.copy)
        values, *amaxes = prepared.tensors
        scale = (amaxes[0], prepared.meaning.divisor) if amaxes else None
        return (values if prepared.meaning.along == 1 else values.T), scale


def _storage_tile(copy: Copy) -> tuple[int, int]:
    assert copy.operand.tile is not None
    rows, cols = copy.operand.tile
    return (rows, cols) if copy.along == 1 else (cols, rows)


def _ready(values: Tensor, amax: Tensor, copy: Copy) -> Prepared:
    if copy.operand.format is not Format.nvfp4:  # the other formats have no global scale
        return Prepared((values,), _Ready(copy.along))
    return Prepared((values, amax), _Ready(copy.along, 6.0 * scale_bound(copy.operand)))
