"""Paths of command lines: what only looks like one is refused before a folder of that name is made.

Not here: paths among the settings of a run, which megatron_fp4.settings.check_bounds refuses.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from megatron_fp4.settings import path_objection


def local_path(text: str) -> Path:
    """The type of an argument. Raises ArgumentTypeError for a URL, and for ~, which Python does not expand."""
    return Path(local_text(text))


def local_text(text: str) -> str:
    """The type of an argument that is a path, a prefix or a glob, and is passed on as text. Raises as `local_path`."""
    if objection := path_objection(text):
        raise argparse.ArgumentTypeError(f"{text}: {objection}")
    return text


def check_room(to: Path, num_bytes: int) -> None:
    """Raise ValueError where the disk of a file or directory to be written has no room for it."""
    above = next(path for path in to.absolute().parents if path.is_dir())
    free = shutil.disk_usage(above).free
    if free < num_bytes:
        raise ValueError(f"the model takes {num_bytes / 1e9:.3g} GB, and {above} has room for {free / 1e9:.3g} GB")
