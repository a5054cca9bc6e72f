"""What a training step is given: rectangles of int64 with the meaning of every position, on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """One data-parallel rank's samples of a step; every tensor but the last is [num_micro * micro_batch, S].

    Rows m*B .. (m+1)*B are micro-batch m. Nothing here depends on tensor, context or pipeline rank.
    """

    tokens: torch.Tensor  # int64 input ids
    labels: torch.Tensor  # int64, the next token of each position
    loss_mask: torch.Tensor  # bool, by position: False = not a target (padding, or a label across a boundary)
    positions: torch.Tensor  # int64, place in the document's part of the sample if documents reset, else the column
    documents: torch.Tensor  # int64, number of the document inside the sample; equal = may attend
    address: torch.Tensor  # int64, sample_in_global_batch * S + column: same for every layout
    sample_ids: torch.Tensor  # int64 [num_micro * micro_batch], number in the global order; -1 = padding row

    def micro(self, index: int, micro_batch: int) -> Batch:
        """Micro-batch `index`, views."""
        rows = slice(index * micro_batch, (index + 1) * micro_batch)
        return Batch(*(tensor[rows] for tensor in self))
