"""Watching a run's operands: a backend that measures what passes through it.

The backend that it wraps gets the same calls as ever, so no number of a run changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.grouped.protocol import Pairs, matmul_segments, quantize_segments
from megatron_fp4.precision.grouped.segments import Segments
from megatron_fp4.precision.operand import Operand
from megatron_fp4.precision.statistics import AMAX, NUM_ELEMENTS, ZERO_SCALES, Report, stats_of, sums_of


class StatisticsProbe:
    """A `Backend` that measures the tensors which pass to the backend `inner`, while `recording`.

    What it measures stays on the device until `take`, which reads it back at once.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.recording = False
        self._measured: dict[str, tuple[Operand, Tensor]] = {}
        self._seen: set[tuple[str, str]] = set()

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`."""
        if self.recording:
            self._measure(x, origin, copies)
        return self.inner.quantize(x, origin, copies)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        return self.inner.matmul(a, b, out_dtype=out_dtype, accumulate_into=accumulate_into)

    def quantize_segments(
        self, x: Tensor, origin: OperandOrigin, segments: Segments, first_expert: int, copies: Sequence[Copy]
    ) -> tuple[QuantizedOperand, ...]:
        """See `SegmentBackend`. This rank's experts are measured as one tensor, with a scale each segment."""
        if self.recording and segments.parts:
            self._measure(x, origin, copies, segments)
        return quantize_segments(self.inner, x, origin, segments, first_expert, copies)

    def matmul_segments(
        self,
        a: QuantizedOperand,
        b: QuantizedOperand,
        pairs: Pairs,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """See `SegmentBackend`."""
        return matmul_segments(self.inner, a, b, pairs, out_dtype=out_dtype, accumulate_into=accumulate_into)

    @property
    def report(self) -> Report:
        """What was measured since the last `take`, without tensors with NaN or Inf: the run's own rule decides what
        happens to those. One read-back."""
        if not self._measured:
            return {}
        rows = torch.stack([sums for _, sums in self._measured.values()]).tolist()
        measured = zip(self._measured.items(), rows, strict=True)
        return {name: stats_of(sums, operand) for (name, (operand, _)), sums in measured if isfinite(sums[AMAX])}

    def take(self) -> Report:
        """`report`, and begin anew."""
        report = self.report
        self._measured, self._seen = {}, set()
        return report

    def _measure(
        self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy], segments: Segments | None = None
    ) -> None:
        if (origin.name, origin.operand) in self._seen:  # a later microbatch, or recomputation
            return
        self._seen.add((origin.name, origin.operand))
        known = set()
        for copy in copies:
            operand = copy.operand
            if not operand.quantized or (operand.transposes and operand in known):  # the same codes, transposed
                continue
            known.add(operand)
            if segments is None:
                sums = sums_of(x.detach(), operand, copy.along, origin.step, origin.amax)
            else:
                sums = _sums_of_segments(x.detach(), origin, segments, copy)
            self._measured[f"{origin.name}/{copy.gemm}.{origin.operand}"] = (operand, sums)


def _sums_of_segments(x: Tensor, origin: OperandOrigin, segments: Segments, copy: Copy) -> Tensor:
    """`sums_of` the rows of all segments, without the zeros that extend them, whose addresses are negative."""
    operand, (rows, columns) = copy.operand, copy.stored_tile
    group = operand.contraction_multiple if copy.along == 0 else rows
    total: Tensor | None = None
    for part in segments.parts:
        sums = sums_of(x[part.rows], operand, copy.along, origin.step)
        num_zeros = (origin.rows[part.rows] < 0).sum()
        sums[NUM_ELEMENTS] -= num_zeros * x.shape[1]
        sums[ZERO_SCALES] -= num_zeros // group * group * (x.shape[1] // columns) // rows
        total = (
            sums if total is None else torch.cat([torch.maximum(total, sums)[: AMAX + 1], (total + sums)[AMAX + 1 :]])
        )
    assert total is not None
    return total
