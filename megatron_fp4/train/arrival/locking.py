"""What a launch holds alone, taken by rank 0 for all: the run directory, and the mirror of its checkpoints.

Where either cannot be written, that is seen here.

Not here: what they are, and when a holder is dead (storage/lock.py, storage/remote/lease.py).
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
from megatron_fp4.storage.remote.client import Remote, StoreError
from megatron_fp4.storage.remote.lease import Lease


class RunHold:
    """The lock of a run directory, and the lease of its mirror where it has one. They act on rank 0 only."""

    def __init__(self, lock: RunLock) -> None:
        self._lock = lock
        self._lease: Lease | None = None

    def take(self, mirror: str, on_lost: Callable[[], None], beat: Callable[[], None]) -> None:
        """See `hold_run`."""
        _take(self._lock)
        if not mirror:
            return
        try:
            lease = Lease(Remote(mirror), on_lost=on_lost)
            lease.acquire(beat)
            self._lease = lease
        except StoreError as error:
            self._lock.release()
            raise RunUnwritable(
                f"checkpoint.mirror={mirror} cannot be written ({error}); start again when it answers, with credentials"
                " that it takes (docs/object_stores.md), or without a mirror"
            ) from None
        except RunLocked:
            self._lock.release()
            raise

    def release(self) -> None:
        """Give both back; safe to call twice."""
        self._lock.release()
        if self._lease:
            self._lease.release()


def hold_run(
    directory: str | os.PathLike[str],
    mirror: str,
    group: Group,
    on_lost: Callable[[], None] = lambda: None,
    beat: Callable[[], None] = lambda: None,
) -> RunHold:
    """Rank 0 takes the lock, and the lease of `mirror` unless that is empty; a refusal is raised on all ranks.

    on_lost: called when another launch has taken one of them over. beat: called while this waits for a dead holder.
    Raises RunLocked.
    """
    hold = RunHold(RunLock(directory, on_lost=on_lost))
    decided_by_rank0(lambda: hold.take(mirror, on_lost, beat), group, RunLocked)
    return hold


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
