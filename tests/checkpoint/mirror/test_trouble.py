"""The fault table of docs/checkpoints.md for a mirror: what fails is reported, tried again, and never ends a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fp4.checkpoint import CorruptCheckpoint, OnCorrupt
from megatron_fp4.checkpoint.directory import latest_step, step_name
from megatron_fp4.checkpoint.mirror import fetch, send, worker
from megatron_fp4.checkpoint.mirror.keep import DROPPED, note_dropped
from megatron_fp4.checkpoint.mirror.state import MirrorState
from megatron_fp4.checkpoint.retention import set_aside_after
from megatron_fp4.storage.patience import UnreadableFile
from megatron_fp4.storage.remote.client import AccessRefused, Remote, StoredObject, StoreError
from tests.checkpoint.mirror.stand import CONFIG, Stand
from tests.helpers.stores import FaultyRemote


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(fetch, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(send, "VISIBLE_SECONDS", (0.0, 0.0))


def fails(error: Exception, times: int) -> Callable[[int], None]:
    left = [times]

    def before(number: int) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise error

    return before


@pytest.mark.parametrize(
    "error",
    [StoreError("503 Service Unavailable SlowDown"), AccessRefused("400 ExpiredToken"), StoreError("timed out")],
)
def test_what_the_store_refuses_is_told_counted_and_tried_again(tmp_path: Path, error: Exception) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints", before=fails(error, 2))
    stand.save(1)
    first, second, third = stand.look(), stand.look(), stand.look()
    assert [(one.failures, bool(one.error)) for one in (*first, *second, *third)] == [(1, True), (2, True), (2, False)]
    assert str(error) in first[0].error
    assert stand.steps() == [1]


def test_the_state_for_whoever_looks(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints", before=fails(StoreError("503 SlowDown"), 1))
    stand.save(7)
    stand.look()
    state = MirrorState.read(tmp_path / "run")
    assert state is not None
    assert state.describe() == (
        f"none yet, waiting: 7; 1 failed tries in a row, the last: StoreError: 503 SlowDown ({stand.url})"
    )
    stand.look()
    state = MirrorState.read(tmp_path / "run")
    assert state is not None
    assert (state.step, state.waiting, state.failures) == (7, [], 0)


def test_the_end_of_a_run_waits_and_says_what_is_missing(tmp_path: Path) -> None:
    gone = Stand(tmp_path / "gone" / "checkpoints", before=fails(StoreError("timed out"), 10**9))
    gone.mirror.start()
    gone.save(3)
    assert gone.mirror.finish(0.2) == [3]
    back = Stand(tmp_path / "back" / "checkpoints", before=fails(StoreError("timed out"), 3))
    back.mirror.start()
    back.save(3)
    assert back.mirror.finish(20.0) == []
    assert back.steps() == [3]


def test_retention_on_the_disk_takes_nothing_away_from_an_upload(tmp_path: Path) -> None:
    """A slow store: the checkpoint is removed from the disk while its files are sent."""
    removed = []

    def before(number: int) -> None:
        if number == 4 and not removed:
            removed.append(number)
            shutil.rmtree(stand.root / step_name(1))

    stand = Stand(tmp_path / "run" / "checkpoints", before=before)
    stand.save(1)
    stand.look()
    assert removed
    assert Stand(tmp_path / "other" / "checkpoints", stand.url).resumed() == (1, 1.0)


def test_damage_on_the_disk_does_not_get_into_the_store(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints")
    data = stand.save(1) / "data_0000.bin"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    (report,) = stand.look()
    assert "data_0000.bin has xxh3-64" in report.error
    assert stand.steps() == []
    assert stand.look() == [], "it is not tried again and again"


def test_damage_in_the_store_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        stand.save(step)
        stand.look()
    newest = stand.contents().complete[-1]
    remote = Remote(stand.url)
    whole = remote.read(f"{newest}/data_0000.bin")
    for damaged in (b"x" + whole[1:], whole[:-1]):
        remote.put(f"{newest}/data_0000.bin", damaged)
        assert Stand(tmp_path / f"a{len(damaged)}" / "checkpoints", stand.url).resumed() == (1, 1.0)
    strict = Stand(tmp_path / "b" / "checkpoints", stand.url, replace(CONFIG, on_corrupt=OnCorrupt.fail))
    with pytest.raises(CorruptCheckpoint):
        strict.resumed()
    remote.put(f"{newest}/data_0000.bin", whole)
    remote.put(f"{newest}/manifest.json", remote.read(f"{newest}/manifest.json").replace(b"1", b"2"))
    assert Stand(tmp_path / "c" / "checkpoints", stand.url).resumed() == (1, 1.0)
    assert "of the mirror is refused, trying the one before it" in caplog.text


def test_a_resume_takes_whichever_is_newest_and_complete(tmp_path: Path) -> None:
    home = Stand(tmp_path / "home" / "checkpoints")
    home.save(1)
    home.look()
    away = Stand(tmp_path / "away" / "checkpoints", home.url)
    assert away.resumed() == (1, 1.0)
    away.save(2)
    away.look()
    home.save(3)
    assert Stand(home.root, home.url).resumed() == (3, 3.0), "the disk is newer"
    away.save(4)
    away.look()
    assert Stand(home.root, home.url).resumed() == (4, 4.0), "the mirror is newer"


def test_the_mirror_replaces_what_is_damaged_on_the_disk(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        stand.save(step)
        stand.look()
    for step in (2, 1):
        (stand.root / step_name(step) / "data_0000.bin").write_bytes(b"")
        assert Stand(stand.root, stand.url).resumed() == (2, 2.0)
    shutil.rmtree(stand.root / step_name(2))
    shutil.rmtree(stand.root / step_name(1))
    assert Stand(stand.root, stand.url).resumed() == (2, 2.0), "`latest` names one that is gone"


def test_a_store_that_does_not_answer_at_the_start_is_a_refusal(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints")
    stand.save(1)
    silent = Stand(stand.root, stand.url, before=fails(StoreError("timed out"), 10**9))
    with pytest.raises(UnreadableFile, match="whether it holds what is newer than the disk is not known"):
        silent.resumed()


def test_a_full_disk_while_a_checkpoint_is_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints")
    stand.save(1)
    stand.look()

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = tmp_path / "other" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UnreadableFile, match=r"No space left on device.*make room"):
            Stand(root, stand.url).resumed()
    assert list(root.iterdir()) == [], "the space is not freed"


def test_a_full_disk_does_not_stop_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own file cannot be written, and the checkpoint gets through."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stand = Stand(tmp_path / "run" / "checkpoints")
    stand.save(1)
    monkeypatch.setattr("megatron_fp4.checkpoint.mirror.state.write_durably", full)
    assert [one.error for one in stand.look()] == [""]
    assert stand.steps() == [1]


class LateRemote(FaultyRemote):
    """Shows an object to readers some requests after it was written, and for as long shows what was deleted."""

    LATE = 6

    def __init__(self, url: str, before: Callable[[int], None] = lambda number: None) -> None:
        super().__init__(url, before)
        self._written: dict[str, int] = {}

    def put(self, key: str, data: bytes) -> str:
        self._written.setdefault(key, self.requests)
        return super().put(key, data)

    def send(self, key: str, blocks: Any, num_bytes: int) -> None:
        self._written.setdefault(key, self.requests)
        super().send(key, blocks, num_bytes)

    def _is_late(self, key: str) -> bool:
        return self.requests < self._written.get(key, -self.LATE) + self.LATE

    def read(self, key: str) -> bytes:
        if self._is_late(key):
            self.requests += 1
            raise FileNotFoundError(key)
        return super().read(key)

    def entries(self, prefix: str = "") -> list[StoredObject]:
        return [one for one in super().entries(prefix) if not self._is_late(one.key)]


def test_reads_that_come_late(tmp_path: Path) -> None:
    """A store of before 2020: an upload is complete when it is seen, and tried again until then."""
    stand = Stand(tmp_path / "run" / "checkpoints", make=LateRemote)
    for step in (1, 2, 3):
        stand.save(step)
        for _ in range(9):
            stand.look()
        assert Stand(tmp_path / f"other_{step}" / "checkpoints", stand.url).resumed() == (step, float(step))
    assert stand.steps() == [2, 3]


def test_a_rewind_by_hand_holds_in_the_mirror(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints", config=replace(CONFIG, keep_last=3))
    for step in (1, 2, 3):
        stand.save(step)
        stand.look()
    note_dropped(stand.root, 1)
    set_aside_after(stand.root, 1)
    going_on = Stand(stand.root, stand.url, stand.config)
    assert going_on.resumed() == (1, 1.0)
    going_on.look()
    assert going_on.steps() == [1]
    assert not (stand.root / DROPPED).exists()


def test_more_stay_in_the_mirror(tmp_path: Path) -> None:
    config = replace(CONFIG, keep_last=1, mirror_keep_last=3, keep_every_tokens=0)
    stand = Stand(tmp_path / "run" / "checkpoints", config=config)
    for step in (1, 2, 3, 4):
        stand.save(step)
        stand.look()
    assert stand.steps() == [2, 3, 4]
    fewer = Stand(stand.root, stand.url, replace(config, keep_last=3, mirror_keep_last=1))
    for step in (5, 6):
        fewer.save(step)
        fewer.look()
    assert fewer.steps() == [6]
    assert fewer.look() == [], "what the rules of the store do not keep is not sent again and again"


def test_the_newest_goes_first_and_what_was_left_follows(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints", before=fails(StoreError("timed out"), 1))
    for step in (1, 2):
        stand.save(step)
    stand.look()
    assert [one.step for one in stand.look()] == [2, 1]
    assert latest_step(stand.root) == 2
    assert stand.contents().latest == stand.contents().complete[-1]


def test_a_rollback_stops_an_upload(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "run" / "checkpoints")
    stand.save(1)
    stand.look()
    stand.save(2)
    rolled = threading.Event()

    def before(number: int) -> None:
        if not rolled.is_set() and number > 5:
            rolled.set()
            uploading.store.discard_after(1)

    uploading = Stand(stand.root, stand.url, before=before)
    uploading.look()
    assert rolled.is_set()
    uploading.look()
    assert uploading.steps() == [1]
    assert json.loads((tmp_path / "run" / "mirror.json").read_text())["step"] == 1
