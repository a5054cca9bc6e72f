"""Quantized operands and products of Transformer Engine against the emulation, byte by byte.

Everything before the GEMM can be compared bit for bit: Transformer Engine and the `reference` backend, which the
emulated one equals, both hold codes, block scales and an amax. They are brought to one layout (`Parts`), and the first
difference is named with its place. Stochastic rounding draws other bits, so its codes are compared by distribution
(scales and amax still bitwise); products, whose order of sums differs, by an error bound. -0 and +0 count as equal:
TE's kernels keep the sign of zero, its own reference loses it.

fp8_block is compared by its products only: TE stores its scales in a layout of the GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import formats
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.precision.backends import Copy, OperandOrigin, QuantizedOperand, copies_of
from megatron_fp4.precision.backends.randomness import signs_for
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TeOperand, TransformerEngineBackend
from megatron_fp4.precision.operand import AmaxScope, Format, Operand, Rounding
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.proofs.shards import LocalLinear

SCALE_TYPE = {Format.nvfp4: torch.float8_e4m3fn, Format.mxfp8: torch.float8_e8m0fnu}
"""Formats whose operands can be compared, and the type of their block scales."""
MAX_BIAS = 0.01
"""Mean error of stochastic rounding in steps of the code's grid; 8 random bits alone give 1/512."""
STANDARD_ERRORS = 5.0
"""By so many standard errors of the mean the measured bias may be larger; one code errs by at most half a step."""
MAX_STEPS = 1.01
"""A stochastic code is one of the two neighbours of the value that it stands for."""
GEMM_BOUND = 2.0**-12
"""Error of a product, relative to that of the absolute values: accumulation in FP32 with some bits lost."""


@dataclass(frozen=True)
class Finding:
    """What was compared and what came out."""

    what: str
    text: str
    wrong: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.text}"


@dataclass(frozen=True, eq=False)
class Parts:
    """codes: uint8 `[M, K]`, one element each. scales: uint8 `[M, K/block]`. amax: FP32 scalar, None in mxfp8."""

    codes: Tensor
    scales: Tensor
    amax: Tensor | None


@dataclass(frozen=True)
class Mismatch:
    """The first place where two operands differ. part: codes, scales or amax. count: places that differ, of total."""

    part: str
    index: tuple[int, ...]
    theirs: float
    ours: float
    count: int
    total: int

    def __str__(self) -> str:
        place = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return (
            f"{self.part}{place}: Transformer Engine has {self.theirs:g}, the emulation {self.ours:g}"
            f" ({self.count} of {self.total} {self.part} differ)"
        )


def cross_check(linear: LocalLinear, backend: TransformerEngineBackend, device: torch.device) -> list[Finding]:
    """Every quantized operand and product of one linear, with the largest magnitudes taken over this rank's part."""
    tensors = linear.gaussian_tensors(device, torch.bfloat16)
    reference, precision = ReferenceBackend(), _on_one_rank(linear.precision)
    findings: list[Finding] = []
    for name, copies in copies_of(precision).items():
        quantized = [copy for copy in copies if copy.operand.quantized]
        origin = _origin(linear, name, tensors[name])
        theirs = backend.quantize(tensors[name], origin, quantized)
        ours = reference.quantize(tensors[name], origin, quantized)
        for copy, te_operand, reference_operand in zip(quantized, theirs, ours, strict=True):
            if copy.operand.format in SCALE_TYPE:
                te, expected = te_parts(te_operand, copy), reference_parts(reference_operand)
                findings.append(_compare_operand(copy, origin, te, expected, tensors[name]))
    return findings + _compare_products(linear, _to_nearest(precision), backend, tensors)


def reference_parts(operand: QuantizedOperand) -> Parts:
    """The parts of an operand that the `reference` backend made."""
    codes, scales, *amax = operand.tensors
    unpacked = formats.unpack(codes) if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    return Parts(unpacked, scales.view(torch.uint8), amax[0].reshape(()) if amax else None)


def te_parts(operand: QuantizedOperand, copy: Copy) -> Parts:
    """The parts of an operand that the Transformer Engine backend made, without the padding of its scales.

    Raises ValueError if the scales are already in the GEMM's own order, which this backend never asks for.
    """
    assert isinstance(operand, TeOperand)
    if operand.rest.get("with_gemm_swizzled_scales"):
        raise ValueError("Transformer Engine swizzled the block scales while quantizing: they cannot be compared")
    tensors, block = operand.stored(), _block_size(copy)
    data, scales = tensors["data"].view(torch.uint8), tensors["scale_inv"].view(torch.uint8)
    if copy.operand.format is Format.mxfp8:
        if copy.along == 0:  # kept in the layout of the tensor
            data, scales = data.T, scales.T
        return Parts(data, scales[: data.shape[0], : data.shape[1] // block], None)
    codes = formats.unpack(data)
    return Parts(codes, scales[: codes.shape[0], : codes.shape[1] // block], tensors["amax"].reshape(()))


def first_mismatch(theirs: Parts, ours: Parts, copy: Copy, *, with_codes: bool = True) -> Mismatch | None:
    """The first difference in the order amax, scales, codes, since each follows from the one before.

    with_codes: False for stochastic rounding.
    """
    if theirs.amax is not None and ours.amax is not None and not torch.equal(theirs.amax, ours.amax):
        return Mismatch("amax", (), theirs.amax.item(), ours.amax.item(), 1, 1)
    scales = [_scale_values(parts.scales, copy) for parts in (theirs, ours)]
    mismatch = _first_difference("scales", scales[0], scales[1])
    if mismatch or not with_codes:
        return mismatch
    return _first_difference("codes", _code_values(theirs.codes, copy), _code_values(ours.codes, copy))


def _first_difference(part: str, theirs: Tensor, ours: Tensor) -> Mismatch | None:
    if theirs.shape != ours.shape:
        raise ValueError(f"{part}: shapes {tuple(theirs.shape)} and {tuple(ours.shape)} of the two backends differ")
    different = theirs != ours
    if not bool(different.any()):
        return None
    index = tuple(different.nonzero()[0].tolist())
    count = int(different.sum())
    return Mismatch(part, index, theirs[index].item(), ours[index].item(), count, different.numel())


def _block_size(copy: Copy) -> int:
    """Elements along the contraction that share a block scale."""
    assert copy.operand.tile is not None
    return copy.operand.tile[1]


def _scale_values(scales: Tensor, copy: Copy) -> Tensor:
    """FP32 `[M, K/block]`."""
    return scales.contiguous().view(SCALE_TYPE[copy.operand.format]).float()


def _code_values(codes: Tensor, copy: Copy) -> Tensor:
    """FP32 `[M, K]`, without any scale."""
    if copy.operand.format is Format.nvfp4:
        return formats.decode_e2m1(codes)
    return codes.contiguous().view(torch.float8_e4m3fn).float()


def _origin(linear: LocalLinear, tensor: str, x: Tensor) -> OperandOrigin:
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape)
    return OperandOrigin(linear.names[0], tensor, rows, cols, Group.single(), seed=1, step=0)


def _compare_operand(copy: Copy, origin: OperandOrigin, theirs: Parts, ours: Parts, x: Tensor) -> Finding:
    what = f"{copy.gemm}.{origin.operand}"
    mismatch = first_mismatch(theirs, ours, copy, with_codes=not copy.operand.stochastic)
    if mismatch is not None:
        return Finding(what, str(mismatch), wrong=True)
    if not copy.operand.stochastic:
        return Finding(what, "amax, scales and codes, bit for bit", wrong=False)
    unrounded = _unrounded_codes(copy, origin, x, theirs)
    bias, farthest = _rounding_errors(_code_values(theirs.codes, copy), unrounded)
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
    block_scale = _scale_values(parts.scales, copy).double().repeat_interleave(_block_size(copy), dim=1)
    decode = block_scale * parts.amax.double() / (formats.E2M1_MAX * operand.scale_bound)
    return torch.where(decode > 0, oriented.double() / decode, 0.0).clamp(-formats.E2M1_MAX, formats.E2M1_MAX)


def _rounding_errors(codes: Tensor, unrounded: Tensor) -> tuple[float, float]:
    """(mean, largest absolute) difference of magnitudes in steps of the E2M1 grid at `unrounded`."""
    magnitude = unrounded.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    difference = (codes.double() * unrounded.sign() - magnitude) / step
    return difference.mean().item(), difference.abs().max().item()


def _compare_products(
    linear: LocalLinear, precision: LinearPrecision, backend: TransformerEngineBackend, tensors: dict[str, Tensor]
) -> list[Finding]:
    """The three GEMMs on nearest-even operands, against FP64 products of the reference's operands."""
    reference = ReferenceBackend()
    theirs: dict[tuple[str, str], QuantizedOperand] = {}
    ours: dict[tuple[str, str], QuantizedOperand] = {}
    for name, copies in copies_of(precision).items():
        origin = _origin(linear, name, tensors[name])
        for operands, maker in ((theirs, backend), (ours, reference)):
            prepared = maker.quantize(tensors[name], origin, copies)
            operands.update({(copy.gemm, name): operand for copy, operand in zip(copies, prepared, strict=True)})
    sizes = dict(zip("TNK", (linear.tokens, *linear.shape), strict=True))
    findings = []
    for gemm in precision.gemms:
        if not gemm.quantized:
            continue
        left, right = ((gemm.name, tensor) for tensor in gemm.tensors)
        product = backend.matmul(theirs[left], theirs[right], out_dtype=torch.float32)
        exact = reference.matmul(ours[left], ours[right], out_dtype=torch.float32)
        largest_term = tensors[left[1]].abs().amax().item() * tensors[right[1]].abs().amax().item()
        error = (product - exact).abs().max().item()
        limit = GEMM_BOUND * max(exact.abs().max().item(), largest_term * sizes[gemm.contracted] ** 0.5)
        findings.append(Finding(gemm.name, f"largest error {error:.2e}, limit {limit:.2e}", wrong=not error <= limit))
    return findings


def _on_one_rank(precision: LinearPrecision) -> LinearPrecision:
    def alone(operand: Operand) -> Operand:
        return replace(operand, amax_scope=AmaxScope.shard) if operand.format is Format.nvfp4 else operand

    return precision.with_operands(alone)


def _to_nearest(precision: LinearPrecision) -> LinearPrecision:
    def nearest(operand: Operand) -> Operand:
        return replace(operand, rounding=Rounding.rne, noise_bits=8) if operand.stochastic else operand

    return precision.with_operands(nearest)
