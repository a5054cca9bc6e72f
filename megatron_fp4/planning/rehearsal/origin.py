"""Where in the project something was asked for: file and line of the innermost caller."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

import torch

import megatron_fp4

_PACKAGE = f"{Path(megatron_fp4.__file__).parent}/"
_OBSERVERS = f"{_PACKAGE}planning/"
_CARRIERS = ("comm/collectives.py", "comm/autograd.py", "comm/row_exchange.py")
"""Whoever called these asked for it."""
_files: dict[CodeType, str] = {}
"""The path within the package of code that has been asked about, "" where it is not the project's."""


def origin() -> str:
    """`layers/loss.py:48`, and in a backward pass the operation whose gradient is computed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _file_of(frame.f_code):
        frame = frame.f_back
    place = f"{_file_of(frame.f_code)}:{frame.f_lineno}" if frame is not None else "outside the project"
    node = torch._C._current_autograd_node()
    return place if node is None else f"{place} <{node.name()}>"


def called_by(file_name: str) -> bool:
    """Whether a function of a file with this ending is being executed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(file_name):
            return True
        frame = frame.f_back
    return False


def _file_of(code: CodeType) -> str:
    if code not in _files:
        name = code.co_filename
        inside = name.startswith(_PACKAGE) and not name.startswith(_OBSERVERS)
        path = name.removeprefix(_PACKAGE)
        _files[code] = path if inside and path not in _CARRIERS else ""
    return _files[code]
