"""Whole matrices from the pieces that ranks hold, at one owner each, and their results back to the pieces.

A rank's elements of a matrix are runs of its flat ranges (layout.py), each a rectangle. What goes to an owner is one
message: the rank's runs of all matrices of that owner, in the order of the buckets; what comes back has the same
order. Every rank of the stage works out all messages from the buckets of its tensor-parallel peers, which are told
once; their replicas divide them alike. Owners are chosen by cost, the largest matrix first, each for the rank that has
the least to do; ties by name and rank, so that all ranks choose alike.

    rank 0   [q q q k|          runs of q -> rank 2 ..     rank 2: q [8, 3] = rectangles of ranks 0, 1, 2
    rank 1    q k k v v|        runs of k -> rank 0 ..

Not here: what an owner does with a matrix (newton_schulz.py), the group of the stage (comm/mesh.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Placement, Rectangle
from megatron_fp4.optim.layout import Bucket
from megatron_fp4.optim.muon.newton_schulz import orthogonalization_flops


@dataclass(frozen=True)
class MatrixRun:
    """Elements `[start, stop)` of a rank's part of bucket `bucket`, which are the rectangle `where`.

    sends: False where another rank of the stage sends the same elements.
    """

    bucket: int
    start: int
    stop: int
    where: Rectangle
    sends: bool


@dataclass(frozen=True)
class BucketLayout:
    """How a tensor-parallel rank lays out a bucket: elements of a replica's part; where its parameters start, and what
    they are. Ranks with uneven shares of a matrix have other ones."""

    part_numel: int
    slots: tuple[tuple[int, Placement], ...]

    @staticmethod
    def of(bucket: Bucket) -> BucketLayout:
        """The layout of one of this rank's own."""
        return BucketLayout(bucket.part_numel, tuple((slot.start, slot.placement) for slot in bucket.slots))


def runs_of(layouts: Sequence[BucketLayout], rank: int, sends: bool) -> list[MatrixRun]:
    """The runs of replica `rank` of the tensor-parallel rank that has these buckets, in their order.

    sends: whether this tensor-parallel rank sends what all of them hold.
    """
    runs: list[MatrixRun] = []
    for number, layout in enumerate(layouts):
        low, high = rank * layout.part_numel, (rank + 1) * layout.part_numel
        for begin, placement in layout.slots:
            start = max(begin, low)
            for where in placement.elements(start - begin, high - begin):
                stop = start + where.numel
                runs.append(MatrixRun(number, start - low, stop - low, where, sends or not placement.tp_replicated))
                start = stop
    return [run for run in runs if run.where.numel]


def choose_owners(shapes: Mapping[str, tuple[int, int]], num_ranks: int) -> dict[str, int]:
    """The rank that orthogonalizes each matrix: longest processing time first, cost rows x columns x the smaller."""
    costs = {name: rows * columns * min(rows, columns) for name, (rows, columns) in shapes.items()}
    loads = [(0, rank) for rank in range(num_ranks)]
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        load, rank = heapq.heappop(loads)
        owners[name] = rank
        heapq.heappush(loads, (load + costs[name], rank))
    return owners


class Load(NamedTuple):
    """flops: of the owner with most to do; imbalance: that over the mean. largest: elements of the fullest owner.
    matrix: elements of the largest matrix."""

    flops: float
    imbalance: float
    largest: int
    matrix: int


def busiest(shapes: Mapping[str, tuple[int, int]], num_ranks: int, steps: int) -> Load:
    """How the matrices, at least one, divide over the ranks of a stage. steps: of the orthogonalization."""
    flops, elements = [0] * num_ranks, [0] * num_ranks
    for name, rank in choose_owners(shapes, num_ranks).items():
        flops[rank] += orthogonalization_flops(*shapes[name], steps)
        elements[rank] += shapes[name][0] * shapes[name][1]
    matrix = max(rows * columns for rows, columns in shapes.values())
    return Load(max(flops), max(flops) * num_ranks / sum(flops), max(elements), matrix)


class MatrixExchange:
    """The messages of one rank, laid out once.

    buckets: of matrices only. group: the ranks of the pipeline stage, tensor parallelism innermost; of experts, whose
    tp is one rank, those that hold the same ones. Collective over tp when it is made.
    """

    def __init__(self, buckets: Sequence[Bucket], dp_cp: Group, tp: Group, group: Group) -> None:
        assert group.size == dp_cp.size * tp.size, f"{group.name}: {group.size} ranks, {dp_cp.size} x {tp.size} needed"
        self._group = group
        of_peers = all_gather_object([BucketLayout.of(bucket) for bucket in buckets], tp)
        runs = [  # of every rank of the stage
            runs_of(of_peers[rank % tp.size], rank // tp.size, sends=rank % tp.size == 0) for rank in range(group.size)
        ]
        self.shapes = {
            run.where.name: (run.where.global_shape[0], run.where.global_shape[1])
            for of_rank in runs
            for run in of_rank
        }
        self.owners = choose_owners(self.shapes, group.size)
        self.by_owner: dict[int, list[MatrixRun]] = {}
        for run in runs[group.rank]:
            self.by_owner.setdefault(self.owners[run.where.name], []).append(run)
        self._at_owner = {  # by the rank that holds them
            rank: owned
            for rank, of_rank in enumerate(runs)
            if (owned := [run for run in of_rank if self.owners[run.where.name] == group.rank])
        }

    @property
    def owned(self) -> list[str]:
        """The matrices of this rank, by name."""
        return sorted(name for name, owner in self.owners.items() if owner == self._group.rank)

    def elements_to_owners(self) -> dict[int, int]:
        """How many elements this rank sends to each owner, itself included."""
        counts = {owner: sum(run.where.numel for run in runs if run.sends) for owner, runs in self.by_owner.items()}
        return {owner: count for owner, count in counts.items() if count}

    def elements_to_holders(self) -> dict[int, int]:
        """How many elements of its results this rank sends to each that holds some, itself included."""
        return {rank: sum(run.where.numel for run in runs) for rank, runs in self._at_owner.items()}

    def to_owners(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """This rank's matrices. parts: flat, one per bucket, of one dtype. Collective over the stage."""
        dtype, device = parts[0].dtype, parts[0].device
        sent = {
            owner: torch.cat([parts[run.bucket][run.start : run.stop] for run in sending])
            for owner, runs in self.by_owner.items()
            if (sending := [run for run in runs if run.sends])
        }
        counts = {rank: sum(run.where.numel for run in runs if run.sends) for rank, runs in self._at_owner.items()}
        received = self._carry(sent, counts, dtype, device)
        matrices = {name: torch.empty(self.shapes[name], dtype=dtype, device=device) for name in self.owned}
        for rank, message in received.items():
            for run, values in _split(message, [run for run in self._at_owner[rank] if run.sends]):
                matrices[run.where.name][run.where.slices] = values
        return matrices

    def to_holders(
        self, matrices: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[MatrixRun, Tensor]]:
        """This rank's runs with their values, flat. matrices: results of this rank's. Collective over the stage."""
        sent = {
            rank: torch.cat([matrices[run.where.name][run.where.slices].reshape(-1) for run in runs])
            for rank, runs in self._at_owner.items()
        }
        counts = {owner: sum(run.where.numel for run in runs) for owner, runs in self.by_owner.items()}
        for owner, message in self._carry(sent, counts, dtype, device).items():
            for run, values in _split(message, self.by_owner[owner]):
                yield run, values.view(-1)

    def _carry(
        self, sent: dict[int, Tensor], counts: dict[int, int], dtype: torch.dtype, device: torch.device
    ) -> dict[int, Tensor]:
        """The messages of `counts` elements that other ranks, and this one itself, send here."""
        group = self._group
        received = {rank: torch.empty(count, dtype=dtype, device=device) for rank, count in counts.items() if count}
        if group.rank in received:
            received[group.rank] = sent[group.rank]
        ops = [
            dist.P2POp(op, message, group.ranks[rank], group.process_group)
            for op, messages in ((dist.isend, sent), (dist.irecv, received))
            for rank, message in messages.items()
            if rank != group.rank
        ]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        return received


def _split(message: Tensor, runs: Sequence[MatrixRun]) -> Iterator[tuple[MatrixRun, Tensor]]:
    """The values of each run in a message, in the shape of its rectangle."""
    for run, values in zip(runs, message.split([run.where.numel for run in runs]), strict=True):
        yield run, values.view(run.where.shape)
