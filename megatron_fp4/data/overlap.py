"""Held-out text that a run also trains on: found by the hashes of documents that are stored beside the shards.

A shard's `.hashes` has 8 bytes for each document, so looking for the documents of a held-out set in a source reads
those and no tokens: one pass of some nanoseconds a document (`python -m benchmarks.data` times it). Shards of other
tools have no such file; `megatron-fp4 data verify SOURCE --heldout SET` hashes their tokens instead.

Not here: near duplicates. Equal documents are equal token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.checks import check_ends
from megatron_fp4.data.evaluation import EvalLoader
from megatron_fp4.data.loader import Loader
from megatron_fp4.data.shards.documents import ShardedDocuments
from megatron_fp4.data.shards.shard import TokenShard

MAX_DOCUMENTS_AT_START = 1_000_000_000
MIN_TOKENS = 8
"""Shorter documents (empty ones, titles) are equal by chance."""

FILTER_BITS = 20
FILTER_MASK = np.uint64((1 << FILTER_BITS) - 1)
AT_ONCE = 1 << 20

Hashes = Callable[[TokenShard], "NDArray[np.uint64] | None"]


def stored_hashes(shard: TokenShard) -> NDArray[np.uint64] | None:
    """The hashes beside the shard, uint64 [documents]; None if it has none."""
    return shard.document_hashes()


def any_hashes(shard: TokenShard) -> NDArray[np.uint64]:
    """The hashes beside the shard, else those of its tokens, which reads all of them."""
    stored = shard.document_hashes()
    return shard.hash_documents() if stored is None else stored


def common_documents(heldout: ShardedDocuments, source: ShardedDocuments, hashes: Hashes) -> NDArray[np.int64] | None:
    """Numbers of the held-out documents of at least MIN_TOKENS that the source has too; None without hashes."""
    wanted = [hashes(shard) for shard in heldout.shards]
    if any(part is None for part in wanted):
        return None
    keys = np.concatenate([part for part in wanted if part is not None]) if wanted else np.zeros(0, np.uint64)
    numbers = np.flatnonzero(heldout.lengths >= MIN_TOKENS)
    order = numbers[np.argsort(keys[numbers], kind="stable")]
    ascending = keys[order]
    may_be_wanted = np.zeros(1 << FILTER_BITS, np.bool_)
    may_be_wanted[ascending & FILTER_MASK] = True
    is_common = np.zeros(len(order), np.bool_)
    for shard in source.shards:
        part = hashes(shard)
        if part is None:
            return None
        for start in range(0, len(part), AT_ONCE):
            block = part[start : start + AT_ONCE]
            is_common |= np.isin(ascending, block[may_be_wanted[block & FILTER_MASK]])
    return np.sort(order[is_common])


@dataclass(frozen=True)
class Compared:
    """common: numbers of the held-out documents that the source has too, int64."""

    common: NDArray[np.int64]


@dataclass(frozen=True)
class NotCompared:
    """reason: why, with the name of the source and the remedy."""

    reason: str


def check_heldout(loader: Loader, evaluations: Sequence[EvalLoader]) -> list[str]:
    """Compare every evaluation set with every source; returns lines about what could not be compared.

    Raises ValueError for a set with documents of a source, unless it `may_overlap`, and for sets whose documents end
    with different tokens: none would be equal.
    """
    sources = [stream.documents for stream in loader.streams.values()]
    opened = [*sources, *(evaluation.documents for evaluation in evaluations)]
    check_ends([documents for documents in opened if isinstance(documents, ShardedDocuments)])
    may_overlap = {settings.name: settings.may_overlap for settings in loader.config.evaluation}
    lines: list[str] = []
    for heldout in (evaluation.documents for evaluation in evaluations if not may_overlap[evaluation.name]):
        for source in sources:
            if isinstance(source, ShardedDocuments):
                outcome = _compare_at_start(heldout, source)
                if isinstance(outcome, NotCompared):
                    lines.append(f"held-out set {heldout.name!r} was not compared with {outcome.reason}")
                elif len(outcome.common):
                    raise _overlapping(heldout, source, outcome)
    return lines


def _compare_at_start(heldout: ShardedDocuments, source: ShardedDocuments) -> Compared | NotCompared:
    remedy = "`megatron-fp4 data verify SOURCE --heldout SET` does it"
    if source.num_documents > MAX_DOCUMENTS_AT_START:
        much = f"whose {source.num_documents:,} documents take too long at a start"
        return NotCompared(f"source {source.name!r}, {much}; {remedy}")
    common = common_documents(heldout, source, stored_hashes)
    if common is None:
        why = "shards without .hashes (of another tool, or an older version)"
        return NotCompared(f"source {source.name!r}: {why}; {remedy}")
    return Compared(common)


def _overlapping(heldout: ShardedDocuments, source: ShardedDocuments, outcome: Compared) -> ValueError:
    place = heldout.place(int(outcome.common[0]))
    return ValueError(
        f"evaluation set {heldout.name!r} holds {len(outcome.common)} document(s) that source {source.name!r} trains"
        f" on, first document {place.document} of {place.shard}; choose other held-out text, or set may_overlap: true"
        " in its entry of data.evaluation"
    )
