"""Reading from a file server that does not answer for a moment.

A failed read says nothing about what is in a file. So it is tried again, and refused in the end; only a file that is
not there, or holds other bytes than were written, is damage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_SECONDS = (1.0, 4.0, 10.0)
"""Pauses between the tries."""


class UnreadableFile(ValueError):
    """The file system refused to read a file that is there; whether the file is intact is not known."""


def read_patiently(read: Callable[[], T], path: Path, pauses: Sequence[float] | None = None) -> T:
    """`read()`, again after each of the pauses while it raises OSError. Raises UnreadableFile after the last try.

    pauses: seconds; None for RETRY_SECONDS.

    FileNotFoundError and every other exception pass at once.
    """
    for pause in (*(RETRY_SECONDS if pauses is None else pauses), None):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError as error:
            if pause is None or isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
                raise UnreadableFile(
                    f"{path} cannot be read ({error}), so whether it is intact is not known; start again when the file"
                    " system answers"
                ) from error
            log.warning("%s cannot be read (%s); trying again in %g s", path, error, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
