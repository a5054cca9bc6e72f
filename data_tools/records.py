"""A batch of raw records, the position after it, and the packages that some formats need.

Not here: how files are cut into batches (documents.py, parquet.py).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple


class Position(NamedTuple):
    """Where reading goes on: number of the file and, in it, bytes (uncompressed) or rows read."""

    file: int
    offset: int


BEGIN = Position(0, 0)


class RawBatch(NamedTuple):
    where: str  # file and offset of the first record, for messages
    kind: str  # jsonl | text | parquet
    records: list[Any]  # bytes, or str | None for parquet
    dropped: int  # over-long records left out
    end: Position
    file_bytes: int  # bytes of the stored files read so far, for progress


def require(module: str, path: Path) -> Any:
    """The module that reads `path`; ValueError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ValueError(f"{path}: reading it needs the package {package!r}: pip install {package}") from None
