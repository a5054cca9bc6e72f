"""Explicit zero padding of a linear whose shapes the tiles do not divide (`pad: true` on its GEMMs).

Tensors are padded before the wrapped backend sees them and its results are cut, so a padded linear computes, bit for
bit, what the same linear with zeros written into larger tensors computes. Zeros raise no amax, quantize to zero and add
nothing to a product. Only in a group of the Hadamard transform that is part padding do they take part in the rounding,
with noise of addresses that no element of the tensor has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand, WrappedOperand
from megatron_fp4.precision.spec import TENSOR_DIMS

Padding = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class _PaddedOperand(WrappedOperand):
    """size: M of the operand `[M, K]` without padding. extended: whether M has any."""

    size: int
    extended: bool


@dataclass(frozen=True)
class PaddedBackend:
    """A `Backend` that extends T, N and K to multiples of `padding` for `inner`. Equal where both of these are."""

    inner: Backend
    padding: Padding

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`."""
        multiples = dict(zip("TNK", self.padding, strict=True))
        rows, cols = (multiples[dim] for dim in TENSOR_DIMS[origin.operand])
        larger = padded(x, rows, cols)
        place = replace(origin, rows=padded_index(origin.rows, rows), cols=padded_index(origin.cols, cols))
        operands = self.inner.quantize(larger, place, copies)
        sizes = [(x.shape[1 - copy.along], larger.shape[1 - copy.along]) for copy in copies]
        return tuple(
            _PaddedOperand(operand.tensors, operand, size, size < padded_size)
            for operand, (size, padded_size) in zip(operands, sizes, strict=True)
        )

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`. Where the result is cut, a sum is a pass of its own."""
        assert isinstance(a, _PaddedOperand)
        assert isinstance(b, _PaddedOperand)
        if not a.extended and not b.extended:
            return self.inner.matmul(a.inner, b.inner, out_dtype=out_dtype, accumulate_into=accumulate_into)
        out = self.inner.matmul(a.inner, b.inner, out_dtype=out_dtype)[: a.size, : b.size]
        return out.contiguous() if accumulate_into is None else accumulate_into.add_(out)


def with_padding(backend: Backend, padding: Padding) -> Backend:
    """`backend`, wrapped where any of the multiples of (T, N, K) is above 1."""
    return backend if padding == (1, 1, 1) else PaddedBackend(backend, padding)


def padded(x: Tensor, rows: int, cols: int) -> Tensor:
    """`x [R, C]` with zeros at both ends, up to multiples of `rows` and `cols`; x itself where it fits."""
    below, right = -x.shape[0] % rows, -x.shape[1] % cols
    return F.pad(x, (0, right, 0, below)) if below or right else x


def padded_index(index: Tensor, multiple: int) -> Tensor:
    """Global indices, int64, with negative ones for the padding: others for each last index, so for each microbatch."""
    count = -len(index) % multiple
    if not count:
        return index
    return torch.cat([index, -1 - index[-1] * multiple - torch.arange(count, device=index.device)])
