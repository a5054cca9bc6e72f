"""Print the requirements that the container image still needs: pyproject.toml's, without what the base image ships.

Pyproject.toml stays the only list of dependencies. The base image has torch (built for its CUDA), so torch
is left out; everything else, with the extras `data` and `export`, is printed one a line, and what the kernels of
Mamba-2 import (the Dockerfile compiles them without their dependencies). Standard library only: it runs before
anything is installed. Used by the Dockerfile: `python image_requirements.py pyproject.toml`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

SHIPPED = {"torch"}
EXTRAS = ("data", "export")
OF_MAMBA = ["einops>=0.8", "ninja"]  # transformers is in `export`


def requirements(pyproject: Path) -> list[str]:
    """Requirement strings of the project, EXTRAS and OF_MAMBA, without SHIPPED."""
    project = tomllib.loads(pyproject.read_text())["project"]
    listed = list(project["dependencies"])
    for extra in EXTRAS:
        listed += project["optional-dependencies"][extra]
    listed += OF_MAMBA
    return [line for line in listed if re.split(r"[^A-Za-z0-9._-]", line)[0].lower() not in SHIPPED]


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1])), sep="\n")
