"""Processor time of AdamW's update alone, by what is kept of its state: eagerly, and with compiled conversions.

    python -m benchmarks.update

One matrix on one rank, one thread, nanoseconds an element; the least of some updates, so that a busy machine disturbs
little. Not here: whole steps (zero1.py).
"""

from __future__ import annotations

import argparse
import time

import torch

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim import OptimConfig, Zero1Optimizer
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat, MomentsConfig

KEPT = {"fp32": OptimConfig(), "remainder": OptimConfig(master=MasterFormat.remainder)} | {
    f"{format.name} moments": OptimConfig(moments=MomentsConfig(format, format))
    for format in (MomentFormat.bf16, MomentFormat.fp8, MomentFormat.int8)
}


def nanoseconds(config: OptimConfig, rows: int, columns: int, updates: int, *, compile: bool) -> float:
    """Of an element's update. The first one, which may compile, is not counted."""
    weight = LogicalParameter.whole("weight", torch.randn(rows, columns).bfloat16())
    optimizer = Zero1Optimizer([("weight", weight)], config, ParallelMesh.single_process(), True, compile=compile)
    least = float("inf")
    for update in range(updates + 1):
        optimizer.zero_grad()
        assert weight.main_grad is not None
        weight.main_grad.normal_()
        norm = optimizer.finish_grads()
        start = time.process_time()
        optimizer.step(norm, lr=1e-3, max_norm=0.0)
        if update:
            least = min(least, time.process_time() - start)
    return 1e9 * least / (rows * columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'ns an element':16}{'eager':>8}{'compiled':>10}")
    for name, config in KEPT.items():
        sizes = (args.rows, args.columns, args.updates)
        eager, compiled = (nanoseconds(config, *sizes, compile=compile) for compile in (False, True))
        print(f"{name:16}{eager:8.1f}{compiled:10.1f}", flush=True)


if __name__ == "__main__":
    main()
