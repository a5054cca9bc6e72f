"""Safetensors files, read by rows: the tensors of a folder by name, and where their bytes lie.

The format is a length, a JSON header and raw bytes, so no package is needed, and nothing of a file is in memory but its
header and the rows that somebody asks for. The header is a stranger's: what it says is compared with the file.

Not here: what the tensors are called in a model (families.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.storage.durable import is_file_name
from megatron_fp4.storage.patience import read_json, read_patiently

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MOST_HEADER_BYTES = 100 << 20
LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. dtype: as the file calls it. start: its first byte, counted from the file's."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows `[first, stop)` in the file's dtype. Raises ValueError for one that is no float; UnreadableFile."""
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.path}: {self.name} is {self.dtype}; weights are {', '.join(DTYPES)}")
        dtype = DTYPES[self.dtype]
        row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        data = _bytes_at(self.path, self.start + first * row_bytes, (stop - first) * row_bytes)
        return torch.frombuffer(data, dtype=dtype).view(stop - first, *self.shape[1:])


def tensors_in(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model's safetensors by name; no values are read.

    Raises FileNotFoundError, and ValueError for what is damaged or contradicts the index.
    """
    stored: dict[str, StoredTensor] = {}
    for name in files_in(folder):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / INDEX} names {name}, which is not there; copy the folder anew")
        for tensor in _tensors_of(folder / name):
            if tensor.name in stored:
                raise ValueError(f"{tensor.name} is in {stored[tensor.name].path} and in {tensor.path}")
            stored[tensor.name] = tensor
    return stored


def files_in(folder: Path) -> list[str]:
    """The names of a model's safetensors files: those that its index names, or the one that needs none."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            others = f"; {pickled[0]} is pickled, which is not read: save it as safetensors" if pickled else ""
            raise FileNotFoundError(f"{folder} has neither {INDEX} nor {SINGLE}{others}")
        return [SINGLE]
    if (folder / SINGLE).exists():
        raise ValueError(f"{folder} has both {SINGLE}, which transformers reads, and {INDEX}; remove the stale one")
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and is_file_name(name) for name in names):
        raise ValueError(f"{folder / INDEX} names no files of its folder")
    return names


def _tensors_of(path: Path) -> Iterator[StoredTensor]:
    num_bytes = read_patiently(path.stat, path).st_size
    length = int.from_bytes(_bytes_at(path, 0, min(LENGTH_BYTES, num_bytes)), "little")
    if not 0 < length <= min(num_bytes - LENGTH_BYTES, MOST_HEADER_BYTES):
        raise ValueError(f"{path} is no safetensors file: {num_bytes} bytes, with a header of {length}")
    try:
        header = json.loads(_bytes_at(path, LENGTH_BYTES, length))
        header.pop("__metadata__", None)
        end = 0
        for begin, stop in sorted(tuple(map(int, entry["data_offsets"])) for entry in header.values()):
            if begin != end:
                raise ValueError(f"a tensor begins at byte {begin}, and the one before it ends at {end}")
            end = stop
        if end != num_bytes - LENGTH_BYTES - length:
            raise ValueError(f"tensors end at byte {end} of {num_bytes - LENGTH_BYTES - length}")
        for name, entry in header.items():
            yield _stored(path, name, entry, LENGTH_BYTES + length, num_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _stored(path: Path, name: str, entry: Any, first_byte: int, file_bytes: int) -> StoredTensor:
    """Raises ValueError unless the bytes are there and as many as the shape needs."""
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = map(int, entry["data_offsets"])
    fits = 0 <= begin <= end <= file_bytes - first_byte and all(size >= 0 for size in shape) and name.isprintable()
    if not fits or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"{name!r} of shape {shape} is said to be bytes {begin} to {end} of {file_bytes - first_byte}")
    return StoredTensor(path, name, dtype, shape, first_byte + begin)


def _bytes_at(path: Path, start: int, num_bytes: int) -> bytearray:
    def read() -> bytearray:
        data = bytearray(num_bytes)
        view, done = memoryview(data), 0
        with open(path, "rb", buffering=0) as stream:
            stream.seek(start)
            while done < num_bytes and (count := stream.readinto(view[done:])):
                done += count
        if done < num_bytes:
            raise ValueError(f"{path} ends at byte {start + done}, where {num_bytes - done} more were expected")
        return data

    return read_patiently(read, path)
