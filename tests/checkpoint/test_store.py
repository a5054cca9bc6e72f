"""Damage is refused by name, the previous good checkpoint is taken, old ones go, a rollback forgets."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, CorruptCheckpoint, OnCorrupt, Verified, load
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage import patience
from megatron_fp4.storage.durable import FileRecord, problem_of, read_manifest
from megatron_fp4.storage.lock import RunLock
from tests.checkpoint.synthetic import Layout, shards_of, wrong_shards

ONE = Layout()


def open_store(root: Path, **settings: object) -> CheckpointStore:
    return CheckpointStore(root, Group.single("world"), CheckpointConfig(**{"asynchronous": False, **settings}))  # type: ignore[arg-type]


def load_newest(store: CheckpointStore, shards: list[Shard]) -> Verified:
    chosen = store.choose()
    store.load(chosen, shards)
    return chosen


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints 10 and 20, of versions 10 and 20 of the state."""
    store = open_store(tmp_path)
    for step in (10, 20):
        store.save(step, shards_of(ONE, 0, filled=True, version=step), {"tokens": step})
    return tmp_path


def flip_byte(path: Path, position: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 70)  # more than what stands between two pieces


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped data byte": (
        lambda d: flip_byte(d / "data_0000.bin"),
        r"data_0000\.bin has xxh3-64 \w{16}, expected \w{16}",
    ),
    "truncated data": (lambda d: truncate(d / "data_0000.bin"), r"data_0000\.bin has \d+ bytes, expected \d+"),
    "deleted data": (lambda d: (d / "data_0000.bin").unlink(), r"data_0000\.bin is missing, expected \d+ bytes"),
    "missing manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json is missing"),
    "torn manifest": (lambda d: truncate(d / "manifest.json"), r"manifest\.json is damaged"),
    "flipped layout": (lambda d: flip_byte(d / "layout.bin"), r"layout\.bin has xxh3-64"),
    "flipped state": (lambda d: flip_byte(d / "state.json"), r"state\.json has xxh3-64"),
    "empty directory": (lambda d: [p.unlink() for p in d.iterdir()] and None, r"manifest\.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name_and_the_previous_one_taken(
    root: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    inflict, message = DAMAGES[damage]
    inflict(root / "step_00000020")
    shards = shards_of(ONE, 0, filled=False)
    with caplog.at_level(logging.WARNING):
        chosen = load_newest(open_store(root), shards)
    assert chosen.meta == {"step": 10, "tokens": 10}, f"{damage}: the damaged checkpoint was taken"
    assert wrong_shards(shards, ONE, 0, version=10) == [], "tensors of two checkpoints were mixed"
    assert "step_00000020 is refused, trying the previous one" in caplog.text
    with pytest.raises(CorruptCheckpoint, match=message):
        open_store(root, on_corrupt=OnCorrupt.fail).choose()
    with pytest.raises(CorruptCheckpoint, match=message):
        open_store(root).choose(20)  # asked for by number: never silently another one


def test_without_hashes_an_unreadable_file_is_still_refused(root: Path) -> None:
    truncate(root / "step_00000020" / "layout.bin")
    assert load_newest(open_store(root, verify=False), shards_of(ONE, 0, filled=False)).step == 10


def test_a_resume_hashes_every_file_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def count(directory: Path, name: str, expected: FileRecord, file_bytes: int | None = None) -> str | None:
        hashed.append(name)
        return problem_of(directory, name, expected, file_bytes)

    monkeypatch.setattr(load, "problem_of", count)
    store = open_store(root)
    chosen = store.choose()  # the small state decides first what is built
    store.load(chosen, shards_of(ONE, 0, filled=False))
    assert sorted(hashed) == sorted(read_manifest(root / "step_00000020").files), (
        "every byte of a large state is read again"
    )


def test_a_file_that_is_lost_between_choice_and_load(root: Path) -> None:
    store = open_store(root)
    chosen = store.choose()
    truncate(chosen.directory / "data_0000.bin")
    with pytest.raises(CorruptCheckpoint, match="step_00000020 is refused"):
        store.load(chosen, shards_of(ONE, 0, filled=False))


def test_nothing_intact_and_nothing_there(root: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        truncate(root / f"step_000000{step}" / "data_0000.bin")
    with pytest.raises(CorruptCheckpoint, match=r"no intact checkpoint under .*tried \[20, 10\]"):
        open_store(root).choose()
    empty = open_store(tmp_path / "new")
    assert empty.latest() is None
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        empty.choose()
    with pytest.raises(FileNotFoundError, match=r"step_00000030 under .*complete ones: \[10, 20\]"):
        open_store(root).choose(30)


def test_a_directory_without_manifest_is_no_checkpoint(root: Path) -> None:
    shutil.copytree(root / "step_00000020", root / "step_00000030")
    (root / "step_00000030" / "manifest.json").unlink()
    store = open_store(root)
    assert store.complete_steps() == [10, 20]
    assert store.latest() == 20


def test_lost_latest_is_found_again(root: Path) -> None:
    (root / "latest").unlink()
    assert load_newest(open_store(root), shards_of(ONE, 0, filled=False)).step == 20
    (root / "latest").write_text("step_0000")
    assert open_store(root).latest() == 20


def test_rollback(root: Path) -> None:
    store = open_store(root, keep_last=3)
    store.save(30, shards_of(ONE, 0, filled=True, version=30), {})
    store.discard_after(10)
    assert store.complete_steps() == [10]
    assert store.latest() == 10, "after a rollback a resume must not take the abandoned checkpoints"
    store.save(20, shards_of(ONE, 0, filled=True, version=21), {})
    shards = shards_of(ONE, 0, filled=False)
    store.load(store.choose(), shards)
    assert wrong_shards(shards, ONE, 0, version=21) == []


def test_the_same_step_again_replaces(root: Path) -> None:
    store = open_store(root)
    store.save(20, shards_of(ONE, 0, filled=True, version=99), {"tokens": 99})
    shards = shards_of(ONE, 0, filled=False)
    assert load_newest(store, shards).meta["tokens"] == 99
    assert wrong_shards(shards, ONE, 0, version=99) == []
    assert sorted(os.listdir(root)) == ["latest", "step_00000010", "step_00000020"], "the replaced one was left behind"


def test_retention_on_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep_last=2, keep_every_tokens=100, keep_best=1)
    scores = {1: 3.0, 2: 1.0, 3: 2.0}
    for step in range(1, 10):
        store.save(step, shards_of(ONE, 0, filled=True), {}, tokens=step * 30, score=scores.get(step))
    # 2: best; 4 and 7: the first at or after 100 and 200 tokens; 8 and 9: the last two
    assert store.complete_steps() == [2, 4, 7, 8, 9]
    assert len(os.listdir(tmp_path)) == 1 + 5, "a deleted one left files"


def test_an_unreadable_state_deletes_nothing_and_delays_no_save(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was waited for 15 s a checkpoint, in the writing thread, and then taken for one without a score."""
    read_bytes = Path.read_bytes

    def stale(path: Path) -> bytes:
        if path.parent.name == "step_00000010":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_bytes(path)

    store = open_store(root, keep_last=1, keep_best=1)
    monkeypatch.setattr(Path, "read_bytes", stale)
    monkeypatch.setattr(patience.time, "sleep", lambda _: pytest.fail("the save waited"))
    store.save(30, shards_of(ONE, 0, filled=True), {})
    assert store.complete_steps() == [10, 20, 30]
    assert "are not removed yet" in caplog.text
    monkeypatch.undo()
    store.save(40, shards_of(ONE, 0, filled=True), {})
    assert store.complete_steps() == [40]


def test_token_rule_without_tokens_is_an_error(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep_every_tokens=100)
    with pytest.raises(ValueError, match="keep_every_tokens is set"):
        store.save(1, shards_of(ONE, 0, filled=True), {})


def test_small_state_is_json_only(root: Path) -> None:
    state = json.loads((root / "step_00000020" / "state.json").read_text())
    assert state == {"step": 20, "tokens": None, "score": None, "meta": {"tokens": 20}}
    for path in (root / "step_00000020").iterdir():
        assert str(root).encode() not in path.read_bytes(), "a checkpoint must not remember where it was written"


def test_leftovers_of_another_host_go_at_once_where_the_lock_is_held(tmp_path: Path) -> None:
    """The holder of the run's lock is the only writer; without the lock the other host may be one for an hour."""
    left = tmp_path / "checkpoints" / "step_00000030.writing-node-17.4242.1.0"
    left.mkdir(parents=True)
    open_store(left.parent)
    assert left.exists(), "the directory of a live writer was removed"
    lock = RunLock(tmp_path)
    lock.acquire()
    open_store(left.parent)
    lock.release()
    assert not left.exists()
