"""Rounding FP32 values to the E2M1 and E4M3 grids by arithmetic, so that a compiler can fuse it.

Adding and then subtracting 1.5 * 2^23 * step rounds an FP32 number to a multiple of `step`, ties to even; the step
comes from the exponent bits. All functions take and return FP32 *values* on the grid, not codes (codes are in
`formats`). They are written so that contraction to fused multiply-adds cannot change a bit: every product that feeds an
addition is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FLT_MAX = torch.finfo(torch.float32).max
_EXPONENT_BITS = 0x7F800000


def exponent_power(x: Tensor) -> Tensor:
    """2^floor(log2 x) of positive normal FP32 numbers (0 for zero and denormals)."""
    return (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def round_e2m1(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """The E2M1 values nearest to `x` (ties to even), or, with noise, stochastically rounded; saturates at +-6.

    noise: FP32 in [0, 1 - 2^-21], of x's shape (closer to 1, FP32 addition itself could round up). |x| is counted in
    steps of the grid at |x| (0.5 below 2, 1 below 4, 2 above), the noise is added and the sum rounded down. This is
    Transformer Engine's software form (`ptx.cuh`): a sum that crosses into the next binade rounds down to its first
    grid point either way. Nearest-even rounding gives +0 for both zeros (one operation less).
    """
    if noise is None:
        clipped = x.clamp(-E2M1_MAX, E2M1_MAX)
        magnitude = clipped.abs()
        shift = torch.where(magnitude < 2.0, 1.5 * 2.0**22, torch.where(magnitude < 4.0, 1.5 * 2.0**23, 1.5 * 2.0**24))
        return (clipped + shift) - shift
    magnitude = x.abs().clamp(max=E2M1_MAX)
    small, middle = magnitude < 2.0, magnitude < 4.0
    per_step = torch.where(small, 2.0, torch.where(middle, 1.0, 0.5))
    step = torch.where(small, 0.5, torch.where(middle, 1.0, 2.0))
    return torch.copysign(torch.floor(magnitude * per_step + noise) * step, x)


def round_e4m3(x: Tensor) -> Tensor:
    """The E4M3 values nearest to `x`, ties to even; saturates at +-448; spacing 2^-9 below 2^-6."""
    magnitude = x.abs().clamp(max=E4M3_MAX)
    shift = exponent_power(magnitude).clamp(min=2.0**-6) * (1.5 * 2.0**20)  # the spacing is power / 8
    return torch.copysign((magnitude + shift) - shift, x)


def power_of_two_at_least(x: Tensor) -> Tensor:
    """The smallest power of two in [2^-127, 2^126] that is not below `x` >= 0 (an E8M0 scale, rounded up)."""
    bits = x.view(torch.int32)
    power = (((bits + 0x007FFFFF) >> 23).clamp(max=253) << 23).view(torch.float32)
    return torch.where(bits <= 0x00400000, 2.0**-127, power)  # 0x00400000 is 2^-127, a denormal


def power_of_two_inverse(power: Tensor) -> Tensor:
    """1 / power of FP32 powers of two, exactly (2^-127 included)."""
    return ((254 - (power.view(torch.int32) >> 23)) << 23).view(torch.float32)
