"""Main gradients in flat buckets, reduced over the data-parallel ranks, or those that hold the same experts.

A gradient is added to `parameter.main_grad` where it is made, and the optimizer counts the contributions. A linear
layer's backward adds its weight gradient itself and calls `parameter.grad_ready()`; the gradient of every other
parameter is moved over by a hook. `arm()` announces the backward after which the sums are complete. From then on a
bucket that has got as many contributions as in the step before is sent at once, beside the rest of the backward.

The count is a guess, never a condition: what was not sent is sent in `finish()` (unused parameters, the first step, the
first one of so many microbatches), and a contribution to a bucket that was sent already (a weight used more often than
last time) makes the sums worthless, which `late` says: only the caller can repeat the step, on all ranks. Buckets leave
in their fixed order on every rank, whatever their groups. Only a rank's own part of a bucket holds the sum afterwards;
the rest is this rank's partial gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim.bucket_comm import PendingSum, sums_in_rank_order
from megatron_fp4.optim.layout import Bucket

MAX_IN_FLIGHT = 2  # buckets of which parts are received at once, where none were sent during the backward


class GradBuffer:
    """Main gradients of all parameters; reduces each bucket over its group, after `tp` and tied stages where needed.

    overlap: send full buckets during the armed backward. It changes no bit of the result. parts: this rank's part of
    each bucket, the sums after `finish`: FP32 where the bucket's are in BF16, else views. late: whether a gradient of
    this rank came after its bucket had been sent; then the sums of all ranks are worthless.
    """

    def __init__(self, buckets: Sequence[Bucket], tp: Group, *, overlap: bool) -> None:
        self._buckets = buckets
        self._tp = tp
        self._overlap = overlap and any(bucket.group.size > 1 for bucket in buckets)
        self._flats = [torch.zeros(each.numel, dtype=each.kind.sums, device=each.kind.device) for each in buckets]
        self.parts = [
            torch.zeros(bucket.part_numel, device=flat.device)
            if _narrow(bucket)
            else bucket.part(flat, bucket.group.rank)
            for bucket, flat in zip(buckets, self._flats, strict=True)
        ]
        self._num_early = sum(not bucket.kind.deferred for bucket in buckets)
        self._known: dict[int, list[list[int]]] = {}  # contributions to each parameter, by number of microbatches
        self._num_microbatches = 0  # of those that were announced
        self._expected: list[list[int]] | None = None
        self._counts = [[0] * len(bucket.slots) for bucket in buckets]
        self._missing = [0] * len(buckets)
        self._num_sent = 0  # of the buckets, in order
        self._pending: dict[int, PendingSum] = {}  # of those that were sent and are not finished
        self.late = False
        self._armed = False
        self._absorbers: list[Callable[[], None]] = []
        for index, (bucket, flat) in enumerate(zip(buckets, self._flats, strict=True)):
            for position, slot in enumerate(bucket.slots):
                main_grad, ready = flat[slot.start : slot.stop], partial(self._ready, index, position)
                self._absorbers.append(_equip(slot.parameter, main_grad, ready))

    @property
    def tensors(self) -> list[Tensor]:
        """What lives from step to step."""
        return [
            *self._flats,
            *(part for part, bucket in zip(self.parts, self._buckets, strict=True) if _narrow(bucket)),
        ]

    def zero(self) -> None:
        """Forget all gradients; begins a step."""
        assert not self._pending, "zero_grad between begin_last_microbatch and finish_grads"
        for bucket, flat in zip(self._buckets, self._flats, strict=True):
            flat.zero_()
            for slot in bucket.slots:
                slot.parameter.grad = None
        self._armed = self.late = False

    def arm(self, num_microbatches: int) -> None:
        """The backward passes that follow are the last before `finish`: full buckets may leave."""
        assert not self._armed, "begin_last_microbatch was called twice in one step"
        self._armed, self._num_microbatches = True, num_microbatches
        self._expected = self._known.get(num_microbatches)
        for index, bucket in enumerate(self._buckets):
            self._counts[index] = [0] * len(bucket.slots)
            self._missing[index] = sum(self._expected[index]) if self._expected else 0
        self._send_full()

    def finish(self) -> None:
        """Complete all sums: afterwards every rank's own part of each bucket is the sum over all ranks."""
        for absorb in self._absorbers:  # what reached `.grad` without autograd's hook, as pipeline engines do
            absorb()
        for bucket, flat in zip(self._buckets, self._flats, strict=True):
            if _sums_replicas_first(bucket):  # equal gradients have equal sums on all replicas
                _sum_replicas(bucket, flat, self._tp)
        for index in range(len(self._buckets)):
            while self._num_sent < min(index + MAX_IN_FLIGHT, len(self._buckets)):
                self._send_next()
            if index in self._pending:
                self._pending.pop(index).finish()
        for bucket, part in zip(self._buckets, self.parts, strict=True):
            if not _sums_replicas_first(bucket):  # the replicas' own sums need not be equal
                _sum_replicas(bucket, part, self._tp)
        if self._armed:
            self._known[self._num_microbatches] = [list(counts) for counts in self._counts]
        self._num_sent = 0
        self._armed = False

    def _ready(self, index: int, position: int) -> None:
        """One contribution to a parameter is complete."""
        if not self._armed:
            return
        self._counts[index][position] += 1
        if index < self._num_sent:
            self.late = True
        elif self._expected and self._counts[index][position] <= self._expected[index][position]:
            self._missing[index] -= 1
            self._send_full()

    def _send_full(self) -> None:
        if not self._overlap or self._expected is None:
            return
        while self._num_sent < self._num_early and self._missing[self._num_sent] == 0:
            self._send_next()

    def _send_next(self) -> None:
        number, bucket = self._num_sent, self._buckets[self._num_sent]
        total = self.parts[number] if _narrow(bucket) else None
        if total is not None:  # its messages are as large as the bucket: those that are here go first, nobody waits
            for index in [index for index, pending in self._pending.items() if pending.arrived]:
                self._pending.pop(index).finish()
        if bucket.group.size > 1:
            self._pending[number] = PendingSum(self._flats[number], bucket.group, total)
        self._num_sent += 1


def _narrow(bucket: Bucket) -> bool:
    """Whether a rank sums in BF16, and all ranks together in FP32."""
    return bucket.kind.sums == torch.bfloat16


def _sums_replicas_first(bucket: Bucket) -> bool:
    """Whether tied copies and partial gradients are added before the sum over ranks; BF16 would round once more."""
    return sums_in_rank_order(bucket.group) and not _narrow(bucket)


def _equip(parameter: LogicalParameter, flat: Tensor, ready: Callable[[], None]) -> Callable[[], None]:
    """Give a parameter its `main_grad` and `grad_ready`; returns what moves `.grad` over, also hooked to autograd."""
    main_grad = flat.view(parameter.shape)

    def absorb() -> None:
        if parameter.grad is None:  # the layer's backward has accumulated and counted by itself
            return
        main_grad.add_(parameter.grad)
        parameter.grad = None
        ready()

    parameter.main_grad = main_grad
    parameter.grad_ready = ready
    parameter.register_post_accumulate_grad_hook(lambda _parameter: absorb())
    return absorb


def _sum_replicas(bucket: Bucket, tensor: Tensor, tp: Group) -> None:
    """Add the gradients of tied copies on other stages and the partial ones of tp ranks."""
    if bucket.kind.tied_group is not None:
        tensor.copy_(all_reduce_sum(tensor, bucket.kind.tied_group))
    if bucket.kind.tp_summed:
        tensor.copy_(all_reduce_sum(tensor, tp))
