"""This rank's share of a save, beside the step loop: a copy in host memory, bytes in a file, a deadline.

The bytes are written by a background thread that uses no collective. It needs none, because the layout was planned
before on the main thread and the ranks meet in a store (marks.py); so it can never interleave with the training's
process groups. A thread and not a process: writing and hashing release the interpreter lock, no second copy of torch is
loaded, and its death cannot go unnoticed: an exception is kept and reported, a hang is reported by the deadline, and a
kill takes the rank with it, which leaves only an unfinished directory.

Not here: when a checkpoint counts (commit.py), and what the ranks agree on (save.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.checkpoint.outcome import NotSaved, Saved
from megatron_fp4.checkpoint.pieces.layout import ALIGN_BYTES, round_up
from megatron_fp4.checkpoint.pieces.plan import Part
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.durable import FileRecord, HashingFile, fsync_directory

GRACE_SECONDS = 1.0
"""A writer that keeps the deadline itself is waited for so much longer: it knows better who is late."""
HAND_OVER_SECONDS = 0.002
"""The thread sleeps first: one that computes keeps the interpreter lock, and the step loop waiting, for 5 ms."""


class GivenUp(RuntimeError):
    """The save was given up elsewhere: by another rank, or by the main thread."""


class Staging:
    """Host buffers (pinned for an accelerator), one for each tensor that this rank writes, used again by every save.

    So host memory is flat; the buffers are made anew only if the layout changes.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}

    def copy(self, shards: Sequence[Shard]) -> tuple[Shard, ...]:
        """The shards, copied to the host; returns when the copy is complete."""
        copies, buffers = [], {}
        accelerator: torch.device | None = None
        for shard in shards:
            copied = {}
            for kind in shard.tensors:
                data = shard.read(kind)
                place = (kind, shard.name, shard.where.offset)
                buffer = self._buffer(place, data)
                buffer.copy_(data, non_blocking=True)
                if data.device.type != "cpu":
                    accelerator = data.device
                buffers[place] = copied[kind] = buffer
            copies.append(Shard(shard.where, copied))
        self._buffers = buffers
        if accelerator is not None:
            torch.get_device_module(accelerator).synchronize(accelerator)
        return tuple(copies)

    def _buffer(self, place: tuple[str, str, tuple[int, ...]], data: Tensor) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is not None and buffer.shape == data.shape and buffer.dtype == data.dtype:
            return buffer
        return torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type != "cpu")


def write_part(directory: Path, part: Part, shards: Sequence[Shard]) -> FileRecord:
    """Write this rank's part, `shards` in their order, and return when it is on disk."""
    if not part.num_bytes:
        return FileRecord(0, "")
    with closing(HashingFile(directory / part.file, part.start)) as stream:
        for shard in shards:
            for kind in sorted(shard.tensors):
                data = shard.read(kind).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                stream.write(data)
                if missing := round_up(len(data), ALIGN_BYTES) - len(data):
                    stream.write(bytes(missing))
        os.fsync(stream.fileno())
    record = stream.record()
    assert record.num_bytes == part.num_bytes, f"{record.num_bytes} bytes written, {part.num_bytes} planned"
    fsync_directory(directory)
    return record


class SaveInProgress:
    """One save on this rank: `work(self)`, which returns the bytes it wrote, runs in a thread, or here and now.

    It ends once: with the return or the exception of `work`, or when the main thread has given it up after the
    deadline. Exactly one of `claim_commit` (by the thread, just before the rename) and `abandon` succeeds, so a save
    that was reported as failed never appears later.
    """

    def __init__(
        self, step: int, work: Callable[[SaveInProgress], int], timeout_seconds: float, *, background: bool
    ) -> None:
        self.step = step
        self.outcome: Saved | NotSaved | None = None
        self.seconds = 0.0
        self._work = work
        self._timeout_seconds = timeout_seconds
        self._background = background
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._committing = False
        self._done = threading.Event()
        if background:
            threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True).start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            if self._background:
                time.sleep(HAND_OVER_SECONDS)
            self._end(Saved(self._work(self)))
        except BaseException as error:  # the thread must not die silently, whatever it was
            self._end(NotSaved(f"{type(error).__name__}: {error}", isinstance(error, GivenUp)))
            if not self._background and not isinstance(error, Exception):
                raise  # Ctrl-C during a synchronous save is still Ctrl-C
        finally:
            self._done.set()

    def _end(self, outcome: Saved | NotSaved) -> None:
        with self._lock:
            if self.outcome is None:
                self.outcome, self.seconds = outcome, self._elapsed()

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    @property
    def finished(self) -> bool:
        """Whether `work` has come to an end; a save that was given up may still hang in it."""
        return self._done.is_set()

    def overdue(self) -> bool:
        """Whether the writer is past its time."""
        return self._elapsed() > self._timeout_seconds

    def hangs(self) -> bool:
        """Whether the writer, seen from the main thread, has neither finished nor can notice that it is overdue."""
        return not self.finished and self._elapsed() > self._timeout_seconds + GRACE_SECONDS

    def claim_commit(self) -> bool:
        """Whether the thread may commit, because the save has not been given up."""
        with self._lock:
            self._committing = self.outcome is None
            return self._committing

    def abandon(self) -> bool:
        """Give the save up unless it is being committed; returns whether it has failed."""
        with self._lock:
            if self.outcome is None and not self._committing:
                reason = f"TimeoutError: not written after {self._timeout_seconds:g} seconds"
                self.outcome, self.seconds = NotSaved(reason), self._elapsed()
            return isinstance(self.outcome, NotSaved)

    def join(self) -> Saved | NotSaved:
        """Wait for the end, at most until the deadline; after it the save is abandoned and has failed.

        A commit that has begun is waited for in any case: it consists of a few renames.
        """
        self._done.wait(max(0.0, self._timeout_seconds + GRACE_SECONDS - self._elapsed()))
        if not self.finished and not self.abandon():
            self._done.wait()
        assert self.outcome is not None
        return self.outcome
