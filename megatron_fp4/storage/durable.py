"""Durable, checked files: hashed while they are written, fsynced before they get their name, listed in a manifest.

What is promised to be on disk was fsynced, and what was written is known by size and xxh3-64 hash before it is read
back; so damage is reported with the name of the file, the expected and the actual value.

Not here: which files make a checkpoint (checkpoint/directory.py), and the bytes of tensors (checkpoint/write.py).
"""

from __future__ import annotations

import heapq
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.patience import read_json, read_patiently

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""1: one hash for each file. 2: also files in parts, each with its own."""
READ_BYTES = 8 << 20
MOST_NAME_BYTES = 255  # of a file's name, on every usual file system; a longer one looks like one that does not answer


@dataclass(frozen=True)
class FileRecord:
    """What `num_bytes` bytes of a file from byte `start` on must look like."""

    num_bytes: int
    xxh3_64: str
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.num_bytes


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: the step of the checkpoint, and the parts of each file, ascending, mostly only one."""

    step: int
    files: dict[str, tuple[FileRecord, ...]]

    def parts(self, names: Iterable[str] | None = None) -> list[tuple[str, FileRecord]]:
        """The parts of these files or of all."""
        return [(name, part) for name in (self.files if names is None else names) for part in self.files[name]]

    def file_bytes(self, name: str) -> int:
        return self.files[name][-1].stop


class HashingFile(io.RawIOBase):
    """A binary file that hashes what is written to it; sequential writes only.

    start: None for a file of its own, which is made anew; else only the bytes from there on are touched.
    """

    def __init__(self, path: str | os.PathLike[str], start: int | None = None) -> None:
        super().__init__()
        if start is None:
            self._file = open(path, "wb")  # noqa: SIM115 (closed by close())
        else:
            self._file = open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")  # noqa: SIM115
            self._file.seek(start)
        self._hash = xxhash.xxh3_64()
        self._start, self._num_bytes = start or 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._file.write(view)
        self._num_bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._num_bytes

    def fileno(self) -> int:
        self._file.flush()
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        super().close()

    def record(self) -> FileRecord:
        return FileRecord(self._num_bytes, self._hash.hexdigest(), self._start)


def write_temporary(path: Path, *parts: Any) -> tuple[Path, FileRecord]:
    """Write and fsync `parts` (objects with a buffer, one after the other) beside `path`, to be renamed to it.

    What needs disk space is thus done before what does not. The name is this process's own, also on a shared folder.
    Raises OSError, and leaves no file then.
    """
    temporary = path.with_name(f"{path.name}.tmp-{Owner.me().tag}")
    stream = HashingFile(temporary)
    try:
        for part in parts:
            stream.write(part)
        os.fsync(stream.fileno())
    except BaseException:
        with suppress(OSError):
            stream.close()
        with suppress(OSError):
            temporary.unlink()
        raise
    stream.close()
    return temporary, stream.record()


def write_durably(path: Path, *parts: Any) -> FileRecord:
    """Create or replace `path` in one step: readers see the old content or the new one, also after a power cut."""
    temporary, record = write_temporary(path, *parts)
    os.replace(temporary, path)
    return record


def fsync_directory(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, step: int, files: Mapping[str, Sequence[FileRecord]]) -> None:
    """List all files of a checkpoint; the list's presence under the final name is what makes it complete.

    files: of each the parts, ascending.
    """
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {name: _listed(files[name]) for name in sorted(files)},
    }
    write_durably(directory / MANIFEST, (json.dumps(body, indent=1) + "\n").encode())


def _listed(parts: Sequence[FileRecord]) -> dict[str, Any]:
    """A part is a text, so that it takes one line: its first byte, its number of bytes, its hash."""
    if len(parts) == 1 and parts[0].start == 0:
        return {"bytes": parts[0].num_bytes, "xxh3_64": parts[0].xxh3_64}
    return {"bytes": parts[-1].stop, "parts": [f"{part.start} {part.num_bytes} {part.xxh3_64}" for part in parts]}


def _parts(name: str, listed: Mapping[str, Any]) -> tuple[FileRecord, ...]:
    if "parts" not in listed:
        return (FileRecord(int(listed["bytes"]), str(listed["xxh3_64"])),)
    parts = []
    for text in listed["parts"]:
        start, num_bytes, digest = text.split()
        parts.append(FileRecord(int(num_bytes), digest, int(start)))
    stops = [0, *(part.stop for part in parts)]
    if (
        not parts
        or any(part.start < stop for part, stop in zip(parts, stops, strict=False))
        or stops[-1] != int(listed["bytes"])
    ):
        raise ValueError(f"the parts of {name} do not follow each other up to its end")
    return tuple(parts)


def read_manifest(directory: Path) -> Manifest:
    """Raises ValueError, naming the file, if the manifest is missing or not one; UnreadableFile."""
    path = directory / MANIFEST
    try:
        body = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint was not completed, or was altered") from None
    try:
        if body["format_version"] > FORMAT_VERSION:
            raise ValueError(f"format version {body['format_version']}; this program reads {FORMAT_VERSION}")
        files = {name: _parts(name, one) for name, one in body["files"].items()}
        step = int(body["step"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if outside := [name for name in files if not is_file_name(name)]:
        raise ValueError(f"{path} lists {outside[0]!r}, which is no file of its directory")
    return Manifest(step, files)


def is_file_name(name: str) -> bool:
    """Whether `name` is that of a file in the directory at hand, without a path that leads elsewhere, fit to print."""
    fits = name.isprintable() and len(name.encode()) <= MOST_NAME_BYTES
    return fits and name not in ("", ".", "..") and not set(name) & set("/\\")


def problem_of(directory: Path, name: str, expected: FileRecord, file_bytes: int | None = None) -> str | None:
    """None if the part of the file is as recorded, else a sentence with its path, the expected and the actual value.

    file_bytes: what the whole file must have; None if the part is all of it. Raises UnreadableFile.
    """
    path = directory / name
    expected_bytes = expected.num_bytes if file_bytes is None else file_bytes
    try:
        num_bytes = read_patiently(path.stat, path).st_size
        if num_bytes != expected_bytes:
            return f"{path} has {num_bytes} bytes, expected {expected_bytes}"
        digest = read_patiently(lambda: _digest(path, expected.start, expected.num_bytes), path)
    except FileNotFoundError:
        return f"{path} is missing, expected {expected_bytes} bytes"
    if digest != expected.xxh3_64:
        where = "" if expected.num_bytes == expected_bytes else f" in bytes {expected.start} to {expected.stop}"
        return f"{path} has xxh3-64 {digest}{where}, expected {expected.xxh3_64}"
    return None


def hash_of(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """xxh3-64 of a whole file. beat: called after each block. Raises FileNotFoundError; UnreadableFile."""
    return read_patiently(lambda: _digest(path, 0, path.stat().st_size, beat), path)


def _digest(path: Path, start: int, num_bytes: int, beat: Callable[[], None] = lambda: None) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        while num_bytes > 0 and (block := stream.read(min(READ_BYTES, num_bytes))):
            digest.update(block)
            num_bytes -= len(block)
            beat()
    return digest.hexdigest()


def share_of(parts: Sequence[tuple[str, FileRecord]], rank: int, size: int) -> list[tuple[str, FileRecord]]:
    """The parts that rank `rank` of `size` verifies: largest first, each to the rank with the fewest bytes so far."""
    loads = [(0, target) for target in range(size)]
    share = []
    for name, part in sorted(parts, key=lambda one: (-one[1].num_bytes, one[0], one[1].start)):
        num_bytes, target = loads[0]
        heapq.heapreplace(loads, (num_bytes + part.num_bytes + 1, target))
        if target == rank:
            share.append((name, part))
    return share
