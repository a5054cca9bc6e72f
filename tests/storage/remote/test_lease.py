"""One owner at a time: two launches, dead ones, frozen ones, lost answers, and a store without conditions."""

from __future__ import annotations

import threading
import time
import uuid

import pytest

from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.remote import lease as lease_module
from megatron_fp4.storage.remote.client import Conflict, Remote
from megatron_fp4.storage.remote.lease import FOLDER, Lease, LeaseHeld, LeaseRecord

QUICK = {"heartbeat_seconds": 0.05, "stale_seconds": 0.3}
ELSEWHERE = Owner("another-host", 7, 7)


def memory() -> Remote:
    return Remote(f"memory:///{uuid.uuid4().hex}")


def held_by(remote: Remote, owner: Owner, *, released: bool = False, number: int = 4) -> str:
    key = f"{FOLDER}/{number:08d}.json"
    remote.put(key, LeaseRecord(owner, "long ago", "other", released).encode())
    return key


def test_a_second_launch_is_refused_until_the_first_has_left() -> None:
    remote = memory()
    first, second = Lease(remote), Lease(remote)
    first.acquire()
    with pytest.raises(LeaseHeld, match=r"is in use by pid \d+ on host .* choose another checkpoint.mirror"):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


@pytest.mark.parametrize("released", [False, True])
def test_a_process_that_is_gone_is_replaced_at_once(released: bool) -> None:
    remote = memory()
    me = Owner.me()
    key = held_by(remote, ELSEWHERE if released else Owner(me.host, 1 << 22, 1), released=released)
    lease = Lease(remote)
    began = time.monotonic()
    lease.acquire()
    assert time.monotonic() - began < 1
    assert key not in [one.key for one in remote.entries()], "history is removed"
    lease.release()


def test_a_holder_elsewhere_is_watched() -> None:
    """Without a sign of life it is replaced after stale_seconds; one sign of life and this launch is refused."""
    remote = memory()
    held_by(remote, ELSEWHERE)
    lease = Lease(remote, **QUICK)
    began = time.monotonic()
    lease.acquire()
    assert 0.3 <= time.monotonic() - began < 3
    lease.release()

    remote = memory()
    key = held_by(remote, ELSEWHERE)
    sign = LeaseRecord(ELSEWHERE, "long ago", "other", beats=1)
    threading.Timer(0.1, lambda: remote.put(key, sign.encode())).start()
    with pytest.raises(LeaseHeld, match="another-host"):
        Lease(remote, heartbeat_seconds=0.05, stale_seconds=5.0).acquire()


def test_of_many_that_find_it_free_one_gets_it() -> None:
    remote = memory()
    got: list[Lease] = []

    def run() -> None:
        lease = Lease(remote)
        try:
            lease.acquire()
            got.append(lease)
        except LeaseHeld:
            pass

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_a_frozen_holder_learns_that_it_was_replaced() -> None:
    remote = memory()
    lost = threading.Event()
    frozen = Lease(remote, on_lost=lost.set, **QUICK)
    frozen.acquire()
    held_by(remote, ELSEWHERE, number=2)
    assert lost.wait(5)


class LostAnswers(Remote):
    """Every create is done, and then reported as if it had met itself: the answer was lost, and it was sent again."""

    def create(self, key: str, data: bytes) -> str:
        super().create(key, data)
        raise Conflict("412")


class NoConditions(Remote):
    """A store that takes no notice of conditions."""

    def create(self, key: str, data: bytes) -> str:
        return self.put(key, data)


def test_a_lost_answer_is_no_other_launch() -> None:
    remote = LostAnswers(f"memory:///{uuid.uuid4().hex}")
    lease = Lease(remote)
    lease.acquire()
    lease.release()


def test_a_store_without_conditions_is_read_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease_module, "READ_BACK_SECONDS", 0.3)
    remote = NoConditions(f"memory:///{uuid.uuid4().hex}")
    other = threading.Timer(0.1, lambda: held_by(remote, ELSEWHERE, number=1))
    other.start()
    with pytest.raises(LeaseHeld, match="taken by another launch just now"):
        Lease(remote).acquire()
    assert "has no conditional puts" in caplog.text
