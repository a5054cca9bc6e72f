"""What the epoch indices of a configuration take, and where: for a plan, and for a look at the machine before a run.

Not here: the indices themselves (epoch_index.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.order.epoch_index import cache_folder, index_bytes
from megatron_fp4.data.shards.documents import count_documents


@dataclass(frozen=True)
class IndexNeed:
    """The indices of one epoch of all sources. folder: of each node, to keep them in; None: in each process."""

    documents: int
    num_bytes: int
    folder: Path | None

    @staticmethod
    def of(config: DataConfig, documents: int | None = None) -> IndexNeed:
        """documents: None to count those of the shards. Raises OSError or ValueError for shards that are not here."""
        if documents is None:
            documents = sum(count_documents(source.paths) for source in config.sources)
        return IndexNeed(documents, index_bytes(documents), cache_folder(config.index_cache, documents))
