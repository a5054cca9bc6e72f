"""Compute parameters as views into flat buckets, refreshed from the master weights.

After a step each rank rounds its part of the masters to the parameters' dtype and one all-gather per bucket writes the
whole bucket in place; the parameter objects stay the same. The gathers may run beside the next forward:
`gather_beside_forward` makes every module wait for its own buckets, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_fp4.optim.bucket_comm import PendingGather
from megatron_fp4.optim.layout import Bucket


class ParamBuffer:
    """The parameters of all buckets, each replicated over its group.

    parts: this rank's part of each bucket, views.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._flats = [torch.zeros(b.numel, dtype=b.kind.dtype, device=b.kind.device) for b in buckets]
        self._pending: dict[int, PendingGather] = {}
        for bucket, flat in zip(buckets, self._flats, strict=True):
            for slot in bucket.slots:
                view = flat[slot.start : slot.stop].view(slot.parameter.shape)
                view.copy_(slot.parameter.detach())
                slot.parameter.data = view
        self.parts = [bucket.part(flat, bucket.group.rank) for bucket, flat in zip(buckets, self._flats, strict=True)]

    def refresh(self, masters: Sequence[Tensor | None], *, wait: bool) -> None:
        """Parameters = masters, rounded. wait=False: gather in the background.

        masters: FP32, one flat part per bucket; those of FP32 parameters may be `parts` themselves, if nobody writes
        them before `wait`; None where `parts` holds them, rounded. The buckets go out in forward order, the reverse of
        their own.
        """
        self.wait()
        for index in reversed(range(len(self._buckets))):
            master, group = masters[index], self._buckets[index].group
            if master is not None:
                self.parts[index].copy_(master)
            if group.size > 1:
                self._pending[index] = PendingGather(self._flats[index], group)
        if wait:
            self.wait()

    def wait(self, indices: Sequence[int] | None = None) -> None:
        """Return when the buckets `indices` (default: all) may be read."""
        for index in list(self._pending) if indices is None else indices:
            pending = self._pending.pop(index, None)
            if pending is not None:
                pending.wait()

    def gather_beside_forward(self, module: nn.Module) -> None:
        """Make each submodule wait for its own parameters before its forward."""
        bucket_of = {id(slot.parameter): i for i, bucket in enumerate(self._buckets) for slot in bucket.slots}
        for child in module.modules():
            owned = sorted({bucket_of[id(p)] for p in child.parameters(recurse=False) if id(p) in bucket_of})
            if owned:
                child.register_forward_pre_hook(lambda _module, _inputs, owned=owned: self.wait(owned))
