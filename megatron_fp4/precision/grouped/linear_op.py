"""The three GEMMs of a linear of experts: `precision.linear_op` for many weights, one autograd Function for all.

A part of each GEMM is one segment by the weight of its expert. Its shape, scales and noise are the same wherever the
expert lives. Weight gradients of an expert are the sum over its segments, in their order.

Not here: how rows come to their expert and how they are sorted (layers.moe), one pass over all segments (`emulated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.precision.backends.padded import padded_index
from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand, copies_of, narrow
from megatron_fp4.precision.backends.randomness import expert_rows
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.grouped.protocol import least_rows, matmul_segments, quantize_segments
from megatron_fp4.precision.grouped.segments import Padding, Segments
from megatron_fp4.precision.grouped.weight_cache import GroupedWeightCache
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.spec import LinearPrecision, WgradOutput
from megatron_fp4.precision.weight_cache import WeightVersion
from megatron_fp4.precision.wgrad import WgradQueue


@dataclass(frozen=True, eq=False)
class _Call:
    """Everything but the tensors of one `grouped_linear` call; step and seed are those of the forward pass."""

    segments: Segments
    padding: Padding
    joined: Segments
    joining: frozenset[str]
    index: Tensor
    multiples: tuple[int, int, int]
    sharding: Sharding
    precision: LinearPrecision
    copies: dict[str, tuple[Copy, Copy]]
    backend: Backend
    cache: GroupedWeightCache
    queue: WgradQueue | None
    clock: StepClock
    seed: int
    step: int
    version: WeightVersion
    differentiable: bool

    def weights(self, weight: Tensor) -> tuple[QuantizedOperand, ...]:
        """The Fprop copies of the weights, and the Dgrad copies where a backward pass may follow."""
        self.version.check(self.sharding.name, WeightVersion.of(weight, self.clock))
        _, n, k = self.multiples
        if self.cache.multiples != (n, k):
            self.cache.multiples = (n, k)
            self.cache.clear()
        return self.cache.get(
            weight,
            self.copies["w"] if self.differentiable else self.copies["w"][:1],
            backend=self.backend,
            sharding=self.sharding,
            version=self.version,
            seed=self.seed,
            step=self.step,
        )

    def quantized(
        self, x: Tensor, origin: OperandOrigin, columns: int, copies: Sequence[Copy]
    ) -> tuple[QuantizedOperand, ...]:
        """Grouped operands of x or dy `[R, C]`."""
        place = replace(origin, cols=padded_index(origin.cols, columns))
        rows = self.padding.rows(x, columns)
        operands: dict[Copy, QuantizedOperand] = {}
        for segments in (self.padding.segments, self.joined):
            some = [copy for copy in copies if self.parts_of(copy.gemm) is segments]
            if some:
                quantized = quantize_segments(self.backend, rows, place, segments, self.cache.first_expert, some)
                operands |= zip(some, quantized, strict=True)
        return tuple(operands[copy] for copy in copies)

    def multiplied(
        self, gemm: str, a: QuantizedOperand, weights: QuantizedOperand, columns: int, dtype: torch.dtype
    ) -> Tensor:
        """`[R, columns]`: each segment by the weight of its expert; zero where no segment is."""
        operands = self.parts_of(gemm).parts
        pairs = [(i, part.expert) for i, part in enumerate(operands)]
        products = matmul_segments(self.backend, a, weights, pairs, out_dtype=dtype)
        make = torch.empty if self.segments.dense else torch.zeros
        out = make(self.segments.num_rows, columns, dtype=dtype, device=self.index.device)
        index = 0
        for part, extended in zip(self.segments.parts, self.padding.segments.parts, strict=True):
            while operands[index].stop < extended.stop:
                index += 1
            first = extended.start - operands[index].start
            out[part.rows] = products[index][first : first + part.num_rows, :columns]
        return out

    def parts_of(self, gemm: str) -> Segments:
        """What the operands of a GEMM are quantized as: segments, or with amax_scope=expert_call all of an expert."""
        return self.joined if gemm in self.joining else self.padding.segments


class _GroupedLinear(torch.autograd.Function):
    """y_s = x_s w_e^T of each segment s, whose expert is e, and its gradients.

    GEMM    first           second        contracted   output                 algebra
    Fprop   x_s    [S, K]   w_e   [N, K]  K            y_s  [S, N] x.dtype    as `linear_op`, segment by segment
    Dgrad   dy_s   [S, N]   w_e^T [K, N]  N            dx_s [S, K] x.dtype
    Wgrad   dy_s^T [N, S]   x_s^T [K, S]  S            dw_e [N, K] FP32       summed over the segments of e
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: _Call) -> Tensor:
        """Fprop: y [R, N]."""
        needs_dw = call.differentiable and ctx.needs_input_grad[1]
        copies = call.copies["x"] if needs_dw else call.copies["x"][:1]
        origin = call.sharding.x(call.index, call.seed, call.step)
        for_fprop, *for_wgrad = call.quantized(narrow(x.detach()), origin, call.multiples[2], copies)
        ctx.call, ctx.weight = call, weight
        if needs_dw:
            ctx.wgrad_x = for_wgrad[0].with_tensors(())
            ctx.save_for_backward(*for_wgrad[0].tensors)
        return call.multiplied("fprop", for_fprop, call.weights(weight)[0], len(call.sharding.n_index), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Dgrad: dx [R, K].   Wgrad: dw [E * N, K]."""
        call: _Call = ctx.call
        dy = grads[0]
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        copies = [copy for copy, needed in zip(call.copies["dy"], (needs_dx, needs_dw), strict=True) if needed]
        origin = call.sharding.dy(call.index, call.seed, call.step)
        operands = list(call.quantized(narrow(dy), origin, call.multiples[1], copies))
        dx = dw = None
        if needs_dx:
            dx = call.multiplied(
                "dgrad", operands.pop(0), call.weights(ctx.weight)[1], len(call.sharding.k_index), dy.dtype
            )
        if needs_dw:
            dw = _weight_gradient(call, ctx.weight, operands[0], ctx.wgrad_x.with_tensors(ctx.saved_tensors))
        return dx, dw, None


def _weight_gradient(call: _Call, weight: Tensor, dy: QuantizedOperand, x: QuantizedOperand) -> Tensor | None:
    """See `linear_op`; `grad_ready` is called once, though nothing came to any expert."""
    out_dtype = torch.float32 if call.precision.wgrad_output is WgradOutput.fp32 else weight.dtype
    if not isinstance(weight, LogicalParameter) or weight.main_grad is None:
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        _add_products(call, dy, x, total, out_dtype)
        return total.to(weight.dtype)
    main_grad, grad_ready = weight.main_grad, weight.grad_ready
    if main_grad.dtype == torch.float64:
        out_dtype = torch.float64

    def compute() -> None:
        _add_products(call, dy, x, main_grad, out_dtype)
        if grad_ready is not None:
            grad_ready()

    if call.queue is None:
        compute()
    else:
        call.queue.put(compute)
    return None


def _add_products(call: _Call, dy: QuantizedOperand, x: QuantizedOperand, total: Tensor, dtype: torch.dtype) -> None:
    """Add dw of every segment to the rows of its expert in `total [E * N, K]`."""
    parts = call.parts_of("wgrad").parts
    size, columns = len(call.sharding.n_index), len(call.sharding.k_index)
    pairs = [(i, i) for i in range(len(parts))]
    targets = [total[part.expert * size : (part.expert + 1) * size] for part in parts]
    extended = size % call.multiples[1] or columns % call.multiples[2]
    into = None if extended else targets
    products = matmul_segments(call.backend, dy, x, pairs, out_dtype=dtype, accumulate_into=into)
    if extended:
        for target, product in zip(targets, products, strict=True):
            target.add_(product[:size, :columns])


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
    call = _Call(
        segments=segments,
        padding=padding,
        joined=padding.segments.joined() if joining else padding.segments,
        joining=joining,
        index=_index(rows, segments, padding, cache.first_expert),
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
    y: Tensor = _GroupedLinear.apply(x, weight, call)
    return y


def _index(rows: Tensor, segments: Segments, padding: Padding, first_expert: int) -> Tensor:
    """Noise addresses of the extended rows, with the expert of each in them."""
    return padding.addresses(expert_rows(rows, segments.experts(rows.device) + first_expert))
