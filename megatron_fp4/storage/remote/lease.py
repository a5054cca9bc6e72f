"""The lease of a prefix in an object store: one owner at a time, where nothing can be locked or renamed.

    lease/00000003.json      whose turn it was; lower numbers are history and are removed
    lease/00000004.json      whose turn it is: written again every HEARTBEAT_SECONDS by its owner, and by nobody else

Who takes the lease creates the next number, which one of those who try can do; nothing else is asked of a store than a
put that fails where an object exists. A holder is gone if its process is (on this host), if it has said so, if its
object is older than any clock can be wrong, or if it was watched for STALE_SECONDS without a sign of life: no clocks of
two hosts are compared more finely than SKEW_SECONDS, beyond which S3 itself refuses requests.

A holder that was frozen sees the higher number when it wakes. What it may still send in that moment must do no harm:
see checkpoint/mirror/, whose data have names of their own content.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from megatron_fp4.storage.lock import HEARTBEAT_SECONDS, STALE_SECONDS, RunLocked
from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.remote.client import Conflict, Remote, StoredObject, StoreError

log = logging.getLogger(__name__)
FOLDER = "lease"
SKEW_SECONDS = 900.0
READ_BACK_SECONDS = 2.0
"""How long a store without conditional puts is given to show who else has put the same number."""


class LeaseHeld(RunLocked):
    """Another launch holds the prefix; the message has its pid and host."""


@dataclass(frozen=True)
class LeaseRecord:
    """What a lease says. released: its owner has left in order."""

    owner: Owner
    since: str
    nonce: str
    released: bool = False
    beats: int = 0

    def encode(self) -> bytes:
        me = {"host": self.owner.host, "pid": self.owner.pid, "start": self.owner.start}
        rest = {"since": self.since, "nonce": self.nonce, "released": self.released, "beats": self.beats}
        return json.dumps({**me, **rest}).encode()

    @staticmethod
    def decode(text: bytes) -> LeaseRecord:
        """Raises ValueError for what is no lease."""
        try:
            body: dict[str, Any] = json.loads(text)
            owner = Owner(str(body["host"]), int(body["pid"]), int(body["start"]))
            return LeaseRecord(owner, str(body["since"]), str(body["nonce"]), bool(body["released"]), body["beats"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no lease: {error}") from None


class Lease:
    """The lease of `remote`. on_lost: called, by another thread, when another launch has taken it over."""

    def __init__(
        self,
        remote: Remote,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        if stale_seconds < 3 * heartbeat_seconds:
            raise ValueError(f"stale_seconds = {stale_seconds} must be at least 3 heartbeats of {heartbeat_seconds} s")
        self._remote = remote
        self._heartbeat_seconds, self._stale_seconds = heartbeat_seconds, stale_seconds
        self._on_lost = on_lost
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._record = LeaseRecord(Owner.me(), since, uuid.uuid4().hex)
        self._number = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, beat: Callable[[], None] = lambda: None) -> None:
        """Take the lease, over a holder that is gone if need be (logged). Raises LeaseHeld, StoreError.

        A holder that may live is watched until it gives a sign of life, for `stale_seconds` at most. beat: called while
        this waits.
        """
        seen = None
        began = time.monotonic()
        while True:
            newest = self._newest()
            if newest is None:
                break
            record = self._read(newest)
            if record is not None and self._is_gone(record, newest):
                break
            who = f"pid {record.owner.pid} on host {record.owner.host} (since {record.since})" if record else "nobody"
            on_this_host = record is not None and record.owner.host == Owner.me().host
            if on_this_host or (seen is not None and (seen.key, seen.version) != (newest.key, newest.version)):
                raise LeaseHeld(
                    f"the mirror {self._remote.url} is in use by {who}; stop that launch, or choose another"
                    f" checkpoint.mirror (if it is surely dead: remove {self._remote.url}/{newest.key})"
                )
            if seen is None:
                log.warning("%s is held by %s; waiting up to %g s", self._remote.url, who, self._stale_seconds)
                seen = newest
            elif time.monotonic() - began > self._stale_seconds:
                log.warning("taking over %s from %s, which gave no sign of life", self._remote.url, who)
                break
            beat()
            time.sleep(min(1.0, self._heartbeat_seconds / 4))
        self._take(_number(newest) + 1 if newest else 1)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lease back, if the store answers; safe to call twice."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        try:
            self._put(LeaseRecord(self._record.owner, self._record.since, self._record.nonce, released=True))
        except OSError as error:
            log.warning("the lease of %s could not be given back: %s", self._remote.url, error)

    def _newest(self) -> StoredObject | None:
        leases = [one for one in self._remote.entries(FOLDER) if _number(one)]
        return max(leases, key=_number, default=None)

    def _read(self, lease: StoredObject) -> LeaseRecord | None:
        """None for what cannot be read as one: its holder is watched like any other."""
        with suppress(FileNotFoundError, ValueError):
            return LeaseRecord.decode(self._remote.read(lease.key))
        return None

    def _is_gone(self, record: LeaseRecord, lease: StoredObject) -> bool:
        if record.released:
            return True
        age = (datetime.now(UTC) - lease.modified).total_seconds()
        if record.owner.host == Owner.me().host:
            gone = not record.owner.lives(age, self._stale_seconds)
        else:
            gone = age > self._stale_seconds + SKEW_SECONDS
        if gone:
            log.warning("taking over %s from pid %d on host %s, which is gone", self._remote.url, *_who(record))
        return gone

    def _take(self, number: int) -> None:
        key, content = _key(number), self._record.encode()
        try:
            self._remote.create(key, content)
        except Conflict:
            if not self._is_own(key):  # it is where the answer to a put was lost, which was then sent again
                raise self._taken() from None
        self._number = number
        if not self._is_exclusive(key, content):
            log.warning("%s has no conditional puts: a second launch is seen by reading back only", self._remote.url)
            time.sleep(READ_BACK_SECONDS)
            if not self._is_own(key):
                raise self._taken()
        self._remote.delete(one.key for one in self._remote.entries(FOLDER) if 0 < _number(one) < number)

    def _is_exclusive(self, key: str, content: bytes) -> bool:
        """Whether this store refuses to create what exists; some take no notice of the condition."""
        try:
            self._remote.create(key, content)
        except Conflict:
            return True
        return False

    def _is_own(self, key: str) -> bool:
        with suppress(FileNotFoundError, ValueError):
            return LeaseRecord.decode(self._remote.read(key)).nonce == self._record.nonce
        return False

    def _taken(self) -> LeaseHeld:
        return LeaseHeld(f"the mirror {self._remote.url} was taken by another launch just now")

    def _put(self, record: LeaseRecord) -> None:
        self._remote.put(_key(self._number), record.encode())

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(self._heartbeat_seconds):
            beats += 1
            try:
                newest = self._newest()
                if newest is not None and _number(newest) > self._number:
                    holder = self._read(newest)
                    who = f"pid {holder.owner.pid} on host {holder.owner.host}" if holder else "another launch"
                    log.error("the lease of %s was lost to %s", self._remote.url, who)
                    self._on_lost()
                    return
                self._put(LeaseRecord(self._record.owner, self._record.since, self._record.nonce, beats=beats))
            except StoreError as error:
                log.warning("no heartbeat for %s: %s", self._remote.url, error)


def _who(record: LeaseRecord) -> tuple[int, str]:
    return record.owner.pid, record.owner.host


def _key(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def _number(lease: StoredObject) -> int:
    """0 for another object."""
    text = lease.key.removeprefix(f"{FOLDER}/").removesuffix(".json")
    return int(text) if text.isdecimal() else 0
