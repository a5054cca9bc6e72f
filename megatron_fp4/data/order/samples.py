"""From a source to its endless, shuffled sequence of samples.

Epoch after epoch, each a fresh permutation of the documents, is ONE stream of tokens; sample slot i is the
S + 1 tokens from i * S on. Neighbouring slots share one token (the last label of one is the first input of the next),
so in every epoch every token is a target exactly once. Left over are only the very first token of the stream (nothing
precedes it) and, at the end of the last permitted epoch, the tail that fills no sample: (epochs * T - 1) mod S tokens.

An epoch's samples are those whose first token lies in it. The last of them reaches into the next epoch; it is always
delivered last, the others are shuffled. So the order does not depend on how many epochs will be read, and sample i is
found without any table of samples. Example, S = 4, T = 17 tokens:

    epoch 0: slots 0 1 2 3 (tokens 0-4, 4-8, 8-12, 12-16) shuffled, then slot 4 (token 16 and 4 tokens of epoch 1)
    epoch 1: slots 5 6 7 shuffled (tokens 20-24, ...), then slot 8 ...
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.documents import Documents
from megatron_fp4.data.order.ahead import IndexBuilder
from megatron_fp4.data.order.epoch_index import EpochIndex, IndexCache, build_index, index_bytes
from megatron_fp4.data.order.permute import digest, permute

log = logging.getLogger(__name__)
_KEPT_EPOCHS = 4


class Piece(NamedTuple):
    """A run of one document inside a sample: `length` tokens from token `offset` of document `document`."""

    epoch: int
    document: int
    offset: int
    length: int


class SampleStream:
    """Samples of one source. shuffle=False (evaluation) keeps the stored order of documents and samples.

    Raises ValueError for a source without tokens.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        seq_length: int,
        seed: int,
        cache: IndexCache | None = None,
        shuffle: bool = True,
    ) -> None:
        if documents.num_tokens == 0:
            raise ValueError(f"data source {documents.name!r} has no tokens in {documents.num_documents} documents")
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        self._cache = cache
        self._cache_works = False
        self._builder = IndexBuilder(self._make_index)
        self._epochs: OrderedDict[int, EpochIndex] = OrderedDict()

    def available(self, epochs: int) -> int:
        """Samples that need no token beyond the first `epochs` epochs."""
        return max(0, (epochs * self.documents.num_tokens - 1) // self.seq_length)

    @property
    def waits_for_index(self) -> bool:
        """Whether a sample waits for the index of an epoch that is being built."""
        return self._builder.awaited

    def read_ahead(self, num_samples: int) -> None:
        """Let a thread build the index of each next epoch, up to what `num_samples` samples of this source need."""
        self._builder.last_epoch = self.epoch_after(num_samples)

    def epoch_after(self, num_samples: int) -> int:
        """The epoch in which the first token after `num_samples` samples lies, which is the last one's last label."""
        return num_samples * self.seq_length // self.documents.num_tokens

    def slot(self, index: int) -> int:
        """Slot (position in the stream / S) of the `index`-th sample delivered."""
        tokens, length = self.documents.num_tokens, self.seq_length
        epoch = index * length // tokens
        first = -(-epoch * tokens // length)  # first slot that starts in this epoch: ceil(epoch * T / S)
        count = -(-(epoch + 1) * tokens // length) - first
        place = index - first
        if self.shuffle and place < count - 1:
            key = digest(self.seed, "samples", self.documents.name, epoch)
            place = int(permute(key, count - 1, np.array([place]))[0])
        return first + place

    def pieces(self, index: int, num_tokens: int | None = None) -> list[Piece]:
        """The documents that make up a sample, in order; their lengths sum to S + 1 (or to `num_tokens`)."""
        left = self.seq_length + 1 if num_tokens is None else num_tokens
        epoch, place = divmod(self.slot(index) * self.seq_length, self.documents.num_tokens)
        out: list[Piece] = []
        while left:
            table = self._epoch(epoch)
            at = int(np.searchsorted(table.starts, place, side="right")) - 1
            while left and place < self.documents.num_tokens:
                begin, end = int(table.starts[at]), int(table.starts[at + 1])
                take = min(end - place, left)
                if take:  # an empty document has no tokens to give
                    out.append(Piece(epoch, int(table.order[at]), place - begin, take))
                place, left = place + take, left - take
                at += 1
            epoch, place = epoch + 1, 0
        return out

    def tokens(self, pieces: list[Piece], out: NDArray[np.int64]) -> None:
        """Copy the pieces' token ids to out [sum of lengths]."""
        at = 0
        for piece in pieces:
            out[at : at + piece.length] = self.documents.read(piece.document, piece.offset, piece.length)
            at += piece.length

    def _epoch(self, epoch: int) -> EpochIndex:
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        table = self._epochs[epoch] = self._builder.take(epoch)
        while len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return table

    def _make_index(self, epoch: int) -> EpochIndex:
        key = digest(self.seed, "documents", self.documents.name, epoch) if self.shuffle else None
        if self._cache is not None:
            try:
                index = self._cache.get(self.documents, key)
            except ValueError as error:
                if not self._cache_works:  # the first index, at the start of a run: no work is lost
                    raise
                size = index_bytes(self.documents.num_documents) / 1e9
                message = "%s. Epoch %d of source %s goes on with %.1f GB in the memory of EACH process"
                log.warning(message, error, epoch, self.documents.name, size)
            else:
                self._cache_works = True
                return index
        return build_index(self.documents.lengths, key)
