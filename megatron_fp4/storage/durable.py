"""Durable, checked files: hashed while they are written, fsynced before they get their name, listed in a manifest.

What is promised to be on disk was fsynced, and what was written is known by size and xxh3-64 hash before it is read
back; so damage is reported with the name of the file, the expected and the actual value.

Not here: which files make a checkpoint (checkpoint/directory.py), and the bytes of tensors (checkpoint/write.py).
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.patience import read_json, read_patiently

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like."""

    num_bytes: int
    xxh3_64: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: the step of the checkpoint, and its files by name."""

    step: int
    files: dict[str, FileRecord]


class HashingFile(io.RawIOBase):
    """A binary file that hashes what is written to it; sequential writes only. `error` is the first that it met."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close())
        self._hash = xxhash.xxh3_64()
        self._num_bytes = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        try:
            self._file.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
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
        return FileRecord(self._num_bytes, self._hash.hexdigest())


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


def write_manifest(directory: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """List all files of a checkpoint; the list's presence under the final name is what makes it complete."""
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {name: {"bytes": files[name].num_bytes, "xxh3_64": files[name].xxh3_64} for name in sorted(files)},
    }
    write_durably(directory / MANIFEST, (json.dumps(body, indent=1) + "\n").encode())


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
        files = {name: FileRecord(int(one["bytes"]), str(one["xxh3_64"])) for name, one in body["files"].items()}
        step = int(body["step"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if outside := [name for name in files if not is_file_name(name)]:
        raise ValueError(f"{path} lists {outside[0]!r}, which is no file of its directory")
    return Manifest(step, files)


def is_file_name(name: str) -> bool:
    """Whether `name` is that of a file in the directory at hand, without a path that leads elsewhere."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def problem_of(directory: Path, name: str, expected: FileRecord) -> str | None:
    """None if the file is as recorded, else a sentence with its path, the expected and the actual value.

    Raises UnreadableFile.
    """
    path = directory / name
    try:
        num_bytes = read_patiently(path.stat, path).st_size
        if num_bytes != expected.num_bytes:
            return f"{path} has {num_bytes} bytes, expected {expected.num_bytes}"
        digest = read_patiently(lambda: _digest(path), path)
    except FileNotFoundError:
        return f"{path} is missing, expected {expected.num_bytes} bytes"
    if digest != expected.xxh3_64:
        return f"{path} has xxh3-64 {digest}, expected {expected.xxh3_64}"
    return None


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def share_of(files: Mapping[str, FileRecord], rank: int, size: int) -> list[str]:
    """The files that rank `rank` of `size` verifies: largest first, each to the rank with the fewest bytes so far."""
    bytes_of_rank = [0] * size
    names = []
    for name in sorted(files, key=lambda name: (-files[name].num_bytes, name)):
        target = bytes_of_rank.index(min(bytes_of_rank))
        bytes_of_rank[target] += files[name].num_bytes + 1
        if target == rank:
            names.append(name)
    return names
