"""The `.metadata` of checkpoints that torch.distributed.checkpoint (DCP) wrote for us, read without trusting it.

DCP stores it as a pickle, and a pickle may call any function that its reader lets it name. This reader lets it name the
dozen classes of which such a description consists, so a stranger's checkpoint can be opened; and it believes no path
that leads out of the directory. Nothing writes this format any more.

Not here: the tensors' own bytes, which torch reads with `weights_only` (read.py), and whether the pieces fill their
tensors (stored.py).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.serialization
from numpy.typing import NDArray

from megatron_fp4.checkpoint.pieces.layout import StoredLayout, TensorEntry, sorted_layout
from megatron_fp4.storage.durable import is_file_name

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

METADATA = ".metadata"


def classes() -> Any:
    """The module of torch whose classes a description consists of."""
    from torch.distributed.checkpoint import metadata  # here: it imports sympy, which takes a second

    return metadata


@cache
def _allowed() -> dict[tuple[str, str], Any]:
    """What a `.metadata` may name, beside torch's dtypes."""
    from torch.distributed.checkpoint import filesystem

    names = (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
    owners = (
        (classes(), names),
        (filesystem, ("_StorageInfo",)),
        (torch.serialization, ("_get_layout",)),
        (torch, ("Size",)),
    )
    return {(owner.__name__, name): getattr(owner, name) for owner, names in owners for name in names}


def _member(owner: Any, name: str) -> object:
    """A memory format by its name, which is how Python 3.11.0 to 3.11.3 pickle one: getattr(class, name)."""
    formats = classes()._MEM_FORMAT_ENCODING
    if owner is not formats or name not in formats.__members__:
        raise pickle.UnpicklingError(f"it asks for {name} of {owner!r}, which no checkpoint needs")
    return formats[name]


class MetadataUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for every global that is not of `_allowed`, before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _allowed():
            return _allowed()[module, name]
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def unpickled(data: bytes, unpickler: type[MetadataUnpickler] = MetadataUnpickler) -> Metadata:
    """Raises UnpicklingError also where the pickle sets attributes of what it may name, which it leaves as it was."""
    before = {allowed: dict(vars(allowed)) for allowed in _allowed().values()}
    try:
        description: Metadata = unpickler(io.BytesIO(data)).load()
        if not isinstance(description, classes().Metadata):
            raise ValueError(f"it holds a {type(description).__name__}")
        return description
    finally:
        changed = [allowed for allowed, attributes in before.items() if dict(vars(allowed)) != attributes]
        for allowed in changed:
            for name in vars(allowed).keys() - before[allowed].keys():
                delattr(allowed, name)
            for name, value in before[allowed].items():
                if vars(allowed).get(name) is not value:
                    setattr(allowed, name, value)
        if changed:
            raise pickle.UnpicklingError(f"it changes {changed[0].__name__}")


def _checked(key: str, stored: Any) -> TensorStorageMetadata:
    """Raises ValueError, or what a damaged description raises, unless its pieces lie in the tensor and fill it."""
    if not isinstance(stored, classes().TensorStorageMetadata):
        raise ValueError(f"{key} is no tensor")
    if "/" not in key or not key.isprintable():
        raise ValueError(f"{key!r} is no name of a tensor")
    size = stored.size
    if not isinstance(size, torch.Size) or not isinstance(stored.properties.dtype, torch.dtype):
        raise ValueError(f"{key} has no shape or dtype")
    for chunk in stored.chunks:
        spans = zip(chunk.offsets, chunk.sizes, size, strict=True)
        if not all(offset >= 0 <= length <= whole - offset for offset, length, whole in spans):
            raise ValueError(f"a piece of {key} is not inside {tuple(size)}")
    num_elements = sum(chunk.sizes.numel() for chunk in stored.chunks)
    if num_elements != size.numel():
        raise ValueError(f"the pieces of {key} have {num_elements} elements, its shape {size.numel()}")
    return stored


def _place(key: str, offset: tuple[int, ...], description: Metadata) -> Any:
    place = description.storage_data[classes().MetadataIndex(key, offset)]
    if not is_file_name(place.relative_path):
        raise ValueError(f"{place.relative_path!r} leads out of the directory")
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"{place.relative_path} is transformed by {place.transform_descriptors}")
    return place


@dataclass(frozen=True, eq=False)
class ArchivedPieces:
    """A layout of which each file is one rank's, and where in them each piece is an archive of torch.save.

    position, num_bytes: int64 [pieces].
    """

    layout: StoredLayout
    files: tuple[str, ...]
    position: NDArray[np.int64]
    num_bytes: NDArray[np.int64]


def parse_metadata(data: bytes) -> ArchivedPieces:
    """What a `.metadata` says. Raises whatever a damaged one raises."""
    description = unpickled(data)
    return archived_pieces(description, {key: key for key in description.state_dict_metadata})


def archived_pieces(description: Metadata, keys: Mapping[str, str]) -> ArchivedPieces:
    """The pieces of some tensors. keys: "<kind>/<name>" of each by its name in the file. Raises as `parse_metadata`."""
    files: dict[str, int] = {}
    entries: list[TensorEntry] = []
    rows: list[tuple[int, int, int, int]] = []  # tensor, file, position, bytes
    offsets: list[tuple[int, ...]] = []
    sizes: list[tuple[int, ...]] = []
    for stored_name, key in keys.items():
        stored = _checked(key, description.state_dict_metadata[stored_name])
        kind, name = key.split("/", 1)
        entries.append(
            TensorEntry(name, tuple(stored.size), ((kind, str(stored.properties.dtype).removeprefix("torch.")),))
        )
        for chunk in stored.chunks:
            place = _place(stored_name, chunk.offsets, description)
            number = files.setdefault(place.relative_path, len(files))
            rows.append((len(entries) - 1, number, place.offset, place.length))
            offsets.append(tuple(chunk.offsets))
            sizes.append(tuple(chunk.sizes))
    dims = max([1, *map(len, sizes), *(len(entry.shape) for entry in entries)])
    tensor, file, position, num_bytes = np.array(rows, np.int64).reshape(-1, 4).T
    offset = np.array([(*one, *[0] * (dims - len(one))) for one in offsets], np.int64).reshape(-1, dims)
    size = np.array([(*one, *[1] * (dims - len(one))) for one in sizes], np.int64).reshape(-1, dims)
    layout, order = sorted_layout(len(files), 1, entries, tensor, file, offset, size)
    return ArchivedPieces(layout, tuple(files), position[order], num_bytes[order])
