"""The reference backend: the readable oracle.

Codes and scales are really made, with the formulas of `numerics.block_scale`, and the product is computed in FP64 and
rounded once. Slow; for tests and for understanding. Everything that `emulated` does must equal it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.numerics import QuantizedTensor, quantize_nvfp4, quantize_power_of_two
from megatron_fp4.numerics.block_scale import Eden
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.numerics.random import random_bits
from megatron_fp4.precision.backends.finite import NonFiniteWatch, reduce_and_check
from megatron_fp4.precision.backends.product import GlobalScale
from megatron_fp4.precision.backends.protocol import CodedOperand, Copy, OperandOrigin, QuantizedOperand, check_shape
from megatron_fp4.precision.backends.randomness import block_addresses, noise_key, signs_for, with_signs
from megatron_fp4.precision.operand import OUTER_BLOCK, AmaxScope, Format, Operand, Rounding


@dataclass(frozen=True, eq=False)
class _Exact(QuantizedOperand):
    """tensors = (x,): in high precision."""


@dataclass(frozen=True, eq=False)
class _Codes(CodedOperand):
    """tensors = (codes, scales) or (codes, scales, amax) of a QuantizedTensor. grouped: amax is `[M, K/128]`."""

    divisor: float = 1.0
    grouped: bool = False


class ReferenceBackend:
    """See `Backend`; on any device."""

    def __init__(self, watch: NonFiniteWatch | None = None) -> None:
        self._watch = watch

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`. Every copy holds packed codes, scales and amax, transposed where it must be."""
        for copy in copies:
            check_shape(x, origin, copy)
        oriented = {copy: _oriented(x, origin, copy) for copy in copies}
        scaled = [copy for copy in copies if copy.operand.quantized]
        local = [_amax(oriented[copy], copy.operand) for copy in scaled]
        amaxes = dict(zip(scaled, reduce_and_check(local, origin, scaled, self._watch), strict=True))
        return tuple(
            _quantized(oriented[copy], amaxes[copy], origin, copy) if copy in amaxes else _Exact((oriented[copy],))
            for copy in copies
        )

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`; the accumulation is in FP64, that is, exact for all practical sizes."""
        left, left_scale = decode(a)
        right, right_scale = decode(b)
        product = left.double() @ right.double().T
        # alpha is one FP32 number, amax_a * amax_b / (divisor_a * divisor_b), as hardware gets it
        alpha, divisor = torch.ones((), device=product.device), 1.0
        for scale, shape in ((left_scale, (-1, 1)), (right_scale, (1, -1))):
            if scale is None:
                continue
            if scale.amax.numel() == 1:
                alpha, divisor = alpha * scale.amax.reshape(()), divisor * scale.divisor
            else:
                product = product * (scale.amax.double() / scale.divisor).view(shape)
        result = (product * (alpha / torch.full_like(alpha, divisor)).double()).to(out_dtype)
        return result if accumulate_into is None else accumulate_into.add_(result)


def decode(operand: QuantizedOperand) -> tuple[Tensor, GlobalScale | None]:
    """An operand of this backend as `[M, K]`, without its global scale, and that scale."""
    if isinstance(operand, _Exact):
        return operand.tensors[0], None
    assert isinstance(operand, _Codes)
    codes, scales, *amax = operand.tensors
    values = QuantizedTensor(codes, scales, None).operand(torch.float32)
    if operand.grouped:
        outer = amax[0] / torch.full_like(amax[0], operand.divisor)
        return values * outer.repeat_interleave(OUTER_BLOCK, 1), None
    return values, GlobalScale(amax[0], operand.divisor) if amax else None


def _oriented(x: Tensor, origin: OperandOrigin, copy: Copy) -> Tensor:
    """The tensor with the contraction along its last dimension, transformed if the copy asks for it."""
    operand = copy.operand
    x = with_signs(x, origin, copy)
    x = x if copy.along == 1 else x.T.contiguous()
    return hadamard(x, operand.rht_size, signs_for(origin, operand, x.device), 1) if operand.rht_size else x


def _amax(x: Tensor, operand: Operand) -> Tensor:
    if operand.amax_scope is AmaxScope.row:
        return x.abs().amax(1, keepdim=True).float()
    if operand.amax_scope is AmaxScope.group128:
        return x.abs().unflatten(1, (-1, OUTER_BLOCK)).amax(2).float()
    return x.abs().amax().float()


def _quantized(x: Tensor, amax: Tensor, origin: OperandOrigin, copy: Copy) -> _Codes:
    """x: `[M, K]` as the product sees it."""
    operand = copy.operand
    assert operand.tile is not None
    noise = None
    if operand.stochastic:
        bits = random_bits(noise_key(origin, copy), origin.rows, origin.cols)
        bits = bits if copy.along == 1 else bits.T
        kept = (bits >> (32 - operand.noise_bits)) & ((1 << operand.noise_bits) - 1)
        noise = (kept.float() + (0.5 if operand.centred_noise else 0.0)) / 2**operand.noise_bits
    if operand.format is not Format.nvfp4:
        element = "e2m1" if operand.format is Format.mxfp4 else "e4m3"
        quantized = quantize_power_of_two(x, element=element, tile=operand.tile, noise=noise)
        return _Codes((quantized.codes, quantized.scales))
    rows, cols = block_addresses(origin, copy)
    word = random_bits(noise_key(origin, copy), rows, cols) if operand.eden else None
    grouped = operand.amax_scope is AmaxScope.group128
    quantized = quantize_nvfp4(
        x,
        tile=operand.tile,
        amax=amax.repeat_interleave(OUTER_BLOCK // 16, 1) if grouped else amax,
        scale_order=operand.scale_order.name,
        noise=noise,
        headroom=operand.rounding is Rounding.sr_headroom,
        four_over_six=operand.four_over_six.name,
        bound=operand.scale_bound,
        eden=None if word is None else Eden(operand.rht_size, word if copy.along == 1 else word.T),
    )
    return _Codes((quantized.codes, quantized.scales, amax), quantized.divisor, grouped)
