"""Watching a step's channels: which columns of the tensors around each GEMM have an element that is not zero.

A channel is a column of x, y, dy or dx, or a row or column of the weight. One that is live where it enters a GEMM and
dead where it leaves it has underflowed in there, whatever the format and whoever multiplied: nothing is quantized a
second time to know it. Masks of several microbatches, uses and recomputations are joined by "or", so they depend on
neither. Nothing is read back.

Not here: masks over ranks (train/telemetry/monitors/health.py), what they say of a weight gradient (origins.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand, WrappedOperand
from megatron_fp4.precision.grouped.protocol import Pairs, matmul_segments, part_origin, quantize_segments
from megatron_fp4.precision.grouped.segments import Segments
from megatron_fp4.precision.health.weights import ScaleFloors, tile_spread
from megatron_fp4.precision.operand import Format


class Channels(Enum):
    """Whose channels: a tensor on its way into a GEMM, unquantized, or what comes out of one."""

    x = "x"  # [K], into Fprop and Wgrad
    dy = "dy"  # [N], into Dgrad and Wgrad
    w_rows = "w_rows"  # [N], into Fprop
    w_columns = "w_columns"  # [K], into Dgrad
    y = "y"  # [N], out of Fprop
    dx = "dx"  # [K], out of Dgrad


SIDES = {
    Channels.x: "K",
    Channels.dy: "N",
    Channels.w_rows: "N",
    Channels.w_columns: "K",
    Channels.y: "N",
    Channels.dx: "K",
}
"""Whether there are as many as input features or as output features."""


@dataclass(eq=False)
class LiveChannels:
    """live: bool `[C]` of this rank. index: int64 `[C]`, their global numbers, negative for padding; None: of an
    expert, whose channels are all here, in order, with padding behind them."""

    live: Tensor
    index: Tensor | None


@dataclass(frozen=True, eq=False)
class _Named(WrappedOperand):
    """An operand that was made while the probe recorded. first_expert: global number of its first part; None: of no
    expert."""

    origin: OperandOrigin
    gemm: str
    first_expert: int | None = None


class ChannelProbe:
    """A `Backend` that watches what passes to the backend `inner`, while `recording`.

    live: by linear, kind and global number of the expert (None: no experts). spreads: of the quantized NVFP4 weights,
    by linear and expert, see `tile_spread`. floors: by linear and `GEMM.operand`, see `ScaleFloors.count`.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.recording = False
        self.live: dict[tuple[str, Channels, int | None], LiveChannels] = {}
        self.spreads: dict[tuple[str, int | None], Tensor] = {}
        self.floors: dict[tuple[str, str], Tensor] = {}
        self._scales = ScaleFloors()

    def begin(self) -> None:
        """Record from now on, and forget what was. Copies of weights that are kept must be made anew."""
        self.recording = True
        self.live, self.spreads = {}, {}
        self.floors = {}

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`."""
        operands = self.inner.quantize(x, origin, copies)
        if not self.recording:
            return operands
        self._enter(x.detach(), origin, copies)
        return _named(operands, origin, copies)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        out = self.inner.matmul(_bare(a), _bare(b), out_dtype=out_dtype, accumulate_into=accumulate_into)
        if self.recording and isinstance(b, _Named) and b.origin.operand == "w":
            self._leave(out, b, b.origin.expert)
        return out

    def quantize_segments(
        self, x: Tensor, origin: OperandOrigin, segments: Segments, first_expert: int, copies: Sequence[Copy]
    ) -> tuple[QuantizedOperand, ...]:
        """See `SegmentBackend`."""
        operands = quantize_segments(self.inner, x, origin, segments, first_expert, copies)
        if not self.recording:
            return operands
        for part in segments.parts:
            self._enter(x.detach()[part.rows], part_origin(origin, part.rows, first_expert + part.expert), copies)
        return _named(operands, origin, copies, first_expert)

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
        products = matmul_segments(
            self.inner, _bare(a), _bare(b), pairs, out_dtype=out_dtype, accumulate_into=accumulate_into
        )
        if self.recording and isinstance(b, _Named) and b.origin.operand == "w" and b.first_expert is not None:
            for (_, local), out in zip(pairs, products, strict=True):
                self._leave(out, b, b.first_expert + local)
        return products

    def _enter(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> None:
        """x `[R, C]` goes into the GEMMs of `copies`."""
        name, expert = origin.name, origin.expert
        if origin.operand == "w":
            self._add(name, Channels.w_rows, expert, _live(x, 1), origin.rows)
            self._add(name, Channels.w_columns, expert, _live(x, 0), origin.cols)
            if any(copy.operand.format is Format.nvfp4 for copy in copies):
                self.spreads[name, expert] = tile_spread(x)
        else:
            self._add(name, Channels(origin.operand), expert, _live(x, 0), origin.cols)
        for copy in copies:
            if copy.operand.format is Format.nvfp4:
                key = name, f"{copy.gemm}.{origin.operand}"
                counts = self._scales.count(x, origin, copy)
                self.floors[key] = self.floors[key] + counts if key in self.floors else counts

    def _leave(self, out: Tensor, weights: _Named, expert: int | None) -> None:
        """out `[T, C]` is y or dx of a linear."""
        origin = weights.origin
        kind, index = (Channels.y, origin.rows) if weights.gemm == "fprop" else (Channels.dx, origin.cols)
        self._add(origin.name, kind, expert, _live(out, 0), index)

    def _add(self, name: str, kind: Channels, expert: int | None, live: Tensor, index: Tensor) -> None:
        known = self.live.get((name, kind, expert))
        if known is None:
            self.live[name, kind, expert] = LiveChannels(live, index if expert is None else None)
        else:
            known.live |= live


def _live(x: Tensor, dim: int) -> Tensor:
    """Whether there is anything but zero along `dim`; NaN is something."""
    return (x != 0).any(dim)


def _named(
    operands: Sequence[QuantizedOperand], origin: OperandOrigin, copies: Sequence[Copy], first_expert: int | None = None
) -> tuple[QuantizedOperand, ...]:
    def names() -> Iterator[QuantizedOperand]:
        for operand, copy in zip(operands, copies, strict=True):
            yield _Named(operand.tensors, operand, origin, copy.gemm, first_expert)

    return tuple(names())


def _bare(operand: QuantizedOperand) -> QuantizedOperand:
    """The operand of the wrapped backend; one that was made while nothing was recorded is that already."""
    return operand.inner if isinstance(operand, _Named) else operand
