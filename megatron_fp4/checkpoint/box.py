"""The seam to torch.distributed.checkpoint (DCP): a logical tensor of which this rank holds some rectangles.

One idea: DCP asks an object three things: what to write, which chunks to read, and where a chunk's memory is. `Boxes`
answers them for any set of rectangles of one logical tensor; a replica (`writes=False`) answers the second and third
only. Nothing is known here about what the tensors mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True, eq=False)
class Box:
    """One rectangle: local `data` (any strides) lies at `offset` in the logical tensor."""

    data: Tensor
    offset: tuple[int, ...]
    writes: bool = True

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.data.size())


@dataclass(eq=False)
class Boxes:
    """The rectangles of one logical tensor on this rank; may be none (a rank without rows of it)."""

    global_shape: tuple[int, ...]
    boxes: list[Box] = field(default_factory=list)

    def size(self) -> torch.Size:
        """The logical shape; DCP compares it with the stored one."""
        return torch.Size(self.global_shape)

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        size = self.size()
        return [
            WriteItem(
                index=MetadataIndex(fqn, box.offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(box.chunk, TensorProperties.create_from_tensor(box.data), size),
            )
            for box in self.boxes
            if box.writes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.chunk for box in self.boxes]


class BoxSavePlanner(DefaultSavePlanner):
    """DCP's planner over a flat dict of `Boxes`."""

    def __init__(self, state: dict[str, Boxes]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(state)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        boxes = self.state_dict[index.fqn].boxes
        return next(box.data for box in boxes if box.writes and torch.Size(box.offset) == index.offset)


class BoxLoadPlanner(DefaultLoadPlanner):
    """As above for reading. The chunk's number finds its box, so two copies of one rectangle are both filled."""

    def __init__(self, state: dict[str, Boxes], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state_dict, self.metadata, self.is_coordinator = state, metadata, False

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.index is not None
        return self.state_dict[index.fqn].boxes[index.index].data
