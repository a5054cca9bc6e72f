"""Memory of the device: what is alive, for what, and who made it.

A storage counts from the operation that first returns it until nothing refers to it, in pieces of 512 bytes as CUDA's
allocator gives them. Not here: fragmentation, workspaces of kernels, and the libraries' own memory.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from megatron_fp4.planning.rehearsal.origin import called_by, origin

PIECE = 512
LARGE = 1_000_000_000
"""Bytes of a tensor from which on it is reported by itself."""
PASSING = "activations and working set"
BUFFERS = "buffers"


class Held(NamedTuple):
    """Who holds bytes. kind: what for, in the words of the plan; phase: of the step."""

    kind: str
    phase: str
    origin: str


class LiveKinds:
    """Bytes alive now and at the peak. kind: of what is made from now on, None to decide by who makes it."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.at_peak: Counter[Held] = Counter()
        self.peak_origin = ""
        self.large: Counter[tuple[str, str]] = Counter()
        """(shape and type, origin) of tensors above `LARGE` bytes: how often one was made."""
        self.kind: str | None = None
        self._held: Counter[Held] = Counter()
        self._storages: dict[int, tuple[Held, int]] = {}

    def see(self, tensors: Iterable[Tensor], phase: str) -> None:
        """Count the storages of tensors that an operation has returned."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            size = -(-storage.nbytes() // PIECE) * PIECE
            held = Held(self.kind or _kind(), phase, origin())
            self._storages[key] = (held, size)
            weakref.finalize(storage, self._forget, key)
            self.now += size
            self._held[held] += size
            if size > LARGE:
                self.large[f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}", held.origin] += 1
            if self.now > self.peak:
                self._mark()

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what tensors that exist are for."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            held, size = self._storages[key]
            self._subtract(held, size)
            self._storages[key] = (held._replace(kind=kind), size)
            self._held[self._storages[key][0]] += size

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made in here is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def begin(self) -> None:
        """Look for the peak from here on."""
        self._mark()
        self.large.clear()

    def by_kind(self) -> dict[str, int]:
        """Bytes of each kind at the peak."""
        kinds: Counter[str] = Counter()
        for held, size in self.at_peak.items():
            kinds[held.kind] += size
        return dict(kinds)

    def _mark(self) -> None:
        self.peak, self.at_peak = self.now, self._held.copy()
        self.peak_origin = origin()

    def _forget(self, key: int) -> None:
        held, size = self._storages.pop(key)
        self.now -= size
        self._subtract(held, size)

    def _subtract(self, held: Held, size: int) -> None:
        self._held[held] -= size
        if not self._held[held]:
            del self._held[held]


def _kind() -> str:
    return BUFFERS if called_by("torch/distributed/pipelining/_utils.py") else PASSING
