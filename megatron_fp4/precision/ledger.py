"""The GEMM ledger: what was really multiplied, against what the precision table says.

A backend that wraps another one sees every GEMM of every linear, because there is no other way to a GEMM. It
tags each operand with the linear and the copy it was made for, and counts the products. A projection that is handed to
a fused kernel, a stale cached weight or a precision that was not assigned then shows as a missing or an unexpected
line. It changes no number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand, WrappedOperand
from megatron_fp4.precision.grouped.protocol import Pairs, matmul_segments, quantize_segments
from megatron_fp4.precision.grouped.segments import Segments
from megatron_fp4.precision.operand import Operand
from megatron_fp4.precision.spec import LinearPrecision, operands_text


class Product(NamedTuple):
    """One kind of GEMM of one linear."""

    name: str
    gemm: str
    tensors: tuple[str, str]
    """What was multiplied, such as ("x", "w")."""
    operands: tuple[Operand, Operand]
    """How each of them was quantized."""

    def __str__(self) -> str:
        return f"{self.name} {self.gemm} {operands_text(self.tensors, self.operands)}"


class GemmMismatch(RuntimeError):
    """The GEMMs that were executed are not those of the precision table."""


@dataclass(frozen=True, eq=False)
class _Tagged(WrappedOperand):
    """An operand that passed through the ledger."""

    name: str
    tensor: str
    copy: Copy


class GemmLedger:
    """A `Backend` that counts the products of the backend `inner` while `recording`."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.recording = False
        self._counts: Counter[Product] = Counter()

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`."""
        return _tagged(self.inner.quantize(x, origin, copies), origin, copies)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        left, right = self._counted(a, b)
        return self.inner.matmul(left, right, out_dtype=out_dtype, accumulate_into=accumulate_into)

    def quantize_segments(
        self, x: Tensor, origin: OperandOrigin, segments: Segments, first_expert: int, copies: Sequence[Copy]
    ) -> tuple[QuantizedOperand, ...]:
        """See `SegmentBackend`."""
        operands = quantize_segments(self.inner, x, origin, segments, first_expert, copies)
        return _tagged(operands, origin, copies)

    def matmul_segments(
        self,
        a: QuantizedOperand,
        b: QuantizedOperand,
        pairs: Pairs,
        *,
        out_dtype: torch.dtype,
        accumulate_into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """See `SegmentBackend`. One GEMM of the linear, however many experts have rows, and if none has."""
        left, right = self._counted(a, b)
        return matmul_segments(self.inner, left, right, pairs, out_dtype=out_dtype, accumulate_into=accumulate_into)

    def _counted(self, a: QuantizedOperand, b: QuantizedOperand) -> tuple[QuantizedOperand, QuantizedOperand]:
        """The operands of the wrapped backend."""
        assert isinstance(a, _Tagged), "an operand that another backend made"
        assert isinstance(b, _Tagged), "an operand that another backend made"
        if self.recording:
            name, gemm = _joined(a.name, b.name), _joined(a.copy.gemm, b.copy.gemm)
            self._counts[Product(name, gemm, (a.tensor, b.tensor), (a.copy.operand, b.copy.operand))] += 1
        return a.inner, b.inner

    def take(self) -> Counter[Product]:
        """What was counted since the last call."""
        counts, self._counts = self._counts, Counter()
        return counts


def _tagged(
    operands: Sequence[QuantizedOperand], origin: OperandOrigin, copies: Sequence[Copy]
) -> tuple[QuantizedOperand, ...]:
    return tuple(
        _Tagged(operand.tensors, operand, origin.name, origin.operand, copy)
        for operand, copy in zip(operands, copies, strict=True)
    )


def expected_products(name: str, precision: LinearPrecision) -> list[Product]:
    """The three GEMMs of a linear: each happens once per microbatch and use of the linear."""
    return [Product(name, gemm.name, gemm.tensors, gemm.operands) for gemm in precision.gemms]


def differences(
    counts: Counter[Product],
    precisions: dict[str, LinearPrecision],
    *,
    num_microbatches: int,
    recomputed: Iterable[str] = (),
    uses: Mapping[str, int] | None = None,
) -> list[str]:
    """One line per GEMM that was executed too often, too rarely, or in a format that the table does not give.

    precisions: the linears on this rank and what the table gives them. recomputed: the linears whose forward pass
    activation recomputation may repeat. uses: of those that a microbatch passes not once.
    """
    repeated = set(recomputed)
    lines = []
    unexpected = Counter(counts)
    for name, precision in precisions.items():
        for product in expected_products(name, precision):
            executed = unexpected.pop(product, 0)
            least = num_microbatches * (uses or {}).get(name, 1)
            most = least * (2 if product.gemm == "fprop" and name in repeated else 1)
            if not least <= executed <= most:
                lines.append(f"{product}: executed {executed} times for {num_microbatches} microbatches")
    lines += [f"{product}: executed {count} times, not in the table" for product, count in unexpected.items()]
    return lines


def _joined(a: str, b: str) -> str:
    """One name, or both where a GEMM mixes operands of two linears or two GEMMs."""
    return a if a == b else f"{a} with {b}"
