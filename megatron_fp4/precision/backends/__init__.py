"""What a backend is: two methods, `quantize` and `matmul`.

One idea: the linear op decides *what* is multiplied (which tensor, in which copies, reduced over which ranks, with
which noise addresses); a backend decides *how* a number format is stored and multiplied. A backend returns opaque
`Prepared` operands and is the only reader of them.

    reference            readable formulas, codes and scales really made; the oracle
    emulated             the same operands, vectorized or compiled, multiplied by a BF16 GEMM
    native_fp8           the same operands again, multiplied by a Hopper GPU's FP8 tensor cores
    transformer_engine   FP4 tensor cores
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_max
from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics.hadamard import fixed_signs, signs_from_key
from megatron_fp4.numerics.random import key_of
from megatron_fp4.precision.operand import AmaxScope, FourOverSix, Operand, Rounding, Signs
from megatron_fp4.precision.spec import LinearPrecision


class NonFiniteError(FloatingPointError):
    """A tensor with NaN or Inf reached a quantizer. `name`: the linear; `operand`: "x", "w" or "dy"."""

    def __init__(self, source: Source, amax: float) -> None:
        rank = source.group.ranks[source.group.rank]
        super().__init__(
            f"{source.name}: operand {source.operand} contains NaN or Inf (max |{source.operand}| = {amax}) at step "
            f"{source.step} on rank {rank}; it cannot be quantized"
        )
        self.name = source.name
        self.operand = source.operand


@dataclass(frozen=True)
class NonFiniteEvent:
    """A NaN or Inf that was met. rank: a rank of the group that held the tensor."""

    name: str
    operand: str
    step: int
    rank: int

    def __str__(self) -> str:
        return f"{self.name} ({self.operand}, rank {self.rank})"


class NonFiniteWatch:
    """Records NaN and Inf instead of raising, for a trainer that skips the step on all ranks.

    Nothing is read back from the device until `take`, once per step.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Source, Tensor]] = []

    def see(self, source: Source, largest: Tensor) -> None:
        """largest: max |x| over all copies, a scalar; NaN or Inf if any element is."""
        self._seen.append((source, largest))

    def take(self) -> list[NonFiniteEvent]:
        """Every event since the last call, in order, one per linear and operand."""
        seen, self._seen = self._seen, []
        if not seen:
            return []
        finite = torch.isfinite(torch.stack([largest for _, largest in seen])).tolist()
        events = [
            NonFiniteEvent(source.name, source.operand, source.step, source.group.ranks[source.group.rank])
            for (source, _), good in zip(seen, finite, strict=True)
            if not good
        ]
        return list(dict.fromkeys(events))


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor `[R, C]` on its way to a GEMM, and its place in the logical tensor.

    rows, cols: int64 global indices of its rows and columns (noise addresses). group: ranks that hold other parts.
    """

    name: str
    operand: str
    rows: Tensor
    cols: Tensor
    group: Group
    seed: int
    step: int


@dataclass(frozen=True)
class Copy:
    """One quantized copy of a source: for which GEMM, how, and along which dimension it will be contracted.

    along: 1 if the columns of `[R, C]` are contracted, 0 if the rows are (the operand is then the transpose).
    deferred: its matmul comes much later (Wgrad of x); a backend may keep the source instead of the result.
    """

    gemm: str
    operand: Operand
    along: int
    deferred: bool = False


def copies_of(precision: LinearPrecision) -> dict[str, tuple[Copy, Copy]]:
    """The copies of x, w and dy that the linear op asks for."""
    fprop, dgrad, wgrad = precision.fprop, precision.dgrad, precision.wgrad
    return {
        "x": (Copy("fprop", fprop.x, along=1), Copy("wgrad", wgrad.x, along=0)),
        "w": (Copy("fprop", fprop.w, along=1), Copy("dgrad", dgrad.w, along=0)),
        "dy": (Copy("dgrad", dgrad.dy, along=1), Copy("wgrad", wgrad.dy, along=0)),
    }


@dataclass(frozen=True, eq=False)
class Prepared:
    """An operand of a GEMM as its backend holds it: tensors (to be saved for backward), and what they mean."""

    tensors: tuple[Tensor, ...]
    meaning: Any

    def with_tensors(self, tensors: Sequence[Tensor]) -> Prepared:
        return replace(self, tensors=tuple(tensors))


class Backend(Protocol):
    """How operands are made and multiplied. Stateless between calls, but for compiled kernels."""

    def quantize(self, x: Tensor, source: Source, copies: Sequence[Copy]) -> tuple[Prepared, ...]:
        """All asked copies of `x [R, C]`, with one reduction of their amaxes over the source's group.

        Raises ValueError if a dimension is not a multiple of the tile, NonFiniteError for NaN or Inf (unless a
        `NonFiniteWatch` was given to the backend; the results are then meaningless and the step must be discarded).
        """

    def matmul(
        self, a: Prepared, b: Prepared, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """`a [M, K] @ b [N, K].T`, accumulated in FP32, scaled in FP32, rounded once to `out_dtype`.

        accumulate_into: FP32 `[M, N]` to which the product is added in place; it is then also the result.
        """


def check_shape(x: Tensor, source: Source, copy: Copy) -> None:
    """Raises ValueError, with the numbers, where a copy's tile or transform does not divide the tensor."""
    operand = copy.operand
    if not operand.quantized:
        return
    assert operand.tile is not None
    contracted, other = x.shape[copy.along], x.shape[1 - copy.along]
    for size, multiple in ((contracted, operand.contraction_multiple), (other, operand.tile[0])):
        if size % multiple:
            raise ValueError(
                f"{source.name}: operand {source.operand} of {copy.gemm} has local shape {tuple(x.shape)}; its "
                f"dimension of {size} must be a multiple of {multiple} (tile {operand.tile[0]}x{operand.tile[1]}, "
                f"Hadamard size {operand.rht_size}); change the sizes or the parallel layout, let the GEMM "
                f"pad, or leave this linear in bf16"
            )


def noise_key(source: Source, copy: Copy) -> int:
    """Key of the rounding noise of one copy: the same in every layout and in recomputation."""
    return key_of(source.seed, source.step, source.name, f"{copy.gemm}.{source.operand}")


def signs_for(source: Source, operand: Operand, device: torch.device) -> Tensor | None:
    """Signs of the Hadamard transform, FP32 `[rht_size]`; both operands of a GEMM get the same."""
    if operand.rht_size == 0 or operand.rht_signs is Signs.none:
        return None
    if operand.rht_signs is Signs.fixed:
        return fixed_signs(operand.rht_size, device)
    return signs_from_key(key_of(source.seed, source.step, source.name, "rht"), operand.rht_size, device)


def scale_bound(operand: Operand) -> float:
    """Largest block scale that the global scale of nvfp4 aims at (448, or lower where a factor will be applied)."""
    if operand.four_over_six is not FourOverSix.off:
        return float(operand.four_over_six_bound)
    return 416.0 if operand.rounding is Rounding.sr_headroom else 448.0  # 416 * 17/16 still rounds to 448


def reduce_and_check(
    local: list[Tensor], source: Source, copies: Sequence[Copy], watch: NonFiniteWatch | None
) -> list[Tensor]:
    """The amax of each copy over its scope, with one collective for all of them; NaN and Inf go to `watch`, or raise.

    local: FP32 amaxes of this rank, scalars (or one per row for amax_scope=row, which is never reduced). The check
    comes after the collective, so that no rank waits for one that has raised.
    """
    result = list(local)
    shared = [i for i, copy in enumerate(copies) if copy.operand.amax_scope is AmaxScope.tensor]
    if shared:
        reduced = all_reduce_max(torch.stack([local[i] for i in shared]), source.group)
        for position, i in enumerate(shared):
            result[i] = reduced[position]
    if local:
        largest = torch.stack([amax.amax() for amax in (*local, *result)]).amax()  # NaN propagates
        if watch is not None:
            watch.see(source, largest)
        elif not largest.item() < float("inf"):
            raise NonFiniteError(source, largest.item())
    return result
