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
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.groups import AdamTensors, MuonTensors
from megatron_fp4.optim.layout import Bucket
from megatron_fp4.optim.muon.choice import is_muons
from megatron_fp4.optim.muon.config import MuonConfig
from megatron_fp4.optim.muon.exchange import MatrixExchange
from megatron_fp4.optim.muon.newton_schulz import orthogonalize


class Muon:
    """Updates the parts of the buckets of matrices. dtype: of the products, and of what travels."""

    def __init__(
        self,
        parts: Sequence[MuonTensors],
        exchange: MatrixExchange,
        config: MuonConfig,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        self._parts, self._exchange = parts, exchange
        self._config = config
        self._weight_decay = weight_decay
        self._dtype = dtype

    @staticmethod
    def takes(parameter: LogicalParameter, config: OptimConfig) -> bool:
        """Whether it updates a local parameter; see `choice.is_muons`."""
        return is_muons(parameter, config)

    def update(self, lr: float) -> None:
        """One step of every part in place. Collective over the pipeline stage."""
        config, device = self._config, self._parts[0].master.device
        matrices = self._exchange.to_owners([self._direction(part) for part in self._parts])
        for name, matrix in matrices.items():
            matrices[name] = orthogonalize(matrix, config.newton_schulz.triples, dtype=self._dtype)
        for part in self._parts:
            part.master.mul_(1 - lr * self._weight_decay)
        for run, update in self._exchange.to_holders(matrices, self._dtype, device):
            rows, columns = run.where.global_shape
            master = self._parts[run.bucket].master[run.start : run.stop]
            master.add_(update, alpha=-lr * config.scale.factor(rows, columns))

    def _direction(self, part: MuonTensors) -> Tensor:
        mu = self._config.momentum
        part.momentum.lerp_(part.grad, 1 - mu)
        return (part.grad.lerp(part.momentum, mu) if self._config.nesterov else part.momentum).to(self._dtype)


def make_muons(
    buckets: Sequence[Bucket],
    parts: Sequence[AdamTensors | MuonTensors],
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
    of_groups: dict[bool, list[tuple[Bucket, MuonTensors]]] = {}
    for bucket, part in zip(buckets, parts, strict=True):
        if isinstance(part, MuonTensors):
            of_groups.setdefault(bucket.slots[0].placement.of_experts, []).append((bucket, part))
    muons: list[Muon] = []
    for of_experts, members in sorted(of_groups.items(), key=lambda each: each[0]):
        groups = (mesh.edp, Group.single(), mesh.edp) if of_experts else (mesh.dp_cp, mesh.tp, stage)
        exchange = MatrixExchange([bucket for bucket, _ in members], *groups)
        muons.append(Muon([part for _, part in members], exchange, config.muon, config.weight_decay, dtype))
    return muons
