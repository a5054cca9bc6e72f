"""Quantized operands of two backends, byte by byte.

One idea: Transformer Engine and the `reference` backend both hold codes, block scales and an amax; they are brought to
one layout (`Parts`) and compared, and the first difference is named with its place. -0 and +0 count as equal: TE's
kernels keep the sign of zero, its own reference loses it.

fp8_block is not compared here: TE stores its scales in a layout of the GEMM; it is checked by products only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.numerics import formats
from megatron_fp4.precision.backends import Copy, Prepared
from megatron_fp4.precision.backends.transformer_engine import stored
from megatron_fp4.precision.operand import Format

BLOCK = {Format.nvfp4: 16, Format.mxfp8: 32}
"""Formats that can be compared, and the elements per block scale."""


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


def reference_parts(prepared: Prepared) -> Parts:
    """Of an operand that the `reference` backend made."""
    codes, scales, *amax = prepared.tensors
    plain = formats.unpack(codes) if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    return Parts(plain, scales.view(torch.uint8), amax[0].reshape(()) if amax else None)


def te_parts(prepared: Prepared, copy: Copy) -> Parts:
    """Of an operand that the Transformer Engine backend made, without the padding of its scales.

    Raises ValueError if the scales are already in the GEMM's own order, which this backend never asks for.
    """
    if prepared.meaning.rest.get("with_gemm_swizzled_scales"):
        raise ValueError("Transformer Engine swizzled the block scales while quantizing: they cannot be compared")
    tensors, block = stored(prepared), BLOCK[copy.operand.format]
    data, scales = tensors["data"].view(torch.uint8), tensors["scale_inv"].view(torch.uint8)
    if copy.operand.format is Format.mxfp8:
        if copy.along == 0:  # kept in the layout of the source
            data, scales = data.T, scales.T
        return Parts(data, scales[: data.shape[0], : data.shape[1] // block], None)
    codes = formats.unpack(data)
    return Parts(codes, scales[: codes.shape[0], : codes.shape[1] // block], tensors["amax"].reshape(()))


def first_mismatch(theirs: Parts, ours: Parts, copy: Copy, *, with_codes: bool = True) -> Mismatch | None:
    """In the order amax, scales, codes, since each follows from the one before. with_codes: False for SR."""
    if theirs.amax is not None and ours.amax is not None and not torch.equal(theirs.amax, ours.amax):
        return Mismatch("amax", (), theirs.amax.item(), ours.amax.item(), 1, 1)
    scale_type = torch.float8_e4m3fn if copy.operand.format is Format.nvfp4 else torch.float8_e8m0fnu
    values = [scales.contiguous().view(scale_type).float() for scales in (theirs.scales, ours.scales)]
    found = _first("scales", values[0], values[1])
    if found or not with_codes:
        return found
    return _first("codes", decoded(theirs.codes, copy), decoded(ours.codes, copy))


def decoded(codes: Tensor, copy: Copy) -> Tensor:
    """FP32 values of codes, without any scale."""
    if copy.operand.format is Format.nvfp4:
        return formats.decode_e2m1(codes)
    return codes.contiguous().view(torch.float8_e4m3fn).float()


def _first(part: str, theirs: Tensor, ours: Tensor) -> Mismatch | None:
    if theirs.shape != ours.shape:
        raise ValueError(f"{part}: shapes {tuple(theirs.shape)} and {tuple(ours.shape)} of the two backends differ")
    different = theirs != ours
    if not bool(different.any()):
        return None
    index = tuple(different.nonzero()[0].tolist())
    count = int(different.sum())
    return Mismatch(part, index, theirs[index].item(), ours[index].item(), count, different.numel())
