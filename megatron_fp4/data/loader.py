"""Batches by number: `batch(first_sample, num_samples)` is a pure function, so a loader has no position to lose.

What to deliver is decided by the plan (global order), by the streams (source order) and by the trainer (how
many samples a step takes); data-parallel rank, micro-batch size and batch-size ramp only decide who gets which rows.
Resuming is remembering one number of consumed samples, plus the plan in case blends were changed on the way.

Not here: prefetching (prefetch.py), evaluation sets (evaluation.py), what the trainer logs (ledger.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_fp4.data.batch import Batch
from megatron_fp4.data.checks import check_enough_data, check_state, check_vocabulary, out_of_data
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.order.epoch_index import open_cache
from megatron_fp4.data.order.plan import Plan
from megatron_fp4.data.order.samples import Piece, SampleStream
from megatron_fp4.data.pack import Rows
from megatron_fp4.data.shards.documents import open_documents

STATE_VERSION = 1
QUICK_DOCUMENTS = 1_000_000
"""So many are put in order in a fraction of a second: nobody need be waited for."""


class SampleOrigin(NamedTuple):
    """Where a sample of the global order comes from."""

    sample_id: int
    source: str
    source_sample: int  # number in the source's own order
    pieces: list[Piece]


class PieceOrigin(NamedTuple):
    """Where a piece of a sample is stored: `length` tokens from token `offset` of a document of a shard."""

    source: str
    epoch: int
    shard: str
    document: int  # number inside the shard
    offset: int
    length: int


class Loader:
    """Samples of the global order for one data-parallel rank.

    Rank r's micro-batch m holds delivered samples first + (m*dp + r)*B .. + B of the step (B = micro batch size).
    """

    def __init__(
        self,
        config: DataConfig,
        streams: dict[str, SampleStream],
        plan: Plan,
        *,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        vocab_size: int | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} is not in 0..{dp_size - 1}")
        self.config = config
        self.streams = streams
        self.plan = plan
        self.micro_batch = micro_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.vocab_size = vocab_size

    def batch(self, first_sample: int, num_samples: int) -> Batch:
        """This rank's rows of delivered samples [first_sample, first_sample + num_samples). See `Batch`."""
        group = self.micro_batch * self.dp_size
        if num_samples < 1 or num_samples % group:
            raise ValueError(
                f"a step of {num_samples} samples cannot be split over micro_batch={self.micro_batch} x "
                f"data parallel={self.dp_size}; use a multiple of {group}"
            )
        places = np.arange(num_samples).reshape(-1, self.dp_size, self.micro_batch)[:, self.dp_rank].ravel()
        ids = self.plan.ids(first_sample, num_samples)[places]
        length = self.config.seq_length
        rows = Rows(len(ids), length, self.config.reset_documents)
        for row, origin in enumerate(self._origins(ids)):
            rows.fill(row, self.streams[origin.source], origin.pieces)
        if self.vocab_size is not None:
            self._check_ids(rows, ids, self.vocab_size)
        address = torch.from_numpy(places[:, None] * length + np.arange(length))
        return rows.batch(address, torch.from_numpy(ids))

    def build_indices(self, consumed_samples: int) -> None:
        """Build what the first samples from here on need of every source, so that no step waits for it."""
        cursors = self.plan.cursors_at(self.plan.id_of(consumed_samples))
        for name, stream in self.streams.items():
            stream.pieces(cursors.get(name, 0))

    def begins_epoch(self, first_sample: int, num_samples: int) -> bool:
        """Whether a step of these delivered samples is the first to need the index of an epoch of a large source.

        The same on all ranks, whatever part of the step is theirs.
        """
        first, end = (self.plan.id_of(sample) for sample in (first_sample, first_sample + num_samples))
        most = {name: count - 1 for name, count in self.plan.most_cursors_at(first).items()}
        if self._epochs_of(most) == self._epochs_of(self.plan.most_cursors_at(end)):
            return False  # between two bounds; the exact numbers may cost milliseconds
        return self._epochs_of(self.plan.cursors_at(first)) != self._epochs_of(self.plan.cursors_at(end))

    def _epochs_of(self, cursors: Mapping[str, int]) -> dict[str, int]:
        """The last epoch of each source that is needed to deliver so many of its samples."""
        large = {name for name, it in self.streams.items() if it.documents.num_documents > QUICK_DOCUMENTS}
        return {name: self.streams[name].epoch_after(count) for name, count in cursors.items() if name in large}

    @property
    def waits_for_index(self) -> bool:
        """Whether a batch waits for the index of an epoch that is being built."""
        return any(stream.waits_for_index for stream in self.streams.values())

    def origins(self, first_sample: int, num_samples: int) -> list[SampleOrigin]:
        """What every sample of a step is made of, in global order, all data-parallel ranks (the audit ledger)."""
        return self._origins(self.plan.ids(first_sample, num_samples))

    def describe(self, origin: SampleOrigin) -> list[PieceOrigin]:
        """The pieces of a sample with the names of their shards."""
        documents = self.streams[origin.source].documents
        return [
            PieceOrigin(origin.source, piece.epoch, *documents.place(piece.document), piece.offset, piece.length)
            for piece in origin.pieces
        ]

    def state_dict(self, consumed_samples: int) -> dict[str, Any]:
        """Small and JSON-able: all that a resume needs beside the config. Same on every rank."""
        cursors = self.plan.cursors_at(self.plan.id_of(consumed_samples))
        return {
            "version": STATE_VERSION,
            "consumed_samples": consumed_samples,
            "seq_length": self.config.seq_length,
            "seed": self.config.seed,
            "plan": self.plan.to_json(),
            "sources": {
                name: {"fingerprint": stream.documents.fingerprint, "cursor": cursors.get(name, 0)}
                for name, stream in self.streams.items()
            },
        }

    def _origins(self, ids: np.ndarray) -> list[SampleOrigin]:
        origins = []
        for sample_id, (name, number) in zip(ids.tolist(), self.plan.locate(ids), strict=True):
            if name not in self.streams:
                raise ValueError(f"sample {sample_id} comes from source {name!r}, which the config no longer lists")
            stream = self.streams[name]
            epochs = next(s.max_epochs for s in self.config.sources if s.name == name)
            if epochs and number >= stream.available(epochs):
                raise out_of_data(name, number + 1, stream.available(epochs), epochs, f"sample {sample_id}")
            origins.append(SampleOrigin(sample_id, name, number, stream.pieces(number)))
        return origins

    def _check_ids(self, rows: Rows, ids: np.ndarray, vocab_size: int) -> None:
        wrong = (rows.tokens >= vocab_size) | (rows.tokens < 0)
        if not wrong.any():
            return
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        origin = self._origins(ids[row : row + 1])[0]
        ends = np.cumsum([piece.length for piece in origin.pieces])
        piece = self.describe(origin)[int(np.searchsorted(ends, column, side="right"))]
        raise ValueError(
            f"token id {int(rows.tokens[row, column])} is beyond the vocabulary of {vocab_size}: sample {ids[row]}, "
            f"source {origin.source!r}, shard {piece.shard}, document {piece.document}. The shard was written "
            "with another tokenizer or is damaged (data_tools.verify tells)."
        )


def open_streams(
    config: DataConfig, *, vocab_size: int | None = None, tokenizer_fingerprint: str | None = None
) -> dict[str, SampleStream]:
    """Open every source of the config; indexes go where `config.index_cache` says.

    Raises ValueError for shards of another tokenizer than `tokenizer_fingerprint`, or with ids that `vocab_size` rows
    of an embedding do not have, and where there is no room for indexes.
    """
    if not config.sources:
        raise ValueError("data.sources is empty: name at least one source of token shards")
    opened = [open_documents(source.name, source.paths) for source in config.sources]
    check_vocabulary(opened, vocab_size, tokenizer_fingerprint)
    cache = open_cache(config.index_cache, opened)
    return {
        documents.name: SampleStream(documents, seq_length=config.seq_length, seed=config.seed, cache=cache)
        for documents in opened
    }


def build_loader(
    config: DataConfig,
    *,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    total_samples: int | None = None,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
    state: dict[str, Any] | None = None,
    streams: dict[str, SampleStream] | None = None,
) -> Loader:
    """Open the sources and refuse, with both values named, whatever would go wrong later.

    total_samples: samples of the whole run; refused if a source would run out within its permitted epochs.
    vocab_size: rows of the model's embedding. tokenizer_fingerprint: the tokenizer's in use.
    state: what `Loader.state_dict` gave; a changed blend or skip list then takes effect from its consumed samples on.
    streams: those of a loader of the same sources, which are then not opened again.
    """
    group = micro_batch * dp_size
    if micro_batch < 1 or global_batch < 1 or global_batch % group:
        raise ValueError(
            f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x data parallel {dp_size} "
            f"= {group}"
        )
    streams = streams or open_streams(config, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer_fingerprint)
    sizes = {name: stream.available(1) for name, stream in streams.items()}
    plan = Plan.from_config(config.phases, sizes, config.seq_length, config.skip)
    if state is not None:
        check_state(state, STATE_VERSION, config, {name: s.documents for name, s in streams.items()})
        past = Plan.from_json(state["plan"])
        plan = past.continued(plan, past.id_of(state["consumed_samples"]))
    if total_samples is not None:
        check_enough_data(config, streams, plan, total_samples)
        for name, num_samples in plan.most_cursors_at(plan.id_of(total_samples)).items():
            if name in streams:
                streams[name].read_ahead(num_samples)
    return Loader(
        config,
        streams,
        plan,
        micro_batch=micro_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=vocab_size,
    )
