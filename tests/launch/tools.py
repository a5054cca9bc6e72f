"""Find a linter that the `test` extra installs beside the interpreter."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def linter(name: str) -> str:
    """Path of the program `name`; an assertion with the remedy if it is not installed."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert path, f"{name} is not installed: pip install -e '.[test]'"
    return path
