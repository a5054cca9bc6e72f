"""One step of Muon on divided masters (torch/optim/_muon.py; M <- lerp(M, G, 1 - mu) is its momentum).

    every rank     momentum of its own elements, and what is to be orthogonalized, in the dtype of the products
    owners         the whole matrix -> orthogonalized
    every rank     W <- (1 - lr decay) W - lr scale O, on its own elements, in FP32

Not here: which parameters (choice.py), the messages (exchange.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.optim.adam import decay_cautiously
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.groups import MuonTensors
from megatron_fp4.optim.kept.part import MASTER, KeptPart
from megatron_fp4.optim.layout import Bucket
from megatron_fp4.optim.muon.exchange import MatrixExchange, MatrixRun
from megatron_fp4.optim.muon.newton_schulz import orthogonalize

MOMENTUM = "momentum"


class Muon:
    """Updates the parts of the buckets of matrices. dtype: of the products, and of what travels."""

    def __init__(
        self,
        parts: Sequence[KeptPart],
        exchange: MatrixExchange,
        config: OptimConfig,
        dtype: torch.dtype,
    ) -> None:
        self._parts, self._exchange = parts, exchange
        self._config, self._cautious = config.muon, config.cautious_decay
        self._weight_decay = config.weight_decay
        self._dtype = dtype

    def update(self, lr: float, step: int) -> None:
        """One step of every part. step: its number, from 1. Collective over the pipeline stage."""
        config, device = self._config, self._parts[0].grad.device
        matrices = self._exchange.to_owners([self._direction(part, step) for part in self._parts])
        for name, matrix in matrices.items():
            matrices[name] = orthogonalize(matrix, config.newton_schulz.triples, dtype=self._dtype)
        updates: list[list[tuple[MatrixRun, Tensor]]] = [[] for _ in self._parts]
        for run, update in self._exchange.to_holders(matrices, self._dtype, device):
            updates[run.bucket].append((run, update))
        for part, of_part in zip(self._parts, updates, strict=True):
            for chunk in part.chunks():
                master = part.read(MASTER, chunk)
                if not self._cautious:
                    master.mul_(1 - lr * self._weight_decay)
                for run, update in of_part:
                    low, high = max(run.start, chunk.start), min(run.stop, chunk.stop)
                    if low < high:
                        stretch = master[low - chunk.start : high - chunk.start]
                        direction = update[low - run.start : high - run.start]
                        if self._cautious:
                            decay_cautiously(stretch, direction, lr * self._weight_decay)
                        stretch.add_(direction, alpha=-lr * config.scale.factor(*run.where.global_shape))
                part.write(MASTER, chunk, master)

    def _direction(self, part: KeptPart, step: int) -> Tensor:
        """What is to be orthogonalized of a part, flat, after its gradient is in the momentum."""
        mu = self._config.momentum
        direction = torch.zeros_like(part.grad, dtype=self._dtype)
        for chunk in part.chunks():
            grad = part.grad[chunk.start : chunk.stop]
            momentum = part.read(MOMENTUM, chunk)
            momentum.lerp_(grad, 1 - mu)
            ahead = grad.lerp(momentum, mu) if self._config.nesterov else momentum
            direction[chunk.start : chunk.stop] = ahead
            part.write(MOMENTUM, chunk, momentum, step)
        return direction


def make_muons(
    buckets: Sequence[Bucket],
    parts: Sequence[KeptPart],
    config: OptimConfig,
    mesh: ParallelMesh,
    stage: Group,
    sum_dtype: torch.dtype,
) -> list[Muon]:
    """Muon for the buckets of matrices that the ranks of `stage` share, and for those of experts, which never leave the
    ranks that hold the same ones.

    Products are in BF16, in the proof mode (sum_dtype FP64) in FP32. Collective over tp.
    """
    dtype = torch.float32 if sum_dtype == torch.float64 else torch.bfloat16
    of_groups: dict[bool, list[tuple[Bucket, KeptPart]]] = {}
    for bucket, part in zip(buckets, parts, strict=True):
        if part.tensors is MuonTensors:
            of_groups.setdefault(bucket.slots[0].placement.of_experts, []).append((bucket, part))
    muons: list[Muon] = []
    for of_experts, members in sorted(of_groups.items(), key=lambda each: each[0]):
        groups = (mesh.edp, Group.single(), mesh.edp) if of_experts else (mesh.dp_cp, mesh.tp, stage)
        exchange = MatrixExchange([bucket for bucket, _ in members], *groups)
        muons.append(Muon([part for _, part in members], exchange, config, dtype))
    return muons
