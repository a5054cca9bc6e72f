"""The one place where a linear layer's three GEMMs are computed.

One idea: `quantized_linear` knows no layout and no format. Of the layout it sees a `LinearSite`: which ranks hold the
other parts of each tensor (for amax) and which global indices the local rows and columns have (for noise). Of the
format it sees a `LinearPrecision` value and a `Backend`. Collectives of activations belong to the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.precision.backends import Backend, Copy, Prepared, Source
from megatron_fp4.precision.backends.padded import padded, padded_index
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.spec import LinearPrecision, WgradOutput


@dataclass(frozen=True, eq=False)
class LinearSite:
    """All that the GEMM function may know about the layout.

    name: logical name of the linear, "blocks.3.attention.qkv". x_group, w_group, dy_group: ranks that hold other parts
    of the logical x, w, dy (their amax is max-reduced there when amax_scope=tensor). n_index: int64 `[N]` global
    output-feature index of each local weight row. k_index: int64 `[K]` global input-feature index of each column.
    """

    name: str
    x_group: Group
    w_group: Group
    dy_group: Group
    n_index: Tensor
    k_index: Tensor


@dataclass(eq=False)
class WeightCache:
    """Quantized copies of one weight, valid for one (weights_version, precision, backend, device, dtype)."""

    key: Any = None
    fprop: Prepared | None = None
    dgrad: Prepared | None = None


@dataclass(eq=False)
class WgradQueue:
    """Weight gradients that a zero-bubble pipeline computes later: `enabled`, `put(fn)`, `take()`, `drain()`."""

    enabled: bool = False
    _waiting: list[Callable[[], None]] = field(default_factory=list)

    def put(self, compute: Callable[[], None]) -> None:
        self._waiting.append(compute)

    def take(self) -> Callable[[], None]:
        """Remove everything that waits; the result computes it, in the order it was put."""
        waiting, self._waiting = self._waiting, []

        def compute_all() -> None:
            while waiting:
                waiting.pop(0)()  # released one by one: each holds the operands of a GEMM

        return compute_all

    def drain(self) -> None:
        """Compute everything that waits now."""
        self.take()()


@dataclass(frozen=True, eq=False)
class _Call:
    """Everything but the tensors of one `quantized_linear` call; step and seed are those of the forward pass."""

    rows: Tensor
    site: LinearSite
    precision: LinearPrecision
    backend: Backend
    cache: WeightCache
    queue: WgradQueue | None
    clock: StepClock
    seed: int
    step: int
    weights_version: int

    def source(self, operand: str) -> Source:
        site = self.site
        t, n, k = map(padded_index, (self.rows, site.n_index, site.k_index), self.precision.padding)
        rows, cols, group = {"x": (t, k, site.x_group), "w": (n, k, site.w_group), "dy": (t, n, site.dy_group)}[operand]
        return Source(site.name, operand, rows, cols, group, self.seed, self.step)

    def quantize(self, operand: str, tensor: Tensor, copies: list[Copy]) -> tuple[Prepared, ...]:
        """Copies of x, w or dy, padded where the precision asks for it."""
        t, n, k = self.precision.padding
        rows, cols = {"x": (t, k), "w": (n, k), "dy": (t, n)}[operand]
        return self.backend.quantize(padded(tensor, rows, cols), self.source(operand), copies)

    def matmul(self, a: Prepared, b: Prepared, out_dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """The product without its padding, of the given shape."""
        out = self.backend.matmul(a, b, out_dtype=out_dtype)
        return out if out.shape == shape else out[: shape[0], : shape[1]].contiguous()

    def weights(self, weight: Tensor) -> tuple[Prepared, Prepared]:
        """Fprop and Dgrad copies of the weight, from the cache if it holds this version."""
        fprop, dgrad = self.precision.fprop.w, self.precision.dgrad.w
        if self.clock.weights_version != self.weights_version:
            raise RuntimeError(
                f"{self.site.name}: the weights changed (version {self.weights_version} -> "
                f"{self.clock.weights_version}) between a forward pass and its backward pass; "
                f"Dgrad would use other weights than Fprop"
            )
        key = (
            self.weights_version,
            fprop,
            dgrad,
            self.precision.padding,
            id(self.backend),
            weight.device,
            weight.dtype,
        )
        if self.cache.key != key or self.cache.fprop is None or self.cache.dgrad is None:
            copies = [Copy("fprop", fprop, along=1), Copy("dgrad", dgrad, along=0)]
            self.cache.key = key
            self.cache.fprop, self.cache.dgrad = self.quantize("w", weight.detach(), copies)
        return self.cache.fprop, self.cache.dgrad


class _Linear(torch.autograd.Function):
    """y = x w^T with its three GEMMs, each `a [M, k] @ b [N, k].T` of separately quantized operands.

        GEMM    a               b              contracted   output                algebra
        Fprop   x    [T, K]     w    [N, K]    K            y  [T, N] x.dtype     y  = x w^T
        Dgrad   dy   [T, N]     w^T  [K, N]    N            dx [T, K] x.dtype     dx = dy w
        Wgrad   dy^T [N, T]     x^T  [K, T]    T            dw [N, K] FP32        dw = dy^T x

    x is saved, not its quantized Wgrad copy: the copy would be as large in BF16, would be made twice under activation
    recomputation and for nothing in evaluation. Its amax is measured in the forward pass, in the same collective as
    that of the Fprop copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: _Call) -> Tensor:
        """Fprop: y [T, N] = x [T, K] @ w [N, K].T."""
        copies = [Copy("fprop", call.precision.fprop.x, along=1)]
        if ctx.needs_input_grad[1]:
            copies.append(Copy("wgrad", call.precision.wgrad.x, along=0, deferred=True))
        prepared = call.quantize("x", _narrow(x.detach()).contiguous(), copies)
        ctx.call, ctx.weight = call, weight
        ctx.wgrad_x = None
        if ctx.needs_input_grad[1]:
            ctx.wgrad_x = prepared[1].with_tensors(())
            ctx.save_for_backward(*prepared[1].tensors)
        return call.matmul(prepared[0], call.weights(weight)[0], x.dtype, (x.shape[0], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Dgrad: dx [T, K] = dy [T, N] @ w^T [K, N].T.   Wgrad: dw [N, K] = dy^T [N, T] @ x^T [K, T].T."""
        call: _Call = ctx.call
        dy = grads[0].contiguous()
        need_dx, need_dw, _ = ctx.needs_input_grad
        copies = [Copy("dgrad", call.precision.dgrad.dy, along=1)] if need_dx else []
        if need_dw:
            copies.append(Copy("wgrad", call.precision.wgrad.dy, along=0, deferred=True))
        prepared = list(call.quantize("dy", _narrow(dy), copies))
        dx = dw = None
        if need_dx:
            shape = (dy.shape[0], ctx.weight.shape[1])
            dx = call.matmul(prepared.pop(0), call.weights(ctx.weight)[1], dy.dtype, shape)
        if need_dw:
            dw = _weight_gradient(call, ctx.weight, prepared[0], ctx.wgrad_x.with_tensors(ctx.saved_tensors))
        return dx, dw, None


def _narrow(x: Tensor) -> Tensor:
    """FP64 is the type of sums in FP32 compute (layers.layer_context.widen); the values themselves are FP32."""
    return x.float() if x.dtype == torch.float64 else x


def _weight_gradient(call: _Call, weight: Tensor, dy: Prepared, x: Prepared) -> Tensor | None:
    """Add dw to `weight.main_grad` (now, or when the queue is drained), or return it where there is no main_grad."""
    out_dtype = torch.float32 if call.precision.wgrad_output is WgradOutput.fp32 else weight.dtype
    n, k = weight.shape
    if not isinstance(weight, LogicalParameter) or weight.main_grad is None:
        return call.matmul(dy, x, out_dtype, (n, k)).to(weight.dtype)
    main_grad, grad_ready = weight.main_grad, weight.grad_ready
    if main_grad.dtype == torch.float64:
        out_dtype = torch.float64
    fits = n % call.precision.padding[1] == 0 and k % call.precision.padding[2] == 0

    def compute() -> None:
        if fits:
            call.backend.matmul(dy, x, out_dtype=out_dtype, accumulate_into=main_grad)
        else:
            main_grad.add_(call.matmul(dy, x, out_dtype, (n, k)))
        if grad_ready is not None:
            grad_ready()

    if call.queue is not None and call.queue.enabled:
        call.queue.put(compute)
    else:
        compute()
    return None


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    *,
    rows: Tensor,
    site: LinearSite,
    precision: LinearPrecision,
    backend: Backend,
    clock: StepClock,
    cache: WeightCache,
    queue: WgradQueue | None = None,
) -> Tensor:
    """y `[T, N]` = x `[T, K]` w`[N, K]`^T, forward and backward in the given precision.

    x: BF16, or FP32 (given as FP64 to have the sums in FP64), T and K local. weight: BF16 or FP32. rows:
    int64 `[T]` address of each token in the global batch. The gradient of a LogicalParameter with a `main_grad` is
    added there in that tensor's type (FP32, FP64), and its `grad_ready()` is called; otherwise it is returned in the
    weight's dtype as `.grad`. cache: one per weight.
    Raises ValueError where shapes do not fit the tiles and the GEMM does not pad, NonFiniteError for NaN or Inf.
    """
    call = _Call(rows, site, precision, backend, cache, queue, clock, clock.seed, clock.step, clock.weights_version)
    return _Linear.apply(x, weight, call)  # type: ignore[no-any-return]
