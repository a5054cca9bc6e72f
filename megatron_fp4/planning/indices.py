"""What the epoch indices of the data take, on each node or in each process.

A plan is made where there may be no data; then the documents are reckoned from the tokens of the run and the mean
length that is assumed.
"""

from __future__ import annotations

from typing import Any

from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.order.index_need import IndexNeed


def index_section(config: DataConfig, tokens: int, tokens_per_document: float) -> dict[str, Any]:
    """What one epoch takes. documents: of all sources. counted: in shards, not reckoned from `tokens` of the run.

    bytes: of their indices. folder: where each node keeps them; "" for the memory of each process.
    """
    need = _counted(config)
    counted = need is not None
    need = need or IndexNeed.of(config, max(1, int(tokens / tokens_per_document)))
    folder = str(need.folder or "")
    return {"documents": need.documents, "counted": counted, "bytes": need.num_bytes, "folder": folder}


def _counted(config: DataConfig) -> IndexNeed | None:
    if not config.sources:
        return None
    try:
        return IndexNeed.of(config)
    except (OSError, ValueError):
        return None


def index_text(entry: dict[str, Any]) -> str:
    """The section in a sentence."""
    where = f"in {entry['folder']} of each node" if entry["folder"] else "in the memory of each process"
    documents = f"{entry['documents']:,}" if entry["counted"] else f"about {entry['documents']:.2g}"
    source = "" if entry["counted"] else ", if the run is one epoch (their shards are not here)"
    size = f"{entry['bytes'] / 1e9:,.2f} GB" if entry["bytes"] >= 1e9 else f"{entry['bytes'] / 1e6:,.1f} MB"
    return f"{size} for {documents} documents{source}, {where}"
