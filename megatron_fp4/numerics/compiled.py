"""Running a stage: eagerly, or compiled by torch once, at its first use. Results are equal, bit for bit.

Compiled kernels are made for symbolic sizes, so that a model with many shapes compiles about a dozen of them; they are
cached on disk by inductor, and ranks that compile at once are kept apart by its file locks.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megatron_fp4.numerics import eden, four_over_six, stages

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

EAGER_ON_CUDA = (
    stages.nvfp4_scales,
    stages.power_scales,
    four_over_six.candidates,
    four_over_six.errors,
    eden.correction,
    eden.round_scale,
)
"""Triton divides approximately and contracts multiply-adds. These stages divide, and are small (per block)."""


_LIMIT: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}
"""torch 2.11, which benchmarks/gpu.sh bears, has no such argument; there the limit is 8 for each kernel."""


class StageRunner:
    """Calls a stage with arguments by name. Those that are no tensors select the kernel; they are constants in it."""

    def __init__(self, compile: bool) -> None:
        self.compiles = compile
        self._kernels: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, stage: Callable[Arguments, Result], *args: Arguments.args, **arguments: Arguments.kwargs
    ) -> Result:
        """`stage(**arguments)`."""
        assert not args, "arguments are given by name"
        tensors: dict[str, Tensor] = {}
        key: list[Any] = [stage]  # one pass over the arguments: small tensors feel every microsecond of a call
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                tensors[name] = value
                key += (name, value.dim(), value.dtype, value.device.type)
            else:
                key += (name, value)
        if not self.compiles or (stage in EAGER_ON_CUDA and any(tensor.is_cuda for tensor in tensors.values())):
            return stage(*args, **arguments)
        kernel = self._kernels.get(tuple(key))
        if kernel is None:
            constants = {name: value for name, value in arguments.items() if name not in tensors}
            kernel = self._kernels[tuple(key)] = _compiled(stage, constants)
        result: Result = kernel(**tensors)
        return result


def _compiled(stage: Callable[..., Any], constants: dict[str, Any]) -> Callable[..., Any]:
    """`stage` as a compiled function of its tensors."""

    def kernel(**tensors: Tensor) -> Any:
        return stage(**tensors, **constants)

    # Dynamo counts recompilations per code object, and all kernels would share that of `kernel`.
    kernel.__code__ = kernel.__code__.replace(co_name=stage.__name__)
    compiled: Callable[..., Any] = torch.compile(kernel, dynamic=True, fullgraph=True, **_LIMIT)
    return compiled
