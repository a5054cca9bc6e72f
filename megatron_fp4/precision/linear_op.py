"""The one place where a linear layer's three GEMMs are computed.

`quantized_linear` knows no layout and no format. Of the layout it sees a `Sharding`: which ranks hold the other parts
of each tensor (for amax) and which global indices the local rows and columns have (for noise). Of the format it sees a
`LinearPrecision` value and a `Backend`.

Not here: collectives of activations (layers), how a copy of the weight stays valid (`weight_cache`), padding
(`backends.padded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.precision.backends.padded import with_padding
from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand, copies_of, narrow
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.spec import LinearPrecision, WgradOutput
from megatron_fp4.precision.weight_cache import WeightCache, WeightVersion
from megatron_fp4.precision.wgrad import WgradQueue


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearCall:
    """Everything but the tensors of one call of a linear; step and seed are those of the forward pass.

    rows: noise addresses of the quantized rows. copies: of x, w and dy, the forward pass's first. differentiable: a
    backward pass may follow. input_amax: of x, for amax_scope=static. A linear of many weights has another way to
    quantize and to multiply (`grouped`).
    """

    rows: Tensor
    sharding: Sharding
    precision: LinearPrecision
    copies: dict[str, tuple[Copy, Copy]]
    backend: Backend
    cache: WeightCache
    queue: WgradQueue | None
    clock: StepClock
    seed: int
    step: int
    version: WeightVersion
    differentiable: bool
    input_amax: Tensor | None = None

    def weights(self, weight: Tensor) -> tuple[QuantizedOperand, ...]:
        """The Fprop copy of the weight, and the Dgrad copy where a backward pass may follow."""
        self.version.check(self.sharding.name, WeightVersion.of(weight, self.clock))
        return self.cache.get(
            weight,
            self.copies["w"] if self.differentiable else self.copies["w"][:1],
            backend=self.backend,
            sharding=self.sharding,
            version=self.version,
            seed=self.seed,
            step=self.step,
        )

    def origin(self, operand: str) -> OperandOrigin:
        """Where x or dy comes from."""
        if operand == "x":
            return replace(self.sharding.x(self.rows, self.seed, self.step), amax=self.input_amax)
        return self.sharding.dy(self.rows, self.seed, self.step)

    def quantize(self, tensor: Tensor, operand: str, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """Copies of x or dy."""
        return self.backend.quantize(tensor.contiguous(), self.origin(operand), copies)

    def multiply(self, gemm: str, first: QuantizedOperand, weights: QuantizedOperand, dtype: torch.dtype) -> Tensor:
        """y of Fprop, dx of Dgrad."""
        return self.backend.matmul(first, weights, out_dtype=dtype)

    def weight_gradient(
        self, dy: QuantizedOperand, x: QuantizedOperand, dtype: torch.dtype, total: Tensor | None = None
    ) -> Tensor:
        """dw of Wgrad; added to `total`, which is then the result, if there is one."""
        return self.backend.matmul(dy, x, out_dtype=dtype, accumulate_into=total)


class _Linear(torch.autograd.Function):
    """y = x w^T and its gradients: three GEMMs, each `first @ second.T` of two operands quantized for it alone.

        GEMM    first         second        contracted   output               algebra
        Fprop   x    [T, K]   w    [N, K]   K            y  [T, N] x.dtype    y[t,n]  = sum_k x[t,k] w[n,k]
        Dgrad   dy   [T, N]   w^T  [K, N]   N            dx [T, K] x.dtype    dx[t,k] = sum_n dy[t,n] w[n,k]
        Wgrad   dy^T [N, T]   x^T  [K, T]   T            dw [N, K] FP32       dw[n,k] = sum_t dy[t,n] x[t,k]

    x is saved, not its quantized Wgrad copy: the copy would be as large in BF16, and would be made twice under
    activation recomputation. Its amax is measured in the forward pass, in one collective with that of the Fprop copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: LinearCall) -> Tensor:
        """Fprop: y [T, N] = x [T, K] @ w [N, K].T."""
        needs_dw = call.differentiable and ctx.needs_input_grad[1]
        copies = call.copies["x"] if needs_dw else call.copies["x"][:1]
        for_fprop, *for_wgrad = call.quantize(narrow(x.detach()), "x", copies)
        ctx.call, ctx.weight = call, weight
        if needs_dw:
            ctx.wgrad_x = for_wgrad[0].with_tensors(())
            ctx.save_for_backward(*for_wgrad[0].tensors)
        return call.multiply("fprop", for_fprop, call.weights(weight)[0], x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Dgrad: dx [T, K] = dy [T, N] @ w^T [K, N].T.   Wgrad: dw [N, K] = dy^T [N, T] @ x^T [K, T].T."""
        call: LinearCall = ctx.call
        dy = grads[0]
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        copies = [copy for copy, needed in zip(call.copies["dy"], (needs_dx, needs_dw), strict=True) if needed]
        operands = list(call.quantize(narrow(dy), "dy", copies))
        dx = dw = None
        if needs_dx:
            dx = call.multiply("dgrad", operands.pop(0), call.weights(ctx.weight)[1], dy.dtype)
        if needs_dw:
            dw = _weight_gradient(call, ctx.weight, operands[0], ctx.wgrad_x.with_tensors(ctx.saved_tensors))
        return dx, dw, None


def _weight_gradient(call: LinearCall, weight: Tensor, dy: QuantizedOperand, x: QuantizedOperand) -> Tensor | None:
    """Add dw to `weight.main_grad` (now, or when the queue is drained), or return it where there is no main_grad."""
    out_dtype = torch.float32 if call.precision.wgrad_output is WgradOutput.fp32 else weight.dtype
    if not isinstance(weight, LogicalParameter) or weight.main_grad is None:
        return call.weight_gradient(dy, x, out_dtype).to(weight.dtype)
    main_grad, grad_ready = weight.main_grad, weight.grad_ready
    if main_grad.dtype == torch.float64:
        out_dtype = torch.float64

    def compute() -> None:
        call.weight_gradient(dy, x, out_dtype, main_grad)
        if grad_ready is not None:
            grad_ready()

    if call.queue is None:
        compute()
    else:
        call.queue.put(compute)
    return None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    *,
    rows: Tensor,
    sharding: Sharding,
    precision: LinearPrecision,
    backend: Backend,
    clock: StepClock,
    cache: WeightCache,
    queue: WgradQueue | None = None,
    input_amax: Tensor | None = None,
) -> Tensor:
    """y `[T, N]` = x `[T, K]` w`[N, K]`^T, forward and backward in the given precision.

    x: BF16, or FP32 (given as FP64 to have the sums in FP64), T and K local. weight: BF16 or FP32. rows:
    int64 `[T]` address of each token in the global batch. The gradient of a LogicalParameter with a `main_grad` is
    added there (FP32, FP64; BF16 is added to in FP32 and rounded once), and its `grad_ready()` is called; otherwise it
    is returned in the weight's dtype as `.grad`. cache: one per weight. queue: where the computation of that gradient
    waits until it is drained (see `WgradPlan`); None: it is done right after dx. input_amax: FP32 scalar, of x where
    its scale is static.
    Raises ValueError where shapes do not fit the tiles and the GEMM does not pad, NonFiniteError for NaN or Inf.
    """
    call = LinearCall(
        rows=rows,
        sharding=sharding,
        precision=precision,
        copies=copies_of(precision),
        backend=with_padding(backend, precision.padding),
        cache=cache,
        queue=queue,
        clock=clock,
        seed=clock.seed,
        step=clock.step,
        version=WeightVersion.of(weight, clock),
        differentiable=torch.is_grad_enabled(),
        input_amax=input_amax,
    )
    return apply_linear(x, weight, call)


def apply_linear(x: Tensor, weight: Tensor, call: LinearCall) -> Tensor:
    """The three GEMMs of a call, with autograd."""
    y: Tensor = _Linear.apply(x, weight, call)
    return y
