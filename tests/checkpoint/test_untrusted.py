"""A checkpoint that is not what it says: renamed, incomplete, unreadable for a while, or made to do harm."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, CorruptCheckpoint, offline
from megatron_fp4.checkpoint.metadata import read_metadata
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage import patience
from megatron_fp4.storage.durable import FileRecord, read_manifest, write_manifest
from megatron_fp4.storage.patience import UnreadableFile, read_patiently
from megatron_fp4.train.resume.saving import choose_checkpoint
from megatron_fp4.train.sections import Resume
from tests.checkpoint.synthetic import save_one, two_pieces


def open_store(root: Path, *, verify: bool = True) -> CheckpointStore:
    return CheckpointStore(root, Group.single("world"), CheckpointConfig(asynchronous=False, verify=verify))


def rewrite_metadata(directory: Path, change: Callable[[Any], object]) -> None:
    """Replace `.metadata`, and its record in the manifest, as one who means harm would."""
    (directory / ".metadata").write_bytes(pickle.dumps(change(read_metadata(directory))))
    data = (directory / ".metadata").read_bytes()
    manifest = read_manifest(directory)
    record = FileRecord(len(data), xxhash.xxh3_64(data).hexdigest())
    write_manifest(directory, manifest.step, {**manifest.files, ".metadata": record})


def test_the_only_checkpoint_is_incomplete(tmp_path: Path) -> None:
    """A copy that stopped early was taken for no checkpoint, and the run began at step 1 over it."""
    (save_one(tmp_path, 20, two_pieces(1.0)) / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"tried \[20\].*step_00000020/manifest\.json is missing"):
        choose_checkpoint(Resume.auto, open_store(tmp_path))
    assert (tmp_path / "step_00000020" / "state.json").exists()


def test_latest_names_what_is_gone(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_00000020\n")
    with pytest.raises(ValueError, match="latest names step_00000020, and there is no checkpoint"):
        choose_checkpoint(Resume.auto, open_store(tmp_path))


def test_two_names_are_swapped(tmp_path: Path) -> None:
    """The weights of one step were trained on with the data position of the other."""
    first, second = save_one(tmp_path, 15, two_pieces(1.0)), save_one(tmp_path, 20, two_pieces(2.0))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(CorruptCheckpoint, match=r"step_00000015 holds the checkpoint of step 20"):
        open_store(tmp_path).choose()
    assert "holds the checkpoint of step 20" in offline.verify(first)[0]


def test_a_checkpoint_under_another_name_can_be_read(tmp_path: Path) -> None:
    save_one(tmp_path, 15, two_pieces(1.0)).rename(tmp_path / "best")
    assert offline.verify(tmp_path / "best") == []


def test_without_hashes_a_truncated_file_leads_to_the_one_before(tmp_path: Path) -> None:
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    os.truncate(tmp_path / "step_00000020" / "__0_0.distcp", 300)
    store, shards = open_store(tmp_path, verify=False), two_pieces(0.0)
    chosen = store.choose()
    assert chosen.step == 20
    assert store.load_or_earlier(chosen, shards).step == 10
    assert all((shard.tensors["master"] == 10.0).all() for shard in shards)
    os.truncate(tmp_path / "step_00000010" / "__0_0.distcp", 300)
    store = open_store(tmp_path, verify=False)
    chosen = store.choose()
    with pytest.raises(CorruptCheckpoint, match="no intact checkpoint"):
        store.load_or_earlier(chosen, shards)


def test_a_file_server_that_does_not_answer_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY_SECONDS", (0.0, 0.0))
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    read_bytes, failures = Path.read_bytes, iter(range(2))

    def stale(path: Path) -> bytes:
        if path.parent.name == "step_00000020" and next(failures, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    assert open_store(tmp_path).choose().step == 20, "it answers at the third try"
    failures = iter(range(99))
    with pytest.raises(UnreadableFile, match=r"Stale file handle.*whether it is intact is not known"):
        open_store(tmp_path).choose()


def test_patience_with_what_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        read_patiently(Path("/nowhere/x").read_bytes, Path("/nowhere/x"))


class Harm:
    """Unpickled with pickle.load, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_metadata_runs_nothing(tmp_path: Path) -> None:
    directory = save_one(tmp_path, 1, two_pieces(1.0))
    rewrite_metadata(directory, lambda _: Harm(tmp_path / "harm"))
    for read in (offline.list_tensors, read_metadata):
        with pytest.raises(ValueError, match=r"\.metadata is refused.*it names posix\.mkdir"):
            read(directory)
    assert "it names posix.mkdir" in offline.verify(directory)[0]
    with pytest.raises(CorruptCheckpoint, match=r"posix\.mkdir"):
        open_store(tmp_path).choose()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd", ".."])
def test_a_path_that_leaves_the_directory(tmp_path: Path, path: str) -> None:
    directory = save_one(tmp_path, 1, two_pieces(1.0))

    def lead_out(metadata: Any) -> object:
        for place in metadata.storage_data.values():
            place.relative_path = path
        return metadata

    rewrite_metadata(directory, lead_out)
    with pytest.raises(ValueError, match="leads out of the directory"):
        offline.read_tensor(directory, "master/w")


def test_a_manifest_must_list_every_file_and_no_other_place(tmp_path: Path) -> None:
    directory = save_one(tmp_path, 1, two_pieces(1.0))
    path, body = directory / "manifest.json", json.loads((directory / "manifest.json").read_text())
    for name in ("__0_0.distcp", ".metadata", "state.json"):
        path.write_text(json.dumps({**body, "files": {k: v for k, v in body["files"].items() if k != name}}))
        with pytest.raises(CorruptCheckpoint, match=rf"does not list {name}"):
            open_store(tmp_path).choose()
    path.write_text(json.dumps({**body, "files": {**body["files"], "../x": body["files"]["state.json"]}}))
    with pytest.raises(CorruptCheckpoint, match=r"lists '\.\./x'"):
        open_store(tmp_path).choose()
