"""Four over six (arXiv 2512.02010): a tile's scale maps its maximum to 6 or to 4, whichever has the smaller error.

The errors of a candidate are summed line by line (the elements of a tile that are contracted together), in Transformer
Engine's order, so that near ties fall as they do there. Errors and sums are separate kernels, because a compiler
vectorizes the one along lines and the other across them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.numerics import rounding
from megatron_fp4.numerics.stages import BlockScales, at_least, block_encode, encode_scale


def candidates(largest: Tensor, amax: Tensor, aim: float, least: float) -> tuple[BlockScales, BlockScales]:
    """E4M3 scales that map the block maxima `largest` to 6 and to 4, and their 1 / (scale * S_dec).

    amax, aim: see `stages.encode_scale`; amax is broadcastable to `largest`. least: see `stages.nvfp4_scales`.
    """
    encode, decode = encode_scale(amax, aim)
    target = (largest.to(torch.float32) / torch.full_like(largest, 6.0, dtype=torch.float32)) * encode
    to_six, to_four = (at_least(rounding.round_e4m3(one), largest, least) for one in (target, target * 1.5))
    return BlockScales(to_six, block_encode(to_six, decode)), BlockScales(to_four, block_encode(to_four, decode))


def errors(x: Tensor, scale: Tensor, multiplier: Tensor, amax: Tensor, aim: float, measure: str, lanes: int) -> Tensor:
    """Absolute (mae) or squared (mse) error of each element, FP32, `[n/lanes, lanes]` or `[R/lanes, lanes, C]`.

    x `[n]` (lines of `lanes` elements) or `[R, C]` (lines of `lanes` rows). scale, multiplier and amax: FP32, one per
    line (amax: or a scalar), broadcastable to the result. aim: the value that S_enc maps amax to.
    """
    values = x.unflatten(0, (-1, lanes)).to(torch.float32)
    decoded = (rounding.round_e2m1(values * multiplier) * scale) * amax
    difference = decoded / torch.full_like(decoded, aim) - values
    return difference * difference if measure == "mse" else difference.abs()


def sum_along_lines(error: Tensor, lanes: int) -> Tensor:
    """Sum over dimension 1, of size `lanes`, one element after the other."""
    first, *rest = error.unflatten(1, (lanes,)).unbind(1)
    total = torch.zeros_like(first) + first
    for part in rest:
        total = total + part
    return total


def sum_of_lines(errors: Tensor, dim: int) -> Tensor:
    """Sum over dimension `dim` (a power of two long) by a tree; it stays, with size 1."""
    while errors.shape[dim] > 1:
        half = errors.shape[dim] // 2
        errors = errors.narrow(dim, 0, half) + errors.narrow(dim, half, half)
    return errors
