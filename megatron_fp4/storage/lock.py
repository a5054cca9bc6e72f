"""One launch per run directory.

A lock file says who holds it (host, pid, start time); its modification time is a heartbeat. A holder on this
host is looked up in the kernel. One on another host (slurm requeued the job elsewhere) is watched: a heartbeat says
that it lives, and when the last one is old by the file system's own clock it is gone. Looking and taking happen under a
short lock of the file system (`exclusively`), so that two launches cannot both take over; where there is none, creation
with O_EXCL still keeps one of them out.

It does not guard reading, and containers that share a host name but not their process table must not share a run
directory. Not here: which rank takes it, and what the others are told (train/arrival/locking.py).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.storage.owner import Owner

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 180.0
"""Some heartbeats more than a file system may hide from another host (NFS: attributes up to 60 s old)."""
LOCK = "run.lock"
GUARD = ".run.lock.guard"


@contextmanager
def exclusively(path: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Hold the lock of the file `path`, made if need be, against other processes; waits for it.

    A file system without locks lets everybody in: what is done here must then be wasteful at worst.
    """
    with open(path, "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class RunLocked(RuntimeError):
    """Another launch holds the run directory; the message has its pid and host."""


class RunUnwritable(RunLocked):
    """Nobody can hold the run directory: the file system refuses to write there."""

    @staticmethod
    def by(error: OSError, directory: str | os.PathLike[str]) -> RunUnwritable:
        """With the file system's own words, and the remedy."""
        return RunUnwritable(
            f"the run directory {directory} cannot be written ({error}); make room there or get the right to write, or"
            " choose another train.run_dir"
        )


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; owner: None if the file is torn.

    since: text for people. nonce: tells two launches of one process apart. touched: when the last heartbeat came, in
    seconds of the file system's clock; age_seconds: how long ago that was.
    """

    owner: Owner | None
    since: str
    nonce: str
    touched: float
    age_seconds: float

    def describe(self) -> str:
        who = f"pid {self.owner.pid} on host {self.owner.host}" if self.owner else "an unknown process"
        return f"{who} (since {self.since}, last sign of life {self.age_seconds:.0f} s ago)"

    def may_live(self, stale_seconds: float = STALE_SECONDS) -> bool:
        """Whether it is not known to be gone."""
        if self.owner is None:
            return self.age_seconds < stale_seconds
        return self.owner.lives(self.age_seconds, stale_seconds)


class RunLock:
    """The lock of `directory`.

    heartbeat_seconds: how often the holder touches it. stale_seconds: a holder on another host that did not touch it
    for so long is taken for dead. on_lost: called, by another thread, when another launch has taken the lock over (this
    process was frozen for long).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        if stale_seconds < 3 * heartbeat_seconds:
            raise ValueError(f"stale_seconds = {stale_seconds} must be at least 3 heartbeats of {heartbeat_seconds} s")
        self.directory = Path(directory)
        self.path = self.directory / LOCK
        self._heartbeat_seconds, self._stale_seconds = heartbeat_seconds, stale_seconds
        self._nonce = uuid.uuid4().hex
        self._stop = threading.Event()
        self._on_lost = on_lost
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, over a dead holder if need be (logged). Raises RunLocked if the holder lives, RunUnwritable.

        A holder on another host is watched for this, until it gives a sign of life or for `stale_seconds` at most: the
        job may have been moved away from a node that died a moment ago.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._wait_and_take()
        except OSError as error:
            raise RunUnwritable.by(error, self.directory) from error
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def _wait_and_take(self) -> None:
        first = self._take(None)
        if first is not None:
            wait = f"waiting up to {self._stale_seconds:g} s for a sign of life"
            log.warning("%s is held by %s; %s", self.path, first.describe(), wait)
        while first is not None and self._take(first) is not None:
            time.sleep(min(1.0, self._heartbeat_seconds / 4))

    def _take(self, seen: Holder | None) -> Holder | None:
        """Take the lock; or return the holder if it is not known yet whether it lives. seen: the one at first look."""
        with self._guarded() as now:
            holder = self._holder(now)
            if holder is not None and holder.may_live(self._stale_seconds):
                on_this_host = holder.owner is not None and holder.owner.host == Owner.me().host
                if on_this_host or (seen and (holder.nonce, holder.touched) != (seen.nonce, seen.touched)):
                    raise RunLocked(
                        f"the run directory {self.directory} is in use by {holder.describe()}; stop that launch, or"
                        f" choose another directory (if it is surely dead: remove {self.path})"
                    )
                return holder
            if holder is not None:
                log.warning("taking over %s from %s, which is gone", self.path, holder.describe())
                self.path.unlink()
            self._create()
            return None

    def release(self) -> None:
        """Give the lock back; safe to call twice, and does not touch another launch's lock."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        with self._guarded() as now:
            holder = self._holder(now)
            if holder is not None and holder.nonce == self._nonce:
                self.path.unlink()

    @contextmanager
    def _guarded(self) -> Generator[float, None, None]:
        """The critical section; yields the file system's clock, which all hosts share."""
        guard = self.directory / GUARD
        with exclusively(guard):
            os.utime(guard)
            yield guard.stat().st_mtime

    def _create(self) -> None:
        me = Owner.me()
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        body = {"host": me.host, "pid": me.pid, "start": me.start, "since": since, "nonce": self._nonce}
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            raise RunLocked(f"the run directory {self.directory} was taken by another launch just now") from None
        try:
            with open(descriptor, "w") as stream:
                json.dump(body, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            self.path.unlink()  # an empty lock would hold off the launches of other hosts
            raise

    def _holder(self, now: float) -> Holder | None:
        return _read_holder(self.path, now)

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_seconds):
            try:
                holder = self._holder(time.time())
                if holder is None or holder.nonce != self._nonce:
                    who = holder.describe() if holder else "nobody: the lock file was removed"
                    log.error("the lock of %s was lost to %s", self.directory, who)
                    self._on_lost()
                    return
                os.utime(self.path)
            except OSError as error:
                log.warning("no heartbeat for %s: %s", self.path, error)


def last_holder(directory: Path) -> Holder | None:
    """Who holds the lock of `directory`, to look at: nothing is written. None where nobody does.

    The age is by this host's clock, which may differ from the file system's.
    """
    return _read_holder(directory / LOCK, time.time())


def holds(directory: Path) -> bool:
    """Whether this process has the lock of `directory`: then no other that ever wrote there lives."""
    try:
        return _owner(json.loads((directory / LOCK).read_text())) == Owner.me()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_holder(path: Path, now: float) -> Holder | None:
    try:
        touched = path.stat().st_mtime
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        body = json.loads(text)
        return Holder(_owner(body), str(body["since"]), str(body["nonce"]), touched, now - touched)
    except (ValueError, KeyError, TypeError):  # torn by a crash while it was written
        return Holder(None, "unknown", "", touched, now - touched)


def _owner(body: dict[str, Any]) -> Owner:
    return Owner(str(body["host"]), int(body["pid"]), int(body["start"]))
