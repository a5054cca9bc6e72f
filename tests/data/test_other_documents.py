"""Data in another form than shards: seven members are enough for order, resume and audit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.config import DataConfig, SourceConfig
from megatron_fp4.data.documents import DocumentPlace, Documents
from megatron_fp4.data.ledger import ledger
from megatron_fp4.data.loader import Loader
from megatron_fp4.data.order.plan import Plan
from megatron_fp4.data.order.samples import SampleStream
from tests.data.toy import loader_of, write_shard

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]


class Counting:
    """Document d is d * 100, d * 100 + 1, ..., made when it is read."""

    name = "web"
    fingerprint = "counting"
    num_documents = len(LENGTHS)
    num_tokens = sum(LENGTHS)
    lengths = np.array(LENGTHS, np.int64)

    def read(self, document: int, offset: int, length: int) -> NDArray:
        return document * 100 + np.arange(offset, offset + length)

    def place(self, document: int) -> DocumentPlace:
        return DocumentPlace("counting", document)


def test_batches_and_ledger_are_those_of_the_same_documents_in_a_shard(tmp_path):
    """Off: something reads a member that `Documents` does not promise, or the order depends on the storage."""
    documents: Documents = Counting()
    whole = [documents.read(d, 0, length).tolist() for d, length in enumerate(LENGTHS)]
    prefix = write_shard(tmp_path / "web", whole)
    config = DataConfig(sources=[SourceConfig("web", [prefix], max_epochs=0)], seq_length=4, seed=3)
    stored = loader_of(config)
    streams = {"web": SampleStream(documents, seq_length=4, seed=3)}
    plan = Plan.from_config(config.phases, {"web": streams["web"].available(1)}, 4)
    counted = Loader(config, streams, plan, micro_batch=1, dp_rank=0, dp_size=1)
    ours, theirs = counted.batch(5, 20), stored.batch(5, 20)
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
    assert [row | {"shard": prefix} for row in ledger(counted, 5, 20)] == ledger(stored, 5, 20)
    assert counted.state_dict(25)["sources"]["web"]["fingerprint"] == "counting"
