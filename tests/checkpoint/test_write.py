"""The background save: isolated from the step loop, flat in memory, and never silently dead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, SaveFailed, SaveStatus, commit
from megatron_fp4.checkpoint.directory import complete_steps, present_steps
from megatron_fp4.checkpoint.outcome import NotSaved, Saved
from megatron_fp4.checkpoint.pieces.plan import in_writing_order
from megatron_fp4.checkpoint.write import GRACE_SECONDS, SaveInProgress, Staging
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.durable import HashingFile
from tests.checkpoint.synthetic import Layout, shards_of, whole_shard, wrong_shards

ONE = Layout()


class Gate:
    """Holds up every write to a file until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        original = HashingFile.write

        def write(stream: HashingFile, data: object) -> int:
            self.reached.set()
            assert self.open.wait(30)
            return original(stream, data)

        monkeypatch.setattr(HashingFile, "write", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Generator[Gate, None, None]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def open_store(root: Path, **settings: object) -> CheckpointStore:
    return CheckpointStore(root, Group.single("world"), CheckpointConfig(**settings))  # type: ignore[arg-type]


def wait_until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_changes_after_save_returns_are_not_in_the_file(tmp_path: Path, gate: Gate) -> None:
    store = open_store(tmp_path)
    shards = shards_of(ONE, 0, filled=True)
    assert store.save(5, shards, {}).status is SaveStatus.writing
    assert gate.reached.wait(10), "the writer did not start"
    for shard in shards:
        for tensor in shard.tensors.values():
            tensor.fill_(-1.0)
    assert store.poll() == [], "told before it was committed"
    assert present_steps(tmp_path) == [], "visible before it was committed"
    gate.open.set()
    wait_until(lambda: complete_steps(tmp_path))
    wait_until(lambda: store.saver.running is None or store.saver.running.progress.finished)
    [report] = store.poll()
    assert report.status is SaveStatus.committed
    assert store.poll() == [], "an outcome must be told once"
    store.load(store.choose(), shards)
    assert wrong_shards(shards, ONE, 0) == [], "the file has values of after the save"


def test_the_next_save_waits_and_tells_the_earlier_outcome(tmp_path: Path, gate: Gate) -> None:
    store = open_store(tmp_path)
    store.save(1, shards_of(ONE, 0, filled=True, version=1), {})
    threading.Timer(0.3, gate.open.set).start()
    report = store.save(2, shards_of(ONE, 0, filled=True, version=2), {})
    assert report.blocking_seconds > 0.2, "the staging buffers of a running save were overwritten"
    assert next((one.step, one.status) for one in store.poll()) == (1, SaveStatus.committed)
    store.close()
    for step in (1, 2):
        shards = shards_of(ONE, 0, filled=False)
        store.load(store.choose(step), shards)
        assert wrong_shards(shards, ONE, 0, version=step) == []


def test_a_dead_writer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise SystemExit("the thread ends in a way that Python does not even print")

    monkeypatch.setattr(commit, "write_part", die)
    store = open_store(tmp_path, max_failures=2)
    store.save(1, shards_of(ONE, 0, filled=True), {})
    wait_until(lambda: store.saver.running is not None and store.saver.running.progress.finished)
    [report] = store.poll()
    assert report.status is SaveStatus.failed
    assert "SystemExit" in (report.error or "")
    store.save(2, shards_of(ONE, 0, filled=True), {})
    with pytest.raises(SaveFailed, match="2 saves in a row failed"):
        store.wait()
    assert os.listdir(tmp_path) == [], "a failed save left its directory"


def test_a_hung_writer_is_noticed_within_the_time_out_and_never_commits(tmp_path: Path, gate: Gate) -> None:
    store = open_store(tmp_path, timeout_seconds=0.4)
    store.save(1, shards_of(ONE, 0, filled=True), {})
    assert store.saver.running is not None
    hung = store.saver.running.progress
    assert store.poll() == []
    time.sleep(0.4 + GRACE_SECONDS + 0.1)
    [report] = store.poll()
    assert report.status is SaveStatus.failed
    assert "not written after 0.4 seconds" in (report.error or "")
    gate.open.set()
    wait_until(lambda: hung.finished)
    assert present_steps(tmp_path) == [], "a save that was reported as failed appeared later"
    store.wait()
    shards = shards_of(ONE, 0, filled=True, version=2)
    store.save(2, shards, {})
    report = store.wait()
    assert report is not None
    assert report.status is SaveStatus.committed, "one hung save must not stop the next"


def test_commit_and_abandon_exclude_each_other() -> None:
    started, go = threading.Event(), threading.Event()
    claimed: list[bool] = []

    def work(save: SaveInProgress) -> int:
        started.set()
        go.wait(10)
        claimed.append(save.claim_commit())
        return 0

    late = SaveInProgress(1, work, 0.05, background=True)
    assert isinstance(late.join(), NotSaved)
    go.set()
    wait_until(lambda: late.finished)
    assert claimed == [False]
    assert isinstance(late.join(), NotSaved), "a save that was reported as failed has succeeded after all"
    early = SaveInProgress(2, work, 10.0, background=True)
    assert early.join() == Saved(0)
    assert not early.abandon(), "what is committed cannot be abandoned"


def test_interrupt_during_a_synchronous_save_is_not_swallowed() -> None:
    def work(_: SaveInProgress) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SaveInProgress(1, work, 10.0, background=False)


def test_staging_reuses_its_buffers() -> None:
    staging = Staging()
    shards = shards_of(ONE, 0, filled=True)
    written = in_writing_order(shards)
    first, second = staging.copy(written), staging.copy(written)
    for a, b in zip(first, second, strict=True):
        for kind, buffer in a.tensors.items():
            assert buffer.data_ptr() == b.tensors[kind].data_ptr(), f"{kind}/{a.name}: a new buffer for each save"
    assert len(written) < len(shards), "replicas must not be staged"


def resident_bytes() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_host_memory_is_flat_over_20_saves(tmp_path: Path) -> None:
    mega = 1 << 20
    store = open_store(tmp_path)
    shards = [
        whole_shard(f"w{i}", {kind: torch.full((1024, 1024), float(i)) for kind in ("master", "m")}) for i in range(4)
    ]  # 32 MiB
    sizes = []
    for step in range(20):
        shards[0].tensors["master"].add_(1.0)
        store.save(step, shards, {})
        sizes.append(resident_bytes())
    store.close()
    growth = (max(sizes[3:]) - sizes[2]) / mega
    assert growth < 12, f"{growth:.1f} MiB more than after the third save of 32 MiB"
