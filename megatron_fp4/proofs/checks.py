"""The result of one thing that was tried before a run: what `preflight` prints, a line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class CheckResult:
    """ok: None where nothing could be measured here; `text` says why."""

    name: str
    ok: bool | None
    text: str


def attempt(results: list[CheckResult], name: str, make: Callable[[], T], good: str) -> T | None:
    """Append that `make` works, or why not (ValueError, OSError); returns what it made, or None."""
    try:
        product = make()
    except (ValueError, OSError) as error:
        results.append(CheckResult(name, False, str(error)))
        return None
    results.append(CheckResult(name, True, good))
    return product
