"""The two collectives of a bucket, started now and finished later.

One idea: what a collective computes does not depend on when it is waited for, so overlap cannot change a number. Sums
go through an all-to-all and a local FP32 sum in rank order wherever the order would otherwise depend on the position
in the buffer (gloo), where parts are uneven, or where replicas in other buckets must get the same bits. NCCL's native
collectives serve the rest. A group of one rank communicates nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.optim.layout import Bucket


def _is_gloo(group: Group) -> bool:
    return dist.get_backend(group.process_group) == "gloo"


class PendingSum:
    """A started reduce-scatter of `flat` (FP32 `[bucket.numel]`), over a group of at least two ranks.

    If `flat` is written before the wait, the sum is worthless and has to be started again.
    """

    def __init__(self, flat: Tensor, bucket: Bucket, group: Group) -> None:
        self._flat, self._size, self._part = flat, group.size, bucket.parts[group.rank]
        self._ordered = bucket.kind.deferred or not bucket.even or _is_gloo(group)
        if self._ordered:
            self._received = flat.new_empty(group.size * self._part)
            counts = [self._part] * group.size
            self._work = dist.all_to_all_single(
                self._received, flat, counts, list(bucket.parts), group=group.process_group, async_op=True
            )
        else:
            self._received = flat.new_empty(self._part)
            self._work = dist.reduce_scatter_single(self._received, flat, group=group.process_group, async_op=True)

    def write_to(self, part: Tensor) -> None:
        """Wait, and write my part of the sum over all ranks to `part` (FP32 `[bucket.parts[rank]]`)."""
        self._work.wait()
        if not self._ordered:
            part.copy_(self._received)
            return
        parts = self._received.view(self._size, self._part)
        torch.add(parts[0], parts[1], out=part)  # in rank order, without a pass for the copy
        for more in parts[2:]:
            part += more

    def drop(self) -> None:
        """Wait, and forget the sum: what was sent has changed since."""
        self._work.wait()


class PendingGather:
    """A started all-gather, in place: every rank's part of `flat` (`[bucket.numel]`) reaches all ranks.

    One broadcast per part where the backend's all-gather would need copies (gloo: 0.6x the time at 2 ranks, 0.75x at 4)
    or parts are uneven.
    """

    def __init__(self, flat: Tensor, bucket: Bucket, group: Group) -> None:
        pg = group.process_group
        if bucket.even and not _is_gloo(group):
            low, high = bucket.bounds(group.rank)
            self._works = [dist.all_gather_single(flat, flat[low:high], group=pg, async_op=True)]
            return
        parts = zip(flat.split(bucket.parts), group.ranks, strict=True)
        self._works = [
            dist.broadcast(part, src=source, group=pg, async_op=True) for part, source in parts if part.numel()
        ]

    def wait(self) -> None:
        """Return when `flat` may be read (on CUDA: by kernels launched from now on)."""
        for work in self._works:
            work.wait()
