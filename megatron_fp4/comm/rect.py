"""Where a local tensor lies inside a logical tensor.

One idea: every shard is a rectangle of a logical tensor. A parameter says so once, when it is made; initialisation,
the optimizer and the checkpoint read it and need no knowledge of tensor or pipeline parallelism. A fused weight
(q|k|v, gate|up, z|x|B|C|dt) is a few named runs of rows, one rectangle each.

This file does not move data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_fp4.comm.mesh import Group


@dataclass(frozen=True)
class Segment:
    """Rows `[start, stop)` of a local parameter, and the rectangle of the logical tensor `name` that they are.

    `global_offset` is the position of local row `start` in the logical tensor; the rectangle's shape is
    `(stop - start, *local.shape[1:])`.
    """

    name: str
    start: int
    stop: int
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"{self.name}: rows [{self.start}, {self.stop}) are empty or negative")
        if len(self.global_shape) != len(self.global_offset):
            raise ValueError(f"{self.name}: shape {self.global_shape} and offset {self.global_offset} differ in rank")
        if self.global_offset[0] + self.num_rows > self.global_shape[0]:
            raise ValueError(
                f"{self.name}: rows {self.global_offset[0]}+{self.num_rows} leave the logical shape {self.global_shape}"
            )

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def row_index(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Global row number of each local row of the segment; int64 `[num_rows]`."""
        first = self.global_offset[0]
        return torch.arange(first, first + self.num_rows, device=device)


@dataclass(frozen=True)
class Placement:
    """What every parameter of a model carries as `parameter.placement`.

    tp_replicated: every tensor-parallel rank holds the same values (norm weights, biases of row-parallel layers).
    decay: weight decay applies (matrices yes; norms, biases and state-space scalars no).
    writes: False on a copy whose owner is elsewhere (the head's copy of a tied embedding on another stage).
    """

    segments: tuple[Segment, ...]
    tp_replicated: bool = False
    decay: bool = True
    writes: bool = True

    def __post_init__(self) -> None:
        expected = 0
        for segment in self.segments:
            if segment.start != expected:
                raise ValueError(
                    f"{segment.name}: starts at row {segment.start}, the previous segment ends at {expected}"
                )
            expected = segment.stop

    def rows_between(self, start: int, stop: int) -> Iterator[Segment]:
        """The parts of the segments inside local rows `[start, stop)`; rows stay counted in the parameter."""
        for segment in self.segments:
            low, high = max(start, segment.start), min(stop, segment.stop)
            if low < high:
                first = segment.global_offset[0] + low - segment.start
                offset = (first, *segment.global_offset[1:])
                yield Segment(segment.name, low, high, segment.global_shape, offset)


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
