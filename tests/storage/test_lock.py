"""One launch per run directory: refused with the holder's pid and host; dead holders are replaced."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_fp4.storage import lock as lock_module
from megatron_fp4.storage.lock import LOCK, Holder, RunLock, RunLocked, RunUnwritable
from megatron_fp4.storage.owner import Owner, start_of

HOLD = """
import sys, time
from megatron_fp4.storage.lock import RunLock
lock = RunLock(sys.argv[1]); lock.acquire(); print("held", flush=True); time.sleep(60)
"""


def write_lock(directory: Path, host: str, pid: int, start: int, age_seconds: float = 0.0) -> None:
    body = {"host": host, "pid": pid, "start": start, "since": "then", "nonce": "other"}
    (directory / "new").write_text(json.dumps(body))
    os.replace(directory / "new", directory / LOCK)
    os.utime(directory / LOCK, (time.time() - age_seconds, time.time() - age_seconds))


def test_second_launch_is_refused_and_a_killed_one_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunLocked, match=rf"in use by pid {holder.pid} on host {Owner.me().host} "):
        RunLock(tmp_path).acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = RunLock(tmp_path)
    with caplog.at_level(logging.WARNING):
        lock.acquire()
    assert f"pid {holder.pid}" in caplog.text, "a take-over must be logged"
    lock.release()
    assert not (tmp_path / LOCK).exists()
    lock.release()


def test_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    me = Owner.me()
    write_lock(tmp_path, me.host, me.pid, me.start + 1)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_holder_on_another_host_that_gives_a_sign_of_life(tmp_path: Path) -> None:
    write_lock(tmp_path, "node-17", 4242, 1, age_seconds=10)
    touch = threading.Timer(0.5, os.utime, [tmp_path / LOCK])
    touch.start()
    began = time.monotonic()
    with pytest.raises(RunLocked, match="pid 4242 on host node-17"):
        RunLock(tmp_path).acquire()
    assert time.monotonic() - began > 0.4, "refused without a sign of life: the job of a node that died would stay down"
    touch.join()


@pytest.mark.parametrize("torn", [False, True])
def test_holder_on_another_host_that_died_a_moment_ago(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bool
) -> None:
    """Its node failed and slurm has moved the job here: wait for it, and take over."""
    write_lock(tmp_path, "node-17", 4242, 1)
    if torn:
        (tmp_path / LOCK).write_text('{"host": "no')
    lock = RunLock(tmp_path, heartbeat_seconds=0.3, stale_seconds=1.0)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        lock.acquire()
    assert time.monotonic() - began > 0.7, "taken over before a heartbeat could have come"
    assert "waiting up to 1 s for a sign of life" in caplog.text
    assert ("an unknown process" if torn else "pid 4242 on host node-17") in caplog.text
    lock.release()
    write_lock(tmp_path, "node-17", 4242, 1, age_seconds=200)
    lock = RunLock(tmp_path)
    lock.acquire()  # at once
    lock.release()


def test_heartbeat_and_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lost = threading.Event()
    lock = RunLock(tmp_path, heartbeat_seconds=0.05, stale_seconds=1.0, on_lost=lost.set)
    lock.acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    time.sleep(0.3)
    assert time.time() - (tmp_path / LOCK).stat().st_mtime < 5, "a long run would look dead from another host"
    assert not lost.is_set()
    write_lock(tmp_path, "node-18", 1, 1)
    assert lost.wait(10), "two launches would write into one directory"
    assert "lost to pid 1 on host node-18" in caplog.text
    lock.release()
    assert (tmp_path / LOCK).exists(), "the other launch's lock must not be removed"


class SlowLook(RunLock):
    """Time between looking and taking, for all the others to look as well."""

    def _holder(self, now: float) -> Holder | None:
        holder = super()._holder(now)
        time.sleep(0.1)
        return holder


def test_only_one_of_many_launches_takes_over_a_stale_lock(tmp_path: Path) -> None:
    write_lock(tmp_path, Owner.me().host, 2**22 + 1, 1)  # above the kernel's largest pid
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                SlowLook(tmp_path).acquire()
                code = 0
                time.sleep(1.0)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes.count(0) == 1, f"{codes.count(0)} launches hold the same directory"


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_leaves_no_empty_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty lock has no owner: the next start, also on this host, would wait 180 s for its sign of life."""
    monkeypatch.setattr(lock_module.os, "fsync", no_space)
    with pytest.raises(RunUnwritable, match=r"cannot be written \(\[Errno 28\] No space left on device\); make room"):
        RunLock(tmp_path).acquire()
    assert not (tmp_path / LOCK).exists()
    monkeypatch.undo()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_directory_that_cannot_be_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunUnwritable, match=r"or choose another train\.run_dir"):
        RunLock(tmp_path / name).acquire()


def test_a_zombie_is_dead() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    time.sleep(0.2)
    assert start_of(child) == -1
    assert not Owner(Owner.me().host, child, 5).lives(0.0, 180.0)
    os.waitpid(child, 0)
