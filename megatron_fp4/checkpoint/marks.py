"""What each rank says when its part is on disk: size and hash, in the store through which the ranks have met.

All ranks append to one entry; thousands of small files, which rank 0 would list, read and delete, are as slow to make
on a shared file system as the parts themselves. The entry is of one save of one process and never used again. Not here:
a rank that fails says so in the directory (commit.py), which must be gone in any case.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # no public name in torch 2.13

from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.durable import FileRecord

MARK = "{rank:08x}{num_bytes:016x}{start:016x}{digest:0>16}"
MARK_CHARACTERS = 56


class AppendingStore(Protocol):
    """The three calls of torch's stores that marks need; torch's stubs lack the first."""

    def append(self, key: str, value: str, /) -> None:
        """Lengthen an entry in one step; a missing one is empty."""

    def get(self, key: str, /) -> bytes:
        """Read an entry; waits for a missing one."""

    def delete_key(self, key: str, /) -> bool:
        """Remove an entry."""


class Marks:
    """The marks of one save. key: of no other save of any process that has used the store."""

    def __init__(self, store: object, key: str, num_ranks: int) -> None:
        self._store = cast(AppendingStore, store)
        self._key = f"checkpoint/{key}"
        self._num_ranks = num_ranks

    def leave(self, rank: int, record: FileRecord) -> None:
        """Say that the part of `rank` is on disk."""
        digest = record.xxh3_64
        mark = MARK.format(rank=rank, num_bytes=record.num_bytes, start=record.start, digest=digest)
        self._store.append(self._key, mark)

    def collect(self) -> list[FileRecord] | None:
        """The parts of all ranks, by rank; None as long as one is missing. Only after a rank has left its mark here."""
        text = self._text()
        if len(text) < self._num_ranks * MARK_CHARACTERS:
            return None
        records = _records(text)
        return [records[rank] for rank in range(self._num_ranks)]

    def absent(self) -> list[int]:
        """The ranks whose marks are missing."""
        return sorted(set(range(self._num_ranks)) - _records(self._text()).keys())

    def clear(self) -> None:
        """Forget them."""
        self._store.delete_key(self._key)

    def _text(self) -> str:
        return self._store.get(self._key).decode()


def _records(text: str) -> dict[int, FileRecord]:
    marks = (text[first : first + MARK_CHARACTERS] for first in range(0, len(text), MARK_CHARACTERS))
    return {int(one[:8], 16): FileRecord(int(one[8:24], 16), one[40:56], int(one[24:40], 16)) for one in marks}


def store_of(group: Group) -> dist.Store:
    """The store of the ranks' rendezvous; one of its own for a rank that is alone."""
    return _get_default_store() if group.size > 1 else dist.HashStore()
