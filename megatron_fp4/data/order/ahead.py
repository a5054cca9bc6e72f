"""The index of the next epoch, built by a thread while the present one is read.

An epoch of billions of documents takes minutes to put in order, and a step that needs it would wait. So the next one is
begun as soon as an epoch is. Whoever comes before it is ready waits for it, and says so: that is no stall of the data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from megatron_fp4.data.order.epoch_index import EpochIndex


class IndexBuilder:
    """Indices by epoch; `make` makes one. last_epoch: the last that will be read, so the last that is built ahead."""

    def __init__(self, make: Callable[[int], EpochIndex]) -> None:
        self._make = make
        self._begun: dict[int, Future[EpochIndex]] = {}
        self.last_epoch = 0
        self.awaited = False

    def take(self, epoch: int) -> EpochIndex:
        """The index of `epoch`, made here or before; the next one is begun. Raises what `make` raises."""
        future = self._begun.pop(epoch, None)
        self.awaited = True
        try:
            index = self._make(epoch) if future is None else future.result()
        finally:
            self.awaited = False
        self._begin(epoch + 1)
        return index

    def _begin(self, epoch: int) -> None:
        if epoch <= self.last_epoch and epoch not in self._begun:
            future = self._begun[epoch] = Future()
            # A daemon: a process that ends does not wait for what nobody will read.
            threading.Thread(target=self._build, args=(epoch, future), name=f"index-{epoch}", daemon=True).start()

    def _build(self, epoch: int, future: Future[EpochIndex]) -> None:
        try:
            index = self._make(epoch)
        except BaseException as error:
            future.set_exception(error)  # raised where the index is due
        else:
            future.set_result(index)
