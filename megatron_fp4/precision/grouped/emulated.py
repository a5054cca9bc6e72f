"""All segments of a tensor in the passes that one tensor takes: the emulated backend for experts.

Segments are multiples of the tiles, so a pass over all of them cuts none; only the amax is one per segment, and goes
into the scales as one per row of tiles. Products stay one per segment, of the same shape wherever the expert lives, so
that not even the order of a sum differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.numerics.stages import power_of_two_amax
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from megatron_fp4.precision.backends.finite import check_finite_segments
from megatron_fp4.precision.backends.product import GlobalScale, scaled_matmul, widens
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin, QuantizedOperand, check_shape
from megatron_fp4.precision.grouped.protocol import GroupedOperand, Pairs, part_origin
from megatron_fp4.precision.grouped.segments import Segments
from megatron_fp4.precision.operand import AmaxRounding, AmaxScope, Format


class _Part(NamedTuple):
    """The operand `[M, K]` of one segment, and its global scale."""

    values: Tensor
    scale: GlobalScale | None


@dataclass(frozen=True, eq=False)
class _SegmentValues(QuantizedOperand):
    """tensors = (values of all segments,) or (values, amaxes): see `_AmaxesOfSegments`."""

    copy: Copy
    segments: Segments

    def part(self, index: int) -> _Part:
        """The operand of one segment."""
        rows, operand = self.segments.parts[index].rows, self.copy.operand
        values, *amaxes = self.tensors
        values = values[rows]
        scale = None
        if amaxes and operand.format is Format.nvfp4 and operand.amax_scope is not AmaxScope.group128:
            per_row = operand.amax_scope is AmaxScope.row and self.copy.along == 1
            scale = GlobalScale(amaxes[0][rows] if per_row else amaxes[0][index], 6.0 * operand.scale_bound)
        return _Part(values if self.copy.along == 1 else values.T, scale)


@dataclass(frozen=True, eq=False)
class _SegmentsToMake(QuantizedOperand):
    """tensors = (x, amaxes): the operands are still to be made."""

    copy: Copy
    segments: Segments
    origin: OperandOrigin


class SegmentedEmulatedBackend(EmulatedBackend):
    """The emulated backend with a faster way for experts. Results equal those of a loop, bit for bit."""

    def quantize_segments(
        self, x: Tensor, origin: OperandOrigin, segments: Segments, first_expert: int, copies: Sequence[Copy]
    ) -> tuple[QuantizedOperand, ...]:
        """See `grouped.protocol.quantize_segments`."""
        if not segments.parts:
            return tuple(GroupedOperand.of([]) for _ in copies)
        origins = [part_origin(origin, part.rows, first_expert + part.expert) for part in segments.parts]
        for copy in copies:
            check_shape(x[segments.parts[0].rows], origins[0], copy)
        operands: list[QuantizedOperand] = []
        values: dict[object, Tensor] = {}
        largest = []
        for copy in copies:
            if not copy.operand.quantized:
                operands.append(_SegmentValues((self._transformed(x, origin, copy),), copy, segments))
                continue
            blocks = self._blocks(x, origin, copy)
            measured = _Amaxes.of(blocks.maxima, segments, copy)
            if copy.operand.amax_scope is AmaxScope.group128:
                measured = _Amaxes(measured.whole, self._amax(blocks, copy))
            amaxes = measured.scales
            if copy.operand.amax_rounding is AmaxRounding.power_of_two:
                amaxes = power_of_two_amax(amaxes, 6.0 * copy.operand.scale_bound)
            largest.append(measured.whole)
            if copy.deferred:
                operands.append(_SegmentsToMake((x, amaxes), copy, segments, origin))
                continue
            if not (copy.operand.transposes and copy.operand in values):  # else one copy serves both directions
                spread = _spread(amaxes, segments, copy)
                values[copy.operand] = self._values(blocks, spread, origin, copy, x.dtype)
            operands.append(_SegmentValues((values[copy.operand], amaxes), copy, segments))
        check_finite_segments(largest, origins, self._watch)
        return tuple(operands)

    def matmul_segments(
        self,
        a: QuantizedOperand,
        b: QuantizedOperand,
        pairs: Pairs,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """See `grouped.protocol.matmul_segments`."""
        if not pairs:
            return []
        left, right = self._complete(a, out_dtype), self._complete(b, out_dtype)
        products = []
        for i, (first, second) in enumerate(pairs):
            one, other = left.part(first), right.part(second)
            products.append(
                scaled_matmul(
                    one.values,
                    other.values,
                    a_scale=one.scale,
                    b_scale=other.scale,
                    out_dtype=out_dtype,
                    accumulate_into=accumulate_into[i] if accumulate_into else None,
                )
            )
        return products

    def _complete(self, operand: QuantizedOperand, out_dtype: torch.dtype) -> _SegmentValues:
        """Operands that are still to be made are made in the type in which they will be multiplied."""
        if isinstance(operand, _SegmentsToMake):
            x, amaxes = operand.tensors
            copy, segments = operand.copy, operand.segments
            dtype = torch.float32 if widens(x.device, out_dtype) else x.dtype
            blocks = self._blocks(x, operand.origin, copy)
            values = self._values(blocks, _spread(amaxes, segments, copy), operand.origin, copy, dtype)
            return _SegmentValues((values, amaxes), copy, segments)
        assert isinstance(operand, _SegmentValues)
        return operand


@dataclass(frozen=True, eq=False)
class _Amaxes:
    """FP32 amaxes of the segments of one copy. whole: `[S]`. scales: those that go into the scales, `[S]` too, or with
    amax_scope=row one per row of the operand, `[P, 1]` or `[S, C]`, with group128 one per group."""

    whole: Tensor
    scales: Tensor

    @staticmethod
    def of(maxima: Tensor, segments: Segments, copy: Copy) -> _Amaxes:
        """maxima: of the blocks, `[P/r, C/c]`."""
        owners = segments.owners(maxima.device, copy.stored_tile[0])
        lines = maxima.amax(1).float()
        whole = lines.new_zeros(len(segments.parts)).scatter_reduce_(0, owners, lines, "amax")
        if copy.operand.amax_scope is not AmaxScope.row:
            return _Amaxes(whole, whole)
        if copy.along == 1:
            return _Amaxes(whole, lines[:, None])
        empty = whole.new_zeros(len(whole), maxima.shape[1])
        return _Amaxes(whole, empty.scatter_reduce_(0, owners[:, None].expand_as(maxima), maxima.float(), "amax"))


def _spread(amaxes: Tensor, segments: Segments, copy: Copy) -> Tensor:
    """The amax of each row of blocks, `[P/r, 1]`; of each block, `[P/r, C]`, where columns have their own."""
    if copy.operand.amax_scope is AmaxScope.group128 or (copy.operand.amax_scope is AmaxScope.row and copy.along == 1):
        return amaxes
    spread = amaxes[segments.owners(amaxes.device, copy.stored_tile[0])]
    return spread[:, None] if spread.dim() == 1 else spread
