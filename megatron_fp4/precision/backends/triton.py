"""Our own kernels: the operands of the emulation as packed codes and scales, multiplied as such.

An operand of nvfp4 takes 4.5 bits an element instead of 16, also while it waits for its backward pass: copies that are
needed later are made at once, for their noise has an address. What the kernels do not make (`obstacle`) the emulated
backend makes, and products with such an operand, or in FP64 (the proof mode), are made of decoded values, which are
exact: the same operands in every case.

Importing this module imports triton: `choose` does so for a run that asks for it, after `triton_limits` has seen the
machine. Not here: the kernels (kernels/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_fp4.kernels.multiply import multiply
from megatron_fp4.kernels.quantize import measure, measure_transformed, noise_words, quantize
from megatron_fp4.kernels.values import Coding, PackedOperand, Target
from megatron_fp4.numerics import QuantizedTensor, fixed_signs
from megatron_fp4.precision.backends.emulated import EmulatedBackend, compile_obstacle, values_operand
from megatron_fp4.precision.backends.finite import NonFiniteWatch, reduce_and_check
from megatron_fp4.precision.backends.product import GlobalScale
from megatron_fp4.precision.backends.protocol import CodedOperand, Copy, OperandOrigin, QuantizedOperand, check_shape
from megatron_fp4.precision.backends.randomness import noise_key, signs_for
from megatron_fp4.precision.backends.triton_limits import BLOCKS, obstacle
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.operand import Format, FourOverSix, Operand, Rounding, ScaleOrder, Signs

CELLS = 1024
"""Zeros that one launch makes."""


@dataclass(frozen=True, eq=False)
class _Packed(CodedOperand):
    """tensors = (codes, scales) or (codes, scales, amax), see `PackedOperand`. dtype: of the tensor it was made of."""

    how: Coding
    dtype: torch.dtype

    def row_major(self) -> tuple[Tensor, ...]:
        """See `CodedOperand.row_major`: codes and scales in the types of their formats."""
        packed = _unwrapped(self)
        codes = packed.codes if self.how.bits == 4 else packed.codes.view(torch.float8_e4m3fn)
        scale_type = torch.float8_e4m3fn if self.how.aim else torch.float8_e8m0fnu
        return codes, packed.row_major_scales().view(scale_type), *self.tensors[2:]


class TritonBackend:
    """See `Backend`; on GPUs, and on CPUs with TRITON_INTERPRET=1."""

    def __init__(self, config: PrecisionConfig, watch: NonFiniteWatch | None = None) -> None:
        on_cpu = not torch.cuda.is_available()
        self._emulated = EmulatedBackend(config.compile and not (on_cpu and compile_obstacle()), watch)
        self._watch = watch
        self._targets: dict[torch.device, Target] = {}
        self._cells: dict[torch.device, Tensor] = {}  # zeros that are not used yet

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`. Deferred copies are made at once."""
        operands: dict[Copy, QuantizedOperand] = {}
        others = [copy for copy in copies if not copy.operand.quantized or obstacle(copy.operand)]
        if others:
            operands |= zip(others, self._emulated.quantize(x, origin, others), strict=True)
        coded = [copy for copy in copies if copy not in operands]
        if coded:
            for copy in coded:
                check_shape(x, origin, copy)
            operands |= self._packed(x.contiguous(), origin, coded)
        return tuple(operands[copy] for copy in copies)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`. Where the sum goes into FP32, it is made inside the GEMM."""
        if not (isinstance(a, _Packed) and isinstance(b, _Packed)) or not _multiply_as_codes(a, b, out_dtype):
            left, right = (_decoded(one) if isinstance(one, _Packed) else one for one in (a, b))
            return self._emulated.matmul(left, right, out_dtype=out_dtype, accumulate_into=accumulate_into)
        first, second = _unwrapped(a), _unwrapped(b)
        target = self._target(a.tensors[0].device)
        if accumulate_into is not None and accumulate_into.dtype == torch.float32 and accumulate_into.is_contiguous():
            rounded = out_dtype == torch.bfloat16
            multiply(first, second, accumulate_into, target=target, accumulate=True, rounded=rounded)
            return accumulate_into
        out = torch.empty(first.lines, second.lines, dtype=out_dtype, device=a.tensors[0].device)
        multiply(first, second, out, target=target)
        return out if accumulate_into is None else accumulate_into.add_(out)

    def values(self, operand: QuantizedOperand) -> tuple[Tensor, GlobalScale | None]:
        """See `EmulatedBackend.values`."""
        return self._emulated.values(_decoded(operand) if isinstance(operand, _Packed) else operand)

    def _packed(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> dict[Copy, QuantizedOperand]:
        """All copies of x: one reading for the amaxes, then one per copy, or one for two copies of the same codes."""
        scaled = [copy for copy in copies if copy.operand.format is Format.nvfp4]
        amaxes = self._amaxes(x, origin, scaled)
        first, *rest = copies
        if rest and first.operand == rest[0].operand and _turns(first.operand):
            results = self._quantize(x, origin, first, amaxes[first], both=True)
            order = sorted(copies, key=lambda copy: copy.along)
            return {copy: _kept(result, x.dtype) for copy, result in zip(order, results, strict=True)}
        operands: dict[Copy, QuantizedOperand] = {}
        others: dict[Copy, Tensor] = {}
        for copy in copies:
            amax = amaxes[copy] if copy in amaxes else others.setdefault(copy, self._zeros(1, x.device))
            (result,) = self._quantize(x, origin, copy, amax)
            operands[copy] = _kept(result, x.dtype)
        if others:  # their amaxes decide nothing: there is no collective
            reduce_and_check([cell.view(torch.float32)[0] for cell in others.values()], origin, [*others], self._watch)
        return operands

    def _amaxes(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> dict[Copy, Tensor]:
        """The amax of each copy over its scope, an FP32 scalar: of x itself, and of each transform, in one reading."""
        if not copies:
            return {}
        transformed: dict[Copy, Tensor] = {}
        itself = None
        for copy in copies:
            if copy.operand.rht_size:
                cells = self._zeros(2, x.device)
                how = coding_of(copy.operand)
                measure_transformed(x, copy.along, how, _sign_mask(origin, copy.operand), cells)
                itself, transformed[copy] = cells.view(torch.float32).unbind()
        if itself is None:
            cells = self._zeros(1, x.device)
            measure(x, cells)
            itself = cells.view(torch.float32)[0]
        local = [transformed.get(copy, itself) for copy in copies]
        return dict(zip(copies, reduce_and_check(local, origin, copies, self._watch), strict=True))

    def _quantize(
        self, x: Tensor, origin: OperandOrigin, copy: Copy, amax: Tensor, *, both: bool = False
    ) -> tuple[PackedOperand, ...]:
        words = None
        if copy.operand.stochastic:
            words = noise_words(noise_key(origin, copy), origin.rows, origin.cols)
        return quantize(
            x,
            0 if both else copy.along,
            coding_of(copy.operand),
            amax,
            target=self._target(x.device),
            words=words,
            signs=_sign_mask(origin, copy.operand),
            both=both,
        )

    def _target(self, device: torch.device) -> Target:
        if device not in self._targets:
            self._targets[device] = Target.of(device)
        return self._targets[device]

    def _zeros(self, count: int, device: torch.device) -> Tensor:
        """int32 `[count]` of zeros for atomic maxima, used once: cut from a piece that one launch clears for many."""
        free = self._cells.get(device)
        if free is None or len(free) < count:
            free = torch.zeros(CELLS, dtype=torch.int32, device=device)
        self._cells[device] = free[count:]
        return free[:count]


def _multiply_as_codes(a: _Packed, b: _Packed, out_dtype: torch.dtype) -> bool:
    same_format = (a.how.bits, a.how.block) == (b.how.bits, b.how.block)
    return same_format and out_dtype in (torch.bfloat16, torch.float32)


def coding_of(operand: Operand) -> Coding:
    """What the kernels must know of an operand."""
    return Coding(
        aim=6.0 * operand.scale_bound if operand.format is Format.nvfp4 else 0.0,
        block=BLOCKS[operand.format],
        bits=8 if operand.format is Format.mxfp8 else 4,
        paper_order=operand.scale_order is ScaleOrder.paper,
        wider=operand.rounding is Rounding.sr_headroom,
        over=list(FourOverSix).index(operand.four_over_six),
        square=operand.tile == (16, 16),
        noise_bits=operand.noise_bits if operand.stochastic else 0,
        centred=operand.centred_noise,
        rht=operand.rht_size,
    )


def _unwrapped(operand: _Packed) -> PackedOperand:
    codes, scales, *amax = operand.tensors
    return PackedOperand(codes, scales, amax[0] if amax else None, operand.how)


def _decoded(operand: _Packed) -> QuantizedOperand:
    """The operand as the emulated backend holds it."""
    codes, scales, *amax = operand.row_major()
    values = QuantizedTensor(codes, scales, None).operand(operand.dtype)
    return values_operand(values, amax[0] if amax else None, operand.how.aim)


def _kept(result: PackedOperand, dtype: torch.dtype) -> _Packed:
    amax = () if result.amax is None else (result.amax,)
    return _Packed((result.codes, result.scales, *amax), result.how, dtype)


def _turns(operand: Operand) -> bool:
    """Whether one launch makes the copies for both directions, of the same codes."""
    return operand.transposes and operand.tile == (16, 16)


def _sign_mask(origin: OperandOrigin, operand: Operand) -> int:
    """Bit i is set where element i of a group of the transform is negated."""
    if operand.rht_size and operand.rht_signs is Signs.fixed:
        return _fixed_sign_mask(operand.rht_size)
    signs = signs_for(origin, operand, torch.device("cpu"))
    return 0 if signs is None else _mask(signs)


@cache
def _fixed_sign_mask(size: int) -> int:
    return _mask(fixed_signs(size))


def _mask(signs: Tensor) -> int:
    return sum(1 << i for i, sign in enumerate(signs.tolist()) if sign < 0)
