"""The three GEMMs of a linear of experts: a call of `precision.linear_op` that has many weights.

A part of each GEMM is one segment by the weight of its expert. Its shape, scales and noise are the same wherever the
expert lives. Weight gradients of an expert are the sum over its segments, in their order.

Not here: how rows come to their expert and how they are sorted (layers.moe), one pass over all segments (`emulated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_fp4.precision.backends.padded import padded_index
from megatron_fp4.precision.backends.protocol import Backend, Copy, QuantizedOperand, copies_of
from megatron_fp4.precision.backends.randomness import expert_rows
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.grouped.protocol import (
    UnextendedOperand,
    least_rows,
    matmul_segments,
    quantize_segments,
)
from megatron_fp4.precision.grouped.segments import Padding, Segments
from megatron_fp4.precision.grouped.weight_cache import GroupedWeightCache
from megatron_fp4.precision.linear_op import LinearCall, apply_linear
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.weight_cache import WeightVersion
from megatron_fp4.precision.wgrad import WgradQueue


@dataclass(frozen=True, eq=False, kw_only=True)
class _GroupedCall(LinearCall):
    """A call for the E experts of `cache`, whose segments s are extended to the tiles.

    GEMM    first           second        contracted   output                 algebra
    Fprop   x_s    [S, K]   w_e   [N, K]  K            y_s  [S, N] x.dtype    as `linear_op`, segment by segment
    Dgrad   dy_s   [S, N]   w_e^T [K, N]  N            dx_s [S, K] x.dtype
    Wgrad   dy_s^T [N, S]   x_s^T [K, S]  S            dw_e [N, K] FP32       summed over the segments of e
    """

    cache: GroupedWeightCache
    segments: Segments
    padding: Padding
    joined: Segments
    joining: frozenset[str]
    multiples: tuple[int, int, int]

    def weights(self, weight: Tensor) -> tuple[QuantizedOperand, ...]:
        """The Fprop copies of the weights, and the Dgrad copies where a backward pass may follow."""
        _, n, k = self.multiples
        if self.cache.multiples != (n, k):
            self.cache.multiples = (n, k)
            self.cache.clear()
        return super().weights(weight)

    def quantize(self, tensor: Tensor, operand: str, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """Grouped operands of x or dy `[R, C]`."""
        columns = self.multiples[2 if operand == "x" else 1]
        origin = self.origin(operand)
        place = replace(origin, cols=padded_index(origin.cols, columns))
        rows = self.padding.rows(tensor, columns)
        operands: dict[Copy, QuantizedOperand] = {}
        for segments in (self.padding.segments, self.joined):
            some = [copy for copy in copies if self.parts_of(copy.gemm) is segments]
            if some:
                quantized = quantize_segments(self.backend, rows, place, segments, self.cache.first_expert, some)
                operands |= zip(some, quantized, strict=True)
        if operand == "x":
            extend = partial(self.padding.rows, columns=columns)
            for copy in (copy for copy in copies if copy.gemm == "wgrad"):
                operands[copy] = UnextendedOperand.of(operands[copy], tensor, rows, extend)
        return tuple(operands[copy] for copy in copies)

    def multiply(self, gemm: str, first: QuantizedOperand, weights: QuantizedOperand, dtype: torch.dtype) -> Tensor:
        """`[R, N]` or `[R, K]`: each segment by the weight of its expert; zero where no segment is."""
        columns = len(self.sharding.n_index if gemm == "fprop" else self.sharding.k_index)
        operands = self.parts_of(gemm).parts
        pairs = [(i, part.expert) for i, part in enumerate(operands)]
        products = matmul_segments(self.backend, first, weights, pairs, out_dtype=dtype)
        make = torch.empty if self.segments.dense else torch.zeros
        out = make(self.segments.num_rows, columns, dtype=dtype, device=self.rows.device)
        index = 0
        for part, extended in zip(self.segments.parts, self.padding.segments.parts, strict=True):
            while operands[index].stop < extended.stop:
                index += 1
            start = extended.start - operands[index].start
            out[part.rows] = products[index][start : start + part.num_rows, :columns]
        return out

    def weight_gradient(
        self, dy: QuantizedOperand, x: QuantizedOperand, dtype: torch.dtype, total: Tensor | None = None
    ) -> Tensor:
        """`[E * N, K]`: dw of every segment, added to the rows of its expert in `total` or else in FP32.

        A total in BF16 is rounded once: where an expert has several segments, their sum is made in FP32 first.
        """
        if isinstance(x, UnextendedOperand):
            x = x.whole()
        parts = self.parts_of("wgrad").parts
        if total is not None and total.dtype == torch.bfloat16 and len({part.expert for part in parts}) < len(parts):
            return total.add_(self.weight_gradient(dy, x, dtype))
        size, columns = len(self.sharding.n_index), len(self.sharding.k_index)
        if total is None:
            total = torch.zeros(self.cache.num_experts * size, columns, device=self.rows.device)
        pairs = [(i, i) for i in range(len(parts))]
        targets = [total[part.expert * size : (part.expert + 1) * size] for part in parts]
        extended = size % self.multiples[1] or columns % self.multiples[2]
        into = None if extended else targets
        products = matmul_segments(self.backend, dy, x, pairs, out_dtype=dtype, accumulate_into=into)
        if extended:
            for target, product in zip(targets, products, strict=True):
                target.add_(product[:size, :columns])
        return total

    def parts_of(self, gemm: str) -> Segments:
        """What the operands of a GEMM are quantized as: segments, or with amax_scope=expert_call all of an expert."""
        return self.joined if gemm in self.joining else self.padding.segments


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    *,
    rows: Tensor,
    segments: Segments,
    sharding: Sharding,
    precision: LinearPrecision,
    backend: Backend,
    clock: StepClock,
    cache: GroupedWeightCache,
    queue: WgradQueue | None = None,
) -> Tensor:
    """y `[R, N]` = x `[R, K]` by the weight `[N, K]` of each row's expert, forward and backward in one precision.

    weight: `[E * N, K]`, the E experts of `cache` one below the other. rows: int64 `[R]` token addresses. sharding: of
    one expert, whose amaxes nobody else has a part of (groups of one rank). The rest as of `quantized_linear`; whatever
    is quantized is extended by zeros, segment by segment, to what the tiles divide, N and K only where a GEMM pads.
    Raises ValueError where the rows are not those of the segments, or the weight's not those of the experts.
    """
    if not len(x) == len(rows) == segments.num_rows:
        raise ValueError(
            f"{sharding.name}: {len(x)} rows and {len(rows)} addresses for {segments.num_rows} in segments"
        )
    if len(weight) != cache.num_experts * len(sharding.n_index):
        raise ValueError(f"{sharding.name}: a weight of {len(weight)} rows for {cache.num_experts} experts")
    _, n, k = precision.padding
    t = max([1, *(max(gemm.multiples()["T"], least_rows(backend)) for gemm in precision.gemms if gemm.quantized)])
    padding = segments.padded(t, x.device)
    joining = frozenset(gemm.name for gemm in precision.gemms if gemm.joins_segments)
    call = _GroupedCall(
        segments=segments,
        padding=padding,
        joined=padding.segments.joined() if joining else padding.segments,
        joining=joining,
        rows=_index(rows, segments, padding, cache.first_expert),
        multiples=(t, n, k),
        sharding=sharding,
        precision=precision,
        copies=copies_of(precision),
        backend=backend,
        cache=cache,
        queue=queue,
        clock=clock,
        seed=clock.seed,
        step=clock.step,
        version=WeightVersion.of(weight, clock),
        differentiable=torch.is_grad_enabled(),
    )
    return apply_linear(x, weight, call)


def _index(rows: Tensor, segments: Segments, padding: Padding, first_expert: int) -> Tensor:
    """Noise addresses of the extended rows, with the expert of each in them."""
    return padding.addresses(expert_rows(rows, segments.experts(rows.device) + first_expert))
