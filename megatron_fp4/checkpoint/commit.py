"""The commit protocol on the file system: a checkpoint is complete, or it does not exist.

Ranks meet in the directory, not in a collective, so that bytes can be written by background threads while the training
process groups are in use. A rank that has fsynced its part leaves `part_<rank>.json`; rank 0 watches for all of them,
writes metadata and manifest, renames, and replaces `latest`. A rank that fails renames the directory away: one call
that needs no disk space, after which the others' files cannot be created and rank 0 stops waiting.

Not here: torch.distributed communication, and names (directory.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization_config

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.dcp import ShardSavePlanner, StoredTensor
from megatron_fp4.checkpoint.directory import LATEST, STATE, step_name, temporary_name
from megatron_fp4.checkpoint.outcome import NotSaved
from megatron_fp4.checkpoint.retention import retain, sweep_failed
from megatron_fp4.checkpoint.state import SaveContent, SaveLayout
from megatron_fp4.checkpoint.write import GivenUp, PartWriter, SaveInProgress
from megatron_fp4.storage.durable import FileRecord, fsync_directory, write_durably, write_manifest, write_temporary
from megatron_fp4.storage.owner import Owner

WATCH_SECONDS = 0.005
MOST_WATCH_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class LocalSave:
    """What this rank does for one save in `directory`, without communication: it may run in a thread.

    number: distinguishes the changes of this process in directory names. content: NotSaved if it could not be copied
    to host memory.
    """

    directory: Path
    number: int
    rank: int
    num_ranks: int
    config: CheckpointConfig
    layout: SaveLayout
    content: SaveContent | NotSaved

    def write(self, save: SaveInProgress) -> int:
        """Returns the bytes of this rank's part. What fails here takes the directory out of the others' way."""
        try:
            if isinstance(self.content, NotSaved):  # raised here, so that no other rank waits for this one
                raise MemoryError(self.content.reason)
            try:
                part = write_part(self.directory, self.rank, self.layout.plan, self.content.tensors)
            except FileNotFoundError:
                raise GivenUp("another rank could not write its part") from None
            if self.rank == 0:
                self._commit(save, self.content.state_json)
        except BaseException:
            self.give_up()
            raise
        if self.rank == 0:
            retain(self.directory.parent, save.step, self.number, self.config)
        return part.num_bytes

    def _commit(self, save: SaveInProgress, state_json: bytes) -> None:
        assert self.layout.metadata is not None
        parts = wait_for_parts(self.directory, self.num_ranks, save.overdue)
        seal(self.directory, save.step, self.layout.metadata, state_json, parts)
        if not save.claim_commit():
            raise GivenUp("finished after its time-out")
        publish(self.directory, save.step, self.number)

    def give_up(self) -> None:
        """Take the directory out of everybody's way; rank 0 frees its disk space."""
        with suppress(OSError):
            os.rename(self.directory, self.directory.with_name(self.directory.name.replace(".writing-", ".failed-")))
        if self.rank == 0:
            sweep_failed(self.directory.parent)


@dataclass(frozen=True)
class Part:
    """What one rank wrote, as it says so in its mark, `part_<rank>.json`."""

    files: dict[str, FileRecord]
    results: list[WriteResult]

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.files.values())

    def to_json(self) -> bytes:
        files = {name: asdict(record) for name, record in self.files.items()}
        results = [
            [one.index.fqn, list(one.index.offset or ()), one.size_in_bytes, asdict(one.storage_data)]
            for one in self.results
        ]
        return json.dumps({"files": files, "results": results}).encode()

    @staticmethod
    def from_json(data: bytes) -> Part:
        body = json.loads(data)
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        results = [
            WriteResult(MetadataIndex(fqn, offset), size, _StorageInfo(**info))
            for fqn, offset, size, info in body["results"]
        ]
        return Part(files, results)


def mark_name(rank: int) -> str:
    """The file that says that a rank's part is on disk."""
    return f"part_{rank}.json"


def write_part(directory: Path, rank: int, plan: SavePlan, state: dict[str, StoredTensor]) -> Part:
    """Write this rank's rectangles and, last, the mark that they are on disk."""
    writer = PartWriter(directory)
    plan = SavePlan(plan.items, storage_data=_StoragePrefix(f"__{rank}_"))
    results = []
    # For this thread only; the file is hashed as a whole.
    with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        if plan.items:
            results = writer.write_data(plan, ShardSavePlanner(state)).wait()
    fsync_directory(directory)
    part = Part(writer.fs.records, results)
    # Seen by rank 0 and removed before the commit: it must appear in one step, but need not survive a power cut.
    mark = directory / mark_name(rank)
    temporary = mark.with_suffix(".tmp")
    temporary.write_bytes(part.to_json())
    os.replace(temporary, mark)
    return part


def wait_for_parts(directory: Path, num_ranks: int, overdue: Callable[[], bool]) -> list[Part]:
    """Rank 0: the parts of all ranks, when all are there. Raises GivenUp if a rank failed, TimeoutError if overdue."""
    names = {mark_name(rank): rank for rank in range(num_ranks)}
    pause = WATCH_SECONDS
    while True:
        try:
            present = set(os.listdir(directory))
        except FileNotFoundError:
            raise GivenUp("another rank could not write its part") from None
        missing = [str(rank) for name, rank in names.items() if name not in present]
        if not missing:
            return [Part.from_json((directory / name).read_bytes()) for name in names]
        if overdue():
            raise TimeoutError(f"no part of rank {', '.join(missing[:20])} within the time-out")
        time.sleep(pause)
        pause = min(pause * 1.2, MOST_WATCH_SECONDS)


def seal(directory: Path, step: int, metadata: Metadata, state_json: bytes, parts: list[Part]) -> None:
    """Rank 0: DCP's metadata, the small state and the manifest; the directory is a whole checkpoint afterwards."""
    writer = PartWriter(directory)
    writer.finish(metadata, [part.results for part in parts])
    files = dict(writer.fs.records)
    for part in parts:
        files |= part.files
    files[STATE] = write_durably(directory / STATE, state_json)
    write_manifest(directory, step, files)
    for rank in range(len(parts)):
        (directory / mark_name(rank)).unlink()
    fsync_directory(directory)


def publish(directory: Path, step: int, number: int) -> None:
    """Give the sealed directory its final name, then advance `latest`. A checkpoint of the same step is replaced.

    The new `latest` is written before the rename: a full disk must not strike between the two.
    """
    root = directory.parent
    final = root / step_name(step)
    replaced = root / temporary_name(step, "replaced", Owner.me(), number)
    new_latest, _ = write_temporary(root / LATEST, f"{step_name(step)}\n".encode())
    if os.path.lexists(final):  # also a link to what is gone
        os.rename(final, replaced)
    os.rename(directory, final)
    fsync_directory(root)
    os.replace(new_latest, root / LATEST)
    fsync_directory(root)
    shutil.rmtree(replaced, ignore_errors=True)
