"""Stand-ins on the meta device for what only a GPU has: they keep and return tensors of the sizes of the real ones.

A forward and backward pass on the meta device runs the layers' own code, so what it keeps is what a real one keeps,
except where the device decides: which attention and norm kernels torch has, how a backend stores operands, and fused
kernels of packages that need CUDA. These are here, and nothing else is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.fused.loss import CrossEntropy, LossImpl, choose_cross_entropy, choose_distance
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.norm import RMSNorm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision.backends import Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.backends.finite import reduce_amaxes
from megatron_fp4.precision.backends.product import Factors, multiply_on_cpu, multiply_on_cuda, widens
from megatron_fp4.precision.backends.triton_limits import obstacle
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.operand import OUTER_BLOCK, AmaxScope, Format, Operand

STORED_BYTES = {Format.nvfp4: 0.5625, Format.mxfp4: 0.53125, Format.mxfp8: 1.03125, Format.fp8_block: 1.0}
"""Bytes per element with block scales, as Transformer Engine stores them."""
DEQUANTIZING = (BackendName.emulated, BackendName.reference)
"""Backends whose operands are as large as the compute dtype makes them."""
ACCUMULATING = (BackendName.transformer_engine, BackendName.triton)
"""Backends whose GEMM adds to the main gradient itself."""


def stored_bytes(operand: Operand, backend: BackendName, compute_bytes: int) -> float:
    """Bytes per element of a quantized operand as `backend` holds it."""
    if _is_dequantized(operand, backend):
        return 4.0 if operand.amax_scope is AmaxScope.group128 else float(compute_bytes)
    return STORED_BYTES[operand.format]


def _is_dequantized(operand: Operand, backend: BackendName) -> bool:
    return backend in DEQUANTIZING or (backend is BackendName.triton and bool(obstacle(operand)))


@contextmanager
def cuda_kernels(*, on_gpu: bool) -> Iterator[None]:
    """Attention by a kernel that makes no matrix of scores, as on every real device; on a GPU also a fused RMSNorm.

    torch's own choice where there is no kernel is to compute both from small operations, which keep far more. They are
    put in place of torch's functions: a TorchFunctionMode would be off during a backward pass, where recomputation is.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        """Keeps q, k, v, the output, FP32 sums of the softmax, and a mask, which kernels turn into numbers."""
        mask = None if attn_mask is None else _mask(q, attn_mask, on_gpu=on_gpu)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = flash(q, k, v, 0.0, mask is None, attn_mask=mask)[0]
        return out

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        if on_gpu:
            stack.enter_context(patch.object(F, "rms_norm", _norm))
        yield


def _mask(q: Tensor, mask: Tensor, *, on_gpu: bool) -> Tensor | None:
    from torch.nn.attention.bias import CausalBias  # here: it imports torch._dynamo, which takes seconds

    if not isinstance(mask, CausalBias):
        return mask if mask.is_floating_point() else q.new_empty(mask.shape)
    by_flag = on_gpu or mask.seq_len_q == mask.seq_len_kv
    return None if by_flag else q.new_empty(mask.seq_len_q, mask.seq_len_kv)


def _norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    normed: Tensor = _FusedNorm.apply(x, *([] if weight is None else [weight]))
    return normed


class _FusedNorm(torch.autograd.Function):
    """Keeps its input and the inverse root mean square of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32), *weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, _, *weight = ctx.saved_tensors
        return torch.empty_like(x), *map(torch.empty_like, weight)


class _FusedLoss(torch.autograd.Function):
    """Writes the gradient of the logits over a copy of them and keeps it."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor) -> Tensor:
        ctx.save_for_backward(logits_TV.clone())
        return logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (dz_TV,) = ctx.saved_tensors
        return dz_TV


def use_fused_norms(model: nn.Module, impl: NormImpl) -> None:
    """Make the norms of a model that was built by torch those of `impl`: they keep their input in the compute dtype."""
    for module in model.modules():
        if isinstance(module, RMSNorm) and impl is not NormImpl.torch:
            module._fused = functools.partial(_norm, shape=module.weight.shape, weight=module.weight)


def cross_entropy_of(config: ModelConfig, tp: Group) -> CrossEntropy:
    """The loss that `model.loss_impl` names, with what it keeps."""
    if config.loss_impl is LossImpl.torch:
        return choose_cross_entropy(LossImpl.torch, config.vocab_size, tp)
    return lambda logits_TV, labels_T: _FusedLoss.apply(logits_TV)


def distance_of(config: ModelConfig, tp: Group, *, weight: float, temperature: float) -> CrossEntropy:
    """The loss beside a teacher, whose logits come into being with it."""
    distance = choose_distance(config.vocab_size, tp, weight=weight, temperature=temperature)
    return lambda logits_TV, labels_T: distance(logits_TV, torch.empty_like(logits_TV), labels_T).minimized


@dataclass(frozen=True, eq=False)
class _Values(QuantizedOperand):
    """tensors[0]: values as large as those of the compute dtype. scaled: they have a global scale. pending: they are
    still to be made from it."""

    along: int
    scaled: bool = False
    pending: bool = False

    def oriented(self, dtype: torch.dtype | None) -> Tensor:
        """`[M, K]`. dtype: in which pending values are made; None for their own."""
        values = self.tensors[0]
        if self.pending:
            values = torch.empty_like(values, dtype=dtype)
        return values if self.along == 1 else values.T


@dataclass(frozen=True, eq=False)
class _Codes(QuantizedOperand):
    """tensors[0]: as many bytes as codes and block scales have. rows, length: of the operand; dtype: of its tensor.
    scaled: there is a global scale."""

    rows: int
    length: int
    dtype: torch.dtype
    scaled: bool

    def decoded(self) -> _Values:
        """The operand for a product with one that has no codes."""
        return _Values((self.tensors[0].new_empty(self.rows, self.length, dtype=self.dtype),), 1, self.scaled)


def _amax_of_values(x: Tensor, copy: Copy) -> Tensor:
    per_row = copy.operand.amax_scope is AmaxScope.row
    if copy.operand.amax_scope is AmaxScope.group128:
        return x.new_empty(x.numel() // OUTER_BLOCK, dtype=torch.float32)
    return x.new_empty((x.shape[1 - copy.along],) if per_row else (), dtype=torch.float32)


def _amaxes_of_codes(x: Tensor, copies: Sequence[Copy]) -> list[Tensor]:
    """What the Triton backend measures: x itself alone, or with its transform, whose numbers lie side by side."""
    measured = {copy: x.new_empty(2, dtype=torch.float32).unbind() for copy in copies if copy.operand.rht_size}
    itself = [*measured.values()][-1][0] if measured else x.new_empty((), dtype=torch.float32)
    return [measured[copy][1] if copy in measured else itself for copy in copies]


class SizedBackend:
    """See `Backend`: operands as large as those of `name`, products of the right shape, on the meta device.

    Quantizers are counted as kernels that make nothing but their results; those that run eagerly need more in passing.
    """

    def __init__(self, name: BackendName, *, on_gpu: bool) -> None:
        self._name, self._on_gpu = name, on_gpu

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`. Amaxes are kept as the real backends keep them, but not those of packages."""
        amaxes = self._amaxes(x, origin, copies)
        operands: list[QuantizedOperand] = []
        for copy in copies:
            kept = (amaxes[copy],) if copy in amaxes else ()
            scaled = copy.operand.format is Format.nvfp4
            if not copy.operand.quantized:
                operands.append(_Values((x,), copy.along))
            elif _is_dequantized(copy.operand, self._name):
                grouped = copy.operand.amax_scope is AmaxScope.group128
                values = x if copy.deferred else torch.empty_like(x, dtype=torch.float32 if grouped else x.dtype)
                operands.append(_Values((values, *kept), copy.along, scaled, pending=copy.deferred))
            else:
                num_bytes = round(x.numel() * stored_bytes(copy.operand, self._name, x.itemsize))
                held = x.new_empty(num_bytes, dtype=torch.uint8)
                operands.append(_Codes((held, *kept), x.shape[1 - copy.along], x.shape[copy.along], x.dtype, scaled))
        return tuple(operands)

    def _amaxes(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> dict[Copy, Tensor]:
        """The amaxes that operands keep: a number each, or two side by side where one kernel measures both."""
        values = [copy for copy in copies if copy.operand.quantized and _is_dequantized(copy.operand, self._name)]
        local = [_amax_of_values(x, copy) for copy in values]
        amaxes = dict(zip(values, reduce_amaxes(local, origin, values), strict=True))
        kept = {copy: amax for copy, amax in amaxes.items() if copy.deferred or copy.operand.format is Format.nvfp4}
        if self._name is not BackendName.triton:
            return kept
        coded = [copy for copy in copies if copy.operand.format is Format.nvfp4 and copy not in amaxes]
        local = _amaxes_of_codes(x, coded)
        return kept | dict(zip(coded, reduce_amaxes(local, origin, coded), strict=True))

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        if isinstance(a, _Codes) and isinstance(b, _Codes):
            fused = accumulate_into is not None and accumulate_into.dtype == out_dtype
            if accumulate_into is not None and fused and self._name in ACCUMULATING:
                return accumulate_into
            out = a.tensors[0].new_empty(a.rows, b.rows, dtype=out_dtype)
        else:
            a, b = (one.decoded() if isinstance(one, _Codes) else one for one in (a, b))
            assert isinstance(a, _Values)
            assert isinstance(b, _Values)
            multiply = multiply_on_cuda if self._on_gpu else multiply_on_cpu
            wide = torch.float32 if not self._on_gpu and widens(torch.device("cpu"), out_dtype) else None
            scaled = self._on_gpu and (a.scaled or b.scaled)  # where it is a number in the GEMM it takes no memory
            factors = Factors(a.tensors[0].new_empty((), dtype=torch.float32) if scaled else None, None, None)
            return multiply(a.oriented(wide), b.oriented(wide), factors, out_dtype, accumulate_into)
        return out if accumulate_into is None else accumulate_into
