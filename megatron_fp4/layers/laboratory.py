"""One line to try a layer, in one process, as a run would make it.

>>> import torch
>>> from megatron_fp4 import layers
>>> from megatron_fp4.precision import nvfp4_paper
>>> context = layers.lab(seed=0)
>>> up = layers.ColumnParallelLinear("blocks.0.mlp.up", 64, {"": 128}, context, std=0.02)
>>> layers.initialize_parameters(up, seed=0)
>>> _ = torch.manual_seed(0)
>>> x_TD, tokens = torch.randn(32, 64), layers.Tokens.of_one_document(32)
>>> exact = up(x_TD, tokens)
>>> up.precision = nvfp4_paper()
>>> up  # doctest: +ELLIPSIS
ColumnParallelLinear(blocks.0.mlp.up, 64 -> 128, fprop x nvfp4, w nvfp4 16x16 | dgrad ...)
>>> error = (up(x_TD, tokens) - exact).norm() / exact.norm()
>>> f"{error:.1f}"
'0.1'

A file of its own, because it knows every backend, which layers do not.
"""

from __future__ import annotations

import torch

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.config import BackendName, PrecisionConfig


def lab(
    seed: int = 0,
    backend: str = "emulated",
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
) -> LayerContext:
    """A context of one process for trying layers.

    seed: key of dropout and rounding noise. backend: a name that `precision.backend` takes; it is not compiled.
    dtype: the compute dtype, of weights and activations. Raises ValueError for an unknown backend, or one that this
    machine lacks.
    """
    config = PrecisionConfig(backend=BackendName(backend), compile=False)
    return LayerContext.of(
        ParallelMesh.single_process(), make_backend(config), StepClock(seed), dtype, torch.device(device)
    )
