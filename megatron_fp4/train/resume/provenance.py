"""What made a checkpoint: versions of the packages, and the commit of the checkout."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import megatron_fp4


def versions() -> dict[str, str]:
    """Version of each package that decides the numbers; Transformer Engine only where it is installed."""
    packages = {
        "megatron_fp4": megatron_fp4.__version__,
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    if engine := _transformer_engine():
        packages["transformer_engine"] = engine
    return packages


@functools.cache
def _transformer_engine() -> str:
    """Its version, "" where it is not installed; to find out walks all of sys.path, and every save asks."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("transformer-engine")
    return ""


def source_digest() -> str:
    """Digest of this package's source files: tells two checkouts apart that git calls by one name ("...-dirty")."""
    root = Path(megatron_fp4.__file__).parent
    content = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        text = path.read_bytes()
        content.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return content.hexdigest()


@functools.cache
def git_state() -> str | None:
    """Commit of the checkout that this package runs from, as `git describe` says it ("...-dirty" with changes on top).

    None where it is no checkout, or there is no git.
    """
    root = Path(megatron_fp4.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # also the repository around a virtual environment is not this package's
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
