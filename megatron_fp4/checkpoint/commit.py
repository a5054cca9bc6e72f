"""The commit protocol on the file system: a checkpoint is complete, or it does not exist.

One idea: ranks meet in the directory, not in a collective, so that bytes can be written by background threads while
the training process groups are in use. A rank that has fsynced its part leaves `part_<rank>.json`; rank 0 watches for
all of them, writes metadata and manifest, renames, and replaces `latest`. A rank that fails renames the directory
away: one call that needs no disk space, after which the others' files cannot be created and rank 0 stops waiting.

No torch.distributed communication happens here, and nothing is known about training. Names: directory.py.
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

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization_config

from megatron_fp4.checkpoint.dcp import ShardSavePlanner, StoredTensor
from megatron_fp4.checkpoint.directory import LATEST, STATE, passing_name, step_name
from megatron_fp4.checkpoint.write import HashingFileSystem
from megatron_fp4.storage.durable import (
    FileRecord,
    fsync_directory,
    write_durably,
    write_manifest,
    write_temporary,
)
from megatron_fp4.storage.owner import Owner

WATCH_SECONDS = 0.005


class GivenUp(RuntimeError):
    """The save was given up elsewhere: by another rank, or by the main thread."""


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    files: dict[str, FileRecord]
    results: list[WriteResult]

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.files.values())


class PartWriter(FileSystemWriter):
    """DCP's writer that hashes, and does not store where (on the writing machine) the checkpoint was."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync_files=True, per_thread_copy_ahead=0)
        self.fs: HashingFileSystem = HashingFileSystem()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


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
    mark = directory / f"part_{rank}.json"
    temporary = mark.with_suffix(".tmp")
    temporary.write_bytes(_encode_part(part))
    os.replace(temporary, mark)
    return part


def _encode_part(part: Part) -> bytes:
    files = {name: asdict(record) for name, record in part.files.items()}
    results = [
        [one.index.fqn, list(one.index.offset or ()), one.size_in_bytes, asdict(one.storage_data)]
        for one in part.results
    ]
    return json.dumps({"files": files, "results": results}).encode()


def _decode_part(data: bytes) -> Part:
    body = json.loads(data)
    files = {name: FileRecord(**record) for name, record in body["files"].items()}
    results = [
        WriteResult(MetadataIndex(fqn, offset), size, _StorageInfo(**info))
        for fqn, offset, size, info in body["results"]
    ]
    return Part(files, results)


def wait_for_parts(directory: Path, num_ranks: int, overdue: Callable[[], bool]) -> list[Part]:
    """Rank 0: the parts of all ranks, when all are there. Raises GivenUp if a rank failed, TimeoutError if overdue."""
    names = [f"part_{rank}.json" for rank in range(num_ranks)]
    pause = WATCH_SECONDS
    while True:
        try:
            present = set(os.listdir(directory))
        except FileNotFoundError:
            raise GivenUp("another rank could not write its part") from None
        missing = [name for name in names if name not in present]
        if not missing:
            return [_decode_part((directory / name).read_bytes()) for name in names]
        if overdue():
            late = ", ".join(name.removeprefix("part_").removesuffix(".json") for name in missing[:20])
            raise TimeoutError(f"no part of rank {late} within the time-out")
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)


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
        (directory / f"part_{rank}.json").unlink()
    fsync_directory(directory)


def publish(directory: Path, root: Path, step: int, number: int) -> None:
    """Give the sealed directory its final name, then advance `latest`. A checkpoint of the same step is replaced.

    The new `latest` is written before the rename: a full disk must not strike between the two.
    """
    final = root / step_name(step)
    replaced = root / passing_name(step, "replaced", Owner.me(), number)
    new_latest, _ = write_temporary(root / LATEST, f"{step_name(step)}\n".encode())
    if final.exists():
        os.rename(final, replaced)
    os.rename(directory, final)
    fsync_directory(root)
    os.replace(new_latest, root / LATEST)
    fsync_directory(root)
    shutil.rmtree(replaced, ignore_errors=True)


def set_latest(root: Path, step: int) -> None:
    write_durably(root / LATEST, f"{step_name(step)}\n".encode())
    fsync_directory(root)


def give_up(directory: Path) -> None:
    """Take a directory that is being written out of the way of everybody; the disk space is freed by `sweep`."""
    with suppress(OSError):
        os.rename(directory, directory.with_name(directory.name.replace(".writing-", ".failed-")))
