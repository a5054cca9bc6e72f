"""What the optimizer owns on one rank, as rectangles of logical tensors, and what it says of a step.

The checkpoint needs no knowledge of buckets or ranks, and the optimizer none of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.optim.kept.part import MASTER, KeptPart, KeptShard
from megatron_fp4.optim.layout import ParameterPiece


@dataclass(frozen=True, eq=False)
class OwnedPiece:
    """What this rank updates of a parameter. writes: False where another rank counts and saves the same elements."""

    piece: ParameterPiece
    part: KeptPart
    writes: bool

    def scale_rows(self, factors: Tensor) -> None:
        """Multiply its master weights, each row of the local parameter by its own of `factors [rows]`."""
        piece, parameter = self.piece, self.piece.slot.parameter
        local = Rectangle.whole(piece.slot.name, tuple(parameter.shape))
        shift = piece.start - piece.offset
        for chunk in self.part.chunks_of(piece):
            master, start = self.part.read(MASTER, chunk), 0
            for where in local.elements(chunk.start + shift, min(chunk.stop + shift, piece.stop)):
                stop = start + where.numel
                of_rows = factors[where.slices[0]].view(-1, *[1] * (parameter.dim() - 1))
                master[start:stop].view(where.shape).mul_(of_rows)
                start = stop
            self.part.write(MASTER, chunk, master)

    @property
    def grad(self) -> Tensor:
        """FP32, flat."""
        return self.part.grad[self.piece.offset : self.piece.offset + self.piece.numel]

    def shards(self, flats: Mapping[str, Tensor]) -> Iterator[Shard]:
        """The rectangles that the piece is, with views of `flats` (by kind), which are as long as the part."""
        for where, start, stop in self.part.rectangles(self.piece):
            yield Shard(where, {kind: flat[start:stop].view(where.shape) for kind, flat in flats.items()}, self.writes)

    def state_shards(self) -> Iterator[Shard]:
        """The rectangles that the piece is, with what is kept of them; see `KeptShard`."""
        for where, start, stop in self.part.rectangles(self.piece):
            yield KeptShard(where, self.part.views(where, start, stop), self.writes, part=self.part, start=start)


class RowScales(Protocol):
    """Whoever scales rows of parameters after an update."""

    def begin(self) -> None:
        """A step begins, or begins once more."""

    def row_factors(self) -> Mapping[LogicalParameter, Tensor]:
        """Factors by parameter, FP32 `[rows]` of the local one. Called by all ranks, once in a step that updates."""

    def report(self) -> dict[str, float]:
        """Metrics of the steps since the last report. Collective over the world."""


class GradientFree(Protocol):
    """Parameters that no gradient changes, but a rule of their own, once a step that updates: FP32, the same on every
    rank of a stage, and in checkpoints beside the masters."""

    @property
    def parameters(self) -> Sequence[LogicalParameter]:
        """All of them on this rank."""

    def begin(self) -> None:
        """A step begins, or begins once more."""

    def update(self) -> None:
        """Change the parameters. Collective over the stage."""


def gradient_free_shards(parameters: Sequence[LogicalParameter], *, writes: bool) -> Iterator[Shard]:
    """The rectangles that they are, as masters; their tensors are views into live state."""
    for parameter in parameters:
        for rows, where in parameter.placement.pieces():
            yield Shard(where, {"master": parameter.detach()[rows]}, writes and parameter.placement.writes)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    grad_norm: global norm before clipping, FP32-rounded, the same on every rank. clip_factor: what the gradients were
    multiplied by. skipped: the norm was not finite and no state changed, on any rank. nonfinite: the logical names of
    the offending parameters of all ranks (empty unless skipped).
    """

    lr: float
    grad_norm: float
    clip_factor: float
    skipped: bool
    nonfinite: tuple[str, ...] = ()
