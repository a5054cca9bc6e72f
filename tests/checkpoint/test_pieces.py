"""The table of pieces: the same for every save of a layout, small at thousands of ranks, and a partition or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, save
from megatron_fp4.checkpoint.marks import Marks
from megatron_fp4.checkpoint.pieces.cover import check_cover
from megatron_fp4.checkpoint.pieces.layout import PAGE_BYTES, StoredLayout
from megatron_fp4.checkpoint.pieces.plan import in_writing_order, joined, own_layout, planned_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.storage.durable import FileRecord
from tests.checkpoint.synthetic import Layout, shards_of

ROWS, WIDTH = 3001, 512


def description(rank: int, num_ranks: int) -> bytes:
    """Of a rank that has an equal part of the elements of two tensors, in two kinds."""
    shards: list[Shard] = []
    for name in ("a", "b"):
        cuts = [ROWS * WIDTH * one // num_ranks for one in (rank, rank + 1)]
        shards += [
            Shard(where, {kind: torch.empty(where.shape, device="meta") for kind in ("m", "v")})
            for where in Rectangle.whole(name, (ROWS, WIDTH)).elements(*cuts)
        ]
    return own_layout(in_writing_order(shards)).encode()


def test_a_thousand_ranks_take_some_kilobytes_and_few_files() -> None:
    content, places = planned_by_rank0([description(rank, 1000) for rank in range(1000)])
    layout = StoredLayout.decode(content)
    assert layout.num_pieces > 4000
    assert len(content) < 40_000, "cuts at equal distances must not be listed one by one"
    assert len(layout.files()) <= 512, "thousands of files in a directory"
    assert sum(num_bytes for _, num_bytes in places) >= 2 * 2 * 4 * ROWS * WIDTH


def test_parts_do_not_share_a_page_and_pieces_lie_in_their_part() -> None:
    layout = StoredLayout.decode(planned_by_rank0([description(rank, 20) for rank in range(20)])[0])
    assert (layout.part_starts % PAGE_BYTES == 0).all(), "two nodes would write the same page"
    for first in range(0, 20, 8):
        stops = (layout.part_starts + layout.part_bytes)[first : first + 8]
        assert (layout.part_starts[first + 1 : first + 8] >= stops[:-1]).all(), "a part is written over another"
    begin = layout.part_starts[layout.rank]
    end = begin + layout.part_bytes[layout.rank]
    assert ((layout.positions >= begin) & (layout.positions + layout.piece_bytes <= end)).all()
    by_place = np.lexsort((layout.positions, layout.rank))
    same_rank = np.diff(layout.rank[by_place]) == 0
    gaps = layout.positions[by_place][1:] - (layout.positions + layout.piece_bytes)[by_place][:-1]
    assert (gaps[same_rank] == 0).all(), "pieces overlap"


def test_a_gap_beside_an_overlap_of_the_same_size_is_seen() -> None:
    """The sum of the sizes is right, and no two pieces are equal."""
    pieces = [Rectangle("w", (6, 8), (0, 0), (6, 4)), Rectangle("w", (6, 8), (0, 3), (6, 4))]
    layouts = [own_layout([Shard(where, {"m": torch.empty(where.shape)})]) for where in pieces]
    with pytest.raises(ValueError, match=r"m/w: .*\(rank 0\).*\(rank 1\) are overlapping"):
        check_cover(joined(layouts))


def test_pieces_that_were_computed_to_have_the_right_sum_are_refused() -> None:
    """Elements 1, 3 and 4 are in no piece; the multiplicities come from lattice reduction of numbers once drawn."""
    multiplicities = [7, 0, 4, 0, 0, 4, 4, 5, 5, 2, 7, 3, 5, 3, 6, 1, 10, 9, 1, 8]
    shards = [
        Shard(Rectangle("w", (20,), (place,), (1,)), {"m": torch.zeros(1)})
        for place, count in enumerate(multiplicities)
        for _ in range(count)
    ]
    with pytest.raises(ValueError, match="is written twice"):
        check_cover(own_layout(in_writing_order(shards)))


def test_a_layout_is_planned_once_and_every_checkpoint_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    right = save.plan_layout

    def plan_layout(*arguments: object) -> object:
        planned.append(1)
        return right(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(save, "plan_layout", plan_layout)
    store = CheckpointStore(tmp_path, Group.single("world"), CheckpointConfig(asynchronous=False, keep_last=9))
    for step in (1, 2, 3):
        store.save(step, shards_of(Layout(), 0, filled=True, version=step), {})
    assert planned == [1]
    layouts = [tmp_path / f"step_0000000{step}" / "layout.bin" for step in (1, 2, 3)]
    assert len({path.read_bytes() for path in layouts}) == 1
    assert len({path.stat().st_ino for path in layouts}) == 3, "damage of one would be damage of all"


def test_marks_are_complete_when_the_last_rank_has_left_one() -> None:
    store = dist.HashStore()
    marks, others = Marks(store, "one", 3), Marks(store, "another", 3)
    others.leave(1, FileRecord(1, "f" * 16))
    marks.leave(2, FileRecord(1 << 40, "0123456789abcdef", 4096))
    marks.leave(0, FileRecord(0, ""))
    assert marks.collect() is None
    assert marks.absent() == [1]
    marks.leave(1, FileRecord(5, "f" * 16))
    records = marks.collect()
    assert records is not None
    assert records[2] == FileRecord(1 << 40, "0123456789abcdef", 4096)
    assert (records[0].num_bytes, records[1]) == (0, FileRecord(5, "f" * 16))
    marks.clear()
    marks.leave(1, FileRecord(5, "f" * 16))
    assert marks.absent() == [0, 2], "a late mark of a save that is over"
