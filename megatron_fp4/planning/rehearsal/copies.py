"""Copies from the host to the device, and read-backs, in which the host waits for all that the device has to do.

The device has no values, so a read-back is answered by a stand-in: 1, a value that lets a step go on (a finite norm, a
target token, ranks of one mind; for torch's pipeline stages: shapes that do not change).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

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
        self.read_backs: Counter[str] = Counter()

    def clear(self) -> None:
        self.copies_in.clear()
        self.read_backs.clear()

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
            return self._copied(args[0], torch.device(kwargs["device"]), kwargs.get("dtype"))
        if name == "aten::copy_":
            return self._copied_over(args[0], args[1])
        if name in INDEXING and any(index is not None and not is_rehearsed(index) for index in args[1]):
            self.copies_in[origin()] += 1
        return NotImplemented

    def made_from_values(self, values: Tensor, device: torch.device) -> Tensor:
        """`torch.tensor(values, device=device)`."""
        return self._arrived(values, device)

    def listed(self, x: Tensor) -> Any:
        """`x.tolist()`."""
        self.read_backs[origin()] += 1
        return torch.ones(x.shape, dtype=x.dtype).tolist()

    def _copied(self, x: Tensor, to: torch.device, dtype: torch.dtype | None) -> Any:
        if to.type == x.device.type:
            return NotImplemented
        if to.type == NAME:
            return self._arrived(x, to, dtype)
        self.read_backs[origin()] += 1
        return torch.ones(x.shape, dtype=dtype or x.dtype)

    def _arrived(self, x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        self.copies_in[origin()] += 1
        with self._fake:
            return torch.empty(x.shape, dtype=dtype or x.dtype, device=device)

    def _copied_over(self, target: Tensor, source: Tensor) -> Any:
        if is_rehearsed(target) == is_rehearsed(source):
            return NotImplemented
        (self.copies_in if is_rehearsed(target) else self.read_backs)[origin()] += 1
        return target
