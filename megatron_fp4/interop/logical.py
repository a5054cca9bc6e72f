"""Logical tensors in and out of a model in memory, by name; checked, because they come from files of other people."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.models.foreign.families import expect_tensor


def read_logical(model: nn.Module) -> dict[str, Tensor]:
    """The logical tensors of a model, views of its parameters.

    Raises ValueError if this process holds only a part of one, as under tensor parallelism.
    """
    logical: dict[str, Tensor] = {}
    for parameter in logical_parameters(model):
        for rows, where in parameter.placement.pieces():
            if where.shape != where.global_shape:
                raise ValueError(f"this process holds {where}, a part of the tensor")
            logical[where.name] = parameter.detach()[rows]
    return logical


@torch.no_grad()
def write_logical(model: nn.Module, logical: Mapping[str, Tensor]) -> None:
    """Fill a model, or the part of it on this rank, from whole logical tensors.

    Raises ValueError for a missing tensor or a wrong shape.
    """
    for parameter in logical_parameters(model):
        for rows, where in parameter.placement.pieces():
            parameter[rows].copy_(expect_tensor(logical, where.name, where.global_shape)[where.slices])
