"""What a reader knows of a checkpoint's tensors, whichever program wrote it, and without trusting it.

A stranger's description is not believed before it was compared with itself and with the manifest: files that are
listed, pieces that lie in their tensors and fill them, tensors for which there are bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.checkpoint.directory import STATE
from megatron_fp4.checkpoint.pieces.cover import check_cover
from megatron_fp4.checkpoint.pieces.layout import LAYOUT, StoredLayout
from megatron_fp4.checkpoint.pieces.metadata import parse_metadata
from megatron_fp4.storage.durable import MANIFEST, Manifest, read_manifest
from megatron_fp4.storage.patience import read_patiently

METADATA = ".metadata"
MOST_RANKS = 1 << 22
MOST_DIMS = 16
LAYOUT_BYTES = 16 << 20
"""A description may be so large in memory, and four times the bytes of the tensors: each piece takes 64 bytes there."""


@dataclass(frozen=True, eq=False)
class StoredPieces:
    """The pieces of a checkpoint and where their bytes are.

    file: int64 [pieces], index in `files`. position: int64 [pieces], of the first byte in the file. archive_bytes:
    int64 [pieces], of each archive of torch.save; None where the bytes are the tensors' own.
    """

    layout: StoredLayout
    files: tuple[str, ...]
    file: NDArray[np.int64]
    position: NDArray[np.int64]
    archive_bytes: NDArray[np.int64] | None = None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
        """Key ("<kind>/<name>"), shape, dtype and number of pieces of every stored tensor."""
        counts = np.diff(self.layout.first_rows).tolist()
        for entry, count in zip(self.layout.tensors, counts, strict=True):
            for kind, dtype in entry.kinds:
                yield f"{kind}/{entry.name}", entry.shape, dtype, count

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor by key."""
        return {key: shape for key, shape, _, _ in self.tensors()}


@dataclass(frozen=True)
class Description:
    """A description as it was read, small enough to be handed on: one rank reads it, and all parse it.

    name: of its file. data: the file's content.
    """

    manifest: Manifest
    name: str
    data: bytes

    def parsed(self, directory: Path) -> StoredPieces:
        """Raises ValueError, naming the file, for what is damaged or not what this program has written."""
        path = directory / self.name
        data_bytes = sum(part.num_bytes for _, part in self.manifest.parts())
        try:
            if self.name == METADATA:
                old = parse_metadata(self.data)
                pieces = StoredPieces(old.layout, old.files, old.layout.rank, old.position, old.num_bytes)
                check_layout(pieces.layout, data_bytes)
            else:
                layout = StoredLayout.decode(self.data, LAYOUT_BYTES + 4 * data_bytes)
                check_layout(layout, data_bytes)
                file = layout.rank // layout.ranks_per_file
                pieces = StoredPieces(layout, tuple(layout.files()), file, layout.positions)
        except Exception as error:  # whatever a damaged file raises
            raise ValueError(f"{path} is refused ({type(error).__name__}: {error})") from error
        referred = {pieces.files[index] for index in np.unique(pieces.file).tolist()}
        if unlisted := sorted({self.name, STATE, *referred} - self.manifest.files.keys()):
            listing = directory / MANIFEST
            raise ValueError(f"{listing} does not list {', '.join(unlisted)}, which the checkpoint needs")
        check_places(pieces, {name: self.manifest.file_bytes(name) for name in referred}, path)
        return pieces


def read_description(directory: Path) -> Description:
    """Raises ValueError naming the file if it is missing; UnreadableFile."""
    manifest = read_manifest(directory)
    name = METADATA if METADATA in manifest.files else LAYOUT
    if name not in manifest.files:
        raise ValueError(f"{directory / MANIFEST} does not list {name}, which the checkpoint needs")
    path = directory / name
    try:
        return Description(manifest, name, read_patiently(path.read_bytes, path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None


def read_pieces(directory: str | os.PathLike[str]) -> StoredPieces:
    """The pieces of the checkpoint in `directory`. Raises ValueError; UnreadableFile."""
    directory = Path(directory)
    return read_description(directory).parsed(directory)


def check_places(pieces: StoredPieces, file_bytes: Mapping[str, int], path: Path) -> None:
    """Raise ValueError, naming the description in `path`, if a piece does not lie in its file."""
    known = np.array([file_bytes.get(name, 0) for name in pieces.files], np.int64)
    length = pieces.layout.piece_bytes if pieces.archive_bytes is None else pieces.archive_bytes
    outside = (pieces.position < 0) | (length < 0) | (pieces.position + length > known[pieces.file])
    if outside.any():
        name = pieces.files[int(pieces.file[outside][0])]
        raise ValueError(f"{path} is refused: a piece is not inside {name}")


def check_layout(layout: StoredLayout, data_bytes: int) -> None:
    """Raise ValueError, or what a damaged layout raises, unless its pieces lie in their tensors and fill them."""
    tensor, rank = layout.tensor, layout.rank
    dims = layout.offset.shape[1]
    if not (layout.ranks_per_file > 0 and 0 < dims <= MOST_DIMS and 0 <= layout.num_ranks <= MOST_RANKS):
        raise ValueError(f"{layout.num_ranks} ranks, {layout.ranks_per_file} of them a file, {dims} dims")
    if (np.diff(tensor, prepend=0) < 0).any() or (tensor >= len(layout.tensors)).any():
        raise ValueError("a piece is of no tensor")
    if (rank < 0).any() or (rank >= layout.num_ranks).any():
        raise ValueError("a piece is of no rank")
    if list(layout.tensors) != sorted(layout.tensors):
        raise ValueError("its tensors are in no order")
    needed = 0
    shapes = np.ones((len(layout.tensors), dims), np.int64)
    for index, entry in enumerate(layout.tensors):
        if not entry.kinds or any(length < 1 for length in entry.shape):  # no bytes would bound the other dims
            raise ValueError(f"{entry.name!r} of shape {entry.shape} has no elements")
        for kind, _ in entry.kinds:  # a terminal would obey what is not printable
            if "/" in kind or not f"{kind}/{entry.name}".isprintable():
                raise ValueError(f"{f'{kind}/{entry.name}'!r} is no name of a tensor")
            needed += math.prod(entry.shape) * entry.item_bytes(kind)
        shapes[index, : len(entry.shape)] = entry.shape
    whole = shapes[tensor]
    inside = (layout.offset >= 0) & (layout.size > 0) & (layout.size <= whole) & (layout.offset <= whole - layout.size)
    if not inside.all():
        row = int(np.flatnonzero(~inside.all(1))[0])
        entry = layout.tensors[int(tensor[row])]
        raise ValueError(f"a piece of {entry.kinds[0][0]}/{entry.name} is not inside {entry.shape}")
    if needed > data_bytes:
        raise ValueError(f"its tensors have {needed} bytes, the files {data_bytes}")
    check_cover(layout)
