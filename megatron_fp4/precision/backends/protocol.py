"""What a backend is: two methods, `quantize` and `matmul`, and the values that go in and out of them.

The linear op decides *what* is multiplied (which tensor, in which copies, reduced over which ranks, with which noise
addresses); a backend decides *how* a number format is stored and multiplied. Between its two methods it hands out
operands of a class of its own, which only it can read.

Not here: which backend a run uses (`choose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.precision.operand import Operand
from megatron_fp4.precision.spec import LinearPrecision


@dataclass(frozen=True, eq=False)
class OperandOrigin:
    """A tensor `[R, C]` on its way to a GEMM, and its place in the logical tensor.

    name: logical name of the linear. operand: "x", "w" or "dy". rows, cols: int64 `[R]`, `[C]` global indices of its
    rows and columns (noise addresses; of an expert, see `randomness.expert_rows`). group: ranks that hold other parts.
    seed, step: of the noise. expert: global number of the one whose tensor it is; None: not of one expert. tokens:
    ranks that hold other rows of an activation; None: there are none. amax: FP32 scalar, for copies with
    amax_scope=static; None: not measured yet.
    """

    name: str
    operand: str
    rows: Tensor
    cols: Tensor
    group: Group
    seed: int
    step: int
    expert: int | None = None
    tokens: Group | None = None
    amax: Tensor | None = None

    @property
    def label(self) -> str:
        """The linear, and the expert if it is one's."""
        return self.name if self.expert is None else f"{self.name}, expert {self.expert}"

    @property
    def rank(self) -> int:
        """This rank, in the numbering of the whole run."""
        return self.group.ranks[self.group.rank]


@dataclass(frozen=True)
class Copy:
    """One quantized copy of a tensor: for which GEMM, how, and along which dimension it will be contracted.

    along: 1 if the columns of `[R, C]` are contracted, 0 if the rows are (the operand is then the transpose).
    deferred: its matmul comes much later (Wgrad of x); a backend may keep the tensor instead of the result.
    """

    gemm: str
    operand: Operand
    along: int
    deferred: bool = False

    @property
    def stored_tile(self) -> tuple[int, int]:
        """The tile of a quantized copy in the layout of its tensor (rows, columns)."""
        assert self.operand.tile is not None
        rows, cols = self.operand.tile
        return (rows, cols) if self.along == 1 else (cols, rows)


def copies_of(precision: LinearPrecision) -> dict[str, tuple[Copy, Copy]]:
    """The copies of x, w and dy that the linear op asks for."""
    fprop, dgrad, wgrad = precision.gemms
    return {
        "x": (Copy("fprop", fprop.x, along=1), Copy("wgrad", wgrad.x, along=0, deferred=True)),
        "w": (Copy("fprop", fprop.w, along=1), Copy("dgrad", dgrad.w, along=0)),
        "dy": (Copy("dgrad", dgrad.dy, along=1), Copy("wgrad", wgrad.dy, along=0, deferred=True)),
    }


@dataclass(frozen=True, eq=False)
class QuantizedOperand:
    """An operand of a GEMM as its backend holds it; each backend adds what it must know about the tensors.

    tensors: what is kept until the product, by autograd if that is in the backward pass.
    """

    tensors: tuple[Tensor, ...]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same operand with other tensors: none while autograd keeps them."""
        return replace(self, tensors=tuple(tensors))


@dataclass(frozen=True, eq=False)
class CodedOperand(QuantizedOperand):
    """An operand as codes and block scales, which can be read in one layout whatever its backend's own is."""

    def row_major(self) -> tuple[Tensor, ...]:
        """(codes, scales) or (codes, scales, amax) of the operand `[M, K]` as the `reference` backend has them."""
        return self.tensors


@dataclass(frozen=True, eq=False)
class WrappedOperand(QuantizedOperand):
    """An operand of a backend that wraps another one. inner: the other's operand; tensors: its tensors."""

    inner: QuantizedOperand

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        inner = self.inner.with_tensors(tensors)
        return replace(self, tensors=inner.tensors, inner=inner)


class Backend(Protocol):
    """How operands are made and multiplied. Stateless between calls, but for compiled kernels."""

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """All asked copies of `x [R, C]`, with one reduction of their amaxes over the origin's group.

        Raises ValueError if a dimension is not a multiple of the tile, NonFiniteError for NaN or Inf (unless a
        `NonFiniteWatch` was given to the backend; the results are then meaningless and the step must be discarded).
        """

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """`a [M, K] @ b [N, K].T`, accumulated in FP32, scaled in FP32, rounded once to `out_dtype`.

        accumulate_into: `[M, N]`, FP32 or wider, or BF16, to which the product is added in place, in FP32 and rounded
            once; it is then also the result.
        """


def check_shape(x: Tensor, origin: OperandOrigin, copy: Copy) -> None:
    """Raises ValueError, with the numbers, where a copy's tile or transform does not divide the tensor."""
    operand = copy.operand
    if not operand.quantized:
        return
    assert operand.tile is not None
    assert not operand.center, "the mean is taken off by backends.centred, around the backend"
    if not x.numel():
        raise ValueError(
            f"{origin.label}: operand {origin.operand} of {copy.gemm} has local shape {tuple(x.shape)}, which has no"
            " element, and so no largest one to scale by; leave the GEMM out for an empty microbatch"
        )
    contracted, other = x.shape[copy.along], x.shape[1 - copy.along]
    for size, multiple in ((contracted, operand.contraction_multiple), (other, operand.tile[0])):
        if size % multiple:
            raise ValueError(
                f"{origin.label}: operand {origin.operand} of {copy.gemm} has local shape {tuple(x.shape)}; its "
                f"dimension of {size} must be a multiple of {multiple} (tile {operand.tile[0]}x{operand.tile[1]}, "
                f"Hadamard size {operand.rht_size}, amax_scope {operand.amax_scope.name}); change the sizes or the "
                f"parallel layout, let the GEMM pad, or leave this linear in bf16"
            )


def narrow(x: Tensor) -> Tensor:
    """FP64 is the type of sums in FP32 compute (layers.layer_context.widen); the values themselves are FP32."""
    return x.float() if x.dtype == torch.float64 else x
