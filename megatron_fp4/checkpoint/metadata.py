"""DCP's `.metadata`, read without trusting it.

torch.distributed.checkpoint stores it as a pickle, and a pickle may call any function that its reader lets it name.
This reader lets it name the dozen classes of which such a description consists, so a stranger's checkpoint can be
opened; and it believes no path that leads out of the directory, and no file that the manifest does not list.

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
        description = MetadataUnpickler(io.BytesIO(data)).load()
        referred = _referred_files(description)
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ValueError(f"{path} is refused ({type(error).__name__}: {error})") from error
    if unlisted := sorted({METADATA, STATE, *referred} - files.keys()):
        raise ValueError(f"{path.with_name(MANIFEST)} does not list {', '.join(unlisted)}, which the checkpoint needs")
    return description


def _referred_files(description: Any) -> set[str]:
    """The files that hold the tensors. Raises ValueError for what is no description of tensors in this directory."""
    if not isinstance(description, Metadata):
        raise ValueError(f"it holds a {type(description).__name__}")
    for key, stored in description.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{key} is no tensor")
    referred = set()
    for place in description.storage_data.values():
        name = place.relative_path
        if not is_file_name(name):
            raise ValueError(f"{name!r} leads out of the directory")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{name} is transformed by {place.transform_descriptors}")
        referred.add(name)
    return referred
