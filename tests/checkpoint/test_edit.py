"""Checkpoints made of others: average and extract."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, edit, offline
from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.checkpoint.pieces.stored import Description, StoredPieces
from megatron_fp4.comm.mesh import Group
from megatron_fp4.optim import DecayStyle, OptimConfig, Schedule, learning_rate
from tests.checkpoint.synthetic import Layout, save_one, shards_of, two_pieces, whole_shard


def test_average(tmp_path: Path) -> None:
    paths = [save_one(tmp_path / "run", step, two_pieces(value)) for step, value in ((1, 1.0), (2, 2.0), (3, 6.0))]
    out = edit.average(paths, tmp_path / "mean")
    assert torch.equal(offline.read_tensor(out, "master/w"), torch.full((5, 3), 3.0))
    state = read_state(out)
    assert (state["step"], state["meta"]["averaged_from"]) == (3, [str(path) for path in paths])
    weighted = edit.average(paths[:2], tmp_path / "weighted", weights=[3, 1])
    assert torch.equal(offline.read_tensor(weighted, "master/w"), torch.full((5, 3), 1.25))
    with pytest.raises(ValueError, match="exists already"):
        edit.average(paths, tmp_path / "run")
    other = save_one(tmp_path / "other", 1, [whole_shard("w", {"master": torch.ones(2, 3)})])
    with pytest.raises(ValueError, match="differ in 2 tensors"):
        edit.average([paths[0], other], tmp_path / "no")
    with pytest.raises(ValueError, match="as many weights"):
        edit.average(paths, tmp_path / "no", weights=[1.0])


def test_minus_sqrt_weights_are_those_of_a_decay() -> None:
    """A model that moves by a constant velocity between checkpoints: the mean is where a decaying rate had led it."""
    steps, velocities = [100, 150, 250, 300], [3.0, -1.0, 2.0]
    places, decayed, lr = [0.0], 0.0, OptimConfig(lr=1.0, schedule=Schedule.wsd, decay_style=DecayStyle.minus_sqrt)
    for (first, last), velocity in zip(itertools.pairwise(steps), velocities, strict=True):
        places.append(places[-1] + velocity * (last - first))
        fine = [first + (last - first) * (i + 0.5) / 4000 for i in range(4000)]  # midpoints of the rate's integral
        rates = [learning_rate(lr, round(1e6 * step), 300_000_000, decay_start=100_000_000) for step in fine]
        decayed += velocity * (last - first) * sum(rates) / len(rates)
    weights = edit.minus_sqrt_weights(steps)
    assert sum(weights) == pytest.approx(1.0)
    assert all(weight > 0 for weight in weights)
    assert sum(weight * place for weight, place in zip(weights, places, strict=True)) == pytest.approx(decayed, 1e-4)
    for wrong in ([100], [200, 100], [100, 100]):
        with pytest.raises(ValueError, match="ascending order"):
            edit.minus_sqrt_weights(wrong)


def test_a_layout_is_read_once_for_all_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for each: that of thousands of ranks takes a second."""
    path = save_one(tmp_path / "run", 3, shards_of(Layout(), 0, filled=True))
    parsed: list[int] = []
    right = Description.parsed

    def count(self: Description, directory: Path) -> StoredPieces:
        parsed.append(1)
        return right(self, directory)

    monkeypatch.setattr(Description, "parsed", count)
    edit.average([path, path], tmp_path / "mean")
    edit.extract(path, tmp_path / "masters")
    assert len(parsed) < 10


def test_extract_loads_as_any_checkpoint_does(tmp_path: Path) -> None:
    path = save_one(tmp_path / "run", 3, shards_of(Layout(), 0, filled=True))
    out = edit.extract(path, tmp_path / "masters")
    assert {info.kind for info in offline.list_tensors(out)} == {"master"}
    shards = shards_of(Layout(tp=2), 1, filled=False, kinds=("master",))
    rest = shards_of(Layout(tp=2), 0, filled=False, kinds=("master",))
    store = CheckpointStore(tmp_path / "masters", Group.single("world"), CheckpointConfig())
    store.load(store.choose(), [*shards, *rest])
    assert all(torch.isfinite(shard.tensors["master"]).all() for shard in shards)
    with pytest.raises(ValueError, match="no tensors of the kinds"):
        edit.extract(path, tmp_path / "no", kinds=("nothing",))
