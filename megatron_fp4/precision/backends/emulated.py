"""The emulated backend: the operands that an FP4 tensor core would multiply, on any device.

One idea: an operand is kept as `code * block_scale` without the global scale, which BF16 (and FP32) hold exactly; a
BF16 GEMM with FP32 accumulation multiplies them, and the product of the two global scales is applied in FP32 before the
one rounding to the output type. Codes are never made (the `reference` backend makes them).

Copies stay in the layout of their source: a copy that is contracted along the rows is used as a transposed view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.numerics import fused
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.numerics.random import column_words, row_words
from megatron_fp4.precision.backends import (
    Copy,
    Prepared,
    Source,
    check_shape,
    noise_key,
    reduce_and_check,
    scale_bound,
    signs_for,
)
from megatron_fp4.precision.spec import AmaxScope, Format, Operand, Rounding


@dataclass(frozen=True, eq=False)
class _Ready:
    """tensors = (values,) or (values, amax): the operand is values (or values.T), scaled by amax / divisor."""

    along: int
    divisor: float


@dataclass(frozen=True, eq=False)
class _Deferred:
    """tensors = (x, amax): the operand is still to be made."""

    source: Source
    copy: Copy


class EmulatedBackend:
    """Quantize-dequantize in one pass, and GEMMs in the compute dtype.

    compile: fuse the quantizer with torch.compile (needs a C++ compiler on CPUs); the results are equal, bit for bit.
    """

    def __init__(self, compile: bool = False) -> None:
        self.compile = compile

    def quantize(self, x: Tensor, source: Source, copies: Sequence[Copy]) -> tuple[Prepared, ...]:
        """See `Backend.quantize`. A deferred copy keeps (x, amax); the others hold values of x's shape and dtype."""
        for copy in copies:
            check_shape(x, source, copy)
        scaled = [copy for copy in copies if copy.operand.quantized]
        amaxes = reduce_and_check([self._amax(x, source, copy) for copy in scaled], source, scaled)
        amax_of = {id(copy): amax for copy, amax in zip(scaled, amaxes, strict=True)}
        prepared: list[Prepared] = []
        for i, copy in enumerate(copies):
            if copy.operand.transposes and copy.operand == copies[0].operand and i and not copy.deferred:
                values, *amax = prepared[0].tensors  # 2-D tiles: the codes of the transpose are the transposed codes
                meaning = prepared[0].meaning
                prepared.append(Prepared((values, *amax), _Ready(copy.along, meaning.divisor)))
            elif not copy.operand.quantized:
                prepared.append(Prepared((x,), _Ready(copy.along, 1.0)))
            elif copy.deferred:
                prepared.append(Prepared((x, amax_of[id(copy)]), _Deferred(source, copy)))
            else:
                prepared.append(self._make(x, amax_of[id(copy)], source, copy))
        return tuple(prepared)

    def matmul(
        self, a: Prepared, b: Prepared, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        left, left_scale = self._operand(a)
        right, right_scale = self._operand(b)
        return scaled_matmul(left, right, left_scale, right_scale, out_dtype, accumulate_into)

    def _amax(self, x: Tensor, source: Source, copy: Copy) -> Tensor:
        operand = copy.operand
        if operand.rht_size:
            x = hadamard(x, operand.rht_size, signs_for(source, operand, x.device), copy.along)
        if operand.amax_scope is AmaxScope.row:
            return fused.row_amax_of(x, copy.along)
        return fused.amax_of(x)

    def _make(self, x: Tensor, amax: Tensor, source: Source, copy: Copy) -> Prepared:
        operand, along = copy.operand, copy.along
        assert operand.tile is not None
        tile = operand.tile if along == 1 else (operand.tile[1], operand.tile[0])
        words = None
        if operand.stochastic:
            key = noise_key(source, copy)
            words = (*row_words(key, source.rows), column_words(key, source.cols))
        if operand.rht_size:
            x = hadamard(x, operand.rht_size, signs_for(source, operand, x.device), along)
        if operand.format is not Format.nvfp4:
            element = "e2m1" if operand.format is Format.mxfp4 else "e4m3"
            values = fused.power_of_two_operand(
                x, words, tile=tile, element=element, noise_bits=operand.noise_bits
            )
            return Prepared((values,), _Ready(along, 1.0))
        values = fused.two_level_operand(
            x, amax, words, tile=tile, along=along, bound=scale_bound(operand), **_options(operand)
        )
        return Prepared((values, amax), _Ready(along, 6.0 * scale_bound(operand)))

    def _operand(self, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """The operand as `[M, K]`, and its global scale as (amax, divisor)."""
        if isinstance(prepared.meaning, _Deferred):
            x, amax = prepared.tensors
            prepared = self._make(x, amax, prepared.meaning.source, prepared.meaning.copy)
        values, meaning = prepared.tensors[0], prepared.meaning
        scale = (prepared.tensors[1], meaning.divisor) if len(prepared.tensors) == 2 else None
        return (values if meaning.along == 1 else values.T), scale


def _options(operand: Operand) -> dict[str, Any]:
    return {
        "scale_order": operand.scale_order.name,
        "headroom": operand.rounding is Rounding.sr_headroom,
        "noise_bits": operand.noise_bits,
        "four_over_six": operand.four_over_six.name,
    }


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: tuple[Tensor, float] | None,
    b_scale: tuple[Tensor, float] | None,
    out_dtype: torch.dtype,
    accumulate_into: Tensor | None,
) -> Tensor:
    """`alpha * (a @ b.T)` with alpha = amax_a * amax_b / (divisor_a * divisor_b), in FP32, before the rounding."""
    scales = [scale for scale in (a_scale, b_scale) if scale is not None]
    per_row = any(amax.numel() > 1 for amax, _ in scales)
    alpha = 1.0
    if scales and not per_row:
        product = scales[0][0] if len(scales) == 1 else scales[0][0] * scales[1][0]
        divisor = scales[0][1] if len(scales) == 1 else scales[0][1] * scales[1][1]
        alpha = (product.reshape(()) / torch.full_like(product.reshape(()), divisor)).item()
    if accumulate_into is not None or out_dtype == torch.float32 or per_row:
        out = torch.mm(a.float(), b.float().T)
        if per_row:
            for (amax, divisor), is_left in ((a_scale, True), (b_scale, False)):  # type: ignore[misc]
                out = out * (amax.view(-1, 1) if is_left else amax.view(1, -1)) / divisor
        elif alpha != 1.0:
            out *= alpha
        out = out.to(out_dtype)
        return out if accumulate_into is None else accumulate_into.add_(out)
    return torch.addmm(a.new_empty(1, 1), a, b.T, beta=0, alpha=alpha)
