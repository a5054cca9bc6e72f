"""Quantized operands and products of a backend against the `reference` backend, byte by byte.

Everything before the GEMM can be compared bit for bit: a backend and the reference both hold codes, block scales and an
amax. They are brought to one layout (parts.py), and the first difference is named with its place. What keeps no codes
is compared by its values, code * scale. Where a backend draws noise of its own, as Transformer Engine does, stochastic
codes are compared by distribution (scales and amax still bitwise). Of Transformer Engine -0 and +0 count as equal: its
kernels keep the sign of zero, its own reference loses it.

fp8_block of Transformer Engine and of native_fp8 is compared by its products only: its scales lie as the GEMM wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fp4.numerics import formats
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.precision.backends import Backend, Copy, OperandOrigin, QuantizedOperand, copies_of
from megatron_fp4.precision.backends.protocol import CodedOperand
from megatron_fp4.precision.backends.randomness import signs_for
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TeOperand, TransformerEngineBackend
from megatron_fp4.precision.operand import AmaxScope, Format, Operand, Rounding
from megatron_fp4.precision.selftest.linear_case import LinearCase
from megatron_fp4.precision.selftest.parts import (
    Parts,
    ReadableBackend,
    block_size,
    code_values,
    first_mismatch,
    first_value_mismatch,
    reference_parts,
    scale_values,
    te_parts,
)
from megatron_fp4.precision.selftest.products import Finding, Operands, compare_product
from megatron_fp4.precision.spec import LinearPrecision

MAX_BIAS = 0.01
"""Mean error of stochastic rounding in steps of the code's grid; 8 random bits alone give 1/512."""
STANDARD_ERRORS = 5.0
"""By so many standard errors of the mean the measured bias may be larger; one code errs by at most half a step."""
MAX_STEPS = 1.01
"""A stochastic code is one of the two neighbours of the value that it stands for."""

Tensors = Mapping[str, Tensor]
"""x, w and dy."""


def cross_check(
    case: LinearCase, backend: Backend, tensors: Tensors, reference_device: torch.device | None = None
) -> list[Finding]:
    """Every quantized operand and product of one linear, with the largest magnitudes taken over this rank's part.

    tensors: on the device of the backend. reference_device: where the reference computes; None: there too.
    """
    on_reference = {name: tensor.to(reference_device or tensor.device) for name, tensor in tensors.items()}
    theirs, ours, findings = compare_operands(case, backend, tensors, on_reference)
    precision = _on_one_rank(case.precision)
    if isinstance(backend, TransformerEngineBackend):  # whose noise is its own
        precision = _to_nearest(precision)
        theirs = quantized(case, precision, backend, tensors)
        ours = quantized(case, precision, ReferenceBackend(), on_reference)
    largest = {name: tensor.abs().amax().item() for name, tensor in tensors.items()}
    gemms = [gemm for gemm in precision.gemms if gemm.quantized]
    return findings + [compare_product(case, gemm, backend, theirs, ours, largest) for gemm in gemms]


def compare_operands(
    case: LinearCase, backend: Backend, tensors: Tensors, on_reference: Tensors
) -> tuple[Operands, Operands, list[Finding]]:
    """The operands of `backend`, those of the reference, and what differs."""
    precision = _on_one_rank(case.precision)
    theirs = quantized(case, precision, backend, tensors)
    ours = quantized(case, precision, ReferenceBackend(), on_reference)
    findings: list[Finding] = []
    for name, copies in copies_of(precision).items():
        for copy in copies:
            if copy.operand.quantized:
                pair = theirs[copy.gemm, name], ours[copy.gemm, name]
                findings += _compare_operand(
                    copy, case.origin(name, on_reference[name].device), backend, pair, on_reference[name]
                )
    return theirs, ours, findings


def quantized(case: LinearCase, precision: LinearPrecision, backend: Backend, tensors: Tensors) -> Operands:
    """All six operands of a linear, as `backend` makes them."""
    operands: Operands = {}
    for name, copies in copies_of(precision).items():
        results = backend.quantize(tensors[name], case.origin(name, tensors[name].device), copies)
        operands.update({(copy.gemm, name): operand for copy, operand in zip(copies, results, strict=True)})
    return operands


def name_of(backend: Backend) -> str:
    """A backend as people call it."""
    by_te = isinstance(backend, TransformerEngineBackend)
    return "Transformer Engine" if by_te else type(backend).__name__.removesuffix("Backend").lower()


def _compare_operand(
    copy: Copy,
    origin: OperandOrigin,
    backend: Backend,
    operands: tuple[QuantizedOperand, QuantizedOperand],
    x: Tensor,
) -> list[Finding]:
    """operands: of the backend, and of the reference. x: where the reference is. Nothing for what cannot be read."""
    what, (theirs, ours) = f"{copy.gemm}.{origin.operand}", operands
    if isinstance(theirs, TeOperand):
        if copy.operand.format is Format.fp8_block:
            return []
        return [_compare_te(what, copy, origin, _moved(te_parts(theirs, copy), x.device), reference_parts(ours), x)]
    if isinstance(theirs, CodedOperand):
        parts = _moved(reference_parts(theirs), x.device)
        mismatch = first_mismatch(parts, reference_parts(ours), copy, signed_zero=True, who=name_of(backend))
        text = "amax, scales and codes, bit for bit" if parts.amax is not None else "scales and codes, bit for bit"
    elif isinstance(backend, ReadableBackend):
        mismatch = first_value_mismatch(backend, name_of(backend), theirs, ours)
        text = "amax and code * scale, bit for bit"
    else:
        return []
    return [Finding(what, str(mismatch) if mismatch else text, wrong=mismatch is not None)]


def _moved(parts: Parts, device: torch.device) -> Parts:
    amax = None if parts.amax is None else parts.amax.to(device)
    return Parts(parts.codes.to(device), parts.scales.to(device), amax)


def _compare_te(what: str, copy: Copy, origin: OperandOrigin, theirs: Parts, ours: Parts, x: Tensor) -> Finding:
    mismatch = first_mismatch(theirs, ours, copy, with_codes=not copy.operand.stochastic)
    if mismatch is not None:
        return Finding(what, str(mismatch), wrong=True)
    if not copy.operand.stochastic:
        return Finding(what, "amax, scales and codes, bit for bit", wrong=False)
    unrounded = _unrounded_codes(copy, origin, x, theirs)
    bias, farthest = _rounding_errors(code_values(theirs.codes, copy), unrounded)
    text = f"amax and scales bit for bit; stochastic codes: bias {bias:+.4f} steps, farthest {farthest:.2f} steps"
    max_bias = MAX_BIAS + STANDARD_ERRORS * 0.5 / unrounded.numel() ** 0.5
    return Finding(what, text, wrong=abs(bias) > max_bias or farthest > MAX_STEPS)


def _unrounded_codes(copy: Copy, origin: OperandOrigin, x: Tensor, parts: Parts) -> Tensor:
    """The values, FP64 `[M, K]`, that were rounded to the codes of an nvfp4 operand; its ends beyond the grid."""
    operand = copy.operand
    assert operand.format is Format.nvfp4, "only E2M1 codes are rounded stochastically"
    assert parts.amax is not None
    oriented = x if copy.along == 1 else x.T.contiguous()
    if operand.rht_size:
        oriented = hadamard(oriented, operand.rht_size, signs_for(origin, operand, x.device), dim=1)
    block_scale = scale_values(parts.scales, copy).double().repeat_interleave(block_size(copy), dim=1)
    decode = block_scale * parts.amax.double() / (formats.E2M1_MAX * operand.scale_bound)
    return torch.where(decode > 0, oriented.double() / decode, 0.0).clamp(-formats.E2M1_MAX, formats.E2M1_MAX)


def _rounding_errors(codes: Tensor, unrounded: Tensor) -> tuple[float, float]:
    """(mean, largest absolute) difference of magnitudes in steps of the E2M1 grid at `unrounded`."""
    magnitude = unrounded.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    difference = (codes.double() * unrounded.sign() - magnitude) / step
    return difference.mean().item(), difference.abs().max().item()


def _on_one_rank(precision: LinearPrecision) -> LinearPrecision:
    def alone(operand: Operand) -> Operand:
        operand = replace(operand, center=False)  # which is arithmetic around every backend, the same for all
        if operand.format is not Format.nvfp4 or operand.amax_scope is AmaxScope.group128:
            return operand
        return replace(operand, amax_scope=AmaxScope.shard)

    return precision.with_operands(alone)


def _to_nearest(precision: LinearPrecision) -> LinearPrecision:
    def nearest(operand: Operand) -> Operand:
        return replace(operand, rounding=Rounding.rne, noise_bits=8) if operand.stochastic else operand

    return precision.with_operands(nearest)
