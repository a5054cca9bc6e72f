"""Forward and backward of one emulated linear layer, as a multiple of torch's BF16 linear.

`python -m benchmarks.linear --help`. The memory that backward keeps is printed too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import CLOCKS, paired_seconds, print_table
from megatron_fp4.comm.host_memory import keep_freed_memory
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.precision import (
    EmulatedBackend,
    LinearPrecision,
    Sharding,
    StepClock,
    WeightCache,
    WgradOutput,
    nvfp4_paper,
    quantized_linear,
)


class Layer:
    """One linear with FP32 main gradient."""

    def __init__(self, w: Tensor, precision: LinearPrecision, backend: EmulatedBackend, tokens: int) -> None:
        self.weight = LogicalParameter.whole("w", w.clone())
        self.weight.main_grad = torch.zeros_like(w, dtype=torch.float32)
        single = Group.single()
        n_index, k_index = (torch.arange(size, device=w.device) for size in w.shape)
        self.sharding = Sharding("benchmark", single, single, single, n_index, k_index)
        self.rows = torch.arange(tokens, device=w.device)
        self.precision, self.backend, self.cache, self.clock = precision, backend, WeightCache(), StepClock(seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(
            x,
            self.weight,
            rows=self.rows,
            sharding=self.sharding,
            precision=self.precision,
            backend=self.backend,
            clock=self.clock,
            cache=self.cache,
        )

    def step(self, x: Tensor, dy: Tensor, new_weights: bool = False) -> None:
        self.clock.weights_version += new_weights
        self.forward(x).backward(dy)


def saved_bytes(layer: Layer, x: Tensor) -> int:
    """Bytes of the tensors that one forward pass keeps for backward."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer.forward(x)
    return sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine, with --threads 1"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a training run does
    x = torch.randn(args.tokens, args.inputs, device=args.device).bfloat16().requires_grad_()
    w = (torch.randn(args.outputs, args.inputs, device=args.device) / args.inputs**0.5).bfloat16()
    dy = torch.randn(args.tokens, args.outputs, device=args.device).bfloat16()
    plain = torch.nn.Parameter(w.clone())
    backend = EmulatedBackend(compile=True)
    full, narrow = nvfp4_paper(), replace(nvfp4_paper(), wgrad_output=WgradOutput.compute)
    layers = {
        "bf16, FP32 wgrad": LinearPrecision(),
        "bf16, BF16 wgrad": LinearPrecision(wgrad_output=WgradOutput.compute),
        "nvfp4 paper, FP32 wgrad": full,
        "nvfp4 paper, BF16 wgrad": narrow,
        "nvfp4 without RHT, FP32 wgrad": nvfp4_paper(rht=False),
        "nvfp4 without RHT and SR, BF16 wgrad": replace(
            nvfp4_paper(rht=False, stochastic=False), wgrad_output=WgradOutput.compute
        ),
    }
    wide = [t.detach().float().requires_grad_() for t in (x, plain, dy)]
    candidates: dict[str, Callable[[], object]] = {
        "torch BF16 linear": lambda: F.linear(x, plain).backward(dy),
        "torch FP32 linear": lambda: F.linear(wide[0], wide[1]).backward(wide[2]),
    }
    layers_by_name = {name: Layer(w, precision, backend, args.tokens) for name, precision in layers.items()}
    for name, layer in layers_by_name.items():
        candidates[name] = lambda layer=layer: layer.step(x, dy)  # type: ignore[misc]
    renewed = Layer(w, full, backend, args.tokens)
    candidates["nvfp4 paper, FP32 wgrad, weights renewed"] = lambda: renewed.step(x, dy, new_weights=True)
    seconds = paired_seconds(candidates, args.rounds, CLOCKS[args.clock])
    shape = f"{args.tokens} tokens, {args.inputs} -> {args.outputs}"
    title = f"linear {shape}, forward + backward, {args.threads} threads, {args.clock} time"
    print_table(title, seconds, "torch BF16 linear")
    for name, layer in layers_by_name.items():
        print(f"saved for backward: {saved_bytes(layer, x) / x.nbytes:.4f} x the bytes of x   ({name})")


if __name__ == "__main__":
    main()
