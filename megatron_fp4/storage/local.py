"""Paths of command lines: what only looks like one is refused before a folder of that name is made.

Not here: paths among the settings of a run, which megatron_fp4.settings.check_bounds refuses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_fp4.settings import path_objection


def local_path(text: str) -> Path:
    """The type of an argument. Raises ArgumentTypeError for a URL, and for ~, which Python does not expand."""
    if objection := path_objection(text):
        raise argparse.ArgumentTypeError(f"{text}: {objection}")
    return Path(text)
