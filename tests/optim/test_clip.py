"""The norm and the clipping factor on one rank; across layouts: test_zero1_layouts.py."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.optim.clip import clip_factor, global_norm, sum_of_squares

CPU = torch.device("cpu")


def test_norm_of_several_tensors_is_accumulated_in_fp64() -> None:
    tensors = [torch.full((1000,), 1e-4), torch.full((3,), 1e4), torch.full((1_000_000,), 1e-3)]
    exact = math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
    assert global_norm(tensors, Group.single(), CPU) == pytest.approx(exact, rel=1e-7), "small parts are lost"
    assert global_norm([], Group.single(), CPU) == 0.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_forms_of_the_sum_are_in_fp64(device: str) -> None:
    """9 + 16 + 144, and a million times 2^-60 beside 1, which FP32 loses. The CUDA form takes CPU tensors too."""
    total = sum_of_squares([torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])], torch.device(device))
    assert (total.item(), total.dtype) == (pytest.approx(169.0, rel=1e-15), torch.float64)
    small = [torch.ones(1), torch.full((10**6,), 2.0**-30)]
    assert sum_of_squares(small, torch.device(device)).item() - 1 == pytest.approx(10**6 * 2.0**-60, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_is_seen(bad: float) -> None:
    assert not math.isfinite(global_norm([torch.ones(5), torch.tensor([1.0, bad])], Group.single(), CPU))


def test_large_finite_gradients_do_not_overflow() -> None:
    assert global_norm([torch.full((4,), 1e25)], Group.single(), CPU) == pytest.approx(2e25, rel=1e-6)


def test_factor_is_that_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    norm = float(torch.nn.utils.clip_grad_norm_([weight], 1.5))
    assert torch.equal(weight.grad, torch.full((4,), 3.0) * clip_factor(norm, 1.5))
    assert clip_factor(0.5, 1.0) == 1.0, "small gradients are enlarged"
    assert clip_factor(1e9, 0.0) == 1.0, "max_norm 0 is off"
    with pytest.raises(ValueError, match="max_norm = -1"):
        clip_factor(1.0, -1.0)
