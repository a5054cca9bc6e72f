"""Parquet files as batches of records: a batch is some rows of a row group, its position a number of rows.

A column that is declared text may hold bytes that are no UTF-8. Arrow refuses the whole column then; here it comes as
bytes, and the policies decide record by record.

Not here: lines and whole files of text (documents.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.records import Position, RawBatch, require

PARQUET_ROWS = 1024


def parquet_batches(path: Path, number: int, offset: int, text_key: str, done: int) -> Iterator[RawBatch]:
    """The batches of one file from row `offset` on. number: of the file. done: bytes of the files before it."""
    parquet = require("pyarrow.parquet", path)
    try:
        opened = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's messages name no file
        raise ValueError(f"{path}: {error}") from None
    with opened as file:
        if text_key not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column {text_key!r}; its columns are {file.schema_arrow.names}")
        size, rows, at = path.stat().st_size, file.metadata.num_rows, 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if at + count <= offset:
                at += count
                continue
            for part in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[text_key]):
                end = at + part.num_rows
                if end > offset:
                    records = _records_of(part.column(0).slice(max(0, offset - at)))
                    where = f"{path}, row {max(at, offset)}"
                    yield RawBatch(where, "parquet", records, 0, Position(number, end), done + size * end // rows)
                at = end


def _records_of(column: Any) -> list[Any]:
    """The values of an Arrow column; all as bytes where a string is not UTF-8: the policies decide about those."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        arrow = importlib.import_module("pyarrow")
        strings = column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column
        return strings.cast(arrow.large_binary()).to_pylist()
