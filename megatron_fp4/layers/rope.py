"""Rotary position embedding (arXiv 2104.09864), halves convention, FP32 angles."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions_BS: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, float32 `[B, S, head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32) / head_dim
    angles = positions_BS.float()[..., None] * base**-exponents
    return angles.cos(), angles.sin()


def apply_rope(x_BSHE: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + E/2) of every head; `x.dtype` in and out."""
    cos, sin = (part[:, :, None, :] for part in angles)
    first, second = x_BSHE.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHE.dtype)
