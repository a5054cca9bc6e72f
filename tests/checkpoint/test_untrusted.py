"""A checkpoint that is not what it says: renamed, incomplete, unreadable for a while, or made to do harm."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, CorruptCheckpoint, OnCorrupt, offline
from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.checkpoint.pieces.layout import StoredLayout, TensorEntry
from megatron_fp4.checkpoint.pieces.metadata import MetadataUnpickler
from megatron_fp4.checkpoint.pieces.read import read_into
from megatron_fp4.checkpoint.pieces.stored import read_pieces
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage import patience
from megatron_fp4.storage.durable import FileRecord, read_manifest, write_manifest
from megatron_fp4.storage.patience import UnreadableFile, read_patiently
from megatron_fp4.train.resume.origin import choose_checkpoint
from megatron_fp4.train.sections import Resume
from tests.checkpoint.synthetic import Layout, save_one, shards_of, two_pieces, wrong_shards

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "checkpoint_dcp"


def open_store(root: Path, *, verify: bool = True) -> CheckpointStore:
    return CheckpointStore(root, Group.single("world"), CheckpointConfig(asynchronous=False, verify=verify))


def old_one(root: Path) -> Path:
    """Checkpoint 1 as an earlier version wrote it, "master/w" [5, 3] of ones in two pieces; returns its directory."""
    shutil.copytree(GOLDEN / "one", root, dirs_exist_ok=True)
    return root / "step_00000001"


def rewrite(directory: Path, name: str, data: bytes) -> None:
    """Replace a file, and its record in the manifest, as one who means harm would."""
    (directory / name).write_bytes(data)
    manifest = read_manifest(directory)
    record = FileRecord(len(data), xxhash.xxh3_64(data).hexdigest())
    write_manifest(directory, manifest.step, {**manifest.files, name: (record,)})


def rewrite_metadata(directory: Path, change: Callable[[Any], object]) -> None:
    description = MetadataUnpickler(io.BytesIO((directory / ".metadata").read_bytes())).load()
    rewrite(directory, ".metadata", pickle.dumps(change(description)))


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
    os.truncate(tmp_path / "step_00000020" / "data_0000.bin", 40)
    store, shards = open_store(tmp_path, verify=False), two_pieces(0.0)
    chosen = store.choose()
    assert chosen.step == 20
    assert store.load_or_earlier(chosen, shards).step == 10
    assert all((shard.tensors["master"] == 10.0).all() for shard in shards)
    os.truncate(tmp_path / "step_00000010" / "data_0000.bin", 40)
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
    directory = old_one(tmp_path)
    rewrite_metadata(directory, lambda _: Harm(tmp_path / "harm"))
    for read in (offline.list_tensors, read_pieces):
        with pytest.raises(ValueError, match=r"\.metadata is refused.*it names posix\.mkdir"):
            read(directory)
    assert "it names posix.mkdir" in offline.verify(directory)[0]
    with pytest.raises(CorruptCheckpoint, match=r"posix\.mkdir"):
        open_store(tmp_path).choose()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd", ".."])
def test_a_path_that_leaves_the_directory(tmp_path: Path, path: str) -> None:
    directory = old_one(tmp_path)

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
    for name in ("data_0000.bin", "layout.bin", "state.json"):
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


@pytest.mark.parametrize("name", ["data_0000.bin", "state.json"])
def test_a_file_of_no_parts_is_refused(tmp_path: Path, name: str) -> None:
    """A data file without one was a traceback, and a small state without one was never hashed."""
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    path = tmp_path / "step_00000020" / "manifest.json"
    body = json.loads(path.read_text())
    body["files"][name] = {"bytes": 0, "parts": []}
    path.write_text(json.dumps(body))
    assert open_store(tmp_path).choose().step == 10
    assert f"the parts of {name} do not follow each other" in offline.verify(path.parent)[0]


@pytest.mark.parametrize("name", ["\x1b[2J", "\ud800", "x" * 300])
def test_a_file_name_that_no_checkpoint_has_is_refused(tmp_path: Path, name: str) -> None:
    """A terminal would obey the first; the last was taken for a file server that does not answer."""
    for step in (10, 20):
        save_one(tmp_path, step, two_pieces(float(step)))
    path = tmp_path / "step_00000020" / "manifest.json"
    body = json.loads(path.read_text())
    body["files"][name] = body["files"]["state.json"]
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="which is no file of its directory"):
        offline.list_tensors(path.parent)
    assert open_store(tmp_path).choose().step == 10


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


@pytest.mark.parametrize(("name", "value"), [("tokens", "x"), ("score", [1])])
def test_a_small_state_of_another_type_fails_no_later_save(tmp_path: Path, name: str, value: object) -> None:
    """Retention compared it with numbers: every later save was committed, and reported as failed."""
    directory = save_one(tmp_path, 20, two_pieces(1.0))
    state = json.loads((directory / "state.json").read_text())
    rewrite(directory, "state.json", json.dumps({**state, name: value}).encode())
    assert f"{name} is {value!r}, no number" in offline.verify(directory)[0]
    config = CheckpointConfig(asynchronous=False, keep_every_tokens=5, keep_best=1)
    store = CheckpointStore(tmp_path, Group.single("world"), config)
    assert store.save(30, two_pieces(3.0), {}, tokens=30, score=1.0).error is None


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
    directory = old_one(tmp_path)

    def changed(metadata: Any) -> object:
        change(metadata)
        return metadata

    rewrite_metadata(directory, changed)
    with pytest.raises(ValueError, match=rf"\.metadata is refused.*{message}"):
        offline.list_tensors(directory)


def test_metadata_changes_no_class(tmp_path: Path) -> None:
    """A pickle may set attributes of whatever it may name."""
    directory = old_one(tmp_path)
    before = dict(vars(Metadata))
    name = pickle.dumps("__repr__", protocol=2)[2:-1]
    data = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}" + name + b"K\x01s\x86b."
    (directory / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match="it changes Metadata"):
        read_pieces(directory)
    assert dict(vars(Metadata)) == before


def test_a_checkpoint_of_an_earlier_version_is_read_by_any_layout(tmp_path: Path) -> None:
    """Two ranks wrote it through torch.distributed.checkpoint, before layouts had a file of their own."""
    shutil.copytree(GOLDEN / "two", tmp_path, dirs_exist_ok=True)
    assert offline.verify(tmp_path / "step_00000007") == []
    for layout in (Layout(), Layout(tp=4), Layout(pp=2, dp=3)):
        for rank in range(layout.world_size):
            store = open_store(tmp_path)
            masters = shards_of(layout, rank, filled=False, kinds=("master",))
            read_into(masters, tmp_path / "step_00000007", store.choose().pieces)
            assert wrong_shards(masters, layout, rank) == []
    store.save(8, shards_of(Layout(), 0, filled=True, kinds=("master",)), {})
    assert sorted(one.name for one in (tmp_path / "step_00000008").iterdir()) == [
        "data_0000.bin", "layout.bin", "manifest.json", "state.json",
    ]  # fmt: skip


def changed_layout(**changes: Any) -> Callable[[StoredLayout], bytes]:
    return lambda layout: replace(layout, **{name: change(layout) for name, change in changes.items()}).encode()


def renamed(name: str, shape: tuple[int, ...], dtype: str, kind: str = "master") -> Callable[[StoredLayout], Any]:
    return lambda _: (TensorEntry(name, shape, ((kind, dtype),)),)


def and_one_of(
    shape: tuple[int, ...], kinds: tuple[tuple[str, str], ...] = (("master", "float32"),)
) -> Callable[[StoredLayout], Any]:
    """A further tensor that has no bytes, so that the files did not bound its dims: 300 million were gigabytes."""
    return lambda it: (*it.tensors, TensorEntry("z", shape, kinds))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: b"PK" + it.encode(), "it begins with"),
        (lambda it: it.encode()[:-4], "it is cut short"),
        (lambda it: it.encode()[:8] + zlib.compress(bytes(1 << 26)), "larger than"),
        (changed_layout(tensor=lambda it: it.tensor + 1), "a piece is of no tensor"),
        (changed_layout(tensor=lambda it: it.tensor - 1), "a piece is of no tensor"),
        (changed_layout(rank=lambda it: it.rank + 7), "a piece is of no rank"),
        (changed_layout(num_ranks=lambda _: 1 << 40), "1099511627776 ranks"),
        (changed_layout(ranks_per_file=lambda _: 0), "0 of them a file"),
        (changed_layout(offset=lambda it: it.offset + 1), r"a piece of master/w is not inside \(5, 3\)"),
        (changed_layout(offset=lambda it: it.offset - 1), r"a piece of master/w is not inside \(5, 3\)"),
        (changed_layout(size=lambda it: it.size * 0), r"a piece of master/w is not inside \(5, 3\)"),
        (changed_layout(size=lambda it: it.size - np.eye(2, dtype=int)), "hold 12 of the 15 elements|overlapping|hold"),
        (changed_layout(tensors=renamed("w", (5_000_000, 3), "float32")), "have 60000000 bytes, the files"),
        (changed_layout(tensors=renamed("w", (5, 3), "load")), "'load' is no dtype"),
        (changed_layout(tensors=renamed("w\x1b[2J", (5, 3), "float32")), "is no name of a tensor"),
        (changed_layout(tensors=renamed("w", (5, 3), "float32", "a/b")), "is no name of a tensor"),
        (changed_layout(tensors=renamed("w", (5, 3), "float64")), "a piece is not inside data_0000.bin"),
        (changed_layout(tensors=renamed("w", (5, 3), "quint8")), "'quint8' is no dtype"),
        (changed_layout(tensors=and_one_of((3, 0))), r"'z' of shape \(3, 0\) has no elements"),
        (changed_layout(tensors=and_one_of((-3, 3))), r"'z' of shape \(-3, 3\) has no elements"),
        (changed_layout(tensors=and_one_of((3, 3), ())), r"'z' of shape \(3, 3\) has no elements"),
    ],
)  # fmt: skip
def test_a_layout_that_describes_no_tensors(
    tmp_path: Path, change: Callable[[StoredLayout], bytes], message: str
) -> None:
    directory = save_one(tmp_path, 1, two_pieces(1.0))
    rewrite(directory, "layout.bin", change(read_pieces(directory).layout))
    with pytest.raises(ValueError, match=rf"layout\.bin is refused.*({message})"):
        offline.list_tensors(directory)
    assert "is refused" in offline.verify(directory)[0]


def test_memory_formats_as_python_3_11_0_to_3_11_3_pickle_them() -> None:
    """By getattr(class, name): that of a memory format is read, any other is refused."""

    def by_getattr(owner: str, name: str) -> bytes:
        return f"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n{owner}\nV{name}\ntR.".encode()

    right = by_getattr("_MEM_FORMAT_ENCODING", "TORCH_CONTIGUOUS_FORMAT")
    assert MetadataUnpickler(io.BytesIO(right)).load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for owner, name in (("_MEM_FORMAT_ENCODING", "__class__"), ("Metadata", "__init__")):
        with pytest.raises(pickle.UnpicklingError, match=f"asks for {name} of"):
            MetadataUnpickler(io.BytesIO(by_getattr(owner, name))).load()
