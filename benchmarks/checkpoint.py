"""How long a save holds up the step loop, how fast bytes reach the disk, and what plain `dd` does on the same disk.

    python -m benchmarks.checkpoint --ranks 2 --directory /path/on/the/disk

`dd` (one process, fsync at the end), a synchronous and an asynchronous save of the same number of bytes take
turns on the same disk, so that a busy machine slows them alike; medians of the turns are compared. Every save includes
hashing, fsync of files and directories, manifest and commit; loads include verification, from the page cache. The copy
of all tensors into buffers that are there already, by all ranks at once, is the floor of what an asynchronous save
blocks.

The state is FP32 masters and two moments, rows divided over the ranks: "quickstart" is a 9 M parameter GPT, "256MB"
a model whose state has that size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore
from megatron_fp4.comm import collectives
from megatron_fp4.comm.bootstrap import exit_process, start_process
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.storage.local import local_text

KINDS = ("master", "exp_avg", "exp_avg_sq")
MEGA = 1e6


def logical_shapes(size: str) -> dict[str, tuple[int, int]]:
    if size == "256MB":
        return {f"blocks.{block}.w": (2048, 1024) for block in range(10)} | {"rest": (352, 1024)}
    shapes = {"embedding": (8192, 256), "head": (8192, 256)}
    for block in range(7):
        shapes |= {f"blocks.{block}.attention.{part}": (256, 256) for part in ("q", "k", "v", "out")}
        shapes |= {f"blocks.{block}.mlp.up": (896, 256), f"blocks.{block}.mlp.down": (256, 896)}
    return shapes


def shards_of(size: str, group: Group) -> list[Shard]:
    shards = []
    for name, (rows, columns) in logical_shapes(size).items():
        low, high = rows * group.rank // group.size, rows * (group.rank + 1) // group.size
        where = Rectangle(name, (rows, columns), (low, 0), (high - low, columns))
        shards.append(Shard(where, {kind: torch.randn(where.shape) for kind in KINDS}))
    return shards


def dd_seconds(directory: Path, num_bytes: int) -> float:
    target = directory / "dd.bin"
    count = max(1, round(num_bytes / (1 << 20)))
    began = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={count}", "conv=fsync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def measure(rank: int, world_size: int, port: int, directory: str, sizes: list[str], turns: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = start_process("cpu", 300.0, Launch(rank, world_size, rank, world_size, "torchrun")).world
    for size in sizes:
        rows = compare(world, Path(directory), size, turns)
        if rank == 0:
            print("\n".join(rows), flush=True)
    exit_process(0)


def compare(world: Group, directory: Path, size: str, turns: int) -> list[str]:
    shards = shards_of(size, world)
    num_bytes = sum(3 * 4 * rows * columns for rows, columns in logical_shapes(size).values())
    stores = {
        name: CheckpointStore(
            directory / f"{size}-{name}", world, CheckpointConfig(asynchronous=name == "async", keep_last=turns + 1)
        )
        for name in ("sync", "async")
    }
    blocking: dict[str, list[float]] = {"sync": [], "async": []}
    until_commit: dict[str, list[float]] = {"sync": [], "async": []}
    tensors = [tensor for shard in shards for tensor in shard.tensors.values()]
    buffers = [torch.zeros_like(tensor) for tensor in tensors]
    dd, load, copy = [], [], []
    for turn in range(turns + 1):
        if world.rank == 0:
            dd.append(dd_seconds(directory, num_bytes))
        for name, store in stores.items():
            collectives.barrier(world)
            began = time.perf_counter()
            report = store.save(turn, shards, {})
            blocking[name].append(time.perf_counter() - began)
            store.wait()
            until_commit[name].append(time.perf_counter() - began)
            assert report.error is None, report.error
        collectives.barrier(world)
        began = time.perf_counter()
        for tensor, buffer in zip(tensors, buffers, strict=True):
            buffer.copy_(tensor)
        copy.append(time.perf_counter() - began)
        collectives.barrier(world)
        began = time.perf_counter()
        stores["sync"].load(stores["sync"].choose(turn), shards)
        load.append(time.perf_counter() - began)
        collectives.barrier(world)
        if world.rank == 0:
            for store in stores.values():
                shutil.rmtree(store.root / f"step_{turn:08d}")
    if world.rank:
        return []

    def median(values: list[float]) -> float:
        return statistics.median(values[1:])  # the first turn makes buffers and the plan

    dd_rate = num_bytes / MEGA / median(dd)
    lines = [
        f"{size}: {num_bytes / MEGA:.0f} MB over {world.size} ranks, median of {turns} turns; dd {dd_rate:.0f} MB/s"
    ]
    for name in stores:
        seconds = median(until_commit[name])
        rate = num_bytes / MEGA / seconds
        lines.append(
            f"  {name:5}  blocks {median(blocking[name]) * 1e3:7.1f} ms (first {blocking[name][0] * 1e3:.0f})"
            f"  committed after {seconds * 1e3:7.1f} ms = {rate:5.0f} MB/s, {rate / dd_rate:.2f} of dd"
        )
    floor = median(copy)
    lines.append(
        f"  async blocks {median(blocking['async']) / median(blocking['sync']):.1%} of sync; the copy alone takes"
        f" {floor * 1e3:.1f} ms = {num_bytes / floor / 1e9:.1f} GB/s"
    )
    lines.append(f"  load with verification {num_bytes / MEGA / median(load):.0f} MB/s")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--directory", type=local_text, default=None, help="on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--sizes", nargs="+", default=["quickstart", "256MB"], choices=["quickstart", "256MB"])
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.directory)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    try:
        mp.spawn(measure, (args.ranks, port, directory, args.sizes, args.turns), nprocs=args.ranks)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
