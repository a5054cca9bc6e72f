"""A launch that dies before any of its requests: nobody ever sees a half, and the next launch finishes what it left.

A kill is an exception that nothing here catches, after which no request of that launch comes through; with real
processes and SIGKILL: tests/train/resume/test_mirror.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fp4.checkpoint.directory import step_name
from megatron_fp4.checkpoint.mirror.contents import MirrorContents
from megatron_fp4.storage.durable import MANIFEST
from megatron_fp4.storage.owner import Owner
from tests.checkpoint.mirror.stand import Stand


class Killed(BaseException):
    """What happens to a process."""


def dies(number: int) -> Callable[[int], None]:
    def before(request: int) -> None:
        if request >= number:
            raise Killed

    return before


def is_tidy(contents: MirrorContents) -> bool:
    """Nothing but complete checkpoints, and `latest` names the newest."""
    return list(contents.files) == contents.complete and contents.latest == contents.complete[-1]


def prepared(folder: Path) -> Stand:
    """Steps 1 and 2 are in the mirror; step 3 is on the disk, where it has replaced step 1."""
    stand = Stand(folder / "run" / "checkpoints")
    for step in (1, 2):
        stand.save(step)
        assert [one.error for one in stand.look()] == [""]
    stand.save(3)
    return stand


def requests_of(act: Callable[[Stand], object], folder: Path) -> int:
    stand = prepared(folder)
    other = Stand(stand.root, stand.url)
    act(other)
    remote = other.worker.remote
    return remote.requests  # type: ignore[attr-defined, no-any-return]


def test_killed_before_every_request_of_an_upload(tmp_path: Path) -> None:
    count = requests_of(lambda stand: stand.look(), tmp_path / "count")
    assert count > 12, "listing, four files, manifest, latest, retention"
    for number in range(1, count + 1):
        before = prepared(tmp_path / f"killed_{number}")
        killed = Stand(before.root, before.url, before=dies(number))
        with pytest.raises(Killed):
            killed.look()
        reader = Stand(tmp_path / f"reader_{number}" / "checkpoints", before.url)
        assert reader.resumed() in ((2, 2.0), (3, 3.0)), f"killed before request {number}"
        going_on = Stand(before.root, before.url)
        assert all(not one.error for one in going_on.look())
        assert going_on.steps() == [2, 3]
        assert is_tidy(going_on.contents()), f"killed before request {number}: {going_on.contents()}"
        assert Stand(tmp_path / f"later_{number}" / "checkpoints", before.url).resumed() == (3, 3.0)


def test_killed_before_every_request_of_a_rollback(tmp_path: Path) -> None:
    """The rolled back step is in the mirror; whoever starts in the run directory never goes on from it again."""

    def roll_back(stand: Stand) -> None:
        stand.store.discard_after(2)
        stand.look()

    def mirrored(folder: Path) -> Stand:
        stand = prepared(folder)
        stand.look()
        return stand

    counted = mirrored(tmp_path / "count")
    roll_back(counted)
    assert counted.steps() == [2]
    for number in range(1, 12):
        stand = mirrored(tmp_path / f"killed_{number}")
        killed = Stand(stand.root, stand.url, before=dies(number))
        with suppress(Killed):
            roll_back(killed)
        going_on = Stand(stand.root, stand.url)
        assert going_on.resumed() == (2, 2.0), f"killed before request {number}"
        going_on.look()
        assert going_on.steps() == [2]
        going_on.save(3, value=3.5)
        going_on.look()
        assert Stand(tmp_path / f"later_{number}" / "checkpoints", stand.url).resumed() == (3, 3.5)


def test_killed_before_every_request_of_a_fetch(tmp_path: Path) -> None:
    """What was half brought is swept, and brought again."""
    stand = prepared(tmp_path)
    stand.look()
    for number in range(3, 10):
        root = tmp_path / f"reader_{number}" / "checkpoints"
        with suppress(Killed):
            Stand(root, stand.url, before=dies(number)).resumed()
        for path in root.glob("*.writing-*"):  # as if of a process that is gone
            path.rename(root / f"{step_name(3)}.writing-{replace(Owner.me(), pid=1 << 22).tag}.1")
        assert Stand(root, stand.url).resumed() == (3, 3.0)
        assert sorted(path.name for path in root.iterdir()) == ["latest", step_name(3)]


def test_a_reader_while_the_mirror_is_written(tmp_path: Path) -> None:
    """Between any two requests of an upload and a retention a reader finds a whole checkpoint, the newest or the one
    before it; and every manifest that is listed has all its files."""
    stand = prepared(tmp_path)
    seen = []

    def look(number: int) -> None:
        contents = stand.contents()
        for name in contents.complete:
            assert {MANIFEST, "state.json", "layout.bin", "data_0000.bin"} <= contents.files[name].keys(), number
        seen.append(contents.order()[0].step)

    Stand(stand.root, stand.url, before=look).look()
    assert seen == sorted(seen)
    assert {2, 3} == set(seen)
