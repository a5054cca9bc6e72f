"""A progress line on stderr: share, MB/s, time left. Redrawn in place on a terminal, every 10 seconds elsewhere."""

from __future__ import annotations

import sys
import time


class ProgressBar:
    """`resumed`: the first update says where an earlier run stopped, and does not count as speed."""

    def __init__(self, total_bytes: int, *, resumed: bool = False) -> None:
        self.total_bytes = max(1, total_bytes)
        self._terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()
        self._first: int | None = None if resumed else 0  # bytes done before this run
        self._last = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._show(self._last)
        sys.stderr.write("\n" if self._terminal else "")

    def update(self, done_bytes: int) -> None:
        """`done_bytes` of the stored files are read."""
        if self._first is None:
            self._first = done_bytes
        self._last = done_bytes
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else 10.0):
            self._shown = now
            self._show(done_bytes)

    def _show(self, done_bytes: int) -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        rate = (done_bytes - (self._first or 0)) / seconds
        left = f"{max(0, self.total_bytes - done_bytes) / rate:6.0f} s" if rate else "unknown"
        line = f"{100 * done_bytes / self.total_bytes:5.1f}%  {rate / 1e6:7.2f} MB/s  left {left}"
        sys.stderr.write(f"\r{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()
