"""Lines appended to a file, in spite of a disk that is full for a while.

What the disk refuses is kept in memory, to the byte, and written before the next line. So a full disk neither ends a
run nor tears or loses a line, as long as it has room again before the end.

Not here: fsync. A power cut may take the last lines; what must survive one is written by durable.py.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class AppendFile:
    """Appends JSON lines; each is in the file when `add` returns, unless the disk refused it, which is logged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = bytearray()
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
