"""The parameters of Mamba-2 that are no linear's: this rank's share of each, and what they begin with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_fp4.comm.parameter import Initializer, LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle, split_evenly
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.parameter import make_parameter, sharded_vector, uniform_init
from megatron_fp4.numerics.random import key_of, uniform

DT_MIN = 1e-3
DT_MAX = 0.1
DT_FLOOR = 1e-4
"""Range of the initial step sizes softplus(dt_bias), log-uniform (the defaults of Mamba-2)."""
A_MIN = 1.0
A_MAX = 16.0
"""Range of the initial decay rates exp(A_log), uniform, as in Mamba-2 and in Megatron-LM's mamba_mixer.py."""


def conv_parameter(
    name: str, kind: str, parts: dict[str, int], num_taps: int, context: LayerContext
) -> LogicalParameter:
    """This rank's rows of x, B and C, each a logical tensor `<name>.conv.<part>.<kind>`: `[rows, taps]` or `[rows]`."""
    columns = (num_taps,) if kind == "weight" else ()
    rectangles: list[Rectangle] = []
    num_rows = 0
    for part, size in parts.items():
        rows = split_evenly(size, context.tp, what=f"{name}.conv.{part}")
        offset = (context.tp.rank * rows, *(0 for _ in columns))
        rectangles.append(Rectangle(f"{name}.conv.{part}.{kind}", (size, *columns), offset, (rows, *columns)))
        num_rows += rows
    bound = 1.0 / math.sqrt(num_taps)  # torch's default for a depthwise conv1d, weight and bias alike
    placement = Placement(tuple(rectangles), decay=kind == "weight")
    return make_parameter((num_rows, *columns), placement, uniform_init(-bound, bound), context.dtype, context.device)


def vector_share(
    name: str, initializer: Initializer, size: int, context: LayerContext, dtype: torch.dtype
) -> LogicalParameter:
    """This rank's even share of a 1-D parameter."""
    local = split_evenly(size, context.tp, what=name)
    placement = sharded_vector(name, size, context.tp.rank * local, (context.tp.rank + 1) * local)
    return make_parameter((local,), placement, initializer, dtype, context.device)


def a_log_init(seed: int, where: Rectangle, device: torch.device) -> Tensor:
    """Logarithm of a decay rate drawn uniformly."""
    return (A_MIN + (A_MAX - A_MIN) * _draw_per_head(seed, where, device)).log()


def dt_bias_init(seed: int, where: Rectangle, device: torch.device) -> Tensor:
    """Inverse softplus of a step size drawn log-uniformly."""
    draw = _draw_per_head(seed, where, device)
    step = (math.log(DT_MIN) + draw * (math.log(DT_MAX) - math.log(DT_MIN))).exp().clamp(min=DT_FLOOR)
    return step + torch.log(-torch.expm1(-step))


def _draw_per_head(seed: int, where: Rectangle, device: torch.device) -> Tensor:
    """Uniform in [0, 1), by the head's number in the whole layer."""
    heads = where.index(0, device)
    return uniform(key_of(seed, "init", where.name), heads, torch.zeros_like(heads[:1]))[:, 0]
