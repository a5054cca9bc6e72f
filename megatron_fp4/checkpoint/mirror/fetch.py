"""A checkpoint from the store to the disk: each rank brings its share of the bytes, and hashes them as they arrive.

It is written beside the checkpoints as one that is being saved, and gets its name when all ranks have their share: a
kill on the way leaves what the next start sweeps. What is damaged in the store, or not there, is passed over with a
warning, as on the disk; a store that does not answer is a refusal, because it may hold what is newer than the disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import xxhash

from megatron_fp4.checkpoint.commit import SavePlaces, publish
from megatron_fp4.checkpoint.config import OnCorrupt
from megatron_fp4.checkpoint.load import CheckpointReader, CorruptCheckpoint
from megatron_fp4.checkpoint.mirror.contents import MirroredName, digest_of, look_at_mirror
from megatron_fp4.checkpoint.mirror.keep import dropped
from megatron_fp4.comm import collectives
from megatron_fp4.storage.durable import (
    MANIFEST,
    FileRecord,
    Manifest,
    fsync_directory,
    read_manifest,
    share_of,
    write_durably,
)
from megatron_fp4.storage.local import check_room
from megatron_fp4.storage.patience import UnreadableFile
from megatron_fp4.storage.remote.client import PART_BYTES, AccessRefused, Remote, StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSES = (1.0, 4.0, 10.0)
"""Between the tries to read from a store, each of which the client has repeated for a while."""
BLOCKS_AT_ONCE = 4


class MirrorFetcher:
    """Brings checkpoints of a mirror into the directory of a run. Collective, like the reader that it works for."""

    def __init__(self, remote: Remote, reader: CheckpointReader, places: SavePlaces) -> None:
        self.remote, self.reader = remote, reader
        self._places = places

    def names(self) -> list[MirroredName]:
        """What a resume would try, newest first. Collective. Raises UnreadableFile."""
        group, root = self.reader.group, self.reader.root

        def look() -> list[MirroredName]:
            return look_at_mirror(self.remote).order(without=dropped(root)) if group.rank == 0 else []

        names = self.reader.agreed(lambda: read_store(look, self.remote.url))
        return collectives.broadcast_object(names, group)

    def bring(self, above: int | None) -> int | None:
        """Bring the newest intact checkpoint of a step above `above` (None: of any) to the disk; returns its step.

        None if there is none. Collective. Raises UnreadableFile, CorruptCheckpoint where on_corrupt=fail.
        """
        for name in self.names():
            if above is not None and name.step <= above:
                return None
            try:
                self.fetch(name)
                return name.step
            except CorruptCheckpoint as damage:
                if self.reader.config.on_corrupt is OnCorrupt.fail:
                    raise
                if self.reader.group.rank == 0:
                    log.warning("%s of the mirror is refused, trying the one before it: %s", name, damage)
        return None

    def fetch(self, name: MirroredName, *, only_small: bool = False) -> None:
        """One checkpoint under its own step. only_small: without the files of tensors.

        Raises UnreadableFile, CorruptCheckpoint.
        """
        reader, group = self.reader, self.reader.group
        place = self._places.next(name.step)
        directory, number = place.directory, place.number
        began = time.monotonic()
        try:
            reader.agreed(lambda: self._begin(name, directory, only_small) if group.rank == 0 else None)
            reader.agreed(lambda: self._bring_share(name, directory, only_small))
            reader.agreed(lambda: self._end(name, directory, number) if group.rank == 0 else None)
        except ValueError:
            if group.rank == 0:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        reader.damaged.discard(name.step)
        if group.rank == 0:
            seconds = time.monotonic() - began
            log.warning("checkpoint %d was brought from %s in %.1f s", name.step, self.remote.url, seconds)

    def _begin(self, name: MirroredName, directory: Path, only_small: bool) -> None:
        """Rank 0: the directory with the manifest, whose name is checked; nothing is read from it before."""
        key = f"{name}/{MANIFEST}"
        content = read_store(lambda: self.remote.read(key), self.remote.url)
        if digest_of(content) != name.digest:
            raise ValueError(f"{self.remote.url}/{key} has xxh3-64 {digest_of(content)}, expected {name.digest}")
        with _written(directory):
            directory.mkdir(parents=True)
            write_durably(directory / MANIFEST, content)
        manifest = read_manifest(directory)
        stored = read_store(lambda: self.remote.entries(str(name)), self.remote.url)
        sizes = {one.key.partition("/")[2]: one.num_bytes for one in stored}
        for file in manifest.files:
            if sizes.get(file) != manifest.file_bytes(file):
                size = f"{sizes.get(file, 'no')} bytes, expected {manifest.file_bytes(file)}"
                raise ValueError(f"{self.remote.url}/{name}/{file} has {size}")
        try:
            check_room(directory, sum(part.num_bytes for _, part in manifest.parts(_files(manifest, only_small))))
        except ValueError as error:
            raise UnreadableFile(f"{name} of the mirror cannot be brought: {error}") from None

    def _bring_share(self, name: MirroredName, directory: Path, only_small: bool) -> None:
        group, manifest = self.reader.group, read_manifest(directory)
        parts = manifest.parts(_files(manifest, only_small))
        share = share_of(parts, group.rank, group.size)
        with ThreadPoolExecutor(BLOCKS_AT_ONCE, thread_name_prefix="mirror") as pool:
            for file, part in share:
                self._bring_part(f"{name}/{file}", directory / file, part, pool)

    def _bring_part(self, key: str, path: Path, part: FileRecord, pool: ThreadPoolExecutor) -> None:
        """Raises UnreadableFile, and ValueError if other bytes come than were sent."""
        digest, position = xxhash.xxh3_64(), part.start
        with _written(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for block in self._blocks(key, part, pool):
                digest.update(block)
                with _written(path):
                    os.pwrite(descriptor, block, position)
                position += len(block)
                self.reader.beat()
            with _written(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if digest.hexdigest() != part.xxh3_64:
            raise ValueError(
                f"{self.remote.url}/{key} has xxh3-64 {digest.hexdigest()} in bytes {part.start} to {part.stop},"
                f" expected {part.xxh3_64}"
            )

    def _blocks(self, key: str, part: FileRecord, pool: ThreadPoolExecutor) -> Iterator[bytes]:
        """The bytes of a part in order, a few blocks at a time."""

        def read(start: int) -> bytes:
            length = min(PART_BYTES, part.stop - start)
            return read_store(lambda: self.remote.read_range(key, start, length), self.remote.url)

        for first in range(part.start, part.stop, PART_BYTES * BLOCKS_AT_ONCE):
            last = min(part.stop, first + PART_BYTES * BLOCKS_AT_ONCE)
            yield from pool.map(read, range(first, last, PART_BYTES))

    def _end(self, name: MirroredName, directory: Path, number: int) -> None:
        with _written(directory):
            fsync_directory(directory)
            publish(directory, name.step, number)


def _files(manifest: Manifest, only_small: bool) -> list[str]:
    """Files of a checkpoint; only_small: those without tensors, of this version and of earlier ones."""
    return [file for file in manifest.files if not (only_small and file.startswith(("data_", "__")))]


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """What the disk refuses is no damage of the mirror."""
    try:
        yield
    except OSError as error:
        raise UnreadableFile(f"a checkpoint of the mirror cannot be written to {path} ({error}); make room") from None


def read_store(read: Callable[[], T], url: str) -> T:
    """`read()`, again after pauses. Raises UnreadableFile at the end, ValueError for what is not there."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except FileNotFoundError as error:
            raise ValueError(f"{url}: {error}") from None
        except StoreError as error:
            if pause is None or isinstance(error, AccessRefused):
                raise UnreadableFile(
                    f"{url} cannot be read ({error}), so whether it holds what is newer than the disk is not known;"
                    " start again when it answers, with credentials that it takes (docs/object_stores.md)"
                ) from None
            log.warning("%s cannot be read (%s); trying again in %g s", url, error, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
