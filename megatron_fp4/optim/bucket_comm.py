"""The two collectives of a bucket, started now and finished later.

What a collective computes does not depend on when it is waited for, so overlap cannot change a number. Every pair of
ranks exchanges exactly the rows that one needs of the other, and sums are made locally in FP32 in rank order, wherever
the order would otherwise depend on the position in the buffer (gloo), where parts are uneven, or where replicas in
other buckets must get the same bits. NCCL's native collectives serve the rest. A group of one rank communicates
nothing.

Messages and not gloo's collectives, because they need no staging copy, none of the own part, and none of gloo's worker
threads: reduce-scatter was measured at 0.7x the processor time of its all-to-all, all-gather at 0.6x that of a
broadcast per part (14 MB, 2 ranks; 0.8x both at 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from megatron_fp4.comm.collectives import uses_gloo
from megatron_fp4.comm.mesh import Group
from megatron_fp4.optim.layout import Bucket


def _other_ranks(group: Group) -> list[int]:
    """Group ranks without this one, in order."""
    return [rank for rank in range(group.size) if rank != group.rank]


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: Group) -> list[dist.Work]:
    """Start to send `sent[i]` to, and to receive `received[i]` from, the i-th of the other ranks.

    Empty tensors are left out on both sides.
    """
    ops = []
    for rank, outgoing, incoming in zip(_other_ranks(group), sent, received, strict=True):
        for op, tensor in ((dist.isend, outgoing), (dist.irecv, incoming)):
            if tensor.numel():
                ops.append(dist.P2POp(op, tensor, group.ranks[rank], group.process_group))
    return list(dist.batch_isend_irecv(ops))


class PendingSum:
    """A started reduce-scatter of `flat` (FP32 `[bucket.numel]`), over a group of at least two ranks.

    If `flat` is written before the end, the sum is worthless and has to be started again.
    """

    def __init__(self, flat: Tensor, bucket: Bucket, group: Group) -> None:
        low, high = bucket.bounds(group.rank)
        self._part, self._rank = flat[low:high], group.rank
        self._ordered = bucket.kind.deferred or not bucket.even or uses_gloo(group)
        if self._ordered:
            parts = flat.split(bucket.parts)
            self._received = flat.new_empty(group.size - 1, high - low)
            self._works = _exchange([parts[rank] for rank in _other_ranks(group)], self._received.unbind(), group)
        else:
            self._received = flat.new_empty(high - low)
            self._works = [dist.reduce_scatter_single(self._received, flat, group=group.process_group, async_op=True)]

    def finish(self) -> None:
        """Wait, and turn this rank's part of `flat` into the sum over all ranks."""
        self.drop()
        if not self._ordered:
            self._part.copy_(self._received)
            return
        lower, higher = self._received[: self._rank], self._received[self._rank :]
        for part in lower[1:]:
            lower[0] += part
        for part in (*lower[:1], *higher):  # in rank order: first this rank's part and the sum of the lower ranks'
            self._part += part

    def drop(self) -> None:
        """Wait, and forget the sum: what was sent has changed since."""
        for work in self._works:
            work.wait()


class PendingGather:
    """A started all-gather, in place: every rank's part of `flat` (`[bucket.numel]`) reaches all ranks."""

    def __init__(self, flat: Tensor, bucket: Bucket, group: Group) -> None:
        low, high = bucket.bounds(group.rank)
        if bucket.even and not uses_gloo(group):
            pg = group.process_group
            self._works = [dist.all_gather_single(flat, flat[low:high], group=pg, async_op=True)]
            return
        parts = flat.split(bucket.parts)
        other_ranks = _other_ranks(group)
        own_part = [flat[low:high]] * len(other_ranks)
        self._works = _exchange(own_part, [parts[rank] for rank in other_ranks], group)

    def wait(self) -> None:
        """Return when `flat` may be read (on CUDA: by kernels launched from now on)."""
        for work in self._works:
            work.wait()
