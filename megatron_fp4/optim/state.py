"""What the optimizer owns on one rank, as rectangles of logical tensors, and what it says of a step.

The checkpoint needs no knowledge of buckets or ranks, and the optimizer none of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_fp4.comm.rect import Shard
from megatron_fp4.optim.groups import AdamTensors
from megatron_fp4.optim.layout import RowRange


@dataclass(frozen=True, eq=False)
class OwnedRows:
    """Rows of a parameter that this rank updates. writes: False where another rank counts and saves the same rows."""

    rows: RowRange
    tensors: AdamTensors
    writes: bool

    def shards(self, flats: dict[str, Tensor]) -> Iterator[Shard]:
        """The rectangles that these rows are, with views of `flats` (by kind), which hold the rows' elements."""
        rows = self.rows
        shaped = {kind: flat.view(rows.shape) for kind, flat in flats.items()}
        for piece, where in rows.slot.placement.pieces(rows.first_row, rows.stop_row):
            yield Shard(where, {kind: tensor[piece] for kind, tensor in shaped.items()}, self.writes)


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
