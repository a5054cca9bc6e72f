"""The global gradient norm, each logical element counted once, and the factor that clips it.

Squared sums in FP64, one per parameter, added over all ranks of the job by one collective; the square root is
rounded to FP32. FP64 sums of FP32 squares agree to about 1e-15 in any order, so the rounded norm is the same at every
layout. A replica (tensor-parallel copies, the second copy of a tied embedding) is left out on all ranks but one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import Group

CHUNK = 2**15  # elements whose FP64 copy stays in a core's cache


def global_norm(counted: Sequence[Tensor], world: Group, device: torch.device) -> float:
    """Euclidean norm of the FP32 tensors of all ranks together. NaN or infinity anywhere makes it NaN or infinite.

    counted: the parts of gradients that this rank owns and no other rank counts; may be empty. Reads the sum back.
    """
    return norm_of(float(all_reduce_sum(sum_of_squares(counted, device).view(1), world)))


def norm_of(squared: float) -> float:
    """The norm, rounded to FP32, whose square over all ranks is `squared`; NaN and infinity stay what they are."""
    return float(torch.tensor(math.sqrt(squared), dtype=torch.float32))


def norm_over(square: Tensor, world: Group, *, flag: bool) -> tuple[float, bool]:
    """The norm whose square is the sum of the FP64 scalars `square` of all ranks; whether any has raised its flag."""
    parts = torch.stack([square, torch.full_like(square, float(flag))])
    squared, raised = all_reduce_sum(parts, world).tolist()
    return norm_of(squared), bool(raised)


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """FP64 scalar on `device`, of this rank's FP32 tensors; may be of none."""
    # On CPUs torch's norm with another dtype takes three times as long as these chunks of FP64 copies.
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        chunks = (chunk.double() for tensor in tensors for chunk in tensor.view(-1).split(CHUNK))
        return torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum()
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64)).square().sum()


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply the gradients by; 1 if `max_norm` is 0 (off) or not exceeded. As torch's clip_grad_norm_."""
    if max_norm < 0:
        raise ValueError(f"max_norm = {max_norm}, must not be negative (0 turns clipping off)")
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
