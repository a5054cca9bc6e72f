"""The commit protocol on the file system: a checkpoint is complete, or it does not exist.

Ranks meet in a store, not in a collective, so that bytes can be written by background threads while the training
process groups are in use. A rank that has fsynced its part leaves a mark (marks.py); rank 0 watches for all of them,
writes layout and manifest, renames, and replaces `latest`. A rank that fails renames the directory away: one call that
needs no disk space, after which the others' files cannot be created and rank 0 stops waiting.

Not here: torch.distributed communication, and names (directory.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import LATEST, STATE, step_name, temporary_name
from megatron_fp4.checkpoint.marks import Marks, store_of
from megatron_fp4.checkpoint.outcome import NotSaved
from megatron_fp4.checkpoint.pieces.layout import LAYOUT
from megatron_fp4.checkpoint.pieces.plan import SaveLayout
from megatron_fp4.checkpoint.retention import retain, sweep_failed
from megatron_fp4.checkpoint.state import SaveContent
from megatron_fp4.checkpoint.write import GivenUp, SaveInProgress, write_part
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.durable import FileRecord, fsync_directory, write_durably, write_manifest, write_temporary
from megatron_fp4.storage.owner import Owner

log = logging.getLogger(__name__)
WATCH_SECONDS = 0.005
MOST_WATCH_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class SavePlace:
    """Where the ranks meet for one save. number: distinguishes the changes of one process in directory names."""

    directory: Path
    number: int
    marks: Marks


class SavePlaces:
    """The places of the saves under `root`, one after the other, the same on all ranks of `group`.

    owner: rank 0's process. tag: of rank 0; no other of these has it.
    """

    def __init__(self, root: Path, group: Group, owner: Owner, tag: str) -> None:
        self._root, self._num_ranks = root, group.size
        self._owner, self._tag = owner, tag
        self._store = store_of(group)
        self._number = 0

    def next_number(self) -> int:
        """The number of the next change of this process."""
        self._number += 1
        return self._number

    def next(self, step: int) -> SavePlace:
        """The place of a save of `step`; nothing is made."""
        number = self.next_number()
        directory = self._root / temporary_name(step, "writing", self._owner, number)
        return SavePlace(directory, number, Marks(self._store, f"{self._tag}/{number}", self._num_ranks))


@dataclass(frozen=True, eq=False)
class LocalSave:
    """What this rank does for one save, without communication: it may run in a thread.

    content: NotSaved if it could not be copied to host memory.
    """

    place: SavePlace
    rank: int
    config: CheckpointConfig
    layout: SaveLayout
    content: SaveContent | NotSaved

    def write(self, save: SaveInProgress) -> int:
        """Returns the bytes of this rank's part. What fails here takes the directory out of the others' way."""
        try:
            if isinstance(self.content, NotSaved):  # raised here, so that no other rank waits for this one
                raise MemoryError(self.content.reason)
            try:
                record = write_part(self.place.directory, self.layout.part, self.content.shards)
            except FileNotFoundError:
                raise GivenUp("another rank could not write its part") from None
            self.place.marks.leave(self.rank, record)
            if self.rank == 0:
                self._commit(save, self.content.state_json)
        except BaseException:
            self.give_up()
            raise
        if self.rank == 0:
            retain(self.place.directory.parent, save.step, self.place.number, self.config)
        return record.num_bytes

    def _commit(self, save: SaveInProgress, state_json: bytes) -> None:
        try:
            records = wait_for_parts(self.place.directory, self.place.marks, save.overdue)
        finally:
            self.place.marks.clear()
        seal(self.place.directory, save.step, self.layout, state_json, records)
        if not save.claim_commit():
            raise GivenUp("finished after its time-out")
        publish(self.place.directory, save.step, self.place.number)

    def give_up(self) -> None:
        """Take the directory out of everybody's way; rank 0 frees its disk space."""
        with suppress(OSError):
            os.rename(
                self.place.directory,
                self.place.directory.with_name(self.place.directory.name.replace(".writing-", ".failed-")),
            )
        if self.rank == 0:
            sweep_failed(self.place.directory.parent)


def wait_for_parts(directory: Path, marks: Marks, overdue: Callable[[], bool]) -> list[FileRecord]:
    """Rank 0: the parts of all ranks, when all are there. Raises GivenUp if a rank failed, TimeoutError if overdue."""
    pause = WATCH_SECONDS
    while True:
        if not directory.is_dir():
            raise GivenUp("another rank could not write its part")
        if records := marks.collect():
            return records
        if overdue():
            late = ", ".join(map(str, marks.absent()[:20]))
            raise TimeoutError(f"no part of rank {late} within the time-out")
        time.sleep(pause)
        pause = min(pause * 1.2, MOST_WATCH_SECONDS)


def seal(directory: Path, step: int, layout: SaveLayout, state_json: bytes, records: Sequence[FileRecord]) -> None:
    """Rank 0: the layout, the small state and the manifest; the directory is a whole checkpoint afterwards.

    records: of the parts, by rank. The layout is written again with each checkpoint: one that borrowed it from another
    could not be moved, and would share its damage.
    """
    parts: dict[str, list[FileRecord]] = {}
    for part, record in zip(layout.parts, records, strict=True):
        if record.num_bytes:
            parts.setdefault(part.file, []).append(record)
    files = {
        **parts,
        LAYOUT: [write_durably(directory / LAYOUT, layout.content)],
        STATE: [write_durably(directory / STATE, state_json)],
    }
    write_manifest(directory, step, files)
    fsync_directory(directory)


def publish(directory: Path, step: int, number: int) -> None:
    """Give the sealed directory its final name, then advance `latest`. A checkpoint of the same step is replaced.

    The new `latest` is written before the rename: a full disk must not strike between the two. What fails before
    `latest` is replaced is taken back, so that the old checkpoint of this step is there for a process that lives on.
    """
    root = directory.parent
    final = root / step_name(step)
    replaced = root / temporary_name(step, "replaced", Owner.me(), number)
    new_latest, _ = write_temporary(root / LATEST, f"{step_name(step)}\n".encode())
    if os.path.lexists(final):  # also a link to what is gone
        os.rename(final, replaced)
    try:
        os.rename(directory, final)
        fsync_directory(root)
        os.replace(new_latest, root / LATEST)
    except OSError:
        with suppress(OSError):
            if not directory.exists():
                os.rename(final, directory)
            if os.path.lexists(replaced):
                os.rename(replaced, final)
        raise
    try:
        fsync_directory(root)
    except OSError as error:  # it counts already; after a power cut `latest` may name an older one, or one that is gone
        log.warning("%s names %s, which a power cut may undo: %s", root / LATEST, final.name, error)
    shutil.rmtree(replaced, ignore_errors=True)
