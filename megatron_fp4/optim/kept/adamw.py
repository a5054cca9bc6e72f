"""AdamW over the parts of all buckets: those that are FP32 at once, the others one chunk after the other."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.optim.adam import AdamW, choose_adamw, torch_adamw
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.groups import AdamTensors, UpdateGroup
from megatron_fp4.optim.kept.part import Chunk, KeptPart


class PartwiseAdamW:
    """AdamW of the parts that hold its moments; FP32 copies are alive of one chunk at a time."""

    def __init__(self, parts: Sequence[KeptPart], config: OptimConfig) -> None:
        self._config = config
        own = [part for part in parts if part.tensors is AdamTensors]
        self._compact = [part for part in own if not part.in_place]
        in_place = [(part, chunk) for part in own if part.in_place for chunk in part.chunks()]
        self._in_place: AdamW = choose_adamw(self._groups(in_place), config)

    def update(self, lr: float, step: int) -> None:
        """step: number of this update, from 1."""
        self._in_place.update(lr, step)
        for part in self._compact:
            for chunk in part.chunks():
                (group,) = self._groups([(part, chunk)])
                torch_adamw([group], self._config).update(lr, step)
                part.keep(chunk, group.members[0], step)

    def _groups(self, chunks: Sequence[tuple[KeptPart, Chunk]]) -> list[UpdateGroup]:
        groups: dict[float, UpdateGroup] = {}
        for part, chunk in chunks:
            decay = self._config.weight_decay if chunk.piece.slot.placement.decay else 0.0
            tensors = part.open(chunk)
            assert isinstance(tensors, AdamTensors)
            groups.setdefault(decay, UpdateGroup(decay)).members.append(tensors)
        return list(groups.values())
