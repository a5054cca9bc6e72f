"""Rows of a batch: token pieces in, every field of `Batch` out. Shared by training and evaluation.

A sample is S + 1 tokens; inputs are the first S, labels the last S. A position is a target unless it is
padding or, with document reset on, its label is the first token of another document. Decided by position: an EOS that
is also the padding id is a target wherever it is real.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_fp4.data.batch import Batch
from megatron_fp4.data.order.samples import Piece, SampleStream


class Rows:
    """Buffers for `num_rows` samples of `seq_length`; rows that are never filled stay padding (mask False)."""

    def __init__(self, num_rows: int, seq_length: int, reset_documents: bool, pad_id: int = 0) -> None:
        self.reset_documents = reset_documents
        self.tokens = np.full((num_rows, seq_length + 1), pad_id, np.int64)
        self.mask = np.zeros((num_rows, seq_length), np.bool_)
        self.positions = np.tile(np.arange(seq_length, dtype=np.int64), (num_rows, 1))
        self.documents = np.zeros((num_rows, seq_length), np.int64)

    def fill(self, row: int, stream: SampleStream, pieces: list[Piece]) -> None:
        """Write a sample; pieces shorter than S + 1 leave a padded, masked tail (a document of its own)."""
        lengths = np.array([piece.length for piece in pieces])
        total = int(lengths.sum())
        stream.tokens(pieces, self.tokens[row, :total])
        self.mask[row, : total - 1] = True
        if not self.reset_documents:
            return
        # Consecutive pieces are different documents, except where a one-document source begins its next epoch:
        # that is a boundary too.
        starts = np.cumsum(lengths) - lengths
        width = self.tokens.shape[1]
        padding = [] if total == width else [width - total]
        numbers = np.repeat(np.arange(len(lengths) + len(padding)), [*lengths, *padding])
        begin = np.append(starts, total)[numbers]
        self.documents[row] = numbers[:-1]
        self.positions[row] = (np.arange(width) - begin)[:-1]
        self.mask[row] &= numbers[1:] == numbers[:-1]

    def batch(self, address: torch.Tensor, sample_ids: torch.Tensor) -> Batch:
        tokens = torch.from_numpy(self.tokens)
        return Batch(
            tokens=tokens[:, :-1].contiguous(),
            labels=tokens[:, 1:].contiguous(),
            loss_mask=torch.from_numpy(self.mask),
            positions=torch.from_numpy(self.positions),
            documents=torch.from_numpy(self.documents),
            address=address,
            sample_ids=sample_ids,
        )
