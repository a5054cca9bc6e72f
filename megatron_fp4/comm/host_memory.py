"""How the C library hands out host memory: keep what a step frees for the next one.

glibc gives every block above 32 MiB (less, until it has seen larger ones) fresh pages from the kernel and
returns them when it is freed. A training step on a CPU frees and takes the same tensors again and again, and the page
faults then cost more than the arithmetic: quantizing 32 MiB of BF16 was measured to take four times as long. This file
raises the two thresholds. Not here: pooling, and limits; the process keeps its largest size so far.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT_BYTES = 1 << 30
_TRIM_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Call once, before training on a CPU; returns False where the C library has no such settings."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES), (_M_TRIM_THRESHOLD, _TRIM_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
