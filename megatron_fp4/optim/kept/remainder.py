"""An FP32 number as the BF16 number next to it and 17 bits.

    master     seeeeeee efffffff | gggggggg gggggggg
    weight     the upper half, one unit more where the lower half rounds up (nearest, ties to even)
    low        the lower half, int16
    up         whether it rounds up, 8 of them in a byte

16 bits would not do: an even BF16 number is the nearest of 2^16 + 1 FP32 numbers, both ties included. (Apex rounds ties
away from 0 instead, for which 16 are enough; but then weights are others than those of FP32 masters.)
"""

from __future__ import annotations

import torch
from torch import Tensor

BYTE = 8


def split(master: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of FP32 `master [n]` beside BF16 `weight [n]`, its rounding: int16 `[n]` and uint8 `[n / 8]`.

    n: a multiple of 8.
    """
    low, upper = master.view(torch.int16).view(-1, 2).unbind(1)
    up = (weight.view(torch.int16) != upper).to(torch.uint8).view(-1, BYTE)
    return low, (up << _places(up.device)).sum(1, dtype=torch.uint8)


def join(weight: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """The FP32 `[n]` that was split, bit for bit; of a NaN some NaN."""
    ups = (up[:, None] >> _places(up.device)) & 1
    upper = weight.view(torch.int16) - ups.view(-1)
    return torch.stack([low, upper], 1).view(torch.float32).view(-1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(BYTE, dtype=torch.uint8, device=device)
