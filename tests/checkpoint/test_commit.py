"""SIGKILL before every single file-system call of a save: what is visible afterwards is complete.

The calls are counted in a first run; then one forked child for each dies right before it. What a power cut would do to
unsynced data is not tested here (it needs a machine to be cut); that fsync precedes the rename is.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, offline
from megatron_fp4.checkpoint.directory import latest_step, load_order, step_name
from megatron_fp4.checkpoint.marks import Marks
from megatron_fp4.checkpoint.retention import STALE_SECONDS, set_latest
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.durable import HashingFile
from megatron_fp4.storage.owner import Owner
from tests.checkpoint.synthetic import whole_shard

CALLS = [
    *((os, name) for name in ("rename", "replace", "fsync", "unlink", "mkdir", "open")),
    (HashingFile, "write"),
    *((Marks, name) for name in ("leave", "collect", "clear")),
]


def tiny(version: int) -> list[Shard]:
    """Few tensors, because every write of a byte is a point to be killed at."""
    return [whole_shard("w", {"master": torch.full((6, 4), float(version))})]


def save(root: Path, step: int, version: int, asynchronous: bool) -> None:
    config = CheckpointConfig(asynchronous=asynchronous, keep_last=1)
    store = CheckpointStore(root, Group.single("world"), config)
    store.save(step, tiny(version), {"version": version})
    report = store.close()
    assert report is None or report.error is None, report


def watched(on_call: Callable[[str], None]) -> Callable[[], None]:
    """Call `on_call(name)` before every call in CALLS; returns the undo."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in CALLS]

    def wrap(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            on_call(name)
            return original(*args, **kwargs)

        return call

    for owner, name, original in originals:
        setattr(owner, name, wrap(original, name))

    def undo() -> None:
        for owner, name, original in originals:
            setattr(owner, name, original)

    return undo


def killed_before(number: int, action: Callable[[], None]) -> int:
    """Run `action` in a forked child that SIGKILLs itself before its call `number`; returns the wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        calls = 0

        def count(_: str) -> None:
            nonlocal calls
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1

        code = 1
        try:
            watched(count)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("step", "what"), [(20, "next step"), (10, "same step again")])
def test_sigkill_at_every_point_of_a_save(tmp_path: Path, asynchronous: bool, step: int, what: str) -> None:
    # Before: checkpoint 10 of version 10. The killed save: version 20, as checkpoint 20 or again as 10; keep_last = 1,
    # so it also deletes or replaces the old one.
    old = tmp_path / "old"
    save(old, 10, 10, False)
    names: list[str] = []
    trial = tmp_path / "trial"
    shutil.copytree(old, trial)
    undo = watched(names.append)
    save(trial, step, 20, asynchronous)
    undo()
    assert len(names) > 20
    seen = set()
    for number, name in enumerate(names):
        root = tmp_path / f"killed{number}"
        shutil.copytree(old, root)
        status = killed_before(number, lambda root=root: save(root, step, 20, asynchronous))  # type: ignore[misc]
        assert os.WIFSIGNALED(status), f"call {number} ({name}) was not reached"
        where = f"{what}, killed before call {number} of {len(names)} ({name})"
        store = CheckpointStore(root, Group.single("world"), CheckpointConfig())
        steps = store.complete_steps()
        assert steps, f"{where}: no checkpoint is left"
        for one in steps:
            assert offline.verify(root / step_name(one)) == [], f"{where}: an incomplete one is visible"
        shards = tiny(0)
        chosen = store.choose()
        store.load(chosen, shards)
        version = chosen.meta["version"]
        assert torch.equal(shards[0].tensors["master"], tiny(version)[0].tensors["master"]), where
        left = {one for one in os.listdir(root) if not one.startswith("step_") or "." in one}
        assert not {one for one in left if "-" in one and not one.startswith("latest.tmp")}, f"{where}: {left}"
        seen.add(version)
    assert seen == {10, 20}, "some kills must come before the commit and some after"


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path) -> None:
    names: list[str] = []
    undo = watched(names.append)
    save(tmp_path, 10, 10, False)
    undo()
    names = [name for name in names if name != "open"]
    publication = max(number for number, name in enumerate(names) if name == "rename")
    # data, layout, state, manifest, the new `latest`, and the directory twice; then the root
    assert names[:publication].count("fsync") >= 7, "a file or the directory is renamed before it is on disk"
    assert names[publication + 1] == "fsync", "the new name must be on disk before `latest` names it"
    assert names.index("replace", publication) > publication + 1


@pytest.mark.parametrize("step", [20, 30])
def test_what_fails_once_the_directory_is_whole_is_taken_back(tmp_path: Path, step: int) -> None:
    """In a process that lives on, where no start puts things right: the old checkpoint of the step was hidden."""
    names: list[str] = []
    for number in range(1000):
        root = tmp_path / str(number)
        config = CheckpointConfig(asynchronous=False, keep_last=9)
        store = CheckpointStore(root, Group.single("world"), config)
        for earlier in (10, 20):
            store.save(earlier, tiny(earlier), {"version": earlier})
        calls = 0

        def fail(name: str, number: int = number) -> None:
            nonlocal calls
            calls += 1
            names[calls - 1 :] = [name]
            if calls == number + 1:
                raise OSError(errno.EIO, f"injected into {name}")

        undo = watched(fail)
        report = store.save(step, tiny(99), {"version": 99})
        undo()
        where = f"call {number + 1} ({names[min(number, len(names) - 1)]}) failed"
        shards = tiny(0)
        chosen = store.choose()
        store.load(chosen, shards)
        assert chosen.meta["version"] == (20 if report.error else 99), f"{where}: {report}"
        assert torch.equal(shards[0].tensors["master"], tiny(chosen.meta["version"])[0].tensors["master"]), where
        assert store.complete_steps() == sorted({10, 20} if report.error else {10, 20, step}), where
        assert store.save(step, tiny(77), {"version": 77}).error is None, f"{where}: the retry failed too"
        assert store.choose().meta["version"] == 77, where
        if calls <= number:
            return
    pytest.fail("no end")


def leave(root: Path, stage: str, owner: Owner, age_seconds: float = 0.0) -> Path:
    path = root / f"step_00000050.{stage}-{owner.tag}.1"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"half")
    for one in (path / "__0_0.distcp", path):
        os.utime(one, (time.time() - age_seconds, time.time() - age_seconds))
    return path


def dead_owner() -> Owner:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Owner(Owner.me().host, process.pid, 12345)


def test_only_dead_writers_are_swept(tmp_path: Path) -> None:
    me = Owner.me()
    dead = leave(tmp_path, "writing", dead_owner())
    living = leave(tmp_path, "writing", me)
    reused_pid = leave(tmp_path, "writing", Owner(me.host, me.pid, me.start + 1))
    elsewhere = leave(tmp_path, "writing", Owner("another.host-7", 1, 1))
    elsewhere_old = leave(tmp_path, "writing", Owner("old.host", 1, 1), age_seconds=STALE_SECONDS + 60)
    half_deleted = leave(tmp_path, "deleting", me)
    store = CheckpointStore(tmp_path, Group.single("world"), CheckpointConfig())
    assert living.exists() and elsewhere.exists(), "the directory of a live writer was removed"  # noqa: PT018
    assert not any(path.exists() for path in (dead, reused_pid, elsewhere_old, half_deleted))
    assert store.latest() is None, "an unfinished directory was taken for a checkpoint"


def test_latest_is_the_commit(tmp_path: Path) -> None:
    """Killed between rename and `latest`: the older one is resumed, and the newer is replaced when it comes again."""
    save(tmp_path, 10, 10, False)
    set_latest(tmp_path, 10)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000020")
    assert load_order(tmp_path) == [10]
    assert latest_step(tmp_path) == 10
