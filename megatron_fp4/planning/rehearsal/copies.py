"""Copies between host and device, and read-backs, in which the host waits for all that the device has to do.

A copy out is one for which the host does not wait: into pinned memory, as torch makes it for `non_blocking`.

The device has no values, so a read-back is answered by a stand-in: 1, a value that lets a step go on (a finite norm, a
target token, ranks of one mind; for torch's pipeline stages: shapes that do not change).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fp4.comm.collectives import even_counts
from megatron_fp4.planning.rehearsal.device import NAME, is_rehearsed
from megatron_fp4.planning.rehearsal.origin import origin

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")


class Copies:
    """What crossed between host and device: number of times by `file:line`. fake: the mode of the device's tensors.

    scalar: what a scalar that is read back is said to be.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self.scalar = 1
        self.copies_in: Counter[str] = Counter()
        self.copies_out: Counter[str] = Counter()
        self.read_backs: Counter[str] = Counter()
        self.bytes_out = self.pinned_bytes = 0
        """Bytes of the copies out; and of pinned memory that was asked for."""

    def clear(self) -> None:
        for counts in (self.copies_in, self.copies_out, self.read_backs):
            counts.clear()
        self.bytes_out = self.pinned_bytes = 0

    def answer(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation that crosses; NotImplemented for one that stays on the device."""
        if name == "aten::_local_scalar_dense":
            self.read_backs[origin()] += 1
            return torch.full((), self.scalar, dtype=args[0].dtype).item()
        if name == "aten::nonzero":  # as many rows as the device says
            self.read_backs[origin()] += 1
            with self._fake:
                return torch.empty(0, args[0].dim(), dtype=torch.int64, device=args[0].device)
        if name == "aten::_to_copy" and kwargs.get("device") is not None:
            return self._copied(args[0], torch.device(kwargs["device"]), kwargs)
        if name == "aten::copy_":
            return self._copied_over(args[0], args[1], len(args) > 2 and args[2])
        if name in INDEXING and any(index is not None and not is_rehearsed(index) for index in args[1]):
            self.copies_in[origin()] += 1
        return NotImplemented

    def made_from_values(self, values: Tensor, device: torch.device) -> Tensor:
        """`torch.tensor(values, device=device)`."""
        return self._arrived(values, device)

    def pinned(self, size: Any, kwargs: dict[str, Any]) -> Tensor:
        """`torch.empty(size, pin_memory=True)`: without memory."""
        with self._fake:
            buffer = torch.empty(size, dtype=kwargs.get("dtype"))
        self.pinned_bytes += buffer.nbytes
        return buffer

    def waited(self, device: object = None) -> None:
        """`synchronize()` of the device."""
        self.read_backs[origin()] += 1

    def listed(self, x: Tensor) -> Any:
        """`x.tolist()`."""
        self.read_backs[origin()] += 1
        return torch.ones(x.shape, dtype=x.dtype).tolist()

    def read_evenly(self, counts: Tensor, num_rows: int) -> list[list[int]]:
        """`row_exchange.read_counts`: every expert is sent as much."""
        self.read_backs[origin()] += 1
        return [even_counts(num_rows, counts.shape[1]) for _ in range(counts.shape[0])]

    def _copied(self, x: Tensor, to: torch.device, kwargs: dict[str, Any]) -> Any:
        dtype = kwargs.get("dtype") or x.dtype
        if to.type == x.device.type:
            return NotImplemented
        if to.type == NAME:
            return self._arrived(x, to, dtype)
        self._left(x, waits=not kwargs.get("non_blocking"))
        return torch.full(x.shape, self.scalar, dtype=dtype)

    def _left(self, x: Tensor, *, waits: bool) -> None:
        (self.read_backs if waits else self.copies_out)[origin()] += 1
        if not waits:
            self.bytes_out += x.nbytes

    def _arrived(self, x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        self.copies_in[origin()] += 1
        with self._fake:
            return torch.empty(x.shape, dtype=dtype or x.dtype, device=device)

    def _copied_over(self, target: Tensor, source: Tensor, non_blocking: bool) -> Any:
        if is_rehearsed(target) == is_rehearsed(source):
            return NotImplemented
        if is_rehearsed(target):
            self.copies_in[origin()] += 1
        else:
            self._left(source, waits=not non_blocking)
        return target
