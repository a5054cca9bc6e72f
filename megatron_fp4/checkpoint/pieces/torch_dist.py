"""A checkpoint that another program wrote by torch.distributed.checkpoint (DCP): some of its tensors, as pieces.

Such a description is a pickle and names classes of the program that wrote it. They are read as inert objects here, so
that nothing of that program is imported or called, and what is needed is checked as the description of our own is.

Not here: our own checkpoints (stored.py); what the tensors of a program mean (models/foreign/).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint.pieces.metadata import METADATA, MetadataUnpickler, archived_pieces, classes, unpickled
from megatron_fp4.checkpoint.pieces.stored import StoredPieces, check_layout, check_places
from megatron_fp4.storage.patience import read_patiently

KIND = "stored"
"""The kind under which all tensors are read: "stored/<name in the file>"."""


class Inert:
    """What a pickle names and nobody here needs: made with any arguments, which it drops."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _ForeignUnpickler(MetadataUnpickler):
    """A class of its own for every name that no description needs, so that no pickle can change another's."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            return type("Unread", (Inert,), {})


@dataclass(frozen=True, eq=False)
class TorchDistCheckpoint:
    """pieces: of the wanted tensors. others: the names of what is stored besides them. description: the file's."""

    directory: Path
    pieces: StoredPieces
    others: tuple[str, ...]
    description: bytes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every wanted tensor by its name in the file."""
        return {key.removeprefix(f"{KIND}/"): shape for key, shape in self.pieces.shapes().items()}

    def dtypes(self) -> dict[str, str]:
        """The dtype of every wanted tensor by its name in the file."""
        return {key.removeprefix(f"{KIND}/"): dtype for key, _, dtype, _ in self.pieces.tensors()}


def read_torch_dist(directory: Path, wanted: Callable[[str], bool]) -> TorchDistCheckpoint:
    """The tensors whose names are `wanted`; reads no values.

    Raises FileNotFoundError; ValueError for what is damaged or has pieces that do not fill it; UnreadableFile.
    """
    path = directory / METADATA
    data = read_patiently(path.read_bytes, path)
    try:
        description = unpickled(data, _ForeignUnpickler)
        tensor, entries = classes().TensorStorageMetadata, description.state_dict_metadata.items()
        keys = {name: f"{KIND}/{name}" for name, one in entries if isinstance(one, tensor) and wanted(name)}
        old = archived_pieces(description, keys)
        pieces = StoredPieces(old.layout, old.files, old.layout.rank, old.position, old.num_bytes)
        sizes = {name: _file_bytes(directory / name) for name in old.files}
        check_layout(pieces.layout, sum(sizes.values()))
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file raises
        raise ValueError(f"{path} is refused ({type(error).__name__}: {error})") from error
    check_places(pieces, sizes, path)
    others = tuple(name for name in description.state_dict_metadata if name not in keys)
    return TorchDistCheckpoint(directory, pieces, others, data)


def _file_bytes(path: Path) -> int:
    return read_patiently(path.stat, path).st_size
