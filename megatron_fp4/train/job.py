"""A rank's life in a job: one launch at a time in a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable

from megatron_fp4.comm import collectives
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.lock import RunLock, RunLocked


def lock_run_directory(
    directory: str | os.PathLike[str], group: Group, on_lost: Callable[[], None] = lambda: None
) -> RunLock:
    """Rank 0 takes the lock; the refusal is raised on all ranks. `release` and `on_lost` act on rank 0 only."""
    lock = RunLock(directory, on_lost=on_lost)
    refusal = None
    if group.rank == 0:
        try:
            lock.acquire()
        except RunLocked as error:
            refusal = str(error)
    refusal = collectives.broadcast_object(refusal, group)
    if refusal:
        raise RunLocked(refusal)
    return lock
