"""Offline: list, verify, read whole, average, extract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, inspect
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from tests.checkpoint.synthetic import Layout, logical_shapes, shards_of, whole, whole_shard


def save(root: Path, step: int, shards: list[Shard]) -> Path:
    store = CheckpointStore(root, Group.single("world"), CheckpointConfig(asynchronous=False, keep_last=9))
    store.save(step, shards, {"tokens": step}, tokens=step, score=1.5)
    return root / f"step_{step:08d}"


def two_pieces(value: float) -> list[Shard]:
    data = torch.full((5, 3), value)
    return [
        Shard(Rectangle("w", (5, 3), (low, 0), (high - low, 3)), {"master": data[low:high]})
        for low, high in ((0, 2), (2, 5))
    ]


def test_list_and_read_whole(tmp_path: Path) -> None:
    path = save(tmp_path, 3, [*two_pieces(1.0), *shards_of(Layout(), 0, filled=True)])
    infos = {info.key: info for info in inspect.list_tensors(inspect.resolve(tmp_path))}
    assert len(infos) == 3 * len(logical_shapes()) + 1
    assert infos["master/w"].num_pieces == 2
    assert (infos["master/w"].shape, infos["master/w"].num_bytes) == ((5, 3), 60)
    name = "blocks.3.q"
    assert torch.equal(inspect.read_tensor(path, f"exp_avg/{name}"), whole("exp_avg", name, logical_shapes()[name]))
    with pytest.raises(ValueError, match="has no tensor master/nothing; it has"):
        inspect.read_tensor(path, "master/nothing")
    assert inspect.read_state(path) == {"step": 3, "tokens": 3, "score": 1.5, "meta": {"tokens": 3}}


def test_resolve(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 3, two_pieces(1.0))
    assert inspect.resolve(tmp_path / "run") == path == inspect.resolve(path)
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor"):
        inspect.resolve(tmp_path)


def test_verify(tmp_path: Path) -> None:
    path = save(tmp_path, 3, two_pieces(1.0))
    assert inspect.verify(path) == []
    (path / "state.json").write_text("{}")
    (path / ".metadata").unlink()
    problems = inspect.verify(path)
    assert len(problems) == 2
    assert "state.json has 2 bytes, expected" in problems[1]
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        inspect.list_tensors(path)


def test_average(tmp_path: Path) -> None:
    paths = [save(tmp_path / "run", step, two_pieces(value)) for step, value in ((1, 1.0), (2, 2.0), (3, 6.0))]
    out = inspect.average(paths, tmp_path / "mean")
    assert torch.equal(inspect.read_tensor(out, "master/w"), torch.full((5, 3), 3.0))
    state = inspect.read_state(out)
    assert (state["step"], state["meta"]["averaged_from"]) == (3, [str(path) for path in paths])
    weighted = inspect.average(paths[:2], tmp_path / "weighted", weights=[3, 1])
    assert torch.equal(inspect.read_tensor(weighted, "master/w"), torch.full((5, 3), 1.25))
    with pytest.raises(ValueError, match="exists already"):
        inspect.average(paths, tmp_path / "run")
    other = save(tmp_path / "other", 1, [whole_shard("w", {"master": torch.ones(2, 3)})])
    with pytest.raises(ValueError, match="differ in 2 tensors"):
        inspect.average([paths[0], other], tmp_path / "no")
    with pytest.raises(ValueError, match="as many weights"):
        inspect.average(paths, tmp_path / "no", weights=[1.0])


def test_extract_loads_as_any_checkpoint_does(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 3, shards_of(Layout(), 0, filled=True))
    out = inspect.extract(path, tmp_path / "masters")
    assert {info.kind for info in inspect.list_tensors(out)} == {"master"}
    shards = shards_of(Layout(tp=2), 1, filled=False, kinds=("master",))
    rest = shards_of(Layout(tp=2), 0, filled=False, kinds=("master",))
    store = CheckpointStore(tmp_path / "masters", Group.single("world"), CheckpointConfig())
    store.load(store.choose(), [*shards, *rest])
    assert all(torch.isfinite(shard.tensors["master"]).all() for shard in shards)
    with pytest.raises(ValueError, match="no tensors of the kinds"):
        inspect.extract(path, tmp_path / "no", kinds=("nothing",))
