"""Save at one layout, load at another: bitwise, replicas and tied copies included."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore
from megatron_fp4.comm.mesh import Group
from tests.checkpoint.synthetic import Layout, shards_of, wrong_shards
from tests.helpers.distributed import run_distributed

WORLD_SIZE = 4
# 22 vocabulary rows, 12 hidden and 4 key rows: uneven shares at dp 3 and 4, empty ones at tp 4 x dp > 1
SAVERS = [Layout(ep=1), Layout(tp=2, dp=2, ep=4), Layout(pp=2, dp=2, ep=2), Layout(dp=3, ep=1)]
LOADERS = [*SAVERS, Layout(tp=4, ep=2), Layout(pp=4, ep=1), Layout(tp=2, pp=2, ep=2), Layout(dp=3, ep=3)]
KINDS = ("master", "exp_avg")
META = {"tokens": 7.5, "loader": {"cursor": [1, 2]}}


def cross_all_layouts(rank: int, world_size: int, root: str) -> list[str]:
    """A layout of n ranks runs on the first n ranks; returns what was wrong on this rank."""
    groups = {1: Group.single("world", rank), 4: Group("world", (0, 1, 2, 3), rank, dist.group.WORLD)}
    for size in (2, 3):
        process_group = dist.new_group(list(range(size)))
        if rank < size:
            groups[size] = Group("world", tuple(range(size)), rank, process_group)
    for number, layout in enumerate(SAVERS):
        if rank < layout.world_size:
            config = CheckpointConfig(asynchronous=number % 2 == 0)
            store = CheckpointStore(Path(root, str(number)), groups[layout.world_size], config)
            store.save(7, shards_of(layout, rank, filled=True, kinds=KINDS), META)
            store.close()
        dist.barrier()
    wrong = []
    for number, saver in enumerate(SAVERS):
        for layout in LOADERS:
            if rank >= layout.world_size:
                continue
            shards = shards_of(layout, rank, filled=False, kinds=KINDS)
            store = CheckpointStore(Path(root, str(number)), groups[layout.world_size], CheckpointConfig())
            chosen = store.choose()
            store.load(chosen, shards)
            wrong += [f"{saver} -> {layout}: {name}" for name in wrong_shards(shards, layout, rank)]
            wrong += [] if chosen.meta == {"step": 7, **META} else [f"{saver} -> {layout}: {chosen.meta}"]
        dist.barrier()
    return wrong


def test_every_layout_loads_every_checkpoint_bitwise(tmp_path: Path) -> None:
    wrong = run_distributed(cross_all_layouts, WORLD_SIZE, str(tmp_path))
    assert wrong == [[]] * WORLD_SIZE, "rectangles were written to or read from the wrong place, or a copy not filled"
