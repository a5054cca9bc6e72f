"""Decompressed bytes of a .zst file, of one or several frames, that knows a truncated file from a whole one.

Zstandard's own `stream_reader` ends quietly where the input ends, so a file cut at the end of a record would
lose the rest without a word; a decompression object knows whether its frame has ended.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

MAX_WINDOW_BYTES = 1 << 31  # `zstd --long=31`, the format's largest; the library's own limit is 128 MiB
_CHUNK = 1 << 12  # compressed bytes at a time: what they grow to is held in memory


class ZstdReader(io.RawIOBase):
    """Raises EOFError in the middle of a frame, and ValueError for what is no zstd. path: for messages."""

    def __init__(self, raw: IO[bytes], path: Path, library: Any) -> None:
        self._raw = raw
        self._path = path
        self._library = library
        self._decompressor = library.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame: Any = None  # the one that is being read; None between two
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._raw.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        parts = []
        try:
            while data:
                self._frame = self._frame or self._decompressor.decompressobj()
                parts.append(self._frame.decompress(data))
                if not self._frame.eof:
                    break
                data, self._frame = self._frame.unused_data, None
        except self._library.ZstdError as error:
            raise ValueError(f"{self._path}: the compressed file is damaged ({error})") from None
        return b"".join(parts)
