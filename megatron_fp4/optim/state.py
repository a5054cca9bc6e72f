"""What the optimizer owns on one rank, as rectangles of logical tensors, and what it says of a step.

The checkpoint needs no knowledge of buckets or ranks, and the optimizer none of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_fp4.comm.rect import Shard
from megatron_fp4.optim.groups import AdamTensors, MuonTensors
from megatron_fp4.optim.layout import ParameterPiece


@dataclass(frozen=True, eq=False)
class OwnedPiece:
    """What this rank updates of a parameter. writes: False where another rank counts and saves the same elements."""

    piece: ParameterPiece
    tensors: AdamTensors | MuonTensors
    writes: bool

    def shards(self, flats: dict[str, Tensor]) -> Iterator[Shard]:
        """The rectangles that the piece is, with views of `flats` (by kind), which hold its elements."""
        start = 0
        for where in self.piece.slot.placement.elements(self.piece.start, self.piece.stop):
            stop = start + where.numel
            yield Shard(where, {kind: flat[start:stop].view(where.shape) for kind, flat in flats.items()}, self.writes)
            start = stop


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    grad_norm: global norm before clipping, FP32-rounded, the same on every rank. clip_factor: what the gradients were
    multiplied by. skipped: the norm was not finite and no state changed, on any rank. nonfinite: the logical names of
    the offending parameters of all ranks (empty unless skipped).
    """

    lr: float
    grad_norm: float
    clip_factor: float
    skipped: bool
    nonfinite: tuple[str, ...] = ()
