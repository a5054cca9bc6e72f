"""Lines appended to a file, in spite of a disk that is full for a while.

What the disk refuses is kept in memory, to the byte, and written before the next line. So a full disk neither ends a
run nor tears or loses a line, as long as it has room again before the end.

Not here: fsync. A power cut may take the last lines, or leave blocks of zeros in their place, which `read_lines` tells
from the lines around them; what must survive one is written by durable.py.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A line of a file of JSON objects, each with a step. value: None if damaged; text is then what is left of it."""

    text: bytes
    value: dict[str, Any] | None


def read_lines(path: Path, having: bytes = b"") -> Iterator[Line]:
    """The lines of a file in which `having` occurs, in order; none if there is no file. One without a step is damaged.

    Zeros end a line as well, and make one damaged line: a good one may follow them. Half a line at the end, which a
    killed run leaves, is no line.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for raw in filter(lambda line: having in line, file):
            *texts, end = raw.split(b"\0") if b"\0" in raw else [raw]
            lines = [_parse(text) for text in (*texts, end if end.endswith(b"\n") else b"") if text.strip()]
            yield from (line for line in lines if line.value is not None)
            if texts or any(line.value is None for line in lines):
                yield Line(b"\0".join(line.text for line in lines if line.value is None), None)


def read_values(path: Path, having: bytes = b"") -> Iterator[dict[str, Any]]:
    """The values of `read_lines` without the damaged lines; how many those were is logged at the end."""
    damaged = 0
    for line in read_lines(path, having):
        if line.value is not None:
            yield line.value
        damaged += line.value is None
    if damaged:
        log.warning("%s: %d damaged line(s) are left out", path, damaged)


def read_tail(path: Path, num_bytes: int) -> list[dict[str, Any]]:
    """The values of the whole lines in the last `num_bytes` of a file, in order; damaged lines are left out."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - num_bytes)
        file.seek(start)
        if start:
            file.readline()
        lines = (_parse(raw) for raw in file if raw.endswith(b"\n"))
        return [line.value for line in lines if line.value is not None]


def _parse(text: bytes) -> Line:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # also of bytes that are no text, and of endless brackets
        value = None
    return Line(text.strip(), value if isinstance(value, dict) and type(value.get("step")) is int else None)


class AppendFile:
    """Appends JSON lines; each is in the file when `add` returns, unless the disk refused it, which is logged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"  # half a line that a killed run left
        self._waiting = bytearray(b"\n" if torn else b"")
        self._refused = False

    def add(self, line: dict[str, Any]) -> None:
        self._waiting += (json.dumps(line) + "\n").encode()
        self._flush()

    def close(self) -> None:
        self._flush()
        os.close(self._file)
        if self._waiting:
            log.error("%s: the last %d bytes could not be written", self._path, len(self._waiting))

    def _flush(self) -> None:
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting)
                del self._waiting[:written]
            self._refused = False
        except OSError as error:
            if not self._refused:
                log.warning("%s: %s; what belongs there waits in memory", self._path, error)
            self._refused = True
