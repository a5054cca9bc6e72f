"""What Muon costs a rank: the elements that it updates, the matrices that it orthogonalizes, the messages between.

Not here: AdamW's bytes (memory.py, cost/overheads.py), which Muon's replace for these elements.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import held_parameters, logical_shapes
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.optim.config import Algorithm, OptimConfig
from megatron_fp4.optim.muon.choice import matrices_of
from megatron_fp4.optim.muon.exchange import busiest
from megatron_fp4.optim.muon.newton_schulz import orthogonalization_flops
from megatron_fp4.planning.settings import RankSettings


@dataclass(frozen=True)
class MuonShare:
    """Muon on one rank; all zero without it.

    elements: of the matrices on it, its tensor-parallel part, before they are divided over the replicas; experts: the
    same of its routed experts. flops: of the rank of the stage that orthogonalizes most; imbalance: that over the mean.
    largest: elements that a rank has to hold as whole matrices; matrix: of the largest one.
    """

    elements: int = 0
    experts: int = 0
    flops: float = 0.0
    imbalance: float = 1.0
    largest: int = 0
    matrix: int = 0

    @staticmethod
    def of(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> MuonShare:
        """The share of a rank that holds `stages`."""
        if settings.optim.algorithm is not Algorithm.muon:
            return MuonShare()
        return _share(config, tuple(stages), settings.optim, settings.tp, settings.replicas, settings.ep)

    def divided(self, settings: RankSettings) -> float:
        """Elements that a rank updates."""
        return self.elements / settings.replicas + self.experts / settings.expert_replicas

    def update_bytes(self, settings: RankSettings) -> float:
        """Bytes alive during an update of the rank that has most to hold.

        On the way what a rank sends and receives, twice each: parts and their message, message and matrices. In between
        its matrices, and beside the one that is orthogonalized two more of its size and the two squares.
        """
        own = self.divided(settings)
        return settings.dtype.itemsize * max(2 * (own + max(own, self.largest)), self.largest + 4 * self.matrix)


def whole_flops(config: ModelConfig, optim: OptimConfig) -> int:
    """FLOPs of a step's orthogonalizations, all matrices of the model together; 0 without Muon."""
    steps = len(optim.muon.newton_schulz.triples)
    matrices = matrices_of(logical_shapes(config), optim)
    return sum(orthogonalization_flops(rows, columns, steps) for rows, columns in matrices.values())


@cache
def _share(
    config: ModelConfig, stages: tuple[StageRange, ...], optim: OptimConfig, tp: int, replicas: int, ep: int
) -> MuonShare:
    held = {parameter.name: parameter for parameter in held_parameters(config, stages)}
    matrices = matrices_of({name: parameter.shape for name, parameter in held.items()}, optim)
    if not matrices:
        return MuonShare()
    steps = len(optim.muon.newton_schulz.triples)
    load = busiest(matrices, tp * replicas, steps)
    routed = sum(held[name].numel for name in matrices if held[name].expert is not None)
    common = sum(held[name].local_numel(tp) for name in matrices if held[name].expert is None)
    return MuonShare(common, routed // ep, *load)
