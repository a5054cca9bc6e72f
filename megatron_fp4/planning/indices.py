"""What the epoch indices of the data take, on each node or in each process.

A plan is made where there may be no data; then only the bytes of a document are known. Not here: the indices
(data/order/epoch_index.py).
"""

from __future__ import annotations

from typing import Any

from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.order.epoch_index import cache_folder, index_bytes
from megatron_fp4.data.shards.documents import count_documents


def index_section(config: DataConfig) -> dict[str, Any] | None:
    """None without sources. documents: those of all sources, None if a shard is not here.

    bytes: of their indices of one epoch. folder: where each node keeps them; "" for the memory of each process.
    """
    if not config.sources:
        return None
    try:
        documents = sum(count_documents(source.paths) for source in config.sources)
    except (OSError, ValueError):
        return {"documents": None, "bytes": None, "folder": None}
    folder = cache_folder(config.index_cache, documents)
    return {"documents": documents, "bytes": index_bytes(documents), "folder": str(folder or "")}


def index_text(entry: dict[str, Any]) -> str:
    """The section in a sentence."""
    if entry["documents"] is None:
        return "16 bytes a document and epoch; how many documents there are is not known, their shards are not here"
    where = f"in {entry['folder']} of each node" if entry["folder"] else "in the memory of each process"
    return f"{entry['documents']:,} documents, {entry['bytes'] / 1e6:,.1f} MB an epoch, {where}"
