"""Files of documents -> texts, in bounded memory: JSONL, plain text (each also .gz or .zst) and Parquet.

Reading is split in two. `read_batches` cuts a file into batches of raw records (about `batch_bytes` each,
never more than one record over) with the position after them; it is cheap and runs in one process. `texts_of` turns
raw records into texts and counts every record that is not one; it is the dear part and runs in the workers.
A batch's borders depend on the input alone, so any number of workers, or a resumed run, gives the same result.

Not here: what a batch is (records.py), Parquet files (parquet.py).
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data_tools.parquet import parquet_batches
from data_tools.policies import Policies, Report
from data_tools.records import BEGIN, Position, RawBatch, require
from data_tools.zstd import ZstdReader

BATCH_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"  # some programs open a UTF-8 file with it; it is no part of the text
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files of the globs, each glob's sorted; ValueError for one without a match or with an unknown ending."""
    files: list[Path] = []
    for pattern in patterns:
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if not matches and Path(pattern).is_file():
            matches = [Path(pattern)]  # a name that only looks like a pattern
        if not matches:
            raise ValueError(f"no input file matches {pattern!r}")
        for path in matches:
            kind_of(path)
        files += matches
    return list(dict.fromkeys(files))


def kind_of(path: Path) -> str:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        return "parquet"
    kind = KINDS.get(Path(name).suffix)
    if kind is None:
        raise ValueError(f"{path}: the ending must be one of {sorted(KINDS)} (also .gz, .zst) or .parquet")
    return kind


def read_batches(
    files: Sequence[Path],
    policies: Policies,
    *,
    text_key: str = "text",
    start: Position = BEGIN,
    batch_bytes: int = BATCH_BYTES,
) -> Iterator[RawBatch]:
    """Raw batches of all files from `start` on."""
    done = sum(path.stat().st_size for path in files[: start.file])
    for number in range(start.file, len(files)):
        offset = start.offset if number == start.file else 0
        try:
            if kind_of(files[number]) == "parquet":
                yield from parquet_batches(files[number], number, offset, text_key, done)
            else:
                yield from _line_batches(files[number], number, offset, policies, batch_bytes, done)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{files[number]}: the compressed file is truncated or damaged ({error})") from None
        done += files[number].stat().st_size


def _line_batches(
    path: Path, number: int, offset: int, policies: Policies, batch_bytes: int, done: int
) -> Iterator[RawBatch]:
    kind = kind_of(path)
    whole = kind == "text" and policies.text_unit == "file"
    with open(path, "rb") as raw, _decompressed(path, raw) as stream:
        _skip_to(stream, offset, path)
        first, records, size, dropped = offset, [], 0, 0
        while True:
            record, taken, too_long = _record(stream, policies, whole)
            if kind == "jsonl" and offset == 0 and record.removeprefix(_BOM).lstrip().startswith(b"["):
                raise ValueError(f"{path} is one JSON array; one object per line is expected (jq -c '.[]' makes that)")
            if too_long and policies.too_long == "error":
                raise ValueError(
                    f"{path}, byte {offset}: a record of more than {policies.max_document_bytes} bytes; raise "
                    "--max-document-bytes or choose --on-too-long skip"
                )
            if offset == 0:
                record = record.removeprefix(_BOM)
            empty_file = whole and offset == taken == 0
            offset += taken
            if too_long:
                dropped += 1
            elif taken or empty_file:
                records.append(record)
                size += len(record)
            if (records and (size >= batch_bytes or not taken)) or (dropped and not taken):
                place = Position(number + 1, 0) if empty_file else Position(number, offset)
                yield RawBatch(f"{path}, byte {first}", kind, records, dropped, place, done + raw.tell())
                first, records, size, dropped = offset, [], 0, 0
            if not taken:
                return


def _record(stream: IO[bytes], policies: Policies, whole: bool) -> tuple[bytes, int, bool]:
    """(record without its newline, bytes consumed, too long?); never holds more than the limit of a dropped record."""
    limit = -1 if policies.too_long == "keep" else policies.max_document_bytes
    take = stream.read if whole else stream.readline
    data = take(limit + 1 if limit >= 0 else -1)
    if limit < 0 or len(data) <= limit or (not whole and data.endswith(b"\n") and len(data) - 1 <= limit):
        return data if whole else data.rstrip(b"\r\n"), len(data), False
    taken = len(data)
    while not data.endswith(b"\n") or whole:
        data = take(1 << 20)
        taken += len(data)
        if not data:
            break
    return b"", taken, True


def _skip_to(stream: IO[bytes], offset: int, path: Path) -> None:
    if stream.seekable() and not isinstance(stream, gzip.GzipFile):
        stream.seek(offset)
        return
    while offset:
        data = stream.read(min(offset, 1 << 20))
        if not data:
            raise ValueError(f"{path}: shorter than at the interrupted run ({offset} bytes are missing)")
        offset -= len(data)


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix in (".gz", ".zst") and not path.stat().st_size:
        raise ValueError(f"{path}: the compressed file is truncated: it has no bytes; copy it again")
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(ZstdReader(raw, path, require("zstandard", path)), 1 << 20)
    return raw


def texts_of(batch: RawBatch, text_key: str, policies: Policies, report: Report) -> list[str]:
    """The documents of a batch; everything else is counted in `report`, or refused as the policies say."""
    texts = []
    if batch.dropped:
        report.counts["too long: skip"] += batch.dropped
    for number, record in enumerate(batch.records):
        where = f"{batch.where} + {number} records"
        text = _text_of(record, batch.kind, text_key, policies, report, where)
        if text is None:
            continue
        if not text.strip():
            report.note("empty", policies.empty, where)
            if policies.empty == "skip":
                continue
        report.counts["documents"] += 1
        report.counts["text_bytes"] += len(text.encode())
        texts.append(text)
    return texts


def _text_of(record: Any, kind: str, key: str, policies: Policies, report: Report, where: str) -> str | None:
    value = record
    if isinstance(record, bytes):
        value = _utf8(record, policies, report, where)
    if kind == "jsonl" and value is not None and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            report.note("invalid json", policies.invalid_json, where)
            return None
        value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, str):
            report.note("missing key", policies.missing_key, f"{where} (key {key!r})")
            return None
        if not value.isascii():  # "\\ud800" is valid JSON but not text
            value = _utf8(value.encode("utf-8", "surrogatepass"), policies, report, where)
    elif kind == "parquet" and not isinstance(record, str | bytes):
        report.note("missing key", policies.missing_key, f"{where} (no text in {key!r}: {record!r:.40})")
        return None
    return value


def _utf8(data: bytes, policies: Policies, report: Report, where: str) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        report.note("invalid utf8", policies.invalid_utf8, where)
    return data.decode("utf-8", errors="replace") if policies.invalid_utf8 == "replace" else None


def read_texts(files: Sequence[Path], text_key: str, policies: Policies, report: Report) -> Iterator[str]:
    """All documents of the files, in this process."""
    for batch in read_batches(files, policies, text_key=text_key):
        yield from texts_of(batch, text_key, policies, report)
