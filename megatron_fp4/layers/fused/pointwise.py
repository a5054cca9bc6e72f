"""Chains of pointwise operations as one kernel each, compiled by torch: activations, rotary embedding, convolution.

An operation at a time reads and writes the whole tensor; on a GPU, beside GEMMs in FP4, that is what an MLP waits for.
What is compiled has no sum across ranks and none along a dimension that a layout cuts, so that an element's value does
not depend on the layout; norms, whose sums a compiler orders by the shapes that it sees first, stay as they are.

On CPUs torch computes, unless it is told otherwise: the numbers there are the same as ever.
"""

from __future__ import annotations

import importlib.util
from enum import Enum
from functools import cache

import torch

from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.numerics.compiled import StageRunner
from megatron_fp4.precision.backends.emulated import compile_obstacle


class PointwiseImpl(Enum):
    """Who computes chains of pointwise operations."""

    auto = "auto"  # compiled on GPUs, except in the proof mode; torch on CPUs
    torch = "torch"  # an operation at a time
    compiled = "compiled"  # one kernel a chain, by torch.compile


def pointwise_runner(impl: PointwiseImpl, context: LayerContext) -> StageRunner:
    """What calls such a chain on the device and in the type of `context`."""
    on_gpu = context.device.type == "cuda" and context.dtype is torch.bfloat16
    return _runner(impl is PointwiseImpl.compiled or (impl is PointwiseImpl.auto and on_gpu))


def check_pointwise(impl: PointwiseImpl, device: torch.device) -> None:
    """Raises ValueError with the remedy if nothing can be compiled for `device` on this machine."""
    reason = ""
    if device.type == "cuda" and impl is not PointwiseImpl.torch and importlib.util.find_spec("triton") is None:
        reason = "the package triton, with which torch compiles for GPUs, is not installed"
    if device.type == "cpu" and impl is PointwiseImpl.compiled:
        reason = compile_obstacle()
    if reason:
        raise ValueError(f"model.pointwise_impl={impl.name}, but {reason}; set model.pointwise_impl=torch")


@cache
def _runner(compiled: bool) -> StageRunner:
    """One for all layers, which share its kernels."""
    return StageRunner(compiled)
