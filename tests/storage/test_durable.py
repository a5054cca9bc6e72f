"""What is written durably is whole or the old content, and what it must look like is known."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_fp4.storage.durable import FileRecord, HashingFile, problem_of, share_of, write_durably, write_temporary
from megatron_fp4.storage.lock import exclusively
from megatron_fp4.storage.owner import Owner


def test_parts_stand_one_after_the_other_and_are_hashed_as_one(tmp_path: Path) -> None:
    record = write_durably(tmp_path / "x", b"head", np.arange(3, dtype="<i8").data, b"")
    assert (tmp_path / "x").read_bytes() == b"head" + np.arange(3, dtype="<i8").tobytes()
    assert record.num_bytes == 28
    assert problem_of(tmp_path, "x", record) is None
    assert os.listdir(tmp_path) == ["x"], "the temporary file was left"
    assert "has xxh3-64" in (problem_of(tmp_path, "x", FileRecord(28, "0" * 16)) or "")


def test_a_full_disk_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "x", b"old")

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashingFile, "write", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_two_hosts_with_equal_pids_write_to_different_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = set()
    for host in ("node-1", "node-2"):
        monkeypatch.setattr(Owner, "me", lambda host=host: Owner(host, 7, 1))
        paths.add(write_temporary(tmp_path / "x", host.encode())[0])
    assert len(paths) == 2, "on a shared folder, one would rename the half-written file of the other"


def test_every_file_is_verified_by_one_rank_and_the_bytes_are_even() -> None:
    parts = [(f"f{number}", FileRecord(number * 100, "")) for number in range(20)]
    shares = [share_of(parts, rank, 3) for rank in range(3)]
    assert sorted(part[0] for share in shares for part in share) == sorted(name for name, _ in parts)
    loads = [sum(part.num_bytes for _, part in share) for share in shares]
    assert max(loads) - min(loads) <= 300


HOLD = """
import sys, time
from megatron_fp4.storage.lock import exclusively
with exclusively(sys.argv[1]):
    print("held", flush=True); time.sleep(0.5)
"""


def test_exclusively_waits_for_another_process(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    began = time.monotonic()
    with exclusively(tmp_path / "lock"):
        assert time.monotonic() - began > 0.2, "two processes hold the same lock"
    holder.wait()
