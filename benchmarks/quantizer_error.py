"""What each quantizer loses of a tensor, and what of that stays: `python -m benchmarks.quantizer_error --help`.

MSE: of one draw, as a part of the tensor's energy. Bias: the error of the mean of many draws over that of one, less the
1 / draws that unbiased noise leaves; nearest rounding has 1. Behind a transform the draws are those of its signs, too.
Time: CPU of the passes over a tensor, eager, as a multiple of nearest rounding.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import key_of, normal, uniform
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.precision import AmaxScope, EmulatedBackend, Format, FourOverSix, Operand, Rounding, Signs
from megatron_fp4.precision.backends import Copy, OperandOrigin
from megatron_fp4.precision.backends.centred import CentredBackend, CentredOperand, mean_of_tokens
from megatron_fp4.precision.backends.randomness import signs_for, with_signs

FP4 = Operand(Format.nvfp4)
EDEN = replace(FP4, rounding=Rounding.ms_eden, rht_size=128, rht_signs=Signs.per_index)
QUANTIZERS = {
    "nearest, 1x16": FP4,
    "nearest, 16x16": replace(FP4, tile=(16, 16)),
    "nearest, 1x16, four over six": replace(FP4, four_over_six=FourOverSix.mse),
    "nearest, 16x16, four over six": replace(FP4, tile=(16, 16), four_over_six=FourOverSix.mse),
    "nearest, center": replace(FP4, center=True),
    "nearest, scales of 128": replace(FP4, amax_scope=AmaxScope.group128),
    "sr (Transformer Engine)": replace(FP4, rounding=Rounding.sr),
    "sr, four over six": replace(FP4, rounding=Rounding.sr, four_over_six=FourOverSix.mse),
    "sr_headroom": replace(FP4, rounding=Rounding.sr_headroom),
    "ms_eden": EDEN,
    "ms_eden, four over six": replace(EDEN, four_over_six=FourOverSix.mse),
    "ms_eden, scales of 128": replace(EDEN, amax_scope=AmaxScope.group128),
}


def tensors(rows: int, cols: int) -> dict[str, Tensor]:
    r, c = torch.arange(rows), torch.arange(cols)
    gaussian = normal(key_of("gaussian"), r, c)
    half = uniform(key_of("laplace"), r, c).double() - 0.5 + 2.0**-25
    return {
        "gaussian": gaussian,
        "laplace": (-half.sign() * torch.log1p(-2 * half.abs())).float(),
        "outliers": gaussian * torch.where(c % 61 == 3, 30.0, 1.0),
        "mean": gaussian + 3.0 * normal(key_of("mean"), r[:1], c),
    }


def decoded(x: Tensor, operand: Operand, step: int) -> tuple[Tensor, float]:
    """What an operand stands for, FP64, its transform undone; and the seconds of CPU that it took."""
    emulated = EmulatedBackend()
    rows, cols = (torch.arange(size) for size in x.shape)
    origin = OperandOrigin("benchmark", "x", rows, cols, Group.single(), seed=1, step=step)
    copy = Copy("fprop", operand, 1)
    start = time.process_time()
    (quantized,) = CentredBackend(emulated).quantize(x, origin, [copy])
    seconds = time.process_time() - start
    values, scale = emulated.values(quantized.opened() if isinstance(quantized, CentredOperand) else quantized)
    values = values.double() if scale is None else values.double() * scale.amax.double() / scale.divisor
    if operand.center:
        values = values + mean_of_tokens(x, origin).double()
    if operand.rht_size:
        values, signs = hadamard(values, operand.rht_size, None, 1), signs_for(origin, operand, x.device)
        values = values if signs is None else (values.unflatten(1, (-1, operand.rht_size)) * signs).flatten(1)
        values = with_signs(values, origin, copy)
    return values, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cols", type=int, default=512)
    parser.add_argument("--draws", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = list(tensors(1, 16))
    print(f"{'':32}" + "".join(f"{name:>20}" for name in names) + f"{'time':>8}")
    print(f"{'':32}" + f"{'MSE':>12}{'bias':>8}" * len(names))
    nearest = 0.0
    for label, operand in QUANTIZERS.items():
        cells, seconds = "", []
        for x in tensors(args.rows, args.cols).values():
            draws = args.draws if operand.random else 1
            results = [decoded(x, operand, step) for step in range(draws)]
            seconds += [took for _, took in results]
            errors = torch.stack([values for values, _ in results]) - x.double()
            one = errors.square().sum((1, 2)).mean()
            left = errors.mean(0).square().sum() / one
            bias = max(0.0, (left.item() * draws - 1) / (draws - 1)) if draws > 1 else 1.0
            cells += f"{(one / x.double().square().sum()).item():12.5f}{bias:8.3f}"
        nearest = nearest or min(seconds)
        print(f"{label:32}{cells}{min(seconds) / nearest:8.1f}")


if __name__ == "__main__":
    main()
