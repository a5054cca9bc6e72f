"""The seam to torch.distributed.checkpoint (DCP): a stored tensor of which this rank holds some rectangles.

DCP asks an object three things: what to write, which chunks to read, and where a chunk's memory is. `StoredTensor`
answers them for any set of rectangles of one logical tensor; a replica (`writes=False`) answers the second and third
only. Not here: what the tensors mean, and how they are named (state.py).
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.storage.patience import UnreadableFile, read_patiently


@dataclass(eq=False)
class StoredTensor:
    """The rectangles of one logical tensor on this rank; may be none. Of a shard's tensors, the one called `kind`."""

    kind: str
    global_shape: tuple[int, ...]
    shards: list[Shard] = field(default_factory=list)

    def data(self, shard: Shard) -> Tensor:
        """The shard's elements; any strides."""
        return shard.tensors[self.kind]

    def size(self) -> torch.Size:
        """The logical shape; DCP compares it with the stored one."""
        return torch.Size(self.global_shape)

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        size = self.size()
        return [
            WriteItem(
                index=MetadataIndex(fqn, shard.where.offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    _chunk(shard.where), TensorProperties.create_from_tensor(self.data(shard)), size
                ),
            )
            for shard in self.shards
            if shard.writes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(shard.where) for shard in self.shards]


def _chunk(where: Rectangle) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(where.offset), sizes=torch.Size(where.shape))


class ShardSavePlanner(DefaultSavePlanner):
    """DCP's planner over a flat dict of `StoredTensor`."""

    def __init__(self, state: dict[str, StoredTensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(state)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        stored: StoredTensor = self.state_dict[index.fqn]
        return next(
            stored.data(shard)
            for shard in stored.shards
            if shard.writes and torch.Size(shard.where.offset) == index.offset
        )


class ShardLoadPlanner(DefaultLoadPlanner):
    """The same for reading. The chunk's number finds its shard, so two copies of one rectangle are both filled."""

    def __init__(self, state: dict[str, StoredTensor], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.state_dict, self.metadata = state, metadata
        self.is_coordinator = False

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.index is not None
        stored: StoredTensor = self.state_dict[index.fqn]
        return stored.data(stored.shards[index.index])


def read_into(state: dict[str, StoredTensor], directory: str | os.PathLike[str], metadata: Metadata) -> None:
    """Fill the rectangles from a checkpoint's files. metadata: the checkpoint's.

    Raises UnreadableFile, after several tries; ValueError for bytes that are no tensors, in spite of a good hash or
    without one.
    """
    directory = Path(directory)
    try:
        read_patiently(lambda: _read_once(state, directory, metadata), directory)
    except UnreadableFile:
        raise
    except Exception as error:  # whatever torch raises about a damaged file
        raise ValueError(f"checkpoint {directory.name} is refused: {type(error).__name__}: {error}") from error


def _read_once(state: dict[str, StoredTensor], directory: Path, metadata: Metadata) -> None:
    reader = FileSystemReader(directory)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    planner = ShardLoadPlanner(state, metadata)
    try:
        reader.read_data(planner.create_local_plan(), planner).wait()
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # not the system's word: a damaged offset or archive
            raise ValueError(str(error)) from error
        raise


def stored_metadata(metadata: Metadata, key: str) -> TensorStorageMetadata:
    """Shape, dtype and pieces of the stored tensor `key`."""
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata), f"{key} is no tensor"
    return stored
