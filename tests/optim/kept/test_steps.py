"""No step is far larger than with FP32 moments where one element of a block is far larger than the others."""

from __future__ import annotations

import pytest
import torch

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim import OptimConfig, Zero1Optimizer
from megatron_fp4.optim.kept.config import MomentFormat, MomentsConfig

FP32, INT8, FP8 = MomentFormat.fp32, MomentFormat.int8, MomentFormat.fp8
LARGE = 1000.0
"""How much larger the gradients of the first column are."""


def largest_step(moments: MomentsConfig) -> float:
    """In learning rates, of the small elements, after the first steps."""
    weight = LogicalParameter.whole("w", torch.zeros(64, 64))
    config = OptimConfig(moments=moments, weight_decay=0.0)
    optimizer = Zero1Optimizer([("w", weight)], config, ParallelMesh.single_process(), True)
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for step in range(40):
        optimizer.zero_grad()
        assert weight.main_grad is not None
        weight.main_grad.normal_(generator=generator)[:, 0] *= LARGE
        before = weight.detach().clone()
        optimizer.step(optimizer.finish_grads(), lr=1.0, max_norm=0.0)
        if step >= 20:
            largest = max(largest, float((weight.detach() - before)[:, 1:].abs().max()))
    return largest


@pytest.mark.parametrize("moments", [MomentsConfig(), MomentsConfig(FP8, FP8), MomentsConfig(INT8, INT8)])
def test_what_is_accepted_makes_no_large_step(moments: MomentsConfig) -> None:
    assert largest_step(moments) < 3


@pytest.mark.parametrize("second", [FP8, FP32])
def test_an_int8_first_moment_beside_a_finer_second_one_does(second: MomentFormat) -> None:
    """So it is refused (train/refusals/optimizer_state.py)."""
    assert largest_step(MomentsConfig(INT8, second)) > 6
