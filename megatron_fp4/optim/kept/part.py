"""All optimizer state of a rank's part of a bucket.

    part.chunks()            stretches to update one after the other: FP32 copies of one are alive at a time
    part.open(chunk)         FP32 master, gradient and moments of a stretch; views of what is kept where that is FP32
    part.keep(chunk, ...)    what an update has left in them

A checkpoint sees rectangles, whose FP32 values are read when they are written (`KeptShard.read`), and fills FP32
tensors (`to_fill`), which `take` then keeps. Not here: the updates (adamw.py, muon/update.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.groups import AdamTensors, MuonTensors
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat
from megatron_fp4.optim.kept.noise import rounding_words
from megatron_fp4.optim.kept.stores import RUNNERS, Fp32Store, RemainderStore, Store, moment_store
from megatron_fp4.optim.layout import ALIGN, Bucket, ParameterPiece

CHUNK = 2**22
"""Most elements of which there are FP32 copies at once; a multiple of 64."""
MASTER = "master"


class Chunk(NamedTuple):
    """Elements `[start, stop)` of a part, all of one parameter's piece but for the unused ones after its end."""

    piece: ParameterPiece
    start: int
    stop: int


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptShard(Shard):
    """A shard whose tensors are on the meta device where they are not kept in FP32: `read` makes the values."""

    part: KeptPart
    start: int

    def read(self, kind: str) -> Tensor:
        return self.part.stores[kind].read(self.start, self.start + self.where.numel).view(self.where.shape)


class KeptPart:
    """This rank's part of `bucket`. weights: of its parameters, a view. sums: of their gradients, of any dtype.

    stores: by kind. grad: FP32. seed: of the rounding. compile: the conversions of moments. in_place: whether all state
    is FP32, so that an update of what `open` gives is one of what is kept.
    """

    def __init__(
        self, bucket: Bucket, weights: Tensor, sums: Tensor, config: OptimConfig, seed: int, compile: bool = False
    ) -> None:
        self.pieces = bucket.pieces(bucket.group.rank)
        self.tensors: type[AdamTensors | MuonTensors] = MuonTensors if bucket.kind.matrices else AdamTensors
        self.grad = sums.float()
        self._seed, self._run = seed, RUNNERS[compile]
        compact = config.master is MasterFormat.remainder and weights.dtype == torch.bfloat16
        self.stores: dict[str, Store] = {MASTER: RemainderStore(weights) if compact else Fp32Store(weights.float())}
        for kind in self.tensors.moments():
            format = config.moments.by_kind[kind]
            if format.in_blocks and not bucket.kind.blocks:
                format = MomentFormat.fp32
            unsigned = kind == "exp_avg_sq"
            self.stores[kind] = moment_store(format, weights.numel(), weights.device, self._run, unsigned=unsigned)
        self.in_place = all(store.in_place for store in self.stores.values())
        self._filled: dict[str, Tensor] = {}

    @property
    def master(self) -> Tensor | None:
        """FP32, of all elements; None where the weights are its upper half."""
        store = self.stores[MASTER]
        return store.tensors[0] if store.in_place else None

    def chunks(self) -> Iterator[Chunk]:
        """All that this rank owns of the bucket."""
        for piece in self.pieces:
            yield from self.chunks_of(piece)

    def chunks_of(self, piece: ParameterPiece) -> Iterator[Chunk]:
        """All of a piece; in place it is one chunk.

        Those of matrices end on multiples of 64: then torch computes no element of them in another way than the rest.
        """
        numel = piece.numel if self.tensors is AdamTensors else -(-piece.numel // ALIGN) * ALIGN
        size = numel if self.in_place else CHUNK
        for first in range(0, numel, size):
            yield Chunk(piece, piece.offset + first, piece.offset + min(first + size, numel))

    def rectangles(self, piece: ParameterPiece) -> Iterator[tuple[Rectangle, int, int]]:
        """What a piece is of logical tensors, in order, each with its elements `[start, stop)` of the part."""
        return _rectangles(piece, piece.offset, piece.offset + piece.numel)

    def read(self, kind: str, chunk: Chunk) -> Tensor:
        """FP32 values of a state tensor."""
        return self.stores[kind].read(chunk.start, chunk.stop)

    def write(self, kind: str, chunk: Chunk, values: Tensor, step: int = 0) -> None:
        """Keep what `read` has returned, changed. step: number of the update, of which rounding of a moment depends."""
        store, words = self.stores[kind], None
        if store.needs_words:
            words = values.new_zeros(values.shape, dtype=torch.int32)
            for where, start, stop in _rectangles(chunk.piece, chunk.start, chunk.stop):
                drawn = rounding_words(where, values.device, self._run, self._seed, step, kind)
                words[start - chunk.start : stop - chunk.start] = drawn
        store.write(chunk.start, chunk.stop, values, words)

    def open(self, chunk: Chunk) -> AdamTensors | MuonTensors:
        """FP32 master, gradient and moments."""
        state = {kind: self.read(kind, chunk) for kind in self.stores}
        return self.tensors(grad=self.grad[chunk.start : chunk.stop], **state)

    def keep(self, chunk: Chunk, tensors: AdamTensors | MuonTensors, step: int) -> None:
        """What an update has left in what `open` gave."""
        for kind, values in tensors.state.items():
            self.write(kind, chunk, values, step)

    def views(self, where: Rectangle, start: int, stop: int) -> dict[str, Tensor]:
        """FP32 tensors of the shape of `where`, by kind: what is kept, or one without values."""
        return {
            kind: store.read(start, stop).view(where.shape)
            if store.in_place
            else torch.empty(where.shape, device="meta")
            for kind, store in self.stores.items()
        }

    def to_fill(self) -> dict[str, Tensor]:
        """FP32 tensors of all elements, by kind, to be filled and then taken; what is FP32 is filled in place."""
        self._filled = {
            kind: store.tensors[0] if store.in_place else torch.zeros_like(self.grad)
            for kind, store in self.stores.items()
        }
        return self._filled

    def take(self, step: int) -> None:
        """Keep what `to_fill` has given. step: number of the last update."""
        for kind, values in self._filled.items():
            for chunk in self.chunks():
                self.write(kind, chunk, values[chunk.start : chunk.stop], step)
        self._filled = {}


def _rectangles(piece: ParameterPiece, start: int, stop: int) -> Iterator[tuple[Rectangle, int, int]]:
    """What elements `[start, stop)` of a part, which are of `piece`, are of logical tensors."""
    shift = piece.start - piece.offset
    for where in piece.slot.placement.elements(start + shift, min(stop + shift, piece.stop)):
        yield where, start, start + where.numel
        start += where.numel
