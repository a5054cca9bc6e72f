"""Strict names and shapes, coverage, and what JSON may hold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore
from megatron_fp4.checkpoint.state import encode_meta
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from tests.checkpoint.synthetic import Layout, shards_of, whole_shard, wrong_shards

ONE = Layout()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, Group.single("world"), CheckpointConfig(asynchronous=False))


def shard(name: str, rows: int, offset: int = 0, of: int | None = None, writes: bool = True) -> Shard:
    return Shard(Rectangle(name, (of or rows, 2), (offset, 0), (rows, 2)), {"master": torch.ones(rows, 2)}, writes)


def test_differences_are_listed_in_one_error(store: CheckpointStore) -> None:
    store.save(1, [shard("kept", 2), shard("gone", 2), shard("other", 4)], {})
    with pytest.raises(ValueError, match="does not fit this model") as error:
        store.load(store.choose(1), [shard("kept", 2), shard("new", 2), shard("other", 6)])
    message = str(error.value)
    assert "missing in it (1):\n    master/new" in message, "a name only the model has"
    assert "not in the model (1):\n    master/gone" in message, "a name only the checkpoint has"
    assert "master/other: stored (4, 2), model (6, 2)" in message, "another logical shape"
    assert "master/kept" not in message
    assert len(message.splitlines()) == 8, "one listing, not one error for each name"


def test_only_the_masters_are_loaded_for_evaluation(store: CheckpointStore) -> None:
    store.save(1, shards_of(ONE, 0, filled=True), {})
    masters = shards_of(ONE, 0, filled=False, kinds=("master",))
    store.load(store.choose(), masters)
    assert wrong_shards(masters, ONE, 0) == [], "asking for one kind must not need the others"


def test_masters_load_into_another_dtype(store: CheckpointStore) -> None:
    store.save(1, [whole_shard("w", {"master": torch.full((3, 2), 1.5)})], {})
    target = torch.zeros(3, 2, dtype=torch.bfloat16)
    store.load(store.choose(1), [whole_shard("w", {"master": target})])
    assert target.eq(1.5).all(), "export reads into bf16 without an fp32 copy of its own"


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (lambda: [shard("w", 2, 0, of=5), shard("w", 2, 2, of=5)], r"master/w: .* hold 8 of the 10 elements"),
        (lambda: [shard("w", 3, 0, of=5), shard("w", 3, 2, of=5)], "overlapping"),
        (lambda: [shard("w", 1, 1, of=5), shard("w", 5)], "overlapping"),
        (lambda: [shard("w", 5), shard("w", 5)], "written twice.*writes=False"),
        (lambda: [shard("w", 3, 4, of=5)], "not inside the logical shape"),
        (lambda: [shard("w", 5), shard("w", 4, 0, of=4)], "two shards say"),
    ],
)
def test_shards_that_are_no_partition_are_refused(
    store: CheckpointStore, shards: Callable[[], list[Shard]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.save(1, shards(), {})
    assert store.complete_steps() == [], "a refused save leaves nothing behind"


def test_pieces_of_rows_are_a_partition_or_overlap_inside_a_row(store: CheckpointStore) -> None:
    def pieces(*cuts: int) -> list[Shard]:
        places = [where for low, high in pairwise(cuts) for where in Rectangle.whole("w", (3, 50)).elements(low, high)]
        return [Shard(where, {"master": torch.full(where.shape, 2.0)}) for where in places]

    store.save(1, pieces(0, 7, 11, 60, 149, 150), {})
    target = torch.zeros(3, 50)
    store.load(store.choose(1), [whole_shard("w", {"master": target})])
    assert bool((target == 2.0).all())
    with pytest.raises(ValueError, match=r"master/w: .* overlapping"):
        store.save(2, [*pieces(0, 30), *pieces(29, 150)], {})


def test_shards_as_views_of_one_buffer(store: CheckpointStore) -> None:
    """The optimizer's tensors are views into flat buffers; storing the buffer with each view would be quadratic."""
    flat = torch.arange(4096.0)
    parts = [whole_shard(f"w{i}", {"master": flat[i * 128 : i * 128 + 128].view(32, 4)}) for i in range(32)]
    report = store.save(1, parts, {})
    assert report.num_bytes < 2.5 * flat.nbytes + 32 * 1500, "each view was stored with the whole buffer behind it"
    before = flat.clone()
    flat.zero_()
    store.load(store.choose(1), parts)
    assert torch.equal(flat, before), "a load must fill the live memory in place"


def test_meta_comes_back_the_same(store: CheckpointStore) -> None:
    meta = {"tokens": 2**53 + 1, "lr": 0.1 + 0.2, "best": float("inf"), "names": ["a", None], "nested": {"on": True}}
    store.save(3, [shard("w", 2)], meta)
    assert store.choose().meta == {"step": 3, **meta}


@pytest.mark.parametrize(
    ("meta", "path"),
    [
        ({"a": {"b": (1, 2)}}, r"meta\.a\.b = \(1, 2\) \(tuple\)"),
        ({"a": [torch.tensor(1.0)]}, r"meta\.a\[0\]"),
        ({"a": {1: 2}}, r"meta\.a: key 1"),
    ],
)
def test_meta_that_json_would_change_is_refused(meta: dict, path: str) -> None:
    with pytest.raises(ValueError, match=path):
        encode_meta(meta)
