"""The emulated backend: the operands that an FP4 tensor core would multiply, on any device.

An operand is kept as `code * block_scale` without the global scale, which BF16 (and FP32) hold exactly; a BF16 GEMM
with FP32 accumulation multiplies them, and the product of the two global scales is applied in FP32 before the one
rounding to the output type. Codes are never made (the `reference` backend makes them).

Copies stay in the layout of their tensor: a copy that is contracted along the rows is used as a transposed view.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.numerics.eden import SCALE_BITS
from megatron_fp4.numerics.fused import Passes
from megatron_fp4.numerics.stages import BlockScales
from megatron_fp4.precision.backends.finite import NonFiniteWatch, reduce_and_check
from megatron_fp4.precision.backends.product import GlobalScale, outer_scale, scaled_matmul, widens
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin, QuantizedOperand, check_shape
from megatron_fp4.precision.backends.randomness import SignVectors, block_addresses, noise_key, with_signs
from megatron_fp4.precision.operand import OUTER_BLOCK, AmaxScope, Format, FourOverSix, Operand, Rounding


@dataclass(frozen=True, eq=False)
class _Values(QuantizedOperand):
    """tensors = (values,) or (values, amax): the operand is values (or values.T), scaled by amax / divisor."""

    along: int
    divisor: float = 1.0


@dataclass(frozen=True, eq=False)
class _Deferred(QuantizedOperand):
    """tensors = (x, amax): the operand is still to be made; without amax, only to be transformed."""

    origin: OperandOrigin
    copy: Copy


def compile_obstacle(torch_path: str = torch.__file__) -> str:
    """Why torch.compile cannot work on this machine's CPU; empty if it can. The eager kernels give the same bits."""
    if any(character.isspace() for character in torch_path):
        return f"torch lies under a path with a space ({torch_path}), which it does not quote for the compiler"
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "there is no C++ compiler (g++ or clang++) on PATH"
    return ""


class _Blocks(NamedTuple):
    """A tensor as its copy sees it, transformed where the copy asks for it, with max |x| of each tile."""

    x: Tensor
    maxima: Tensor


class EmulatedBackend:
    """Quantize-dequantize in a few fused passes, and GEMMs in the compute dtype.

    compile: fuse the passes with torch.compile (needs a C++ compiler on CPUs); results are equal, bit for bit.
    """

    def __init__(self, compile: bool = False, watch: NonFiniteWatch | None = None) -> None:
        self.passes = Passes(compile)
        self._signs = SignVectors()
        self._watch = watch

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`. A deferred copy keeps (x, amax); the others hold values of x's shape and dtype."""
        for copy in copies:
            check_shape(x, origin, copy)
        scaled = [copy for copy in copies if copy.operand.quantized]
        blocks: dict[Copy, _Blocks] = {}
        local = []
        for copy in scaled:
            measured = self._blocks(x, origin, copy)
            local.append(self._amax(measured, copy))
            if not copy.deferred:
                blocks[copy] = measured
        amaxes = dict(zip(scaled, reduce_and_check(local, origin, scaled, self._watch), strict=True))
        values: dict[Operand, Tensor] = {}
        operands: list[QuantizedOperand] = []
        for copy in copies:
            operand = copy.operand
            if not operand.quantized and copy.deferred and operand.rht_size:
                operands.append(_Deferred((x,), origin, copy))
            elif not operand.quantized:
                operands.append(_Values((self._transformed(x, origin, copy),), copy.along))
            elif copy.deferred:
                operands.append(_Deferred((x, amaxes[copy]), origin, copy))
            else:
                if not (operand.transposes and operand in values):  # else one copy serves both directions
                    values[operand] = self._values(blocks[copy], amaxes[copy], origin, copy, x.dtype)
                operands.append(_scaled(values[operand], amaxes[copy], copy))
        return tuple(operands)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        # operands that are still to be made are made in the type in which they will be multiplied
        wide = widens(a.tensors[0].device, out_dtype)
        left, left_scale = self._operand(a, torch.float32 if wide else a.tensors[0].dtype)
        right, right_scale = self._operand(b, torch.float32 if wide else b.tensors[0].dtype)
        return scaled_matmul(
            left,
            right,
            a_scale=left_scale,
            b_scale=right_scale,
            out_dtype=out_dtype,
            accumulate_into=accumulate_into,
        )

    def values(self, operand: QuantizedOperand) -> tuple[Tensor, GlobalScale | None]:
        """An operand of this backend as `[M, K]`, without its global scale, and that scale: for checks."""
        return self._operand(operand, operand.tensors[0].dtype)

    def block_scales(self, x: Tensor, origin: OperandOrigin, copy: Copy) -> tuple[Tensor, Tensor]:
        """The block scales of a copy of `x` and max |x| of each block, both `[R/r, C/c]`: for monitors. Collective over
        the origin's group, as `quantize`."""
        blocks = self._blocks(x, origin, copy)
        (amax,) = reduce_and_check([self._amax(blocks, copy)], origin, [copy], self._watch)
        if copy.operand.amax_scope is AmaxScope.group128:
            amax = amax.repeat_interleave(OUTER_BLOCK // 16, copy.along)
        return self._scales(blocks, amax, copy, "e2m1").scale, blocks.maxima

    def _blocks(self, x: Tensor, origin: OperandOrigin, copy: Copy) -> _Blocks:
        x = self._transformed(x, origin, copy)
        return _Blocks(x, self.passes.block_maxima(x, copy.stored_tile))

    def _transformed(self, x: Tensor, origin: OperandOrigin, copy: Copy) -> Tensor:
        """x behind the Hadamard transform of its copy, rounded once to its type; x itself where there is none."""
        size = copy.operand.rht_size
        if not size:
            return x
        signs = self._signs.of(origin, copy.operand, x.device)
        return self.passes.hadamard(with_signs(x, origin, copy), size, signs, copy.along)

    def _amax(self, blocks: _Blocks, copy: Copy) -> Tensor:
        """The local amax of a copy, an FP32 scalar, one per row of the operand or one per group in a row."""
        if copy.operand.amax_scope is AmaxScope.row:
            return blocks.maxima.amax(copy.along, keepdim=True).to(torch.float32)
        if copy.operand.amax_scope is AmaxScope.group128:
            return blocks.maxima.unflatten(copy.along, (-1, OUTER_BLOCK // 16)).amax(copy.along + 1).to(torch.float32)
        return self.passes.amax(blocks.maxima)

    def _values(self, blocks: _Blocks, amax: Tensor, origin: OperandOrigin, copy: Copy, dtype: torch.dtype) -> Tensor:
        """code * block_scale in x's shape; with the scales of its groups, in FP32, where these vary in a row."""
        operand = copy.operand
        if operand.amax_scope is AmaxScope.group128:
            inner = replace(copy, operand=replace(operand, amax_scope=AmaxScope.tensor))
            spread = amax.repeat_interleave(OUTER_BLOCK // 16, copy.along)
            values = self._values(blocks, spread, origin, inner, torch.float32)
            return values * outer_scale(amax, operand).repeat_interleave(OUTER_BLOCK, copy.along)
        noise = None
        if operand.stochastic:
            key, centred = noise_key(origin, copy), operand.centred_noise
            noise = self.passes.noise(key, origin.rows, origin.cols, operand.noise_bits, centred=centred)
        element = "e2m1" if operand.format in (Format.nvfp4, Format.mxfp4) else "e4m3"
        scales = self._scales(blocks, amax, copy, element)
        if operand.eden:
            key, (rows, cols) = noise_key(origin, copy), block_addresses(origin, copy)
            words = self.passes.noise(key, rows, cols, SCALE_BITS, centred=True)
            scales = self.passes.corrected_scales(blocks.x, scales, words, along=copy.along, group=operand.rht_size)
        return self.passes.rounded(blocks.x, scales, tile=copy.stored_tile, element=element, noise=noise, dtype=dtype)

    def _scales(self, blocks: _Blocks, amax: Tensor, copy: Copy, element: str) -> BlockScales:
        operand = copy.operand
        if operand.format is not Format.nvfp4:
            return self.passes.power_of_two_scales(blocks.maxima, element)
        if operand.four_over_six is FourOverSix.off:
            return self.passes.two_level_scales(
                blocks.maxima,
                amax,
                scale_order=operand.scale_order.name,
                headroom=operand.rounding is Rounding.sr_headroom,
                bound=operand.scale_bound,
                least=operand.least_scale,
            )
        return self.passes.four_over_six_scales(
            *blocks,
            amax,
            tile=copy.stored_tile,
            along=copy.along,
            bound=operand.scale_bound,
            measure=operand.four_over_six.name,
            least=operand.least_scale,
        )

    def _operand(self, operand: QuantizedOperand, dtype: torch.dtype) -> tuple[Tensor, GlobalScale | None]:
        """The operand as `[M, K]`, and its global scale. dtype: in which it is made if it is deferred."""
        if isinstance(operand, _Deferred) and not operand.copy.operand.quantized:
            transformed = self._transformed(operand.tensors[0], operand.origin, operand.copy)
            operand = _Values((transformed,), operand.copy.along)
        elif isinstance(operand, _Deferred):
            x, amax = operand.tensors
            origin, copy = operand.origin, operand.copy
            operand = _scaled(self._values(self._blocks(x, origin, copy), amax, origin, copy, dtype), amax, copy)
        assert isinstance(operand, _Values)
        values, *amaxes = operand.tensors
        scale = GlobalScale(amaxes[0], operand.divisor) if amaxes else None
        return (values if operand.along == 1 else values.T), scale


def values_operand(values: Tensor, amax: Tensor | None, divisor: float) -> QuantizedOperand:
    """An operand `[M, K]` of this backend, of code * block_scale that another one has made."""
    return _Values((values,) if amax is None else (values, amax), 1, divisor)


def _scaled(values: Tensor, amax: Tensor, copy: Copy) -> _Values:
    if copy.operand.format is not Format.nvfp4 or copy.operand.amax_scope is AmaxScope.group128:  # no global scale
        return _Values((values,), copy.along)
    return _Values((values, amax), copy.along, 6.0 * copy.operand.scale_bound)
