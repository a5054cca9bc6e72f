"""What the epoch index of many documents takes in the processes of a node, in memory and as a file that they share.

    python -m benchmarks.index_memory --documents 2e6 1e7

Processes open one index at once, each way. Memory is that of all together, in which the kernel counts a shared page
once (Pss of smaps_rollup); seconds are those until all have it, building included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.order.epoch_index import IndexCache, build_index, index_bytes
from megatron_fp4.data.order.permute import digest

KEY = digest("index")


class Lengths:
    """Documents of which only the lengths are known."""

    name, fingerprint = "lengths", "0"

    def __init__(self, num_documents: int) -> None:
        self.num_documents = num_documents
        self.num_tokens = int(self.lengths.sum())

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.random.default_rng(0).integers(1, 4000, self.num_documents, dtype=np.int64)


def memory_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def open_index(num_documents: int, folder: str, barrier: Any, out: Any) -> None:
    documents: Any = Lengths(num_documents)
    barrier.wait()
    before, began = memory_bytes(), time.perf_counter()
    index = IndexCache(folder).get(documents, KEY) if folder else build_index(documents.lengths, KEY)
    checked = int(index.order.sum()), int(index.starts.sum())  # every page is touched
    seconds = time.perf_counter() - began
    barrier.wait()
    used = memory_bytes() - before
    barrier.wait()
    out.put((used, seconds, checked))


def measure(num_documents: int, folder: str, num_processes: int) -> tuple[float, float]:
    """MB of all processes, and seconds until all have the index."""
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(num_processes), context.Queue()
    arguments = (num_documents, folder, barrier, out)
    processes = [context.Process(target=open_index, args=arguments) for _ in range(num_processes)]
    for process in processes:
        process.start()
    results = [out.get() for _ in processes]
    for process in processes:
        process.join()
    assert len({checked for _, _, checked in results}) == 1
    return sum(result[0] for result in results) / 1e6, max(result[1] for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=float, nargs="+", default=[2e6, 1e7])
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    print(f"{args.processes} processes of a node")
    print("   documents  index, MB  MB, in memory  MB, a file  seconds, in memory  seconds, a file")
    for count in map(int, args.documents):
        memory = measure(count, "", args.processes)
        with tempfile.TemporaryDirectory() as folder:
            file = measure(count, folder, args.processes)
        print(
            f"{count:12,}  {index_bytes(count) / 1e6:9.0f}  {memory[0]:13.0f}  {file[0]:10.0f}"
            f"  {memory[1]:18.2f}  {file[1]:15.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
