"""Operands without the mean of their columns (`center: true`): most of an activation's outliers are one row, its mean.

x `[T, K]` is quantized as x - 1 m^T, and the product gets what is missing, of rank one, in high precision:

    Fprop   y  = Q(x - 1 m^T) w^T + 1 (w m)^T             w as it is quantized
    Wgrad   dw = dy^T Q(x - 1 m^T) + (dy^T 1) m^T         dy as it is quantized

with the Hadamard transform of the GEMM, if there is one, of both parts. So nothing but the rounding of x - m is lost,
and without any rounding the product is x w^T. (arXiv 2603.10444)

m is the mean over all tokens of a microbatch, whatever ranks hold them; in a linear of experts over the rows of a
segment. It is summed in FP64 and rounded once to x's type, so that no order of the sum shows in it. Rows that extend a
tensor, which have negative addresses, take no part and stay zero.

This wraps another backend, which sees operands that need no such care. Of a copy that waits for the backward pass x and
m are kept, not their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.backends.randomness import signs_for, with_signs
from megatron_fp4.precision.operand import Operand


@dataclass(frozen=True, eq=False)
class CentredOperand(QuantizedOperand):
    """tensors: those of `inner`, x in place of the difference, and m. at: where x stands."""

    inner: QuantizedOperand
    origin: OperandOrigin
    copy: Copy
    at: frozenset[int]

    def opened(self) -> QuantizedOperand:
        """The operand of the wrapped backend."""
        *kept, mean = self.tensors
        difference = [without_mean(kept[0], mean, self.origin)] if self.at else []
        tensors = [difference[0] if place in self.at else tensor for place, tensor in enumerate(kept)]
        return self.inner.with_tensors(tensors)

    def rank_one(self) -> tuple[Tensor, Tensor]:
        """(left `[M]`, right `[K]`): what the operand `[M, K]` lacks is their outer product, FP32."""
        rows, mean = _real_rows(self.origin).float(), self.tensors[-1].float()
        left, right = (rows, mean) if self.copy.along == 1 else (mean, rows)
        if self.copy.operand.rht_size:
            line = right[None] if self.copy.along == 1 else right[:, None]
            signs = signs_for(self.origin, self.copy.operand, line.device)
            line = with_signs(line, self.origin, self.copy)
            right = hadamard(line, self.copy.operand.rht_size, signs, self.copy.along).flatten()
        return left, right


@dataclass(frozen=True)
class CentredBackend:
    """A `Backend` that takes the mean off the operands that say so. Equal where the wrapped ones are."""

    inner: Backend

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`. One more collective, of the columns' sums, where other ranks hold other tokens."""
        centred = [copy for copy in copies if copy.operand.center]
        others = [copy for copy in copies if not copy.operand.center]
        operands = dict(zip(others, self.inner.quantize(x, origin, others), strict=True)) if others else {}
        if centred:
            mean = mean_of_tokens(x, origin)
            difference = without_mean(x, mean, origin)
            inner_copies = [replace(copy, operand=replace(copy.operand, center=False)) for copy in centred]
            for copy, inner in zip(centred, self.inner.quantize(difference, origin, inner_copies), strict=True):
                at = frozenset(place for place, tensor in enumerate(inner.tensors) if tensor is difference)
                kept = tuple(x if place in at else tensor for place, tensor in enumerate(inner.tensors))
                operands[copy] = CentredOperand((*kept, mean), inner.with_tensors(()), origin, copy, at)
        return tuple(operands[copy] for copy in copies)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`. The two parts are added in FP32 (FP64 in the proof mode), and rounded once."""
        if not isinstance(a, CentredOperand) and not isinstance(b, CentredOperand):
            return self.inner.matmul(a, b, out_dtype=out_dtype, accumulate_into=accumulate_into)
        wide = torch.float64 if out_dtype == torch.float64 else torch.float32
        first, second = (one.opened() if isinstance(one, CentredOperand) else one for one in (a, b))
        out = self.inner.matmul(first, second, out_dtype=wide)
        if isinstance(a, CentredOperand):
            left, right = a.rank_one()
            out.addcmul_(left.to(wide)[:, None], self.inner.matmul(self._line(right, a), second, out_dtype=wide))
        if isinstance(b, CentredOperand):
            left, right = b.rank_one()
            out.addcmul_(self.inner.matmul(first, self._line(right, b), out_dtype=wide), left.to(wide)[None])
        out = out.to(out_dtype)
        return out if accumulate_into is None else accumulate_into.add_(out)

    def _line(self, right: Tensor, of: CentredOperand) -> QuantizedOperand:
        """`[1, K]` in high precision, for the wrapped backend."""
        return self.inner.quantize(right[None], of.origin, [Copy(of.copy.gemm, Operand(), 1)])[0]


def _real_rows(origin: OperandOrigin) -> Tensor:
    return origin.rows >= 0


def mean_of_tokens(x: Tensor, origin: OperandOrigin) -> Tensor:
    """m `[C]` in x's type, over the rows `[R]` of x and those that other ranks hold; zero where there are none."""
    count = _real_rows(origin).sum(dtype=torch.float64)
    sums = torch.cat([x.sum(0, dtype=torch.float64), count[None]])  # the other rows are zero
    if origin.tokens is not None:
        sums = all_reduce_sum(sums, origin.tokens)
    return (sums[:-1] / sums[-1].clamp(min=1.0)).to(x.dtype)


def as_quantized(x: Tensor, origin: OperandOrigin, operand: Operand) -> tuple[Tensor, Operand]:
    """What a wrapped backend quantizes for `operand`, and how: where its mean is taken off, the difference."""
    if not operand.center:
        return x, operand
    return without_mean(x, mean_of_tokens(x, origin), origin), replace(operand, center=False)


def without_mean(x: Tensor, mean: Tensor, origin: OperandOrigin) -> Tensor:
    """x - m in real rows, in FP32 and rounded once to x's type; zeros in the others."""
    difference = (x.float() - mean.float()).to(x.dtype)
    return difference * _real_rows(origin)[:, None]
