"""Imports that ask a file system no more than they must: thousands of ranks start at once, from one that they share.

For each module that registers an operator, torch asks `inspect` for the module of a frame, and `inspect` looks for the
real path of every imported module's file to find it: more than half of the file operations of a start. A frame knows
the name of its module.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType


@contextmanager
def modules_of_frames_by_name() -> Iterator[None]:
    """Let `inspect.getmodule` of a frame look at no file. For imports: whatever runs then finds the same modules."""
    by_files = inspect.getmodule

    def getmodule(object: object, _filename: str | None = None) -> ModuleType | None:
        if isinstance(object, FrameType):
            return sys.modules.get(object.f_globals.get("__name__", ""))
        return by_files(object, _filename)

    inspect.getmodule = getmodule
    try:
        yield
    finally:
        inspect.getmodule = by_files
