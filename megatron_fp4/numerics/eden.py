"""MS-EDEN (arXiv 2601.22813): nearest codes whose shrinking is undone by stochastically rounded block scales.

Rounding to nearest has half the error of stochastic rounding, but a bias. Behind a random rotation (a Hadamard
transform with random signs, of groups of 128) the bias is along the group itself: <y, q> < <y, y>. EDEN's factor
<y, y> / <y, q> of the group undoes it, and is folded into the E4M3 scales of its blocks, which are rounded up or down
at random so that their mean is right. The component along the group is then exact in the mean over this noise, and the
errors across it cancel in the mean over signs.

Products and sums are separate kernels, because a compiler contracts a multiply-add (see `four_over_six`).

Not here: the transform (`hadamard`), codes and first scales (`stages`, `four_over_six`), the oracle (`block_scale`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.numerics import rounding

SCALE_BITS = 16
"""Random bits of a block scale."""
LEAST_SCALE = 2.0**-9
"""Smallest E4M3 number above zero: no block is flushed before its scale is rounded at random."""


class Terms(NamedTuple):
    """Per element, in units of its block's scale: y * y and y * code, FP32."""

    energy: Tensor
    product: Tensor


def terms(x: Tensor, multiplier: Tensor, lanes: int) -> Terms:
    """Terms of each element, `[n/lanes, lanes]` or `[R/lanes, lanes, C]`; multiplier as in `stages.apply_e2m1`."""
    units = x.unflatten(0, (-1, lanes)).to(torch.float32) * multiplier
    return Terms(units * units, units * rounding.round_e2m1(units))


def weighted(total: Tensor, scale: Tensor) -> Tensor:
    """Sums of blocks in units of the global scale instead of each block's own."""
    return (total * scale) * scale


def correction(energy: Tensor, product: Tensor) -> Tensor:
    """EDEN's factor <y, y> / <y, q> of each group; 1 where all codes are zero."""
    return torch.where(product > 0, energy / product, torch.ones_like(energy))


def round_scale(scale: Tensor, factor: Tensor, word: Tensor) -> Tensor:
    """scale * factor, rounded at random to one of its two E4M3 neighbours; at most 448. word: random int32."""
    target = (scale * factor).clamp(max=rounding.E4M3_MAX)
    spacing = rounding.exponent_power(target).clamp(min=2.0**-6) * 0.125
    noise = ((word >> (32 - SCALE_BITS)) & ((1 << SCALE_BITS) - 1)).to(torch.float32) + 0.5
    return (torch.floor(target / spacing + noise * 2.0**-SCALE_BITS) * spacing).clamp(max=rounding.E4M3_MAX)
