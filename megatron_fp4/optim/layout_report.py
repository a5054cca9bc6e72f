"""How evenly buckets divide parameters over their ranks, for all ranks at once and without communication.

Ranks that own nothing and padding cost little by themselves; many of either say that buckets are small for so many
ranks, and then so are the messages. Not here: the messages themselves, which are NCCL's (bucket_comm.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_fp4.optim.layout import Bucket


@dataclass(frozen=True)
class LayoutReport:
    """elements: of the parameters. padding: elements of all buckets beyond these, as a part of them. empty_ranks: ranks
    that own nothing. imbalance: the most elements that a rank owns over the mean. part_numel: of the largest bucket.
    """

    num_buckets: int
    elements: int
    padding: float
    empty_ranks: int
    imbalance: float
    part_numel: int


def layout_report(buckets: Sequence[Bucket]) -> LayoutReport:
    """The report of at least one bucket, all of the same group."""
    num_parts = buckets[0].num_parts
    owned = torch.zeros(num_parts, dtype=torch.int64)
    for bucket in buckets:
        cuts = torch.arange(num_parts + 1) * bucket.part_numel
        for slot in bucket.slots:
            owned += (cuts.clamp(slot.start, slot.stop)).diff()
    elements, largest = int(owned.sum()), int(owned.max())
    return LayoutReport(
        num_buckets=len(buckets),
        elements=elements,
        padding=sum(bucket.numel for bucket in buckets) / elements - 1,
        empty_ranks=int((owned == 0).sum()),
        imbalance=largest * num_parts / elements,
        part_numel=max(bucket.part_numel for bucket in buckets),
    )
