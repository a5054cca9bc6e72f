"""Where weights of other libraries come from: one face for the folders of `transformers` and for Megatron-LM's.

Every rank of a run reads its own rectangles; nobody has the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_fp4.comm.rect import Rectangle
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.megatron_weights import MegatronWeights, megatron_directory
from megatron_fp4.models.foreign.read_config import CONFIG
from megatron_fp4.models.foreign.weights import ForeignWeights


class ForeignSource(Protocol):
    """Weights of another library.

    format: what they are stored as. max_length: tokens of a sample that the model says it takes. shapes: of the logical
    tensors. skipped: names of what is stored and is no weight. notes: sentences on what is not taken as it is.
    """

    folder: Path
    config: ModelConfig
    max_length: int
    format: str
    shapes: dict[str, tuple[int, ...]]
    skipped: list[str]
    notes: list[str]

    def read(self, where: Rectangle) -> Tensor:
        """The values of a rectangle, FP32. Raises ValueError, also for what is not finite; UnreadableFile."""

    def check_tied(self) -> None:
        """Raises ValueError for a head of its own where the settings say that it is the embedding."""

    def files(self) -> list[Path]:
        """All files that weights are read from."""

    def headers_digest(self) -> str:
        """Digest of all but the values: equal where folders are copies."""


def is_foreign(folder: Path) -> bool:
    """Whether a folder is one of another library."""
    return (folder / CONFIG).is_file() or megatron_directory(folder) is not None


def open_source(folder: Path) -> ForeignSource:
    """The weights in a folder of another library. Raises ValueError and FileNotFoundError."""
    return ForeignWeights(folder) if (folder / CONFIG).is_file() else MegatronWeights(folder)


def provenance(source: ForeignSource, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What is stored of where weights came from. hashes: xxh3-64 of each file by its name."""
    return {
        "from": str(source.folder.absolute()),
        "format": source.format,
        "files": dict(sorted(hashes.items())),
        "skipped_tensors": source.skipped,
        "notes": source.notes,
    }
