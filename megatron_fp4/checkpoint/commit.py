"""The commit protocol on the file system: a checkpoint is complete, or it does not exist.

    root/latest                                  name of the newest checkpoint; replacing it is the commit
    root/step_00000123/                          complete: manifest.json lists every file with size and hash
    root/step_00000123.writing-<owner>.<n>/      being written, by all ranks
    root/step_00000123.{failed,deleting,replaced}-<owner>.<n>/      on its way out

One idea: ranks meet in the directory, not in a collective, so that bytes can be written by background threads while
the training process groups are in use. A rank that has fsynced its part leaves `part_<rank>.json`; rank 0 watches for
all of them, writes metadata and manifest, renames, and replaces `latest`. A rank that fails renames the directory
away: one call that needs no disk space, after which the others' files cannot be created and rank 0 stops waiting.

No torch.distributed communication happens here, and nothing is known about training.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as serialization_config

from megatron_fp4.checkpoint.box import Boxes, BoxSavePlanner
from megatron_fp4.checkpoint.files import (
    MANIFEST,
    FileRecord,
    HashingFileSystem,
    fsync_directory,
    write_durably,
    write_manifest,
    write_temporary,
)
from megatron_fp4.checkpoint.owner import Owner

LATEST = "latest"
STATE = "state.json"
COMPLETE_NAME = re.compile(r"step_(\d{8,})")
PASSING_NAME = re.compile(r"(step_\d{8,})\.(writing|failed|deleting|replaced)-(.+)\.\d+")
STALE_SECONDS = 3600.0  # a writer on another host that touched nothing for so long is gone
TEMPORARY_SECONDS = 60.0  # a new `latest` exists under its temporary name for milliseconds
WATCH_SECONDS = 0.005


class GivenUp(RuntimeError):
    """The save was given up elsewhere: by another rank, or by the main thread."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def passing_name(step: int, stage: str, number: int) -> str:
    """Name of a directory that is not a checkpoint yet, or no longer. number: distinguishes those of one process."""
    return f"{step_name(step)}.{stage}-{Owner.me().tag}.{number}"


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. A directory without manifest is none."""
    return [step for step in present_steps(root) if (root / step_name(step) / MANIFEST).exists()]


def present_steps(root: Path) -> list[int]:
    """Steps with a directory under the final name, complete or damaged, ascending."""
    names = os.listdir(root) if root.is_dir() else []
    return sorted(int(match[1]) for match in map(COMPLETE_NAME.fullmatch, names) if match)


def pointer(root: Path) -> int | None:
    """The step that `latest` names, whether or not that checkpoint is intact."""
    with suppress(OSError, UnicodeDecodeError):
        if match := COMPLETE_NAME.fullmatch((root / LATEST).read_text().strip()):
            return int(match[1])
    return None


def latest_step(root: Path) -> int | None:
    """What `latest` names if that is complete, else the highest complete step, else None."""
    steps, named = complete_steps(root), pointer(root)
    return named if named in steps else (steps[-1] if steps else None)


def load_order(root: Path) -> list[int]:
    """Steps to try on a resume: what `latest` names, then lower ones, newest first. (Higher ones than `latest` names
    were left by a run that was rolled back, or killed between rename and commit.)"""
    steps, named = present_steps(root), pointer(root)
    if named is None or named not in steps:
        return steps[::-1]
    return [step for step in steps[::-1] if step <= named]


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


def write_part(directory: Path, rank: int, plan: SavePlan, state: dict[str, Boxes]) -> Part:
    """Write this rank's rectangles and, last, the mark that they are on disk."""
    writer = PartWriter(directory)
    plan = SavePlan(plan.items, storage_data=_StoragePrefix(f"__{rank}_"))
    results = []
    # For this thread only; the file is hashed as a whole.
    with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        if plan.items:
            results = writer.write_data(plan, BoxSavePlanner(state)).wait()
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
    replaced = root / passing_name(step, "replaced", number)
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


def remove_checkpoint(root: Path, step: int, number: int) -> None:
    """Delete a checkpoint such that a kill in between leaves nothing that looks like one."""
    doomed = root / passing_name(step, "deleting", number)
    os.rename(root / step_name(step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> list[str]:
    """Remove what ended runs left behind (rank 0, at start); never the directory of a live writer. Returns the names.

    A checkpoint that was moved aside for its replacement, which then never came, gets its name back.
    """
    removed = []
    for path in root.glob(f"{LATEST}.tmp-*"):
        if time.time() - path.stat().st_mtime > TEMPORARY_SECONDS:
            path.unlink()
    for path, name, stage, owner in list(_passing(root)):
        if stage in ("writing", "replaced") and owner.lives(_age_seconds(path), STALE_SECONDS):
            continue
        if stage == "replaced" and not (root / name).exists():
            os.rename(path, root / name)
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path.name)
    return removed


def sweep_failed(root: Path) -> None:
    """Free the disk space of given-up saves of this process."""
    for path, _, stage, owner in list(_passing(root)):
        if stage == "failed" and owner == Owner.me():
            shutil.rmtree(path, ignore_errors=True)


def _passing(root: Path) -> Iterator[tuple[Path, str, str, Owner]]:
    for entry in sorted(os.listdir(root)) if root.is_dir() else []:
        match = PASSING_NAME.fullmatch(entry)
        owner = Owner.from_tag(match[3]) if match else None
        if match and owner:
            yield root / entry, match[1], match[2], owner


def _age_seconds(path: Path) -> float:
    """Since anything in the directory was last written."""
    times = [path.stat().st_mtime]
    with suppress(OSError):
        times += [entry.stat().st_mtime for entry in os.scandir(path)]
    return time.time() - max(times)


def read_state(directory: Path) -> dict[str, Any]:
    """The small state. Raises ValueError naming the file if it cannot be read."""
    path = directory / STATE
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return state
