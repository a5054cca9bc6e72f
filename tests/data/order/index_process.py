"""A process that opens an index; apart from the tests so that a spawned one does not import torch."""

import os
import time
from typing import Any

from megatron_fp4.data.order.epoch_index import IndexCache
from megatron_fp4.data.order.permute import digest
from megatron_fp4.data.shards.documents import open_documents

KEY = digest("k")


def open_index(prefix: str, folder: str, barrier: Any, out: Any) -> None:
    cache = IndexCache(folder)
    source = open_documents("web", [prefix])
    barrier.wait()
    order = cache.get(source, KEY).order.tolist()
    out.put((folder, order, cache.built))


def hang_while_writing(prefix: str, folder: str, writing: Any) -> None:
    """Build an index and never end: it is on disk under its temporary name, and the lock is held."""

    def hang(_: int) -> None:
        writing.set()
        time.sleep(600)

    os.fsync = hang
    IndexCache(folder).get(open_documents("web", [prefix]), KEY)
