"""Tensors that a quantizer may get wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def hostile(rows: int, cols: int) -> dict[str, Tensor]:
    """BF16 `[rows, cols]` by name; cols is a multiple of 16."""
    gen = torch.Generator().manual_seed(rows * 1000 + cols)

    def normal() -> Tensor:
        return torch.randn(rows, cols, generator=gen)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=gen)

    bits = integers(0, 65536, rows, cols).to(torch.int32)
    every = torch.where((bits & 0x7F80) == 0x7F80, bits & 0x807F, bits).to(torch.int16).view(torch.bfloat16)
    zero_blocks = normal()
    zero_blocks.view(-1, 16)[::3] = 0
    zero_blocks.view(-1, 16)[1::7] = -0.0
    ties = integers(-24, 25, rows, cols) * 0.25  # S_enc is a power of two times 7: every decision point is hit
    ties.view(-1, 16)[:, 0] = 6.0
    scale_ties = normal()
    scale_ties[0, 0] = 12.0  # docs/numerics.md: a target just above a tie of E4M3
    scale_ties.view(-1, 16)[:, 1] = integers(64, 1537, rows * cols // 16) / 128
    one = torch.zeros(rows, cols)
    one[rows // 2, cols // 2] = -1e38
    mixed = normal()
    mixed[0, 0] = 1e38
    mixed[-1] *= 1e-38
    tensors = {
        "normal": normal(),
        "zero blocks, -0": zero_blocks,
        "ties": ties,
        "ties of scales": scale_ties,
        "denormals": integers(-127, 128, rows, cols).float() * 2.0**-133,
        "1e37": (torch.rand(rows, cols, generator=gen) * 2 - 1) * 2e37,  # sums of 16 stay finite
        "all exponents": normal() * torch.exp2(integers(-100, 100, rows, cols).float()),
        "rows of all sizes": normal() * torch.exp2(integers(-20, 20, rows, 1).float()),
        "one element": one,
        "1e38 beside 1e-38": mixed,
        "zeros": torch.zeros(rows, cols),
    }
    return {name: tensor.bfloat16() for name, tensor in tensors.items()} | {"every bf16": every}
