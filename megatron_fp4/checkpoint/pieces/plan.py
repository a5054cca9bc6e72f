"""From the shards of all ranks to the layout of a checkpoint, once as long as the shards stay where they are.

Each rank describes its own pieces as a layout of one rank; rank 0 puts them together, refuses what is no partition, and
tells each where its part begins. Later saves need no word about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_fp4.checkpoint.pieces.cover import check_cover
from megatron_fp4.checkpoint.pieces.layout import StoredLayout, TensorEntry, file_name, ranks_per_file, sorted_layout
from megatron_fp4.comm.agree import decided_by_rank0, gather_to_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard


@dataclass(frozen=True)
class Part:
    """What one rank writes: `num_bytes` bytes of `file` from `start` on."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True, eq=False)
class SaveLayout:
    """Who writes what; planned once in a run, because it holds as long as the signature of the shards does.

    part: this rank's. content: of the layout's file, on rank 0; empty elsewhere. parts: of all ranks, on rank 0.
    """

    signature: tuple[Any, ...]
    part: Part
    content: bytes
    parts: tuple[Part, ...]


def entry_of(shard: Shard) -> TensorEntry:
    """The logical tensor of a shard, with the kinds that it has."""
    kinds = tuple(sorted((kind, str(data.dtype).removeprefix("torch.")) for kind, data in shard.tensors.items()))
    return TensorEntry(shard.name, shard.where.global_shape, kinds)


def in_writing_order(shards: Iterable[Shard]) -> list[Shard]:
    """The shards that this rank writes, in the order in which it does."""
    written = [shard for shard in shards if shard.writes and shard.where.numel and shard.tensors]
    return sorted(written, key=lambda shard: (entry_of(shard), shard.where.offset))


def layout_signature(written: Sequence[Shard]) -> tuple[Any, ...]:
    """Equal signatures of all ranks mean: the layout of the last save still holds."""
    return tuple((shard.where, entry_of(shard).kinds) for shard in written)


def own_layout(written: Sequence[Shard]) -> StoredLayout:
    """The layout of one rank that has these pieces, in their order."""
    entries = sorted({entry_of(shard) for shard in written})
    number = {entry: index for index, entry in enumerate(entries)}
    dims = max([1, *(len(shard.where.shape) for shard in written)])
    tensor = np.array([number[entry_of(shard)] for shard in written], np.int64)
    offset, size = np.zeros((len(written), dims), np.int64), np.ones((len(written), dims), np.int64)
    for row, shard in enumerate(written):
        offset[row, : len(shard.where.offset)] = shard.where.offset
        size[row, : len(shard.where.shape)] = shard.where.shape
    return StoredLayout(1, ranks_per_file(1), tuple(entries), tensor, np.zeros(len(written), np.int64), offset, size)


def joined(layouts: Sequence[StoredLayout]) -> StoredLayout:
    """One layout of the pieces of all ranks."""
    number: dict[TensorEntry, int] = {}
    for layout in layouts:
        for entry in layout.tensors:
            number.setdefault(entry, len(number))
    dims = max(layout.offset.shape[1] for layout in layouts)
    tensor = np.concatenate(
        [np.array([number[entry] for entry in layout.tensors], np.int64)[layout.tensor] for layout in layouts]
    )
    rank = np.repeat(np.arange(len(layouts)), [layout.num_pieces for layout in layouts])
    offset = np.concatenate([_widened(layout.offset, dims, 0) for layout in layouts])
    size = np.concatenate([_widened(layout.size, dims, 1) for layout in layouts])
    per_file = ranks_per_file(len(layouts))
    return sorted_layout(len(layouts), per_file, list(number), tensor, rank, offset, size)[0]


def _widened(columns: np.ndarray, dims: int, value: int) -> np.ndarray:
    missing = dims - columns.shape[1]
    return np.pad(columns, ((0, 0), (0, missing)), constant_values=value) if missing else columns


def plan_layout(written: Sequence[Shard], group: Group) -> SaveLayout:
    """Collective, on the calling thread.

    Raises ValueError on all ranks if the written rectangles overlap or do not cover a logical tensor.
    """
    descriptions = gather_to_rank0(own_layout(written).encode(), group)
    planned: list[bytes] = []

    def plan() -> list[tuple[int, int]]:
        content, places = planned_by_rank0(descriptions)
        planned.append(content)
        return places

    places = decided_by_rank0(plan, group)
    per_file = ranks_per_file(group.size)
    parts = tuple(Part(file_name(rank // per_file), *place) for rank, place in enumerate(places))
    content = planned[0] if planned else b""
    return SaveLayout(layout_signature(written), parts[group.rank], content, parts if group.rank == 0 else ())


def planned_by_rank0(descriptions: Sequence[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    """The content of the layout's file, and the first byte and the number of bytes of each rank's part.

    descriptions: of each rank, `own_layout(...).encode()`. Raises ValueError; see `plan_layout`.
    """
    layout = joined([StoredLayout.decode(one) for one in descriptions])
    check_cover(layout)
    return layout.encode(), list(zip(layout.part_starts.tolist(), layout.part_bytes.tolist(), strict=True))
