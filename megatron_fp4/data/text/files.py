"""What the kinds of tokenizer files have in common: their fingerprint, and the package that reads them."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any


def fingerprint_of(data: bytes) -> str:
    """32 hexadecimal digits of the sha256 of a file's content."""
    return hashlib.sha256(data).hexdigest()[:32]


def require_package(name: str) -> Any:
    """The module; ValueError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"this tokenizer needs the package {name!r}: pip install {name}") from None
