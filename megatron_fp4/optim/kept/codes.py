"""Numbers in 8 bits, a power of two for each block of 64.

    Int8         x = code 2^e                         a moment with a sign, codes -127 to 127
    Fp8          x = E4M3 code 2^e                    a moment with a sign
    RootInt8     x = (code 2^e)^2                     a second moment, codes 1 to 255, 0 for 0 alone
    UnsignedFp8  x = E5M3 code, exponents up to e     a second moment, 32 octaves, 0 for 0 alone

A second moment divides: one that was flushed to 0 would turn a small gradient into a huge step (the zero point problem
of arXiv 2309.01507), so what is below the smallest code becomes that code. Its codes are spaced as those of its root,
which is what an update divides by. Scales are powers of two, so that what was decoded is encoded to the same value, and
every operation is exact but the one that rounds, and compiled kernels, which contract and approximate, give the same
bits. Those with which `RootInt8` encodes are not exact: torch's root is not the nearest number for a fifth of all
numbers, a compiled one is.

words: 32 random bits an element. An element is rounded up with the probability of its distance from the code below, so
the mean of many roundings is right: nearest codes would lose a change of 5 percent a step (beta 0.95) for good.
"""

from __future__ import annotations

import struct
from typing import Protocol

import torch
from torch import Tensor

MANTISSA = 23
BIAS = 127


class Codes(Protocol):
    """A format. code_dtype: of a code; a block has one uint8 beside its codes. exact: how it encodes, see above."""

    code_dtype: torch.dtype
    exact: bool

    def encode(self, values: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of FP32 `values [blocks, 64]`: `[blocks, 64]`, uint8 `[blocks, 1]`."""

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """FP32 `[blocks, 64]`."""


def round_bits(values: Tensor, words: Tensor, dropped: int) -> Tensor:
    """FP32 `values` without the last `dropped` bits of their mantissas, as int32, rounded stochastically."""
    mask = (1 << dropped) - 1
    return (values.view(torch.int32) + (words & mask)) & ~mask


def to_bf16(values: Tensor, words: Tensor) -> Tensor:
    """BF16, rounded stochastically."""
    return round_bits(values, words, 16).view(torch.float32).to(torch.bfloat16)


def _scales(largest: Tensor, top: float, least: int = 1) -> Tensor:
    """Biased exponents e of the smallest powers of two with `largest <= top 2^e`, int32; 1 <= top < 2^8."""
    (bits,) = struct.unpack("<i", struct.pack("<f", top))
    exponent, mantissa = (bits >> MANTISSA) - BIAS, bits & (2**MANTISSA - 1)
    carry = 2**MANTISSA - 1 - mantissa  # adds one to the exponent of what has a larger mantissa
    return (((largest.view(torch.int32) + carry) >> MANTISSA) - exponent).clamp(least, 254)


def _power(scales: Tensor) -> Tensor:
    """2^e of biased exponents."""
    return (scales.to(torch.int32) << MANTISSA).view(torch.float32)


def _inverse(scales: Tensor) -> Tensor:
    """2^-e of biased exponents, whose product is what dividing by 2^e gives; at most 253."""
    return ((2 * BIAS - scales.to(torch.int32)) << MANTISSA).view(torch.float32)


def _uniform(words: Tensor) -> Tensor:
    """FP32 in [0, 1), multiples of 2^-16: added to a code they are exact."""
    return (words & 0xFFFF).to(torch.float32) * 2.0**-16


class _Scaled:
    """Codes that are numbers, times the scale."""

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes.to(torch.float32) * _power(scales)


class Int8(_Scaled):
    """Evenly spaced codes."""

    code_dtype, exact = torch.int8, True

    def encode(self, values: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        scales = _scales(values.abs().max(1, keepdim=True).values, 127.0)
        codes = (values * _inverse(scales) + _uniform(words)).floor_().clamp_(-127, 127)
        return codes.to(self.code_dtype), scales.to(torch.uint8)


class Fp8(_Scaled):
    """E4M3, whose largest number is 448; below 2^-6 its codes are evenly spaced."""

    code_dtype, exact = torch.float8_e4m3fn, True

    def encode(self, values: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        scales = _scales(values.abs().max(1, keepdim=True).values, 448.0)
        scaled = values * _inverse(scales)
        normal = round_bits(scaled, words, MANTISSA - 3).view(torch.float32)
        small = (scaled * 2.0**9 + _uniform(words)).floor_() * 2.0**-9
        rounded = torch.where(scaled.abs() < 2.0**-6, small, normal).clamp_(-448.0, 448.0)
        return rounded.to(self.code_dtype), scales.to(torch.uint8)


class RootInt8:
    """Evenly spaced codes of the root; the rounding is right in the mean of the number itself, not of its root."""

    code_dtype, exact = torch.uint8, False

    def encode(self, values: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        roots = values.sqrt()
        scales = _scales(roots.max(1, keepdim=True).values, 255.0, least=BIAS - 60)  # whose squares are no denormals
        roots /= _power(scales)
        below = roots.floor()
        up = _uniform(words) < (roots * roots - below * below) / (2 * below + 1)
        codes = (below + up).clamp_(0, 255).maximum((values > 0).to(torch.float32))
        return codes.to(self.code_dtype), scales.to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        return (codes.to(torch.float32) * _power(scales)).square_()


class UnsignedFp8:
    """The upper bits of an FP32 number: 5 of the exponent, counted from the block's largest, and 3 of the mantissa."""

    code_dtype, exact = torch.uint8, True

    def encode(self, values: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        tops = round_bits(values, words, MANTISSA - 3) >> (MANTISSA - 3)
        scales = tops.max(1, keepdim=True).values >> 3
        codes = (tops - ((scales - 31) << 3)).clamp_(1, 255) * (values > 0)
        return codes.to(self.code_dtype), scales.to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        codes = codes.to(torch.int32)
        tops = (codes + ((scales.to(torch.int32) - 31) << 3)).clamp_(min=1) * (codes > 0)
        return (tops << (MANTISSA - 3)).view(torch.float32)
