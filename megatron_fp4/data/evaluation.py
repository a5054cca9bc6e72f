"""Held-out sets: stored order, every token a target exactly once, the same batches at every call.

An evaluation set is a one-epoch stream that is not shuffled; its last sample is padded and its missing rows
are whole padding (loss_mask False, sample id -1), so no token is dropped and every rank gets the same number of rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_fp4.data.batch import Batch
from megatron_fp4.data.checks import check_ids, check_vocabulary
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.order.epoch_index import open_cache
from megatron_fp4.data.order.samples import SampleStream
from megatron_fp4.data.pack import Rows
from megatron_fp4.data.shards.documents import ShardedDocuments, open_documents


class EvalLoader:
    """One named set for one data-parallel rank.

    Iterating yields `num_batches` batches of [micro_batch, S] each time anew; rank r's m-th holds samples
    (m*dp + r)*B .. + B. Sums over ranks and batches cover `num_targets` tokens when documents do not reset.
    """

    def __init__(
        self,
        documents: ShardedDocuments,
        stream: SampleStream,
        *,
        num_tokens: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        reset_documents: bool,
        pad_id: int,
    ) -> None:
        self.name = documents.name
        self.documents = documents
        self.num_targets = num_tokens - 1  # nothing precedes the first token
        self.num_samples = -(-self.num_targets // stream.seq_length)
        self.num_batches = -(-self.num_samples // (micro_batch * dp_size))
        self._stream = stream
        self._micro_batch = micro_batch
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._reset_documents = reset_documents
        self._pad_id = pad_id

    @property
    def fingerprint(self) -> str:
        """Fingerprint of its documents: equal where their content is."""
        return self._stream.documents.fingerprint

    def of_rank(self, dp_rank: int) -> EvalLoader:
        """The same set for another data-parallel rank, of the same files."""
        other = copy.copy(self)
        other._dp_rank = dp_rank
        return other

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(index) for index in range(self.num_batches))

    def build_index(self) -> None:
        """Build what a pass needs, so that the first one does not wait for it."""
        self._stream.pieces(0, 1)

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of this rank."""
        size, length = self._micro_batch, self._stream.seq_length
        places = (index * self._dp_size + self._dp_rank) * size + np.arange(size)
        rows = Rows(size, length, self._reset_documents, self._pad_id)
        for row, sample in enumerate(places.tolist()):
            if sample < self.num_samples:
                count = min(length, self.num_targets - sample * length) + 1
                rows.fill(row, self._stream, self._stream.pieces(sample, count))
        ids = np.where(places < self.num_samples, places, -1)
        address = torch.from_numpy(places[:, None] * length + np.arange(length))
        return rows.batch(address, torch.from_numpy(ids))


def _has_successor(lengths: NDArray[np.int64], num_tokens: int) -> bool:
    """Whether two of the first `num_tokens` tokens are neighbours in one document."""
    starts = np.cumsum(lengths) - lengths
    return bool(((lengths >= 2) & (starts + 2 <= num_tokens)).any())


def build_eval_loader(
    config: DataConfig,
    name: str,
    *,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    pad_id: int = 0,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
) -> EvalLoader:
    """Open the evaluation set `name` of the config.

    The tokens of a set without a manifest are read once, for their ids. Raises ValueError for a name that is no set's,
    a set without a target, ids beyond `vocab_size`.
    """
    settings = next((item for item in config.evaluation if item.name == name), None)
    if settings is None:
        raise ValueError(f"no evaluation set {name!r}; data.evaluation has {[e.name for e in config.evaluation]}")
    documents = open_documents(name, settings.paths)
    check_vocabulary([documents], vocab_size, tokenizer_fingerprint)
    if vocab_size is not None and documents.max_token_id is None:
        check_ids(documents, settings.max_tokens or documents.num_tokens, vocab_size)
    cache = open_cache(config.index_cache, [documents])
    stream = SampleStream(documents, seq_length=config.seq_length, seed=config.seed, cache=cache, shuffle=False)
    tokens = min(documents.num_tokens, settings.max_tokens or documents.num_tokens)
    if tokens < 2:
        raise ValueError(
            f"evaluation set {name!r} has no target: {documents.num_tokens} token(s), max_tokens={settings.max_tokens} "
            "(the first token is never one); give a set of at least 2 tokens"
        )
    if config.reset_documents and not _has_successor(documents.lengths, tokens):
        raise ValueError(
            f"evaluation set {name!r} has no target: none of its documents has a second token within its {tokens} "
            "tokens, and under data.reset_documents the first token of a document is no target; give longer documents"
        )
    return EvalLoader(
        documents,
        stream,
        num_tokens=tokens,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        reset_documents=config.reset_documents,
        pad_id=pad_id,
    )
