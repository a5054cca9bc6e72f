"""The checkpoints of a run: save, find, load, keep.

    store = CheckpointStore(root, world, CheckpointConfig())
    store.save(step, optimizer.state_shards(), meta, tokens=tokens)      # all ranks
    for report in store.poll(): log(report)                              # every step, no communication
    if store.latest() is not None:
        chosen = store.choose()                                          # all ranks; the files are hashed here, once
        store.load(chosen, optimizer.state_to_fill())                    # all ranks; `meta` comes back as chosen.meta
    store.close()                                                        # before the process groups go

Everything but `poll` is collective over the group, and leaves all ranks with the same answer or error.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint.commit import SavePlaces
from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import complete_steps, latest_step, step_to_load
from megatron_fp4.checkpoint.load import CheckpointReader, CorruptCheckpoint, Verified
from megatron_fp4.checkpoint.mirror.mirror import Mirror
from megatron_fp4.checkpoint.outcome import SaveReport
from megatron_fp4.checkpoint.retention import sweep
from megatron_fp4.checkpoint.save import Saver
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.owner import Owner

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints under `root`, a directory that all ranks of `group` (the world) see.

    beat: called after each file that was checked and before tensors are read, for whoever watches that it gets on.
    mirror: URL of an object store to which they are sent as well, once `mirror.start` is called; "" = none.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        group: Group,
        config: CheckpointConfig,
        beat: Callable[[], None] = lambda: None,
        mirror: str = "",
    ) -> None:
        self.root, self.group = Path(root), group
        if group.rank == 0:
            for name in sweep(self.root):
                log.warning("removed %s, left by a run that ended while writing it", self.root / name)
        # nobody goes on before rank 0 has swept
        owner, tag = decided_by_rank0(lambda: (Owner.me(), uuid.uuid4().hex), group)
        places = SavePlaces(self.root, group, owner, tag)
        self.saver = Saver(self.root, group, config, places)
        self.reader = CheckpointReader(self.root, group, config, beat)
        self.mirror = Mirror(mirror, self.reader, places) if mirror else None

    def save(
        self,
        step: int,
        shards: Sequence[Shard],
        meta: Mapping[str, Any],
        *,
        tokens: int | None = None,
        score: float | None = None,
    ) -> SaveReport:
        """Save all shards of all ranks and rank 0's `meta` (plain JSON values) as checkpoint `step`.

        Asynchronous: returns after the copy to host memory with status `writing`; the outcome comes by `poll` or
        `wait`. A still running earlier save is waited for first. tokens, score: for the retention rules.
        Raises ValueError on overlapping or incomplete shards or unstorable meta (a bug); SaveFailed by `max_failures`.
        Disk trouble raises nothing else: the report says `failed`.
        """
        self.reader.damaged.discard(step)
        return self.saver.save(step, shards, meta, tokens, score)

    def poll(self) -> list[SaveReport]:
        """Outcomes of saves, each once, as soon as this rank knows. No communication; call it every step.

        Rank 0 knows of commit or failure, other ranks of a failure of their own part, and of the rest at the next
        `save`.
        """
        return self.saver.poll()

    def wait(self) -> SaveReport | None:
        """Wait for the running save, if any; the outcome on which all ranks agree."""
        return self.saver.wait()

    def close(self) -> SaveReport | None:
        """`wait`, to be called before the process groups are destroyed."""
        return self.saver.wait()

    def choose(self, step: int | None = None, *, before: int | None = None) -> Verified:
        """Checkpoint `step`, or the newest intact one (of an earlier step than `before`), its files verified.

        Raises FileNotFoundError if there is none, CorruptCheckpoint where damage does not lead to an earlier one, and
        UnreadableFile where the file system does not answer.
        """
        self.saver.conclude()
        return self.reader.choose(step, before)

    def choose_newest(self) -> Verified | None:
        """The newest intact checkpoint of the disk and the mirror, which is brought to the disk; None if there is none.

        Raises what `choose` raises, and UnreadableFile where the mirror does not answer.
        """
        fetcher = self.mirror.fetcher if self.mirror else None
        if fetcher:
            fetcher.bring(above=decided_by_rank0(lambda: latest_step(self.root), self.group))
        if self.latest() is None:
            return None
        try:
            chosen = self.choose()
        except CorruptCheckpoint:
            if fetcher is None or fetcher.bring(above=None) is None:
                raise
            return self.choose()
        if fetcher and any(step > chosen.step for step in self.reader.damaged):
            return self.choose() if fetcher.bring(above=chosen.step) is not None else chosen
        return chosen

    def load(self, chosen: Verified, shards: Sequence[Shard], unread: tuple[str, ...] = ()) -> None:
        """Fill the shards' tensors in place. Replicas are filled too; kinds that no shard has are not read.

        unread: beginnings of the names of tensors that no shard need have.
        Raises ValueError listing names and shapes that differ; CorruptCheckpoint if a file can no longer be read, after
        which the tensors' contents are undefined.
        """
        self.reader.load(chosen, shards, unread)

    def load_or_earlier(self, chosen: Verified, shards: Sequence[Shard], unread: tuple[str, ...] = ()) -> Verified:
        """`load` what `choose()` has chosen, or the newest earlier one whose files can be read; returns that one.

        Raises CorruptCheckpoint where damage does not lead to an earlier one.
        """
        return self.reader.load_or_earlier(chosen, shards, unread)

    def latest(self) -> int | None:
        """The step that a resume tries first, intact or not; None if there is nothing to go on from.

        Raises ValueError where `latest` names a checkpoint and there is none at all.
        """
        return decided_by_rank0(lambda: step_to_load(self.root), self.group)

    def complete_steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending; that of a running save, which is waited for, is one of them."""
        self.saver.conclude()
        return decided_by_rank0(lambda: complete_steps(self.root), self.group)

    def discard_after(self, step: int) -> None:
        """After a rollback to `step`: delete the checkpoints above it and make it `latest`. Raises OSError."""
        if self.mirror:
            self.saver.conclude()
            self.mirror.discard_after(step)
        self.saver.discard_after(step)
