"""What autograd keeps of an input that was extended by zeros: the input itself, extended anew when it is used.

Kept with its zeros, it would be a tensor of its own: another copy of what a layer keeps anyway, and one that
`layers.recompute.recomputing` does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_fp4.precision.backends.protocol import QuantizedOperand

View = tuple[Sequence[int], Sequence[int], int]
"""Size, stride and offset in the extended tensor."""


@dataclass(frozen=True, eq=False)
class UnextendedOperand(QuantizedOperand):
    """tensors: x, then those of `operand` that are no part of the extended x. views: what the others are, None: these.
    extend: x -> the extended x."""

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
