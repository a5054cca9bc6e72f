"""One checkpoint from the disk to the store: files in parts, the manifest last, then `latest`.

The files are opened before the first byte is sent, so that a retention that removes the checkpoint meanwhile takes
nothing away; and hashed as they are read, so that what was damaged on the disk never becomes a checkpoint of the store.
What an earlier upload has sent is not sent again: its name stands for the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import xxhash

from megatron_fp4.checkpoint.directory import LATEST
from megatron_fp4.checkpoint.mirror.contents import MirroredName, digest_of, named_by_latest
from megatron_fp4.storage.durable import MANIFEST, FileRecord, Manifest, read_manifest
from megatron_fp4.storage.remote.client import PART_BYTES, Conflict, NoCondition, Remote, StoreError

FILES_AT_ONCE = 4
"""Host memory of an upload: files x parts at once x bytes of a part (client.py), 256 MiB."""
VISIBLE_SECONDS = (0.0, 1.0, 4.0)
"""Pauses before a listing must show what was sent; stores of today show it at once."""


class UploadStopped(RuntimeError):
    """It is wanted no more, or its files are gone."""


class DamagedSource(ValueError):
    """A file on the disk is not as it was written; the message has path, expected and actual value."""


def send_checkpoint(
    remote: Remote,
    directory: Path,
    name: MirroredName,
    present: Mapping[str, int],
    stops: Callable[[], bool] = lambda: False,
) -> int:
    """Send the checkpoint in `directory` as `name`; returns the bytes that went, when it is complete in the store.

    present: files of that name which are in the store already, with their sizes. stops: looked at before each block.
    Raises StoreError, DamagedSource, and UploadStopped also if the checkpoint is gone or another one.
    """
    with ExitStack() as opened:
        try:
            manifest = read_manifest(directory)
            streams = {file: opened.enter_context(open(directory / file, "rb")) for file in manifest.files}
            content = (directory / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise UploadStopped(f"{directory} was removed") from None
        if digest_of(content) != name.digest:  # replaced while it was opened
            raise UploadStopped(f"{directory} is not {name} any more")
        waiting = [file for file in manifest.files if present.get(file) != manifest.file_bytes(file)]

        def send(file: str) -> None:
            blocks = _checked(streams[file], directory / file, manifest.files[file], stops)
            remote.send(f"{name}/{file}", blocks, manifest.file_bytes(file))

        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="mirror") as pool:
            for done in [pool.submit(send, file) for file in waiting]:
                done.result()
    _check_arrived(remote, name, manifest)
    if stops():
        raise UploadStopped(f"{name} is wanted no more")
    remote.put(f"{name}/{MANIFEST}", content)
    return sum(manifest.file_bytes(file) for file in waiting)


def _checked(stream: BinaryIO, path: Path, parts: tuple[FileRecord, ...], stops: Callable[[], bool]) -> Iterator[bytes]:
    """The bytes of a file; raises DamagedSource at the end of a part that is not as recorded."""
    position = 0
    for part in parts:
        if part.start > position:  # between the parts of two ranks
            yield stream.read(part.start - position)
        digest, missing = xxhash.xxh3_64(), part.num_bytes
        while missing and (block := stream.read(min(PART_BYTES, missing))):
            if stops():
                raise UploadStopped(f"{path} is wanted no more")
            digest.update(block)
            missing -= len(block)
            yield block
        if missing or digest.hexdigest() != part.xxh3_64:
            actual = f"{missing} bytes too few" if missing else f"xxh3-64 {digest.hexdigest()}"
            raise DamagedSource(f"{path} has {actual} in bytes {part.start} to {part.stop}, expected {part.xxh3_64}")
        position = part.stop


def _check_arrived(remote: Remote, name: MirroredName, manifest: Manifest) -> None:
    """Raises StoreError unless the store shows every file with its size."""
    for pause in VISIBLE_SECONDS:
        time.sleep(pause)
        sizes = {one.key.partition("/")[2]: one.num_bytes for one in remote.entries(str(name))}
        wrong = [file for file in manifest.files if sizes.get(file) != manifest.file_bytes(file)]
        if not wrong:
            return
    file = wrong[0]
    raise StoreError(
        f"{remote.url}/{name}/{file} has {sizes.get(file, 'no')} bytes in the store, sent {manifest.file_bytes(file)}"
    )


def advance_latest(remote: Remote, name: MirroredName) -> None:
    """Let `latest` name a complete checkpoint. Raises Conflict if another launch writes it too, StoreError."""
    content = f"{name}\n".encode()
    named, version = named_by_latest(remote)
    if named == name:
        return
    try:
        if version:
            remote.replace(LATEST, content, version)
        else:
            remote.create(LATEST, content)
    except NoCondition:
        remote.put(LATEST, content)
    except Conflict:
        if named_by_latest(remote)[0] != name:  # else the answer to this put was lost, and it was sent again
            raise
