"""One forward and backward pass of a linear through `quantized_linear` itself, against the same products in FP32.

The bounds are loose: they tell a broken kernel from rounding, not a good recipe from a bad one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.linear_op import quantized_linear
from megatron_fp4.precision.selftest.linear_case import LinearCase
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.weight_cache import WeightCache

MAX_ERROR = 0.6
"""Relative error of a quantized product of Gaussian tensors (NVFP4 with stochastic rounding: about 0.2)."""


def gemm_objections(case: LinearCase, backend: Backend, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the three GEMMs, one line each; empty if nothing is. A refusal is an exception.

    tensors: x, w and dy, in the compute dtype.
    """
    device = tensors["x"].device
    x, w = tensors["x"].detach().requires_grad_(), LogicalParameter.whole("weight", tensors["w"])
    w.main_grad = dw = torch.zeros(case.shape, device=device)
    alone = Group.single()
    n_index, k_index = (torch.arange(size, device=device) for size in case.shape)
    y = quantized_linear(
        x,
        w,
        rows=torch.arange(case.tokens, device=device),
        sharding=Sharding(case.name, alone, alone, alone, n_index, k_index),
        precision=case.precision,
        backend=backend,
        clock=StepClock(seed=1),
        cache=WeightCache(),
    )
    y.backward(tensors["dy"])
    assert x.grad is not None
    exact = {name: tensor.detach().float() for name, tensor in tensors.items()}
    results = {
        "fprop (y)": (y.detach(), exact["x"] @ exact["w"].T),
        "dgrad (gradient of x)": (x.grad, exact["dy"] @ exact["w"]),
        "wgrad (gradient of the weight)": (dw, exact["dy"].T @ exact["x"]),
    }
    return [f"{name} {text}" for name, pair in results.items() if (text := _objection(*pair))]


def _objection(result: Tensor, exact: Tensor) -> str:
    result = result.float()
    if not bool(torch.isfinite(result).all()):
        return f"has {int((~torch.isfinite(result)).sum())} of {result.numel()} elements that are NaN or Inf"
    if not bool(result.any()):
        return "is all zero"
    error = ((result - exact).norm() / exact.norm()).item()
    return f"has a relative error of {error:.2f}, above {MAX_ERROR}" if error > MAX_ERROR else ""
