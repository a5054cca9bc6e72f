"""The lock of a run directory, taken by rank 0 for all; where it cannot be written, that is seen here.

Not here: what the lock is, and when a holder is dead (storage/lock.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.data.ledger import LEDGER
from megatron_fp4.storage.append import AppendFile
from megatron_fp4.storage.durable import write_temporary
from megatron_fp4.storage.lock import RunLock, RunLocked, RunUnwritable


def lock_run_directory(
    directory: str | os.PathLike[str], group: Group, on_lost: Callable[[], None] = lambda: None
) -> RunLock:
    """Rank 0 takes the lock; the refusal is raised on all ranks. `release` and `on_lost` act on rank 0 only."""
    lock = RunLock(directory, on_lost=on_lost)
    decided_by_rank0(lambda: _take(lock), group, RunLocked)
    return lock


def _take(lock: RunLock) -> None:
    """Take it, and write where the first step and the first save will: they would fail after the work of a start."""
    lock.acquire()
    ledger, checkpoints = lock.directory / LEDGER, lock.directory / "checkpoints"
    try:
        if ledger.exists():
            AppendFile(ledger).close()
        if os.path.lexists(checkpoints):  # also a link to a disk that is not there
            write_temporary(checkpoints / "trial", b"trial")[0].unlink()
    except OSError as error:
        lock.release()
        raise RunUnwritable.by(error, lock.directory) from error
