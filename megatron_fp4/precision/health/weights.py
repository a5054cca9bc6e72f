"""What the tiles and block scales of NVFP4 can lose before anything is multiplied.

A 16x16 tile has one scale, which maps its largest element to 6; what is below a quarter of a code unit rounds to zero.
So a channel whose largest element in a tile is at most 1/24 of the tile's is lost there, and one that is lost in all
its tiles is a dead channel of the GEMM. The scales themselves are E4M3 numbers below one FP32 scale of the tensor: a
block more than 448 * 2^9 times weaker than the tensor's maximum has the smallest scale, or zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.precision.backends.centred import as_quantized
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from megatron_fp4.precision.backends.finite import NonFiniteWatch
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin

TILE = 16
LOST = 24.0
"""A channel with its maximum at most the tile's / LOST rounds to zero: 6 code units over a quarter."""
SMALLEST = 2.0**-9
"""Of the E4M3 scales above zero."""
NUM_SPREADS, NUM_FLOORS = 7, 3
"""Numbers in the results below."""


def tile_spread(w: Tensor) -> Tensor:
    """Channels within the 16x16 tiles of a weight `[N, K]`, FP64 `[7]`, sums that parts of a weight may be added of:

    tiles with a live channel; of the 16 columns (input features, Dgrad's outputs) sum over tiles of log2(largest /
    smallest channel maximum), live channels, lost ones; the same of the rows (output features, Fprop's outputs).
    """
    w = F.pad(w.abs(), (0, -w.shape[1] % TILE, 0, -w.shape[0] % TILE))
    tiles = w.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE))  # [N/16, 16, K/16, 16]
    of_columns, of_rows = tiles.amax(1), tiles.amax(3).transpose(1, 2)  # [N/16, K/16, 16]
    parts = [(of_columns.amax(2) > 0).sum()[None].double()]
    for maxima in (of_columns.float(), of_rows.float()):
        largest, live = maxima.amax(2, keepdim=True), maxima > 0
        smallest = torch.where(live, maxima, torch.inf).amin(2, keepdim=True)
        ratio = torch.where(largest > 0, largest / smallest, 1.0)
        lost = live & (maxima * LOST <= largest)
        parts.append(torch.stack([ratio.double().log2().sum(), live.sum().double(), lost.sum().double()]))
    return torch.cat(parts)


class ScaleFloors:
    """Counts the block scales that lie at the floor of E4M3."""

    def __init__(self) -> None:
        self._watch = NonFiniteWatch()
        self._backend = EmulatedBackend(watch=self._watch)

    def count(self, x: Tensor, origin: OperandOrigin, copy: Copy) -> Tensor:
        """Scales of zero, of the smallest above it, and all, FP64, of the blocks of a copy in NVFP4 with an element.

        One maximum is taken over the origin's ranks, where quantizing takes the same one.
        """
        x, operand = as_quantized(x, origin, copy.operand)
        scales, maxima = self._backend.block_scales(x, origin, replace(copy, operand=operand))
        live = maxima > 0
        counts = [((scales == 0) & live).sum(), ((scales == SMALLEST) & live).sum(), live.sum()]
        self._watch.forget()
        return torch.stack(counts).double()
