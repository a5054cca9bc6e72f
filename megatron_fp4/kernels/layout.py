"""How codes and scales of an operand `[M, K]` lie in memory, for those who read them without a kernel.

Row-major scales are `[M, blocks]`. In the 128x4 layout of Blackwell's tensor cores (cuBLAS, "block scaling factors
layout") a tile of 128 lines by 4 blocks is 512 bytes, in which line r, block k lie at (r % 32) 16 + (r // 32) 4 + k;
tiles follow each other along the blocks. Lines and blocks that no operand has are there, too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def swizzled_bytes(lines: int, blocks: int) -> int:
    """Size of the 128x4 layout of the scales of `lines` lines of `blocks` blocks."""
    return -(-lines // 128) * -(-blocks // 4) * 512


def row_major_scales(scales: Tensor, lines: int, blocks: int) -> Tensor:
    """uint8 `[lines, blocks]` of scales in the 128x4 layout, uint8 `[swizzled_bytes]`."""
    tiles = scales.view(-(-lines // 128), -(-blocks // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-(-lines // 128) * 128, -(-blocks // 4) * 4)[:lines, :blocks].contiguous()


def swizzled_scales(scales: Tensor) -> Tensor:
    """The inverse of `row_major_scales`; what no operand has is zero."""
    lines, blocks = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -blocks % 4, 0, -lines % 128))
    return padded.view(-(-lines // 128), 4, 32, -(-blocks // 4), 4).permute(0, 3, 2, 1, 4).reshape(-1)
