"""How a parameter is made: its place in the logical tensor, and how it is filled.

A parameter's initial value is a function of (seed, logical name, global index), so that every parallel layout
starts from the same model. Parameters are made empty; `initialize_parameters` fills all of a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_fp4.comm.parameter import Initializer, LogicalParameter, logical_parameters
from megatron_fp4.comm.rect import Placement, Rectangle
from megatron_fp4.numerics.random import key_of, normal, uniform

BLOCK = 2**24
"""Elements that are drawn at once: a normal one needs 28 bytes while it is drawn, in FP64."""


def make_parameter(
    shape: tuple[int, ...], placement: Placement, initializer: Initializer, dtype: torch.dtype, device: torch.device
) -> LogicalParameter:
    """A parameter of the local `shape`, not filled yet."""
    assert placement.num_rows == shape[0], f"{placement.rectangles} do not cover {shape}"
    return LogicalParameter(torch.empty(shape, dtype=dtype, device=device), placement, initializer)


def replicated_vector(name: str, size: int) -> Placement:
    """Placement of a 1-D parameter that every rank holds whole."""
    return Placement((Rectangle.whole(name, (size,)),), tp_replicated=True, decay=False)


def sharded_vector(name: str, size: int, first: int, stop: int) -> Placement:
    """Placement of elements `[first, stop)` of a 1-D logical parameter."""
    return Placement((Rectangle(name, (size,), (first,), (stop - first,)),), decay=False)


def _addresses(where: Rectangle, device: torch.device) -> tuple[Tensor, Tensor]:
    """Global (row, column) indices; the dims after the first count as one column index."""
    first = where.offset[1] if len(where.offset) > 1 else 0
    return where.index(0, device), torch.arange(first, first + math.prod(where.shape[1:]), device=device)


def normal_init(std: float) -> Initializer:
    """Normal with the given standard deviation."""

    def fill(seed: int, where: Rectangle, device: torch.device) -> Tensor:
        return normal(key_of(seed, "init", where.name), *_addresses(where, device)).view(where.shape) * std

    return fill


def uniform_init(low: float, high: float) -> Initializer:
    """Uniform in [low, high)."""

    def fill(seed: int, where: Rectangle, device: torch.device) -> Tensor:
        draw = uniform(key_of(seed, "init", where.name), *_addresses(where, device)).view(where.shape)
        return low + (high - low) * draw

    return fill


def constant_init(value: float) -> Initializer:
    """The same value everywhere (norm weights 1, biases 0)."""

    def fill(seed: int, where: Rectangle, device: torch.device) -> Tensor:
        return torch.full(where.shape, value, dtype=torch.float32, device=device)

    return fill


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model`; the values depend neither on the parallel layout nor on the blocks."""
    for parameter in logical_parameters(model):
        assert parameter.initializer is not None, f"{parameter.placement.rectangles}: nothing says how it is filled"
        for rows, where in parameter.placement.pieces():
            for start, block in _row_blocks(where):
                first = rows.start + start
                values = parameter.initializer(seed, block, parameter.device)
                parameter[first : first + block.shape[0]] = values.to(parameter.dtype)


def _row_blocks(where: Rectangle) -> Iterator[tuple[int, Rectangle]]:
    """Blocks of consecutive rows of at most `BLOCK` elements, or one row, each with its first row in `where`."""
    num_rows = max(1, BLOCK // math.prod(where.shape[1:]))
    for start in range(0, where.shape[0], num_rows):
        shape = (min(num_rows, where.shape[0] - start), *where.shape[1:])
        yield start, replace(where, offset=(where.offset[0] + start, *where.offset[1:]), shape=shape)
