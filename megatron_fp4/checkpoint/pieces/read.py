"""Tensors filled from the files of a checkpoint: of each piece that a shard touches, the rows that it needs.

Not here: whether the files are as they were written (load.py), and what they must hold (stored.py).
"""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_fp4.checkpoint.pieces.layout import TensorEntry, dtype_of
from megatron_fp4.checkpoint.pieces.stored import StoredPieces
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.patience import UnreadableFile, read_patiently


@dataclass(frozen=True, eq=False)
class PieceToRead:
    """Rows of a piece for a part of a shard's tensor.

    file, position: where the piece's bytes of this kind begin. archive_bytes: see `StoredPieces`. shape: the piece's.
    inside: what is needed of it. target: its memory; any dtype.
    """

    file: int
    position: int
    archive_bytes: int | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    inside: tuple[slice, ...]
    target: Tensor


def read_into(shards: Iterable[Shard], directory: str | os.PathLike[str], pieces: StoredPieces) -> None:
    """Fill the shards' tensors, replicas too, from a checkpoint that has them all.

    Raises UnreadableFile, after several tries; ValueError for bytes that are no tensors, in spite of a good hash or
    without one.
    """
    directory = Path(directory)
    wanted = sorted(_wanted(shards, pieces), key=lambda one: (one.file, one.position))
    try:
        read_patiently(lambda: _read_once(wanted, directory, pieces.files), directory)
    except UnreadableFile:
        raise
    except Exception as error:  # whatever torch raises about a damaged file
        raise ValueError(f"checkpoint {directory.name} is refused: {type(error).__name__}: {error}") from error


def _read_once(wanted: Sequence[PieceToRead], directory: Path, files: Sequence[str]) -> None:
    for file, group in groupby(wanted, key=lambda one: one.file):
        path = directory / files[file]
        with open(path, "rb", buffering=0) as stream:
            for one in group:
                one.target.copy_(_values(one, stream.fileno(), path))


def _values(one: PieceToRead, descriptor: int, path: Path) -> Tensor:
    """What is needed of the piece, in its own dtype."""
    if one.archive_bytes is not None:
        archive = io.BytesIO(_bytes_at(descriptor, one.position, one.archive_bytes, path))
        stored: Tensor = torch.load(archive, map_location="cpu", weights_only=True)
        if not isinstance(stored, Tensor) or tuple(stored.shape) != one.shape or stored.dtype != one.dtype:
            raise ValueError(f"{path} holds something else than a {one.dtype} of shape {one.shape}")
        return stored[one.inside]
    rows = one.inside[0] if one.shape else slice(0, 1)
    row_bytes = math.prod(one.shape[1:]) * one.dtype.itemsize
    data = _bytes_at(descriptor, one.position + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes, path)
    values = torch.frombuffer(data, dtype=one.dtype)
    return values.view(-1, *one.shape[1:])[:, *one.inside[1:]] if one.shape else values.view(())


def _bytes_at(descriptor: int, position: int, num_bytes: int, path: Path) -> bytearray:
    data = bytearray(num_bytes)
    view, done = memoryview(data), 0
    while done < num_bytes:
        try:
            count = os.preadv(descriptor, [view[done:]], position + done)
        except OSError as error:
            if error.errno == errno.EINVAL:  # not the system's word: a damaged position
                raise ValueError(f"{path}: {error}") from error
            raise
        if count == 0:
            raise ValueError(f"{path} ends at byte {position + done}, where {num_bytes - done} more were expected")
        done += count
    return data


def _wanted(shards: Iterable[Shard], pieces: StoredPieces) -> Iterator[PieceToRead]:
    for shard in shards:
        for kind, target in shard.tensors.items():
            if target.numel():
                for index in pieces.layout.tensors_by_key[f"{kind}/{shard.name}"]:
                    yield from _touched(pieces, index, kind, shard, target)


def _touched(pieces: StoredPieces, index: int, kind: str, shard: Shard, target: Tensor) -> Iterator[PieceToRead]:
    """The pieces of tensor `index` that a shard touches."""
    layout, entry = pieces.layout, pieces.layout.tensors[index]
    first, stop = layout.first_rows[index : index + 2].tolist()
    dims = len(entry.shape)
    offset, size = layout.offset[first:stop, :dims], layout.size[first:stop, :dims]
    low = np.maximum(offset, np.array(shard.where.offset, np.int64))
    high = np.minimum(offset + size, np.array(shard.where.offset, np.int64) + np.array(shard.where.shape, np.int64))
    for row in np.flatnonzero((low < high).all(1)).tolist():
        archive = pieces.archive_bytes
        yield PieceToRead(
            file=int(pieces.file[first + row]),
            position=int(pieces.position[first + row]) + layout.kind_start(first + row, kind),
            archive_bytes=None if archive is None else int(archive[first + row]),
            dtype=_dtype(entry, kind),
            shape=tuple(size[row].tolist()),
            inside=_slices(low[row] - offset[row], high[row] - offset[row]),
            target=target[_slices(low[row] - shard.where.offset, high[row] - shard.where.offset)],
        )


def _dtype(entry: TensorEntry, kind: str) -> torch.dtype:
    return dtype_of(dict(entry.kinds)[kind])


def _slices(low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
    return tuple(map(slice, low.tolist(), high.tolist()))
