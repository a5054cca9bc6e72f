"""How long quantizing a tensor takes, as a multiple of copying it. `python -m benchmarks.quantize --help`.

Rows: this project's passes, compiled and eager, and with --peers the quantizers of other projects (`peers.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import peers
from benchmarks.timing import CLOCKS, paired_seconds, print_table
from megatron_fp4.comm.host_memory import keep_freed_memory
from megatron_fp4.numerics import formats, key_of, quantize_nvfp4
from megatron_fp4.numerics.fused import Passes
from megatron_fp4.numerics.hadamard import fixed_signs
from megatron_fp4.numerics.stages import Noise


def ours(passes: Passes, x: Tensor, *, along: int = 1, rht: bool = False, noise: bool = False) -> Tensor:
    """amax pass, scales, and the operand: everything that the emulated backend does to one copy."""
    if rht:
        x = passes.hadamard(x, 16, fixed_signs(16, x.device), along)
    tile = (1, 16) if along == 1 else (16, 1)
    maxima = passes.block_maxima(x, tile)
    scales = passes.two_level_scales(maxima, passes.amax(maxima))
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape)
    return passes.rounded(x, scales, tile=tile, noise=Noise.at(key_of("benchmark"), rows, cols) if noise else None)


def decoded(codes: Tensor) -> Tensor:
    """The E2M1 values of packed codes (-0 equals +0 then)."""
    return formats.decode_e2m1(formats.unpack(codes.view(torch.uint8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine, with --threads 1"
    )
    parser.add_argument("--peers", action="store_true", help="also time other projects (slow)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a training run does
    x = torch.randn(args.rows, args.cols, device=args.device).bfloat16()
    target = torch.empty_like(x)
    compiled, eager = Passes(compile=True), Passes(compile=False)
    candidates: dict[str, Callable[[], object]] = {
        "copy into an existing tensor": lambda: target.copy_(x),
        "copy into a new tensor": x.clone,
        "1x16 nearest": lambda: ours(compiled, x),
        "1x16 stochastic": lambda: ours(compiled, x, noise=True),
        "16x1 (column copy) nearest": lambda: ours(compiled, x, along=0),
        "16x1 RHT nearest (Wgrad of x)": lambda: ours(compiled, x, along=0, rht=True),
        "16x1 RHT stochastic (Wgrad of dy)": lambda: ours(compiled, x, along=0, rht=True, noise=True),
        "1x16 nearest, eager": lambda: ours(eager, x),
        "1x16 codes and scales, spelled out": lambda: quantize_nvfp4(x),
    }
    if args.peers:
        quantizers = peers(x)
        ours_decoded = decoded(quantize_nvfp4(x).codes)
        for name, quantize in quantizers.items():
            share = (decoded(quantize()) != ours_decoded).double().mean().item()
            print(f"{name}: {share:.4%} of the codes are not ours")
        candidates |= quantizers
    seconds = paired_seconds(candidates, args.rounds, CLOCKS[args.clock])
    title = f"quantize {args.rows}x{args.cols} bf16 with amax pass, {args.threads} threads, {args.clock} time"
    print_table(title, seconds, next(iter(candidates)))


if __name__ == "__main__":
    main()
