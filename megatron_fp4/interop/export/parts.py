"""Safetensors files of bounded size, written in place: sizes are known first, rows come in any order.

A file is 8 bytes (the length of the header, little-endian), the header as JSON, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). So its place is known for every row before there is a single one, and a model
of any size is written with the memory of a few rows. Tensors of wide types come first in a file: readers map the bytes
and want each at a multiple of its element.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
READABLE = 0o644
"""Permissions of every file: a model is published."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def divide(tensors: Sequence[FileTensor], part_bytes: int) -> list[list[FileTensor]]:
    """The tensors in parts of at most `part_bytes`, in their order; a larger tensor is a part of its own."""
    parts: list[list[FileTensor]] = []
    room = 0
    for tensor in tensors:
        if not parts or tensor.num_bytes > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(tensor)
        room -= tensor.num_bytes
    return parts


def part_names(count: int) -> list[str]:
    """File names as transformers expects them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


class PartsWriter:
    """The parts of a model in `folder`, open for rows. `index`: content of model.safetensors.index.json, or None."""

    def __init__(self, folder: Path, tensors: Sequence[FileTensor], part_bytes: int) -> None:
        parts = divide(tensors, part_bytes)
        self._places: dict[str, tuple[int, int, FileTensor]] = {}
        self._descriptors: list[int] = []
        weight_map: dict[str, str] = {}
        try:
            for name, part in zip(part_names(len(parts)), parts, strict=True):
                self._open(folder / name, part)
                weight_map.update({tensor.name: name for tensor in part})
        except BaseException:
            self.close()
            raise
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.index: dict[str, Any] | None = index if len(parts) > 1 else None

    def _open(self, path: Path, part: Sequence[FileTensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ordered = sorted(part, key=lambda tensor: -tensor.dtype.itemsize)
        begin = 0
        for tensor in ordered:
            offsets = [begin, begin + tensor.num_bytes]
            header[tensor.name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            begin = offsets[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, READABLE)
        self._descriptors.append(descriptor)
        os.fchmod(descriptor, READABLE)  # whatever the umask says
        os.truncate(descriptor, 8 + len(text) + begin)
        _write_at(descriptor, len(text).to_bytes(8, "little") + text, 0)
        for tensor in ordered:
            first = 8 + len(text) + header[tensor.name]["data_offsets"][0]
            self._places[tensor.name] = (descriptor, first, tensor)

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Rows of the tensor `name`, from `first_row` on; of its dtype and of its shape but for the first dimension."""
        descriptor, position, tensor = self._places[name]
        assert rows.dtype == tensor.dtype, f"{name}: {rows.dtype}"
        assert tuple(rows.shape[1:]) == tensor.shape[1:], f"{name}: {rows.shape}"
        assert first_row + rows.shape[:1].numel() <= torch.Size(tensor.shape[:1]).numel(), f"{name}: row {first_row}"
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        data = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        _write_at(descriptor, data, position + first_row * row_bytes)

    def sync(self) -> None:
        """The bytes are on the disk."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


@contextmanager
def writing_parts(folder: Path, tensors: Iterable[FileTensor], part_bytes: int) -> Iterator[PartsWriter]:
    """A `PartsWriter` whose files are synced where all went well, and closed in any case."""
    writer = PartsWriter(folder, list(tensors), part_bytes)
    try:
        yield writer
        writer.sync()
    finally:
        writer.close()


def _write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
