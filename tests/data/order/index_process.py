"""A process that opens an index; apart from the tests so that a spawned one does not import torch."""

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
