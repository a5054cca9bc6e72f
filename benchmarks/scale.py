"""What grows with the number of ranks, counted and not measured: no cluster is needed.

    python -m benchmarks.scale groups      calls that make the process groups of a rank
    python -m benchmarks.scale board       requests of the store when a job hangs
    python -m benchmarks.scale objects     bytes that a rank receives of what is told of a run
    python -m benchmarks.scale host        milliseconds of a rank's Python in a step that could grow with the ranks

Not here: metadata of checkpoints (checkpoint.py), evenness of the optimizer's parts (`megatron-fp4 plan`).
"""

from __future__ import annotations

import argparse
import pickle
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm import board
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import Group, build_mesh, draw_mesh, rank_grid
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.optim import bucket_comm
from megatron_fp4.planning.stand_ins import SizedBackend
from megatron_fp4.precision.statistics import QuantizationStats
from megatron_fp4.train import message
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.message import StepMessage
from megatron_fp4.train.trainable import draw_stages

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


class CountingStore:
    """Answers like the store of a rendezvous, at once, and counts what it is asked for."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.requests = 0

    def clone(self) -> CountingStore:
        return self

    def set(self, key: str, value: str) -> None:
        self.requests += 1
        self.values[key] = value.encode()

    def add(self, key: str, amount: int) -> int:
        self.requests += 1
        self.values[key] = str(int(self.values.get(key, b"0")) + amount).encode()
        return int(self.values[key])

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], _timeout: object) -> None:
        assert self.check(keys), f"{keys}: nobody else would set them"

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests += 1
        return [self.values[key] for key in keys]


def count_board_requests(world_size: int) -> tuple[int, int]:
    """Requests of all ranks of a job that hangs, and how many ranks print the summary. The last rank is silent."""
    store, readers = CountingStore(), 0

    def conclude(texts: dict[int, str]) -> str:
        nonlocal readers
        readers += 1
        assert len(texts) == world_size - 1
        return "[]"

    with mock.patch.object(board, "_get_default_store", return_value=store):
        ranks = tuple(range(world_size))
        boards = [board.NoticeBoard(Group("world", ranks, rank, mock.Mock()), "watchdog") for rank in ranks[:-1]]
    for one in boards:
        one.post("at a line")
    for one in boards:
        one.conclude(conclude, 1.0)
    return store.requests, readers


def board_requests() -> None:
    print("ranks  requests  if all read all")
    for world_size in WORLDS:
        requests, _ = count_board_requests(world_size)
        print(f"{world_size:5d}  {requests:8d}  {2 * world_size**2:15d}")


RING = 2
"""NCCL's ring all-reduce: a rank receives the tensor about twice, whatever the number of ranks."""
OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "wgrad.x", "wgrad.dy")


class Objects(NamedTuple):
    """What one rank has to tell, pickled: bytes of the statistics, of the norms and of an error; number of tensors."""

    statistics: int
    norms: int
    error: int
    num_tensors: int


def some_statistics() -> QuantizationStats:
    """Numbers of their own: equal ones would be pickled once."""
    snr, mse, underflow, saturation, amax, *histogram = (random.random() for _ in range(12))
    return QuantizationStats(snr, mse, underflow, saturation, tuple(histogram), amax)


def objects_of(config: RunConfig, num_gpus: int, rank: int) -> Objects:
    config = replace(config, model=config.model.by_torch())
    mesh = draw_mesh(config.parallel, num_gpus, rank)
    backend = SizedBackend(config.precision.backend, on_gpu=True)
    stages = draw_stages(config, backend, mesh, torch.device("meta"))
    linears = [name for stage in stages for name in linears_of(stage)]
    report = {f"{name}/{operand}": some_statistics() for name in linears for operand in OPERANDS}
    placements = [parameter.placement for stage in stages for parameter in logical_parameters(stage)]
    norms = {where.name: random.random() for placement in placements for where in placement.rectangles}
    error = f"rank {rank}: blocks.17.mlp.up (x, rank {rank}), samples {list(range(10**9, 10**9 + 8))}"
    return Objects(len(pickle.dumps(report)), len(pickle.dumps(norms)), len(pickle.dumps(error)), len(norms))


def objects() -> None:
    print("bytes that the main rank receives; in brackets, if every rank told all ranks (as all of them would receive)")
    print(f"ranks  {'statistics':>24s} {'norms by tensor':>24s} {'no error':>22s} {'errors of all':>24s}")
    for world_size in WORLDS:
        dp = world_size // 32
        overrides = [
            "experiment=paper_12b_10t",
            "precision.backend=emulated",
            "parallel.tp=8",
            "parallel.pp=4",
            f"train.global_batch={4 * dp}",
        ]
        config = to_run_config(compose_config(overrides))
        of_stages = [objects_of(config, world_size, stage * dp * 8) for stage in range(4)]
        one = Objects(*map(max, *of_stages))
        cells = (
            (4 * one.statistics, world_size * one.statistics),
            (2 * RING * 8 * one.num_tensors + 4 * one.norms, world_size * one.norms),
            (world_size, world_size * (8 + 4)),
            (world_size + 20 * one.error, world_size * one.error),
        )
        print(f"{world_size:5d} " + " ".join(f"{now:11,d} ({before:11,d})" for now, before in cells))


def quickest_ms(act: Callable[[], object]) -> float:
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)


def host() -> None:
    """dp is the whole world, as in the layout with most data-parallel ranks; what the device does takes no time."""
    print("ranks  message, ms  sum and gather of a bucket, ms")
    for world_size in WORLDS:
        world = Group("world", tuple(range(world_size)), 0, mock.Mock())
        mesh = draw_mesh(ParallelConfig(), world_size, 0)
        square = torch.ones((), dtype=torch.float64)
        own = StepMessage(torch.ones(()), square, stop=False, late=False, num_targets=8192, tokens_hash=12345)
        rows = own.row().repeat(world_size, 1)
        with mock.patch.object(message, "all_gather_rows", return_value=rows):
            of_message = quickest_ms(partial(message.exchange, own, mesh))
        flat = torch.zeros(world_size)
        with (
            mock.patch.object(bucket_comm, "uses_gloo", return_value=False),
            mock.patch.object(dist, "reduce_scatter_single"),
            mock.patch.object(dist, "all_gather_single"),
        ):
            of_bucket = quickest_ms(partial(sum_and_gather, flat, world))
        print(f"{world_size:5d}  {of_message:11.3f}  {of_bucket:30.3f}")


def sum_and_gather(flat: torch.Tensor, group: Group) -> None:
    bucket_comm.PendingSum(flat, group).finish()
    bucket_comm.PendingGather(flat, group).wait()


def main() -> None:
    tables: dict[str, Any] = {"groups": groups, "board": board_requests, "objects": objects, "host": host}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables)
    tables[parser.parse_args().table]()


if __name__ == "__main__":
    main()
