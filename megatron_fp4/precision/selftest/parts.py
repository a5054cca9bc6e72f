"""An operand as codes, block scales and amax in one layout, and the first place where two differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_fp4.numerics import formats
from megatron_fp4.precision.backends import Copy, QuantizedOperand
from megatron_fp4.precision.backends.product import GlobalScale
from megatron_fp4.precision.backends.protocol import CodedOperand
from megatron_fp4.precision.backends.reference import decode
from megatron_fp4.precision.backends.transformer_engine import TeOperand
from megatron_fp4.precision.operand import Format

SCALE_TYPE = {
    Format.nvfp4: torch.float8_e4m3fn,
    Format.mxfp4: torch.float8_e8m0fnu,
    Format.mxfp8: torch.float8_e8m0fnu,
    Format.fp8_block: torch.float8_e8m0fnu,
}
"""Type of block scales, by format."""


@runtime_checkable
class ReadableBackend(Protocol):
    """A backend whose operands can be read as values."""

    def values(self, operand: QuantizedOperand) -> tuple[Tensor, GlobalScale | None]:
        """`[M, K]` of code * scale, without the global scale, and that scale."""


@dataclass(frozen=True, eq=False)
class Parts:
    """codes: uint8 `[M, K]`, one element each. scales: uint8 `[M, K/block]`. amax: FP32 scalar, only in nvfp4."""

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
    who: str = "Transformer Engine"

    def __str__(self) -> str:
        place = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return (
            f"{self.part}{place}: {self.who} has {self.theirs:g}, the emulation {self.ours:g}"
            f" ({self.count} of {self.total} {self.part} differ)"
        )


def reference_parts(operand: QuantizedOperand) -> Parts:
    """The parts of an operand that the `reference` backend made, or another one that keeps codes."""
    assert isinstance(operand, CodedOperand)
    codes, scales, *amax = operand.row_major()
    unpacked = formats.unpack(codes) if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    return Parts(unpacked, scales.view(torch.uint8), amax[0].reshape(()) if amax else None)


def te_parts(operand: QuantizedOperand, copy: Copy) -> Parts:
    """The parts of an operand that the Transformer Engine backend made, without the padding of its scales.

    Raises ValueError if the scales are already in the GEMM's own order, which this backend never asks for.
    """
    assert isinstance(operand, TeOperand)
    if operand.rest.get("with_gemm_swizzled_scales"):
        raise ValueError("Transformer Engine swizzled the block scales while quantizing: they cannot be compared")
    tensors, block = operand.stored(), block_size(copy)
    data, scales = tensors["data"].view(torch.uint8), tensors["scale_inv"].view(torch.uint8)
    if copy.operand.format is Format.mxfp8:
        if copy.along == 0:  # kept in the layout of the tensor
            data, scales = data.T, scales.T
        return Parts(data, scales[: data.shape[0], : data.shape[1] // block], None)
    codes = formats.unpack(data)
    return Parts(codes, scales[: codes.shape[0], : codes.shape[1] // block], tensors["amax"].reshape(()))


def first_mismatch(
    theirs: Parts,
    ours: Parts,
    copy: Copy,
    *,
    with_codes: bool = True,
    signed_zero: bool = False,
    who: str = "Transformer Engine",
) -> Mismatch | None:
    """The first difference in the order amax, scales, codes, since each follows from the one before.

    with_codes: False for noise of the backend's own. signed_zero: -0 and +0 differ.
    """
    if theirs.amax is not None and ours.amax is not None and not torch.equal(theirs.amax, ours.amax):
        return Mismatch("amax", (), theirs.amax.item(), ours.amax.item(), 1, 1, who)
    scales = [scale_values(parts.scales, copy) for parts in (theirs, ours)]
    mismatch = first_difference("scales", scales[0], scales[1], who)
    if mismatch or not with_codes:
        return mismatch
    codes = [code_values(parts.codes, copy) for parts in (theirs, ours)]
    signs = [parts.codes for parts in (theirs, ours)] if signed_zero else codes
    return first_difference("codes", codes[0], codes[1], who) or first_difference("codes", signs[0], signs[1], who)


def first_value_mismatch(
    backend: ReadableBackend, who: str, theirs: QuantizedOperand, ours: QuantizedOperand
) -> Mismatch | None:
    """The first difference of values that are kept without codes."""
    (values, scale), (expected, expected_scale) = backend.values(theirs), decode(ours)
    if scale is not None and expected_scale is not None:
        amaxes = [one.amax.reshape(-1).to(expected.device) for one in (scale, expected_scale)]
        if mismatch := first_difference("amax", amaxes[0], amaxes[1], who):
            return mismatch
    return first_difference("values", values.to(expected.device).float(), expected.float(), who)


def first_difference(part: str, theirs: Tensor, ours: Tensor, who: str) -> Mismatch | None:
    if theirs.shape != ours.shape:
        raise ValueError(f"{part}: shapes {tuple(theirs.shape)} and {tuple(ours.shape)} of the two backends differ")
    different = theirs != ours
    if not bool(different.any()):
        return None
    index = tuple(different.nonzero()[0].tolist())
    count = int(different.sum())
    return Mismatch(part, index, theirs[index].item(), ours[index].item(), count, different.numel(), who)


def block_size(copy: Copy) -> int:
    """Elements along the contraction that share a block scale."""
    assert copy.operand.tile is not None
    return copy.operand.tile[1]


def scale_values(scales: Tensor, copy: Copy) -> Tensor:
    """FP32 `[M, K/block]`."""
    return scales.contiguous().view(SCALE_TYPE[copy.operand.format]).float()


def code_values(codes: Tensor, copy: Copy) -> Tensor:
    """FP32 `[M, K]`, without any scale."""
    if copy.operand.format in (Format.nvfp4, Format.mxfp4):
        return formats.decode_e2m1(codes)
    return codes.contiguous().view(torch.float8_e4m3fn).float()
