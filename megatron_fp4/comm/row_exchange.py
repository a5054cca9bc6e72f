"""Rows to the ranks that they are for, and back: numbers of rows that are known to the device only.

Every rank of a group has rows for every other, as many as its data say. `agree` tells each rank what it will get, and
reads the numbers back: the only time that the host waits. Then `deliver` and `back` are one message between each pair
of ranks, as often as wanted; each is the other's backward pass. Rows of several tensors travel as one message
(`together`).

A rank that gets or sends nothing takes part all the same. On the meta device, which has no numbers, rows are spread
evenly. Not here: which row is for which rank, and the order of what arrives (layers/moe/dispatch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_to_all_rows, even_counts
from megatron_fp4.comm.mesh import Group


def read_counts(counts: Tensor, num_rows: int) -> list[list[int]]:
    """`counts [P, N]` on the host: the read-back. num_rows: their sum in each row of it, for who has no values."""
    if counts.is_meta:
        return [even_counts(num_rows, counts.shape[1]) for _ in range(counts.shape[0])]
    listed: list[list[int]] = counts.tolist()
    return listed


@dataclass(frozen=True)
class RowExchange:
    """Who gets how many rows. sent, received: rows to and from each rank of `group`, in its order.

    received_of: of what comes from each rank, how many rows are in each class.
    """

    group: Group
    sent: tuple[int, ...]
    received: tuple[int, ...]
    received_of: tuple[tuple[int, ...], ...]

    @staticmethod
    def agree(counts: Tensor, group: Group, num_rows: int) -> RowExchange:
        """counts: int64 `[P, C]`, rows for each of P ranks in C classes. num_rows: all of them, if none is left out.

        Collective; reads back once.
        """
        size = group.size
        arriving = all_to_all_rows(counts, group, [1] * size, [1] * size)
        both = [counts.flatten()] if size == 1 else [counts.flatten(), arriving.flatten()]
        host = [_in_rows(flat, size) for flat in read_counts(torch.stack(both), num_rows)]
        sent, received = (tuple(sum(of_rank) for of_rank in of_all) for of_all in (host[0], host[-1]))
        return RowExchange(group, sent, received, tuple(tuple(of_rank) for of_rank in host[-1]))

    @property
    def num_sent(self) -> int:
        """Rows that leave, those to this rank itself among them."""
        return sum(self.sent)

    @property
    def num_received(self) -> int:
        """Rows that arrive, those of this rank itself among them."""
        return sum(self.received)

    def deliver(self, rows: Tensor) -> Tensor:
        """`[num_sent, ...]`, sorted by rank -> `[num_received, ...]`, in the order of the ranks. Collective."""
        return all_to_all_rows(rows, self.group, self.sent, self.received)

    def back(self, rows: Tensor) -> Tensor:
        """`[num_received, ...]` as `deliver` gave them -> `[num_sent, ...]`. Collective."""
        return all_to_all_rows(rows, self.group, self.received, self.sent)


def _in_rows(flat: Sequence[int], num_rows: int) -> list[Sequence[int]]:
    width = len(flat) // num_rows
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def together(rows: Sequence[Tensor], move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Tensors `[R]` or `[R, C]` moved in one message: `together([x, weight], exchange.deliver)`."""
    matrices = [each if each.dim() == 2 else each[:, None] for each in rows]
    packed = torch.cat([matrix.contiguous().view(torch.uint8) for matrix in matrices], dim=1)
    arrived = move(packed)
    widths = [matrix.shape[1] * matrix.itemsize for matrix in matrices]
    return [  # clones, because the bytes of a single row may begin anywhere
        part.clone(memory_format=torch.contiguous_format).view(each.dtype).view(len(arrived), *each.shape[1:])
        for part, each in zip(arrived.split(widths, dim=1), rows, strict=True)
    ]
