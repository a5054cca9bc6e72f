"""The code tables of E2M1, E4M3 and E8M0: encode, decode, pack.

This is the readable form, written with comparisons and tables so that it can be checked by eye against the paper's
section 2; `rounding` reaches the same values by arithmetic. E4M3 uses torch's own cast, which rounds to nearest even
and saturates once its input is clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor

# E2M1: code 0..7 for these values, bit 3 is the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0


def encode_e2m1(x: Tensor) -> Tensor:
    """Codes (uint8, 0..15) of the E2M1 values nearest to FP32 `x`; ties to the even code; saturates at +-6.

    Decision points: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
    """
    a = x.abs()
    steps = [a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0]
    return _with_sign(sum(step.to(torch.uint8) for step in steps), x)


def encode_e2m1_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """Codes of `x` rounded up with a probability equal to its position between two grid points.

    noise: FP32 in [0, 1). The spacing at |x| (0.5 below 2, 1 below 4, 2 above) times the noise is added, and the sum is
    rounded down to the grid: Transformer Engine's software form. |x| above 6 gives 6.
    """
    a = x.abs().clamp(max=E2M1_MAX)
    spacing = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    moved = a + noise * spacing
    return _with_sign(sum((moved >= value).to(torch.uint8) for value in E2M1_VALUES[1:]), x)


def _with_sign(magnitude: Tensor | int, x: Tensor) -> Tensor:
    assert isinstance(magnitude, Tensor)
    return magnitude | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """FP32 values of E2M1 codes (uint8, 0..15)."""
    table = torch.stack([torch.full((), value, device=codes.device) for value in E2M1_VALUES])  # no copy of a list
    return torch.cat([table, -table])[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """Two codes per byte, `[R, C]` to `[R, C/2]`: the even column in the low nibble."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """`[R, C/2]` bytes to `[R, C]` codes."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).view(packed.shape[0], -1)


def encode_e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn nearest to `x`, ties to even, saturating at +-448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_e8m0_up(x: Tensor) -> Tensor:
    """float8_e8m0fnu: the smallest power of two in [2^-127, 2^126] that is not below `x` >= 0."""
    mantissa, exponent = torch.frexp(x.double())  # x = mantissa * 2^exponent with mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 126)
    exponent = torch.where(x == 0, -127, exponent)
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
