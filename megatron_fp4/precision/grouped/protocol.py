"""Operands of many GEMMs at once: one part per segment, or per expert.

A backend needs nothing for it: by default each segment is a tensor of its own. One that has a faster way, or that must
see a grouped GEMM as one (the ledger), has two more methods, `SegmentBackend`. Results are equal, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.grouped.segments import Segments


@dataclass(frozen=True, eq=False)
class GroupedOperand(QuantizedOperand):
    """Operands of one backend, in the order of the segments. tensors: those of all parts, `counts` of each, one after
    the other."""

    parts: tuple[QuantizedOperand, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(parts: Sequence[QuantizedOperand]) -> GroupedOperand:
        tensors = tuple(tensor for part in parts for tensor in part.tensors)
        return GroupedOperand(tensors, tuple(parts), tuple(len(part.tensors) for part in parts))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """None while autograd keeps them, in the parts neither, and then again all."""
        rest = iter(tensors)
        parts = tuple(
            part.with_tensors(tuple(itertools.islice(rest, count)))
            for part, count in zip(self.parts, self.counts, strict=True)
        )
        return replace(self, tensors=tuple(tensors), parts=parts)


View = tuple[Sequence[int], Sequence[int], int]
"""Size, stride and offset in the extended tensor."""


@dataclass(frozen=True, eq=False)
class UnextendedOperand(QuantizedOperand):
    """An operand of an input that was extended by zeros, of which autograd keeps the input itself.

    Kept with its zeros, it would be a tensor of its own: another copy of what a layer keeps anyway, and one that
    `layers.recompute.recomputing` does not know. tensors: x, then those of `operand` that are no part of the extended
    x. views: what the others are, None: these. extend: x -> the extended x.
    """

    operand: QuantizedOperand
    views: tuple[View | None, ...]
    extend: Callable[[Tensor], Tensor]

    @staticmethod
    def of(
        operand: QuantizedOperand, x: Tensor, extended: Tensor, extend: Callable[[Tensor], Tensor]
    ) -> QuantizedOperand:
        """The operand itself where it holds no part of `extended`, or this is x."""
        memory = extended.untyped_storage()._cdata
        inside = [tensor.untyped_storage()._cdata == memory for tensor in operand.tensors]
        if x.untyped_storage()._cdata == memory or not any(inside):
            return operand
        views = tuple(
            (tensor.shape, tensor.stride(), int(tensor.storage_offset())) if within else None
            for tensor, within in zip(operand.tensors, inside, strict=True)
        )
        others = [tensor for tensor, within in zip(operand.tensors, inside, strict=True) if not within]
        return UnextendedOperand((x, *others), operand.with_tensors(()), views, extend)

    def whole(self) -> QuantizedOperand:
        """The operand as it was."""
        x, *others = self.tensors
        extended, rest = self.extend(x), iter(others)
        return self.operand.with_tensors(
            [next(rest) if view is None else extended.as_strided(*view) for view in self.views]
        )


Pairs = Sequence[tuple[int, int]]
"""Which part of the first operand is multiplied by which part of the second."""


@runtime_checkable
class SegmentBackend(Protocol):
    """What a `Backend` may have besides."""

    def quantize_segments(
        self, x: Tensor, origin: OperandOrigin, segments: Segments, first_expert: int, copies: Sequence[Copy]
    ) -> tuple[QuantizedOperand, ...]:
        """See `quantize_segments`."""

    def matmul_segments(
        self,
        a: QuantizedOperand,
        b: QuantizedOperand,
        pairs: Pairs,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """See `matmul_segments`."""


def quantize_segments(
    backend: Backend,
    x: Tensor,
    origin: OperandOrigin,
    segments: Segments,
    first_expert: int,
    copies: Sequence[Copy],
) -> tuple[QuantizedOperand, ...]:
    """All asked copies of `x [R, C]`, each a grouped operand with one part per segment.

    segments: dense, and already extended to the tiles. origin: of all rows, their addresses with the expert in them.
    first_expert: global number of the local expert 0.
    """
    if isinstance(backend, SegmentBackend):
        return backend.quantize_segments(x, origin, segments, first_expert, copies)
    quantized = [
        backend.quantize(x[part.rows], part_origin(origin, part.rows, first_expert + part.expert), copies)
        for part in segments.parts
    ]
    return tuple(GroupedOperand.of([parts[i] for parts in quantized]) for i in range(len(copies)))


def least_rows(backend: Backend) -> int:
    """Multiple of rows that the kernels of a backend take, whatever watches it; 1 where the tiles alone decide."""
    while (inner := getattr(backend, "inner", None)) is not None:
        backend = inner
    rows: int = getattr(backend, "least_rows", 1)
    return rows


def part_origin(origin: OperandOrigin, rows: slice, expert: int) -> OperandOrigin:
    """The origin of one segment of a tensor."""
    return replace(origin, rows=origin.rows[rows], expert=expert)


def matmul_segments(
    backend: Backend,
    a: QuantizedOperand,
    b: QuantizedOperand,
    pairs: Pairs,
    *,
    out_dtype: torch.dtype,
    accumulate_into: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`Backend.matmul` of each pair of parts, in this order. accumulate_into: one tensor per pair; some may be one."""
    if isinstance(backend, SegmentBackend):
        return backend.matmul_segments(a, b, pairs, out_dtype=out_dtype, accumulate_into=accumulate_into)
    assert isinstance(a, GroupedOperand)
    assert isinstance(b, GroupedOperand)
    return [
        backend.matmul(
            a.parts[left],
            b.parts[right],
            out_dtype=out_dtype,
            accumulate_into=accumulate_into[i] if accumulate_into else None,
        )
        for i, (left, right) in enumerate(pairs)
    ]
