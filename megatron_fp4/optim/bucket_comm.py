"""The two collectives of a bucket, started now and finished later.

What a collective computes does not depend on when it is waited for, so overlap cannot change a number. On NCCL they are
its reduce-scatter and all-gather, but of BF16 its all-to-all, because its sums would be rounded at every addition. On
gloo every pair of ranks exchanges exactly the part that one needs of the other. Sums that it did not make are made
locally in FP32 in rank order; the order of gloo's own depends on the position in the buffer. A group of one rank
communicates nothing.

Messages and not gloo's collectives, because they need no staging copy, none of the own part, and none of gloo's worker
threads: reduce-scatter was measured at 0.7x the processor time of its all-to-all, all-gather at 0.6x that of a
broadcast per part (14 MB, 2 ranks; 0.8x both at 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp4.comm.collectives import uses_gloo
from megatron_fp4.comm.mesh import Group


def _other_ranks(group: Group) -> list[int]:
    """Group ranks without this one, in order."""
    return [rank for rank in range(group.size) if rank != group.rank]


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: Group) -> list[dist.Work]:
    """Start to send `sent[i]` to, and to receive `received[i]` from, the i-th of the other ranks."""
    ops = []
    for rank, outgoing, incoming in zip(_other_ranks(group), sent, received, strict=True):
        for op, tensor in ((dist.isend, outgoing), (dist.irecv, incoming)):
            ops.append(dist.P2POp(op, tensor, group.ranks[rank], group.process_group))
    return list(dist.batch_isend_irecv(ops))


def sums_in_rank_order(group: Group) -> bool:
    """Whether `PendingSum` adds in rank order; else in an order of NCCL's, which two groups need not share."""
    return group.size == 1 or uses_gloo(group)


class PendingSum:
    """A started reduce-scatter of `flat` (FP32, FP64 or BF16 `[size * n]`), over a group of at least two ranks.

    total: FP32 `[n]` that gets the sum of BF16, which is made in FP32 and rank order; without it this rank's part of
    `flat` gets the sum. If `flat` is written before the end, the sum is worthless. Holds what it receives.
    """

    def __init__(self, flat: Tensor, group: Group, total: Tensor | None = None) -> None:
        parts, others = flat.view(group.size, -1), _other_ranks(group)
        self._part, self._rank = parts[group.rank], group.rank
        self._total = total
        self._others: Sequence[Tensor] = ()  # where every rank's part comes here and is added here
        self._sum: Tensor | None = None  # where it is added on the way
        if sums_in_rank_order(group):
            self._others = parts.new_empty(group.size - 1, parts.shape[1]).unbind()
            self._works = _exchange([parts[rank] for rank in others], self._others, group)
        elif total is not None:
            received = torch.empty_like(parts)
            self._others = [received[rank] for rank in others]
            self._works = [dist.all_to_all_single(received, parts, group=group.process_group, async_op=True)]
        else:
            self._sum = torch.empty_like(self._part)
            self._works = [dist.reduce_scatter_single(self._sum, flat, group=group.process_group, async_op=True)]

    @property
    def arrived(self) -> bool:
        """Whether `finish` would not wait."""
        return all(work.is_completed() for work in self._works)

    def finish(self) -> None:
        """Wait, and turn `total`, or this rank's part of `flat`, into the sum over all ranks."""
        for work in self._works:
            work.wait()
        lower, higher = self._others[: self._rank], self._others[self._rank :]
        if self._sum is not None:
            self._part.copy_(self._sum)
        elif self._total is not None:
            parts = [*lower, self._part, *higher]
            self._total.copy_(parts[0])
            for part in parts[1:]:
                self._total += part
        else:
            for part in lower[1:]:
                lower[0].add_(part)
            for part in (*lower[:1], *higher):  # in rank order: first this rank's and the sum of the lower ranks'
                self._part += part


class PendingGather:
    """A started all-gather, in place: every rank's part of `flat` (`[size * n]`) reaches all ranks."""

    def __init__(self, flat: Tensor, group: Group) -> None:
        parts = flat.view(group.size, -1)
        if not uses_gloo(group):
            self._works = [dist.all_gather_single(flat, parts[group.rank], group=group.process_group, async_op=True)]
            return
        other_ranks = _other_ranks(group)
        self._works = _exchange([parts[group.rank]] * len(other_ranks), [parts[rank] for rank in other_ranks], group)

    def wait(self) -> None:
        """Return when `flat` may be read (on CUDA: by kernels launched from now on)."""
        for work in self._works:
            work.wait()
