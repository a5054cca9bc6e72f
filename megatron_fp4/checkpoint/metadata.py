"""DCP's `.metadata`, read without trusting it.

torch.distributed.checkpoint stores it as a pickle, and a pickle may call any function that its reader lets it name.
This reader lets it name the dozen classes of which such a description consists, so a stranger's checkpoint can be
opened; and it believes no path that leads out of the directory, no file that the manifest does not list, and no tensor
that its pieces do not fill.

Not here: the tensors' own bytes, which torch reads with `weights_only` (dcp.py).
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_fp4.checkpoint.directory import STATE
from megatron_fp4.storage.durable import MANIFEST, is_file_name, read_manifest
from megatron_fp4.storage.patience import read_patiently

METADATA = ".metadata"
ALLOWED = {
    (owner.__name__, name): getattr(owner, name)
    for owner, names in (
        (
            metadata,
            (
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            ),
        ),
        (filesystem, ("_StorageInfo",)),
        (torch.serialization, ("_get_layout",)),
        (torch, ("Size",)),
    )
    for name in names
}
"""What a `.metadata` may name, beside torch's dtypes."""


class MetadataUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for every global that is not of `ALLOWED`, before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_metadata(directory: str | os.PathLike[str]) -> Metadata:
    """Names, shapes and places of the stored tensors.

    Raises ValueError naming the file if it is missing, damaged, or not what this library writes; UnreadableFile.
    """
    path = Path(directory) / METADATA
    files = read_manifest(Path(directory)).files
    try:
        data = read_patiently(path.read_bytes, path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    try:
        description = _unpickled(data)
        referred = _referred_files(description)
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ValueError(f"{path} is refused ({type(error).__name__}: {error})") from error
    if unlisted := sorted({METADATA, STATE, *referred} - files.keys()):
        raise ValueError(f"{path.with_name(MANIFEST)} does not list {', '.join(unlisted)}, which the checkpoint needs")
    _check_size(description, sum(files[name].num_bytes for name in referred), path)
    return description


def _unpickled(data: bytes) -> Any:
    """Raises UnpicklingError also where the pickle sets attributes of what it may name, which it leaves as it was."""
    before = {allowed: dict(vars(allowed)) for allowed in ALLOWED.values()}
    try:
        return MetadataUnpickler(io.BytesIO(data)).load()
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


def _check_tensor(key: str, stored: TensorStorageMetadata) -> None:
    """Raise ValueError, or what a damaged description raises, unless its pieces lie in the tensor and fill it."""
    size = stored.size
    if "/" not in key or not key.isprintable():  # a terminal would obey the others
        raise ValueError(f"{key!r} is no name of a tensor")
    if not isinstance(size, torch.Size) or not isinstance(stored.properties.dtype, torch.dtype):
        raise ValueError(f"{key} has no shape or dtype")
    for chunk in stored.chunks:
        spans = zip(chunk.offsets, chunk.sizes, size, strict=True)
        if not all(offset >= 0 <= length <= whole - offset for offset, length, whole in spans):
            raise ValueError(f"a piece of {key} is not inside {tuple(size)}")
    num_elements = sum(chunk.sizes.numel() for chunk in stored.chunks)
    if num_elements != size.numel():
        raise ValueError(f"the pieces of {key} have {num_elements} elements, its shape {size.numel()}")


def _check_size(description: Metadata, num_bytes: int, path: Path) -> None:
    """Raise ValueError if the files are smaller than the tensors, for which a reader would take memory."""
    tensors = [one for one in description.state_dict_metadata.values() if isinstance(one, TensorStorageMetadata)]
    needed = sum(one.size.numel() * one.properties.dtype.itemsize for one in tensors)
    if needed > num_bytes:
        raise ValueError(f"{path} is refused: its tensors have {needed} bytes, the files {num_bytes}")


def _referred_files(description: Any) -> set[str]:
    """The files that hold the tensors. Raises ValueError for what is no description of tensors in this directory."""
    if not isinstance(description, Metadata):
        raise ValueError(f"it holds a {type(description).__name__}")
    for key, stored in description.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{key} is no tensor")
        _check_tensor(key, stored)
    referred = set()
    for place in description.storage_data.values():
        name = place.relative_path
        if not is_file_name(name):
            raise ValueError(f"{name!r} leads out of the directory")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{name} is transformed by {place.transform_descriptors}")
        referred.add(name)
    return referred
