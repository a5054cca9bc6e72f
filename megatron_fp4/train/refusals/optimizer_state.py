"""Formats of optimizer state that the optimizer's implementation or the layout cannot have, each with the numbers.

Not here: formats that change nothing (effect.py).
"""

from __future__ import annotations

from megatron_fp4.models.count import model_parameters
from megatron_fp4.optim.config import Impl
from megatron_fp4.optim.kept.choice import check_whole_blocks, moment_formats
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat
from megatron_fp4.train.config import RunConfig


def check_optimizer_state(config: RunConfig) -> None:
    """Raises ValueError for state that is not FP32 with another implementation than torch's, and for cut blocks."""
    optim = config.optim
    compact = {"optim.master": optim.master.name} if optim.master is not MasterFormat.fp32 else {}
    adamws = {"optim.moments.first": optim.moments.first, "optim.moments.second": optim.moments.second}
    compact |= {key: format.name for key, format in adamws.items() if format is not MomentFormat.fp32}
    if optim.impl is not Impl.torch and compact:
        key, value = next(iter(compact.items()))
        raise ValueError(
            f"{key}={value} with optim.impl={optim.impl.name}, whose kernel updates FP32 masters and moments in place;"
            f" set optim.impl=torch, or {key}=fp32"
        )
    for parameter in model_parameters(config.model):
        formats = moment_formats(parameter.name, parameter.shape, optim).values()
        if parameter.sharded == 1 and any(format.in_blocks for format in formats):
            check_whole_blocks(parameter.name, parameter.shape[1], config.parallel.tp)
