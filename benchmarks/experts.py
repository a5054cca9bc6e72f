"""The linear of experts: all segments in the passes of one tensor, as a multiple of one segment after the other.

`python -m benchmarks.experts --help`. Beside it the dense linear of
as many rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.linear import Layer
from benchmarks.timing import CLOCKS, paired_seconds, print_table
from megatron_fp4.comm.host_memory import keep_freed_memory
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.precision import EmulatedBackend, LinearPrecision, Sharding, StepClock, nvfp4_paper
from megatron_fp4.precision.grouped import GroupedWeightCache, Segments, grouped_linear
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend


class Experts:
    """The linear of some experts with FP32 main gradient."""

    def __init__(self, w: Tensor, segments: Segments, precision: LinearPrecision, backend: EmulatedBackend) -> None:
        experts, rows, columns = w.shape
        self.weight = LogicalParameter.whole("w", w.reshape(experts * rows, columns).clone())
        self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        single = Group.single()
        n_index, k_index = (torch.arange(size, device=w.device) for size in (rows, columns))
        self.sharding = Sharding("benchmark", single, single, single, n_index, k_index)
        self.rows = torch.arange(segments.num_rows, device=w.device)
        self.cache, self.clock = GroupedWeightCache(experts, 0), StepClock(seed=1)
        self.segments, self.precision, self.backend = segments, precision, backend

    def step(self, x: Tensor, dy: Tensor) -> None:
        """Forward and backward."""
        y = grouped_linear(
            x,
            self.weight,
            rows=self.rows,
            segments=self.segments,
            sharding=self.sharding,
            precision=self.precision,
            backend=self.backend,
            clock=self.clock,
            cache=self.cache,
        )
        y.backward(dy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="mean rows of an expert; they vary from none to twice")
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--outputs", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help="cpu: for a busy machine")
    parser.add_argument("--compile", action="store_true", help="passes compiled, as a run does")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a training run does
    torch.manual_seed(0)
    counts = torch.randint(0, 2 * args.rows, (args.experts, 1)).tolist()
    counts[-1][0] += -sum(count for (count,) in counts) % 16  # the dense linear takes no other number
    segments = Segments.of_counts(counts)
    w = (torch.randn(args.experts, args.outputs, args.inputs, device=args.device) / args.inputs**0.5).bfloat16()
    x = torch.randn(segments.num_rows, args.inputs, device=args.device).bfloat16().requires_grad_()
    dy = torch.randn(segments.num_rows, args.outputs, device=args.device).bfloat16()
    candidates: dict[str, Callable[[], object]] = {}
    for name, precision in (("nvfp4", nvfp4_paper()), ("bf16", LinearPrecision())):
        for kind, make in (("one pass", SegmentedEmulatedBackend), ("a loop", EmulatedBackend)):
            layer = Experts(w, segments, precision, make(compile=args.compile))
            candidates[f"{name}, {kind}"] = partial(layer.step, x, dy)
        dense = Layer(w[0], precision, EmulatedBackend(compile=args.compile), segments.num_rows)
        candidates[f"{name}, dense, one weight for all rows"] = partial(dense.step, x, dy)
    seconds = paired_seconds(candidates, args.rounds, CLOCKS[args.clock])
    shape = f"{args.experts} experts, {segments.num_rows} rows, {args.inputs} -> {args.outputs}"
    title = f"experts: {shape}, forward + backward, {args.threads} threads, {args.clock} time"
    print_table(title, seconds, "nvfp4, one pass")


if __name__ == "__main__":
    main()
