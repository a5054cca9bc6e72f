"""One forward and backward pass of every distinct local linear of a run, for `preflight`.

A kernel goes wrong per local shape and precision, not per layer. So every distinct pair of the run, with the shapes
that a rank will really have, is computed once through `quantized_linear` itself and compared with the same products in
FP32. The bounds are loose: they tell a broken kernel from rounding, not a good recipe from a bad one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.linear_op import quantized_linear
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.weight_cache import WeightCache
from megatron_fp4.proofs.checks import CheckResult
from megatron_fp4.proofs.operands import cross_check
from megatron_fp4.proofs.shards import LocalLinear

MAX_ERROR = 0.6
"""Relative error of a quantized product of Gaussian tensors (NVFP4 with stochastic rounding: about 0.2)."""


def check_gemms(
    linears: Sequence[LocalLinear], backend: Backend, device: torch.device, dtype: torch.dtype
) -> list[CheckResult]:
    """The three GEMMs of every linear; with Transformer Engine the operands also code by code.

    One result if all is well, otherwise one per objection.
    """
    wrong: list[str] = []
    for linear in linears:
        try:
            wrong += gemm_objections(linear, backend, device, dtype)
            if isinstance(backend, TransformerEngineBackend):
                findings = cross_check(linear, backend, device)
                wrong += [f"{linear}: {finding}" for finding in findings if finding.wrong]
        except Exception as error:  # a kernel may fail in any way; the point is to say for which linear
            wrong.append(f"{linear}: {type(error).__name__}: {error}")
    if wrong:
        return [CheckResult("gemms", False, text) for text in wrong]
    compared = "compared with FP32 products" + (
        " and code by code with the emulation" if isinstance(backend, TransformerEngineBackend) else ""
    )
    kinds = f"{len(linears)} distinct local shapes and precisions"
    return [CheckResult("gemms", True, f"{kinds}: forward and backward finite, not zero, {compared} ({device.type})")]


def gemm_objections(linear: LocalLinear, backend: Backend, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What is wrong with the three GEMMs, one line each; empty if nothing is. A refusal is an exception."""
    tensors = linear.gaussian_tensors(device, dtype)
    x, w = tensors["x"].requires_grad_(), LogicalParameter.whole("weight", tensors["w"])
    w.main_grad = dw = torch.zeros(linear.shape, device=device)
    alone = Group.single()
    n_index, k_index = (torch.arange(size, device=device) for size in linear.shape)
    y = quantized_linear(
        x,
        w,
        rows=torch.arange(linear.tokens, device=device),
        sharding=Sharding(linear.names[0], alone, alone, alone, n_index, k_index),
        precision=linear.precision,
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
    return [f"{linear}: {name} {text}" for name, pair in results.items() if (text := _objection(*pair))]


def _objection(result: Tensor, exact: Tensor) -> str:
    result = result.float()
    if not bool(torch.isfinite(result).all()):
        return f"has {int((~torch.isfinite(result)).sum())} of {result.numel()} elements that are NaN or Inf"
    if not bool(result.any()):
        return "is all zero"
    error = ((result - exact).norm() / exact.norm()).item()
    return f"has a relative error of {error:.2f}, above {MAX_ERROR}" if error > MAX_ERROR else ""
