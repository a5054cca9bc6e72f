"""Time of a training step under ZeRO-1, against DDP + AdamW and FSDP2 of torch: same model, same run, ratios.

    python -m benchmarks.zero1 --ranks 4 --dtype float32

All contenders live in the same processes and take turns, so that a busy machine slows them alike; the median
and the fastest of their turns are compared with DDP's. "model only" is forward and backward without any communication
or update. Tokens are drawn anew for every step: a model that has learnt its batch has denormal gradients, whose slow
arithmetic would be what is measured.
Contenders clip to a global norm of 1 and use torch's fused AdamW. In bfloat16, DDP keeps BF16 moments and no master
weights (it is the lower bound, not an equal), FSDP2 and ZeRO-1 keep FP32 masters. This file measures gloo on CPU unless
`--device cuda` is given, which takes one GPU per rank and NCCL.
"""

from __future__ import annotations

import argparse
import copy
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron_fp4.comm.bootstrap import exit_process, start_process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle
from megatron_fp4.optim import Algorithm, OptimConfig, Overlap, Zero1Optimizer
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat, MomentsConfig

ADAMW, MUON = OptimConfig(), OptimConfig(algorithm=Algorithm.muon)
COMPACT = {
    "remainders": OptimConfig(master=MasterFormat.remainder),
    "bf16 moments": OptimConfig(moments=MomentsConfig(MomentFormat.bf16, MomentFormat.bf16)),
    "fp8 moments": OptimConfig(moments=MomentsConfig(MomentFormat.fp8, MomentFormat.fp8)),
}

Step = Callable[[Tensor, Tensor], None]
"""Trains on tokens `[T]` and targets `[T]`."""


class Contender(NamedTuple):
    """finish: waits for what the last step has left running, so that a turn ends when its work does."""

    step: Step
    finish: Callable[[], None] = lambda: None


class MainGradLinear(torch.autograd.Function):
    """What the library's linears do: the weight gradient goes straight into `main_grad`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        if weight.dtype == torch.float32:
            weight.main_grad.addmm_(dy.T, x)
        else:
            weight.main_grad.add_(dy.T @ x)
        weight.grad_ready()
        return dy @ weight, None


class Linear(nn.Linear):
    """Without bias; uses `main_grad` where the optimizer gave it one and `own_gradient` is set."""

    own_gradient = False

    def forward(self, x: Tensor) -> Tensor:
        return MainGradLinear.apply(x, self.weight) if self.own_gradient else super().forward(x)


class Block(nn.Module):
    """Norm and a four-times wider MLP twice: the parameters of a transformer block without its attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mix = Linear(width, width, bias=False)
        self.up = Linear(width, 4 * width, bias=False)
        self.down = Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width: int, num_blocks: int, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.head = Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float(), targets)


def model_only(model: nn.Module) -> Contender:
    def step(tokens: Tensor, targets: Tensor) -> None:
        model.zero_grad()
        model(tokens, targets).backward()

    return Contender(step)


def torch_step(model: nn.Module) -> Contender:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        model(tokens, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Contender(step)


def ddp(model: nn.Module) -> Contender:
    return torch_step(DistributedDataParallel(model, gradient_as_bucket_view=True))


def fsdp2(model: Model, dtype: torch.dtype) -> Contender:
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(param_dtype=dtype)
    model = model.float()
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return torch_step(model)


def zero1(
    model: nn.Module, mesh: ParallelMesh, overlap: Overlap, own_gradient: bool, optim: OptimConfig = ADAMW
) -> Contender:
    for module in model.modules():
        if isinstance(module, Linear):
            module.own_gradient = own_gradient
    for prefix, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            placement = Placement((Rectangle.whole(f"{prefix}.{name}", tuple(p.shape)),), decay=p.dim() > 1)
            setattr(module, name, LogicalParameter(p, placement))
    bucket_mib = 4.0 if overlap is Overlap.always else 25.0  # 25 is DDP's; overlap needs several buckets
    config = replace(optim, bucket_mib=bucket_mib, overlap_reduce=overlap, overlap_gather=overlap)
    optimizer = Zero1Optimizer(model.named_parameters(), config, mesh, sequence_parallel=False)
    optimizer.gather_beside_forward(model)

    def step(tokens: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.begin_last_microbatch()
        model(tokens, targets).backward()
        norm = optimizer.finish_grads()
        optimizer.step(norm, lr=1e-3, max_norm=1.0)

    return Contender(step, optimizer.wait_parameters)


def contenders(model: Model, mesh: ParallelMesh, dtype: torch.dtype) -> dict[str, Contender]:
    def fresh() -> Model:
        return copy.deepcopy(model)

    return {
        "model only": model_only(fresh()),
        "DDP + AdamW": ddp(fresh()),
        "FSDP2 + AdamW": fsdp2(fresh(), dtype),
        "ZeRO-1, autograd gradients": zero1(fresh(), mesh, Overlap.never, own_gradient=False),
        "ZeRO-1": zero1(fresh(), mesh, Overlap.never, own_gradient=True),
        "ZeRO-1, Muon": zero1(fresh(), mesh, Overlap.never, own_gradient=True, optim=MUON),
        **{
            f"ZeRO-1, {name}": zero1(fresh(), mesh, Overlap.never, own_gradient=True, optim=optim)
            for name, optim in COMPACT.items()
        },
        "ZeRO-1, overlapped": zero1(fresh(), mesh, Overlap.always, own_gradient=True),
    }


def measure(rank: int, port: int, args: argparse.Namespace) -> None:
    """One rank; rank 0 prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    process = start_process(args.device, 300.0, Launch(rank, args.ranks, rank, args.ranks, "torchrun"))
    mesh = build_mesh(ParallelConfig(), process.world)
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = Model(args.width, args.blocks, args.vocab).to(process.device, dtype)
    every = contenders(model, mesh, dtype)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
    torch.manual_seed(rank)
    for turn in range(args.turns + 1):
        for name, contender in every.items():
            batches = torch.randint(0, args.vocab, (args.steps, 2, args.tokens), device=process.device)
            if args.ranks > 1:
                dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            for tokens, targets in batches:
                contender.step(tokens, targets)
            contender.finish()
            if process.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
                seconds[name].append((wall / args.steps, cpu / args.steps))
    if rank == 0:
        report(seconds, sum(p.numel() for p in model.parameters()), args)
    dist.destroy_process_group()
    exit_process(0)  # gloo's threads abort an ordinary exit now and then


def report(seconds: dict[str, list[tuple[float, float]]], num_parameters: int, args: argparse.Namespace) -> None:
    """Median and fastest turn, and the CPU time of rank 0 with all its threads, which other programs disturb least."""
    print(f"{num_parameters / 1e6:.2f} M parameters, {args.dtype}, {args.ranks} ranks, {args.tokens} tokens per rank")
    heads = [f"{head:>9} {'/ DDP':>6} {'/ FSDP2':>8}" for head in ("median", "fastest", "cpu", "least cpu")]
    print(f"{'ms per step':28}" + "  ".join(heads))
    numbers = {}
    for name, turns in seconds.items():
        wall, cpu = zip(*turns, strict=True)
        numbers[name] = (statistics.median(wall), min(wall), statistics.median(cpu), min(cpu))
    for name, values in numbers.items():
        columns = [
            f"{1e3 * value:9.1f} {value / to_ddp:6.2f} {value / to_fsdp:8.2f}"
            for value, to_ddp, to_fsdp in zip(values, numbers["DDP + AdamW"], numbers["FSDP2 + AdamW"], strict=True)
        ]
        print(f"{name:28}" + "  ".join(columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64, help="per rank and step")
    parser.add_argument("--steps", type=int, default=5, help="per turn")
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = int(sock.getsockname()[1])
    mp.spawn(measure, args=(port, args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
