"""What grows with the number of ranks, counted and not measured: no cluster is needed.

    python -m benchmarks.scale groups      calls that make the process groups of a rank

Not here: metadata of checkpoints (checkpoint.py), evenness of the optimizer's parts (`megatron-fp4 plan`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import Group, build_mesh, rank_grid

WORLDS = (128, 512, 2048, 2944, 8192)
LAYOUTS: tuple[dict[str, Any], ...] = ({"tp": 4}, {"tp": 8, "pp": 4}, {"tp": 8, "pp": 4, "cp": 2})


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[Group]:
    """A world of process groups that send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Group("world", tuple(range(world_size)), rank, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def count_group_calls(config: ParallelConfig, world_size: int) -> tuple[int, float]:
    """Calls of torch that make the groups of one rank, and their seconds without any network."""
    with (
        fake_world(world_size - 1, world_size) as world,
        mock.patch.object(dist, "new_group", wraps=dist.new_group) as new,
    ):
        began = time.perf_counter()
        build_mesh(config, world)
        return new.call_count, time.perf_counter() - began


def count_subgroups(config: ParallelConfig, world_size: int) -> int:
    """Subgroups of all axes and pairs of axes: the calls of a program that makes each by a call of its own."""
    pp, dp, cp, tp = rank_grid(config, world_size).shape
    sizes = (tp, cp, dp, pp, dp * cp, cp * tp, pp * tp)
    return sum(world_size // size for size in sizes if 1 < size < world_size)


def groups() -> None:
    print("ranks  layout               subgroups  calls  seconds")
    for world_size in WORLDS:
        for sizes in LAYOUTS:
            config = ParallelConfig(**sizes)
            calls, seconds = count_group_calls(config, world_size)
            name = " ".join(f"{axis}{size}" for axis, size in sizes.items())
            name += f" dp{config.resolve_dp(world_size)}"
            print(f"{world_size:5d}  {name:20s} {count_subgroups(config, world_size):9d}  {calls:5d}  {seconds:7.3f}")


def main() -> None:
    tables: dict[str, Any] = {"groups": groups}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables)
    tables[parser.parse_args().table]()


if __name__ == "__main__":
    main()
