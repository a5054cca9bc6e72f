"""The table of a checkpoint's rectangles, and its file: the same bytes in every checkpoint of one layout.

A row is a piece: a rectangle of a logical tensor and the rank that wrote it. Where its bytes are is not stored but
follows. A rank writes its pieces in the order of the table, of each piece one kind after the other, each from a
multiple of `ALIGN_BYTES` on; that is the rank's part. The parts of `ranks_per_file` ranks stand in one file in the
order of the ranks, each from a multiple of `PAGE_BYTES` on, so that the ranks write side by side.

    layout.bin    magic | zlib(length of the header, header as JSON, columns)

A column is int64, and holds the differences between one row and the next: cuts lie at equal distances, so a million
rows are some hundred kilobytes. Not here: whether the pieces fill their tensors (plan.py).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

LAYOUT = "layout.bin"
ALIGN_BYTES = 64
PAGE_BYTES = 4096
MAGIC = b"MEGALAY1"  # change it when the meaning of header, columns or order changes
COMPRESSION = 1  # of zlib; higher levels take longer and gain little
LEAST_RANKS_PER_FILE = 8
MOST_FILES = 512


@dataclass(frozen=True, order=True)
class TensorEntry:
    """A logical tensor, and the kinds ("master") in which its pieces are stored, each with the name of its dtype."""

    name: str
    shape: tuple[int, ...]
    kinds: tuple[tuple[str, str], ...]

    def item_bytes(self, kind: str) -> int:
        return dtype_of(dict(self.kinds)[kind]).itemsize


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError for what is no dtype of torch's, and for a quantized one, which is more than its bytes."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or name.startswith("q"):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


@dataclass(frozen=True, eq=False)
class StoredLayout:
    """tensor int64 [pieces]: index in `tensors`, ascending. rank int64 [pieces]. offset, size int64 [pieces, dims].

    Rows are sorted by tensor and offset. dims is that of the tensor with the most; of others the rest is 0 and 1.
    """

    num_ranks: int
    ranks_per_file: int
    tensors: tuple[TensorEntry, ...]
    tensor: NDArray[np.int64]
    rank: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]

    @property
    def num_pieces(self) -> int:
        return len(self.tensor)

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """int64 [tensors + 1]: the rows of tensor t are first_rows[t] to first_rows[t + 1]."""
        return np.searchsorted(self.tensor, np.arange(len(self.tensors) + 1))

    @cached_property
    def tensors_by_key(self) -> dict[str, list[int]]:
        """The numbers of the tensors that have pieces of "kind/name": more than one where ranks hold other kinds."""
        by_key: dict[str, list[int]] = {}
        for index, entry in enumerate(self.tensors):
            for kind, _ in entry.kinds:
                by_key.setdefault(f"{kind}/{entry.name}", []).append(index)
        return by_key

    @cached_property
    def numel(self) -> NDArray[np.int64]:
        return self.size.prod(1, dtype=np.int64)

    @cached_property
    def piece_bytes(self) -> NDArray[np.int64]:
        """int64 [pieces]: of all kinds of each piece, with what stands between them."""
        total = np.zeros(self.num_pieces, np.int64)
        item_bytes = [[dtype_of(dtype).itemsize for _, dtype in entry.kinds] for entry in self.tensors]
        for sizes in {tuple(one) for one in item_bytes}:
            rows = np.array([tuple(one) == sizes for one in item_bytes])[self.tensor]
            for size in sizes:
                total[rows] += round_up(self.numel[rows] * size, ALIGN_BYTES)
        return total

    @cached_property
    def part_bytes(self) -> NDArray[np.int64]:
        """int64 [ranks]: what each rank writes."""
        return np.bincount(self.rank, self.piece_bytes, self.num_ranks).astype(np.int64)

    @cached_property
    def part_starts(self) -> NDArray[np.int64]:
        """int64 [ranks]: where in its file each rank's part begins."""
        before = _sums_before(round_up(self.part_bytes, PAGE_BYTES))
        return before - before[np.arange(self.num_ranks) // self.ranks_per_file * self.ranks_per_file]

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """int64 [pieces]: where in its file each piece begins."""
        by_rank = np.argsort(self.rank, kind="stable")
        before = np.empty(self.num_pieces, np.int64)
        before[by_rank] = _sums_before(self.piece_bytes[by_rank])
        return before - _sums_before(self.part_bytes)[self.rank] + self.part_starts[self.rank]

    def kind_start(self, row: int, kind: str) -> int:
        """Where the bytes of a kind begin, counted from those of the piece."""
        start = 0
        for other, dtype in self.tensors[int(self.tensor[row])].kinds:
            if other == kind:
                return start
            start += int(round_up(self.numel[row] * dtype_of(dtype).itemsize, ALIGN_BYTES))
        raise AssertionError(f"no kind {kind}")

    def files(self) -> list[str]:
        """The names of the files, in the order of the ranks; one in which no rank writes is not made."""
        return [file_name(index) for index in range(-(-self.num_ranks // self.ranks_per_file))]

    def encode(self) -> bytes:
        """The content of the file."""
        header = {
            "num_ranks": self.num_ranks,
            "ranks_per_file": self.ranks_per_file,
            "dims": self.offset.shape[1],
            "pieces": self.num_pieces,
            "tensors": [[entry.name, entry.shape, entry.kinds] for entry in self.tensors],
        }
        text = json.dumps(header).encode()
        columns = np.column_stack([self.tensor, self.rank, self.offset, self.size]).T
        differences = np.diff(columns, axis=1, prepend=0)
        body = len(text).to_bytes(8, "little") + text + differences.astype("<i8").tobytes()
        return MAGIC + zlib.compress(body, COMPRESSION)

    @staticmethod
    def decode(data: bytes, most_bytes: int = 0) -> StoredLayout:
        """The layout of a file's content; 0 < most_bytes: what it may take in memory.

        Raises ValueError for what is none, and whatever a damaged one raises.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError(f"it begins with {data[: len(MAGIC)]!r}, not with {MAGIC!r}")
        unpacking = zlib.decompressobj()
        body = unpacking.decompress(data[len(MAGIC) :], most_bytes)
        if not unpacking.eof:
            raise ValueError(f"it is cut short, or larger than {most_bytes} bytes")
        begin = 8 + int.from_bytes(body[:8], "little")
        header = json.loads(body[8:begin])
        pieces, dims = int(header["pieces"]), int(header["dims"])
        differences = np.frombuffer(body, "<i8", offset=begin).reshape(2 + 2 * dims, pieces)
        columns = np.cumsum(differences, axis=1)
        tensors = tuple(_entry(*one) for one in header["tensors"])
        offset, size = (np.ascontiguousarray(part.T) for part in (columns[2 : 2 + dims], columns[2 + dims :]))
        return StoredLayout(
            int(header["num_ranks"]), int(header["ranks_per_file"]), tensors, columns[0], columns[1], offset, size
        )


def _entry(name: Any, shape: Sequence[int], kinds: Iterable[Sequence[str]]) -> TensorEntry:
    return TensorEntry(str(name), tuple(map(int, shape)), tuple((str(kind), str(dtype)) for kind, dtype in kinds))


def sorted_layout(
    num_ranks: int,
    per_file: int,
    tensors: Sequence[TensorEntry],
    tensor: NDArray[np.int64],
    rank: NDArray[np.int64],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
) -> tuple[StoredLayout, NDArray[np.int64]]:
    """The layout of pieces in any order, and their order in it (int64 [pieces]). See `StoredLayout`."""
    by_name = sorted(range(len(tensors)), key=lambda index: tensors[index])
    place = np.empty(len(tensors), np.int64)
    place[by_name] = np.arange(len(tensors))
    tensor = place[tensor]
    order = np.lexsort((*offset.T[::-1], tensor))
    entries = tuple(tensors[index] for index in by_name)
    return StoredLayout(num_ranks, per_file, entries, tensor[order], rank[order], offset[order], size[order]), order


def ranks_per_file(num_ranks: int) -> int:
    """A node's ranks, or more: a directory of thousands of files is slow to make, to list and to copy."""
    return max(LEAST_RANKS_PER_FILE, -(-num_ranks // MOST_FILES))


def file_name(index: int) -> str:
    """The file of ranks index * ranks_per_file and following."""
    return f"data_{index:04d}.bin"


def round_up(value: Any, multiple: int) -> Any:
    """The least multiple that is not below `value`, a number or an array."""
    return -(-value // multiple) * multiple


def _sums_before(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(values) - values
