"""Reading from a file server that does not answer for a moment.

A failed read says nothing about what is in a file. So it is tried again, and refused in the end; only a file that is
not there, or holds other bytes than were written, is damage. A directory in its place, or a file in the place of its
directory, means that it is not there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_SECONDS = (1.0, 4.0, 10.0)
"""Pauses between the tries."""


class UnreadableFile(ValueError):
    """The file system refused to read a file that is there; whether the file is intact is not known."""


def read_patiently(read: Callable[[], T], path: Path, pauses: Sequence[float] | None = None) -> T:
    """`read()`, again after each of the pauses while it raises OSError. Raises UnreadableFile after the last try.

    pauses: seconds; None for RETRY_SECONDS.

    FileNotFoundError, which stands for what is no file too, and every other exception pass at once.
    """
    for pause in (*(RETRY_SECONDS if pauses is None else pauses), None):
        try:
            return read()
        except FileNotFoundError:
            raise
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
        except OSError as error:
            if pause is None or isinstance(error, PermissionError):
                raise UnreadableFile(
                    f"{path} cannot be read ({error}), so whether it is intact is not known; start again when the file"
                    " system answers"
                ) from error
            log.warning("%s cannot be read (%s); trying again in %g s", path, error, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def read_json(path: Path, pauses: Sequence[float] | None = None) -> Any:
    """The JSON value in a file. pauses: see `read_patiently`.

    Raises FileNotFoundError; ValueError naming the file if that is no JSON; UnreadableFile.
    """
    try:
        return json.loads(read_patiently(path.read_bytes, path, pauses))
    except UnreadableFile:
        raise
    except (ValueError, RecursionError) as error:  # also of bytes that are no text, and of endless brackets
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
