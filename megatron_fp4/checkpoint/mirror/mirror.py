"""The mirror of a run's checkpoints, as every rank has it: rank 0 sends, all ranks fetch."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_fp4.checkpoint.commit import SavePlaces
from megatron_fp4.checkpoint.load import CheckpointReader
from megatron_fp4.checkpoint.mirror.fetch import MirrorFetcher
from megatron_fp4.checkpoint.mirror.state import MirrorReport
from megatron_fp4.checkpoint.mirror.worker import MirrorWorker
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.storage.remote.client import Remote

WAIT_SECONDS = 2.0
"""How long the other ranks wait in one collective."""


class Mirror:
    """The mirror at `url` of the checkpoints that `reader` reads. Everything but `start` and `poll` is collective."""

    def __init__(self, url: str, reader: CheckpointReader, places: SavePlaces) -> None:
        self._group, self._beat = reader.group, reader.beat
        remote = Remote(url)
        self.fetcher = MirrorFetcher(remote, reader, places)
        self.worker = MirrorWorker(remote, Path(reader.root), reader.config) if reader.group.rank == 0 else None

    def start(self) -> None:
        """From here on the mirror is kept, beside training; trouble comes by `poll`."""
        if self.worker:
            self.worker.start()

    def poll(self) -> list[MirrorReport]:
        """What has come of uploads since the last call; nothing on other ranks than 0."""
        return self.worker.poll() if self.worker else []

    def discard_after(self, step: int) -> None:
        """See `MirrorWorker.discard_after`. Raises OSError."""
        decided_by_rank0(lambda: self.worker.discard_after(step) if self.worker else None, self._group, OSError)

    def finish(self, seconds: float) -> list[int]:
        """Wait, for `seconds` at most, for what is on the disk to be in the store; the steps that are not there then.

        All ranks wait together, so that none ends what another one needs.
        """
        deadline = time.monotonic() + seconds

        def done() -> bool:
            left = deadline - time.monotonic()
            return left <= 0 or bool(self.worker and self.worker.wait(min(left, WAIT_SECONDS)))

        while not decided_by_rank0(done, self._group):
            self._beat()
        return decided_by_rank0(lambda: self.worker.stop() if self.worker else [], self._group)
