"""Where a local tensor lies inside a logical tensor.

Every shard is a rectangle of a logical tensor, and `Rectangle` is the only description of where. A parameter says it
once, when it is made; initialisation, the optimizer and the checkpoint read it and need no knowledge of tensor or
pipeline parallelism. A fused weight (q|k|v, gate|up, z|x|B|C|dt) is a few rectangles, one below the other.

    logical  q.weight [8, 3]                      local  qkv [4, 3] of tensor-parallel rank 1 of 4
             k.weight [4, 3]                             rows 0:2 = Rectangle("q.weight", (8, 3), (2, 0), (2, 3))
             v.weight [4, 3]                             row  2   = Rectangle("k.weight", (4, 3), (1, 0), (1, 3))
                                                         row  3   = Rectangle("v.weight", (4, 3), (1, 0), (1, 3))

Not here: moving data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group


@dataclass(frozen=True)
class Rectangle:
    """The elements from `offset` on, `shape` many in each dim, of the logical tensor `name` of shape `global_shape`.

    It may be empty. Raises ValueError if it is not inside.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        fits = len(self.global_shape) == len(self.offset) == len(self.shape)
        if not fits or any(
            low < 0 or size < 0 or low + size > whole
            for low, size, whole in zip(self.offset, self.shape, self.global_shape, strict=True)
        ):
            raise ValueError(
                f"{self.name}: a rectangle of shape {self.shape} at {self.offset} is not inside the logical shape"
                f" {self.global_shape}"
            )

    @staticmethod
    def whole(name: str, shape: tuple[int, ...]) -> Rectangle:
        """All of a logical tensor."""
        return Rectangle(name, shape, (0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Its place in the logical tensor, as an index: `logical[where.slices]`."""
        return tuple(slice(low, low + size) for low, size in zip(self.offset, self.shape, strict=True))

    def rows(self, start: int, stop: int) -> Rectangle:
        """Rows `[start, stop)`, counted from its first one."""
        offset = (self.offset[0] + start, *self.offset[1:])
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def elements(self, start: int, stop: int) -> Iterator[Rectangle]:
        """Its row-major elements `[start, stop)` as rectangles, in order.

        At most three of a matrix: the end of a row, whole rows, the beginning of a row.
        """
        width = math.prod(self.shape[1:])
        first = min(-(-start // width) * width, stop)
        last = max(stop // width * width, first)
        yield from self._inside_row(start, first)
        if first < last:
            yield self.rows(first // width, last // width)
        yield from self._inside_row(last, stop)

    def _inside_row(self, start: int, stop: int) -> Iterator[Rectangle]:
        if start < stop:
            row, first = divmod(start, math.prod(self.shape[1:]))
            inside = Rectangle(self.name, self.global_shape[1:], self.offset[1:], self.shape[1:])
            for where in inside.elements(first, first + stop - start):
                yield replace(self, offset=(self.offset[0] + row, *where.offset), shape=(1, *where.shape))

    def index(self, dim: int, device: torch.device | str = "cpu") -> Tensor:
        """Position in the logical tensor along `dim`; int64 `[shape[dim]]`."""
        return torch.arange(self.offset[dim], self.offset[dim] + self.shape[dim], device=device)


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank holds of one rectangle: tensors of its shape by kind ("master", "exp_avg", ...).

    writes: False on a replica, whose owner saves it. Raises ValueError for a tensor of another shape.
    """

    where: Rectangle
    tensors: dict[str, Tensor]
    writes: bool = True

    def __post_init__(self) -> None:
        for kind, tensor in self.tensors.items():
            if tuple(tensor.shape) != self.where.shape:
                raise ValueError(f"{kind}/{self.name} has shape {tuple(tensor.shape)}, its place is {self.where}")

    @property
    def name(self) -> str:
        return self.where.name

    def read(self, kind: str) -> Tensor:
        """The values of a kind, for whoever writes them."""
        return self.tensors[kind]


@dataclass(frozen=True)
class Placement:
    """What the rows of a local parameter are: `rectangles`, one below the other.

    tp_replicated: every tensor-parallel rank holds the same values (norm weights, biases of row-parallel layers).
    decay: weight decay applies (matrices yes; norms, biases and state-space scalars no).
    writes: False on a copy whose owner is elsewhere (the head's copy of a tied embedding on another stage).
    of_experts: the rectangles are experts of this rank of `ep`; gradients are summed, and optimizer state is divided,
    over `edp` instead of dp x cp.
    Raises ValueError if a rectangle has no rows or the rectangles differ in width.
    """

    rectangles: tuple[Rectangle, ...]
    tp_replicated: bool = False
    decay: bool = True
    writes: bool = True
    of_experts: bool = False

    def __post_init__(self) -> None:
        first = self.rectangles[0]
        for where in self.rectangles:
            if not where.shape or where.shape[0] == 0 or where.shape[1:] != first.shape[1:]:
                raise ValueError(f"{where.name}: {where.shape} is empty, or does not fit below {first.shape}")

    @property
    def num_rows(self) -> int:
        return sum(where.shape[0] for where in self.rectangles)

    def pieces(self) -> Iterator[tuple[slice, Rectangle]]:
        """The local rows of each rectangle."""
        first = 0
        for where in self.rectangles:
            yield slice(first, first + where.shape[0]), where
            first += where.shape[0]

    def elements(self, start: int, stop: int) -> Iterator[Rectangle]:
        """What local row-major elements `[start, stop)` are, in order."""
        for where in self.rectangles:
            yield from where.elements(min(max(start, 0), where.numel), min(max(stop, 0), where.numel))
            start, stop = start - where.numel, stop - where.numel


def split_evenly(size: int, group: Group, *, what: str, multiple_of: int = 1) -> int:
    """Rows per rank when `size` is divided over `group`; a clear error where it does not fit."""
    if size % group.size:
        raise ValueError(f"{what} = {size} is not divisible by {group.name} = {group.size}; choose a divisor of {size}")
    local = size // group.size
    if local % multiple_of:
        raise ValueError(
            f"{what} = {size} over {group.name} = {group.size} leaves {local} per rank, not a multiple of"
            f" {multiple_of}; use {what} divisible by {group.size * multiple_of} or a smaller {group.name}"
        )
    return local
