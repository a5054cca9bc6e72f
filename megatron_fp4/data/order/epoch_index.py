"""The order of a source's documents in one epoch, and its cache on disk.

Two int64 arrays, `order` (document numbers as they are read) and `starts` (token position of each in the
epoch), say everything; they follow from (lengths, key) alone, so a cached file is right if its fingerprint is right.
The file is built once per machine: under a lock, to a name of its own, flushed, then renamed. The lock only saves
work: two nodes that share a folder without working locks both build and one renames over the other, same bytes.

Not here: when the next epoch's is built (ahead.py).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.documents import Documents
from megatron_fp4.data.order.permute import permute
from megatron_fp4.data.shards.shard import map_file
from megatron_fp4.storage.durable import write_durably
from megatron_fp4.storage.lock import STALE_SECONDS, exclusively
from megatron_fp4.storage.owner import Owner

_MAGIC = b"MEGAEPO1"  # change it when the meaning of the arrays or of `permute` changes
_HEADER_BYTES = 48  # magic 8 | fingerprint 32 | number of documents 8
AUTO = "auto"
IN_MEMORY_DOCUMENTS = 1_000_000
"""With `auto`, so many documents of all sources have their indices in each process, and more have files."""


def index_bytes(num_documents: int) -> int:
    """What the index of an epoch takes, in a file or in memory."""
    return 16 * num_documents + 8


@dataclass(frozen=True, eq=False)
class EpochIndex:
    order: NDArray[np.int64]  # [documents]
    starts: NDArray[np.int64]  # [documents + 1]; starts[-1] = tokens of the epoch


def build_index(lengths: NDArray[np.int64], key: bytes | None) -> EpochIndex:
    """Index of documents with `lengths` [documents] in the order that `key` names; None keeps the stored order."""
    order = np.arange(len(lengths), dtype=np.int64)
    if key is not None:
        order = permute(key, len(lengths), order)
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths[order], out=starts[1:])
    return EpochIndex(order, starts)


def node_folder() -> Path:
    """The folder of `auto`: this user's, on this machine."""
    return Path(tempfile.gettempdir(), f"megatron_fp4_index_{os.getuid()}")


def cache_folder(setting: str, num_documents: int) -> Path | None:
    """Where `data.index_cache` puts the indices of so many documents; None: in the memory of each process."""
    if setting == AUTO:
        return node_folder() if num_documents > IN_MEMORY_DOCUMENTS else None
    return Path(setting) if setting else None


def open_cache(setting: str, sources: Sequence[Documents]) -> IndexCache | None:
    """The cache that `data.index_cache` names; None where each process holds its indices in memory.

    Raises ValueError if there is no folder, or no room in it for the first indices of the sources.
    """
    folder = cache_folder(setting, sum(one.num_documents for one in sources))
    if folder is None:
        return None
    cache = IndexCache(folder)
    if setting == AUTO and cache.folder.stat().st_uid != os.getuid():
        raise ValueError(
            f"data.index_cache: {cache.folder} is another user's, who could change the order of the data; remove it, or"
            " name another folder"
        )
    cache.check_room(sources)
    return cache


class IndexCache:
    """Epoch indexes in a folder, memory-mapped, shared by the processes of a machine. `built` counts own builds."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.index_cache: {error}; name a folder that can be made, or '' for none") from None
        self.built = 0

    def check_room(self, sources: Sequence[Documents]) -> None:
        """Raise ValueError unless there is room for an index of each source that has none here."""
        new = [one for one in sources if not any(self.folder.glob(f"{_file_stem(one)}-*.epoch"))]
        if new:
            self._require_room(sum(one.num_documents for one in new))

    def get(self, documents: Documents, key: bytes | None) -> EpochIndex:
        """The index, built here if no process of the machine has. Raises ValueError where the folder fails."""
        content = f"{documents.fingerprint} {documents.num_documents} {documents.num_tokens}".encode()
        fingerprint = hashlib.blake2b(content + (key or b"stored order"), digest_size=32).digest()
        path = self.folder / f"{_file_stem(documents)}-{fingerprint.hex()[:24]}.epoch"
        cached = _read(path, fingerprint, documents.num_documents)
        if cached is not None:
            return cached
        try:
            with exclusively(self.folder / "index.lock"):
                cached = _read(path, fingerprint, documents.num_documents)  # another process may have built it by now
                if cached is None:
                    self._remove_leftovers()
                    self._require_room(documents.num_documents)
                    _write(path, fingerprint, build_index(documents.lengths, key))
                    self.built += 1
                    cached = _read(path, fingerprint, documents.num_documents)
        except OSError as error:
            raise ValueError(f"data.index_cache: {error}; make room there, or name another folder") from error
        if cached is None:
            raise ValueError(f"data.index_cache: {path} was written but does not read back; name another folder")
        return cached

    def _require_room(self, num_documents: int) -> None:
        needed, free = index_bytes(num_documents), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"data.index_cache: the indices of an epoch of {num_documents:,} documents need {needed / 1e9:.1f} GB,"
                f" and {self.folder} has {free / 1e9:.1f} GB free; name a folder of this machine with room for them"
            )

    def _remove_leftovers(self) -> None:
        """Half an index of a builder that was killed may be as large as an index."""
        for path in self.folder.glob("*.epoch.tmp-*"):
            owner = Owner.from_tag(path.name.rpartition(".tmp-")[2])
            with suppress(FileNotFoundError):  # its builder has renamed it
                if owner is not None and not owner.lives(time.time() - path.stat().st_mtime, STALE_SECONDS):
                    path.unlink()


def _file_stem(documents: Documents) -> str:
    return documents.name.replace("/", "_")


def _write(path: Path, fingerprint: bytes, index: EpochIndex) -> None:
    header = _MAGIC + fingerprint + len(index.order).to_bytes(8, "little")
    order, starts = (np.ascontiguousarray(array, "<i8").data for array in (index.order, index.starts))
    write_durably(path, header, order, starts, _MAGIC)  # the end: a file system that renames early may tear the file


def _read(path: Path, fingerprint: bytes, documents: int) -> EpochIndex | None:
    """The cached index, or None if the file is missing, stale or incomplete (it is then built again)."""
    try:
        view = map_file(path)
    except FileNotFoundError:
        return None
    size = _HEADER_BYTES + 8 * documents + 8 * (documents + 1) + len(_MAGIC)
    header = _MAGIC + fingerprint + documents.to_bytes(8, "little")
    if len(view) != size or view[:_HEADER_BYTES] != header or view[-len(_MAGIC) :] != _MAGIC:
        return None
    order = np.frombuffer(view, "<i8", documents, _HEADER_BYTES)
    return EpochIndex(order, np.frombuffer(view, "<i8", documents + 1, _HEADER_BYTES + 8 * documents))
