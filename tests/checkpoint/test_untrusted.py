"""A checkpoint that is not what it says: renamed, incomplete, unreadable for a while, or made to do harm."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, CorruptCheckpoint, OnCorrupt, offline
from megatron_fp4.checkpoint.directory import read_state
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


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"format_version": 1, "step": 20, "files": {"x": {"bytes": Infinity, "xxh3_64": ""}}}'],
)
def test_a_manifest_that_is_none_leads_to_the_one_before(tmp_path: Path, content: bytes) -> None:
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    path = tmp_path / "step_00000020" / "manifest.json"
    path.write_bytes(content)
    assert open_store(tmp_path).choose().step == 10
    assert f"{path} is damaged" in offline.verify(path.parent)[0]


@pytest.mark.parametrize("name", ["", "manifest.json"])
def test_what_is_no_file_or_no_directory_is_not_there(tmp_path: Path, name: str) -> None:
    """It was taken for a file server that does not answer, which never would."""
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    path = tmp_path / "step_00000020" / name
    if name:
        path.unlink()
        path.mkdir()
    else:
        shutil.rmtree(path)
        path.write_text("")
    assert open_store(tmp_path).choose().step == 10


def test_a_small_state_without_what_every_one_has(tmp_path: Path) -> None:
    path = save_one(tmp_path, 20, two_pieces(1.0)) / "state.json"
    path.write_text('{"step": 20, "meta": {}, "tokens": 5}')
    with pytest.raises(ValueError, match="damaged: no score"):
        read_state(path.parent)


def test_small_state_and_metadata_are_always_hashed(tmp_path: Path) -> None:
    """Another number in it is another position of the data."""
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    path = tmp_path / "step_00000020" / "state.json"
    path.write_text(path.read_text().replace('"tokens": 20', '"tokens": 21'))
    assert open_store(tmp_path, verify=False).choose().step == 10


def test_latest_names_one_that_is_gone_beside_older_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_one(tmp_path, 10, two_pieces(1.0))
    (tmp_path / "latest").write_text("step_00000020\n")
    assert open_store(tmp_path).choose().step == 10
    assert "step_00000020 is refused" in caplog.text
    config = CheckpointConfig(asynchronous=False, on_corrupt=OnCorrupt.fail)
    with pytest.raises(CorruptCheckpoint, match="latest names step_00000020, which is not there"):
        CheckpointStore(tmp_path, Group.single("world"), config).choose()


@pytest.mark.parametrize("name", ["step_00000020.partial", "step_20", "best"])
def test_the_only_checkpoint_has_no_name_of_one(tmp_path: Path, name: str) -> None:
    """The run would begin at step 1 beside it."""
    save_one(tmp_path, 20, two_pieces(1.0)).rename(tmp_path / name)
    (tmp_path / "latest").unlink()
    with pytest.raises(ValueError, match=f"{name} looks like a checkpoint and has no name of one"):
        choose_checkpoint(Resume.auto, open_store(tmp_path))


def test_the_newest_is_looked_at_also_where_it_is_incomplete(tmp_path: Path) -> None:
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    (tmp_path / "step_00000020" / "manifest.json").unlink()
    assert "manifest.json is missing" in offline.verify(offline.resolve(tmp_path))[0]


def test_a_link_to_what_is_gone_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step_00000020").symlink_to("/nowhere/step_00000020")
    save_one(tmp_path, 20, two_pieces(1.0))
    assert open_store(tmp_path).choose().step == 20


def test_what_cannot_be_swept_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for somebody who evaluates another's run."""
    (tmp_path / "latest.tmp-x").mkdir()
    os.utime(tmp_path / "latest.tmp-x", (0, 0))
    open_store(tmp_path)
    assert "latest.tmp-x, left by a run that ended, is not removed" in caplog.text


def first_tensor(metadata: Any) -> Any:
    return metadata.state_dict_metadata["master/w"]


def enlarge(metadata: Any) -> None:
    """Of 60 bytes 60 million are made, in two pieces as before."""
    tensor = first_tensor(metadata)
    tensor.size, tensor.chunks[1].sizes = torch.Size([5_000_000, 3]), torch.Size([4_999_998, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.state_dict_metadata.update({5: first_tensor(it)}), "TypeError"),
        (lambda it: it.state_dict_metadata.update({"master/\x1b[2J": first_tensor(it)}), r"is no name of a tensor"),
        (lambda it: setattr(first_tensor(it), "size", None), "has no shape or dtype"),
        (lambda it: setattr(first_tensor(it), "size", torch.Size([10**9, 3])), "15 elements, its shape 3000000000"),
        (lambda it: first_tensor(it).chunks.pop(), "have 6 elements, its shape 15"),
        (lambda it: setattr(first_tensor(it).chunks[1], "offsets", torch.Size([3, 0])), "is not inside"),
        (lambda it: setattr(first_tensor(it).properties, "dtype", "x"), "has no shape or dtype"),
        (enlarge, "its tensors have 60000000 bytes, the files"),
    ],
)  # fmt: skip
def test_metadata_that_describes_no_tensors(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    """Tracebacks; and where pieces were left out, what was in memory before was taken for a tensor."""
    directory = save_one(tmp_path, 1, two_pieces(1.0))

    def changed(metadata: Any) -> object:
        change(metadata)
        return metadata

    rewrite_metadata(directory, changed)
    with pytest.raises(ValueError, match=rf"\.metadata is refused.*{message}"):
        offline.list_tensors(directory)


def test_metadata_changes_no_class(tmp_path: Path) -> None:
    """A pickle may set attributes of whatever it may name."""
    directory = save_one(tmp_path, 1, two_pieces(1.0))
    before = dict(vars(Metadata))
    name = pickle.dumps("__repr__", protocol=2)[2:-1]
    data = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}" + name + b"K\x01s\x86b."
    (directory / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match="it changes Metadata"):
        read_metadata(directory)
    assert dict(vars(Metadata)) == before
