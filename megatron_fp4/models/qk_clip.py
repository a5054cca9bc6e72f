"""QK-clip of all attentions of a rank: watch a step, then say by how much the optimizer scales which rows.

    forward      largest logit of each head                                    every rank, its heads and tokens
    row_factors  the largest over dp x cp -> factors of heads -> rows          after the update, of a step that is made

It has no state: the factors of a step follow from that step alone, so a resume goes on as if there had been no stop.
What is only counted, for the metrics, begins anew with a launch. Not here: the arithmetic (layers/qk_clip/), the
weights (optim/zero1.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_max, all_reduce_sum
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.layers.attention import Attention
from megatron_fp4.layers.qk_clip.factors import head_factors, row_factors
from megatron_fp4.layers.qk_clip.maxima import LogitMaxima
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.optim.config import QkClipConfig


class QkClip:
    """Clips the attentions of `stages`, of which a rank may have none. It is what `Zero1Optimizer` calls `rows`."""

    def __init__(self, stages: Sequence[Decoder], config: QkClipConfig, mesh: ParallelMesh) -> None:
        self._config, self._mesh = config, mesh
        self._watched: list[tuple[Attention, LogitMaxima]] = []
        for stage in stages:
            for mixer in stage.modules():
                if isinstance(mixer, Attention):
                    self._watched.append((mixer, mixer.watch_logits()))
        self._names = _block_names(stages[0].config)
        self._blocks = [self._names.index(_block_of(attention)) for attention, _ in self._watched]
        self._device = next(stages[0].parameters()).device
        self._largest_L, self._clipped_L = self._nothing_seen()

    def begin(self) -> None:
        """A step begins."""
        for _, maxima in self._watched:
            maxima.forget()

    def row_factors(self) -> dict[LogicalParameter, Tensor]:
        """What each row of a parameter is multiplied with, FP32 `[rows]`. Collective over dp x cp."""
        if not self._watched:
            return {}
        local_LH = torch.stack([maxima.values for _, maxima in self._watched])
        largest_LH = all_reduce_max(local_LH, self._mesh.dp_cp)
        config, kv_heads = self._config, self._watched[0][0].kv_heads
        factors = head_factors(largest_LH, kv_heads, threshold=config.threshold, alpha=config.alpha)
        self._largest_L = torch.maximum(self._largest_L, largest_LH.max(1).values)
        self._clipped_L += factors.clipped.sum(1)
        rows: dict[LogicalParameter, Tensor] = {}
        for (attention, _), queries, keys in zip(self._watched, factors.queries, factors.keys, strict=True):
            rows[attention.qkv.weight] = row_factors(queries, keys, attention.head_dim)
            if attention.qkv.bias is not None:
                rows[attention.qkv.bias] = rows[attention.qkv.weight]
        return rows

    def report(self) -> dict[str, float]:
        """Metrics of the steps since the last report, of the whole model: the largest logit, and that of each block
        with attention, those of multi-token prediction included; query heads that were clipped, counted in every step.
        Collective over the world."""
        mesh, blocks = self._mesh, torch.tensor(self._blocks, dtype=torch.int64, device=self._device)
        largest = torch.full((len(self._names),), -torch.inf, device=self._device).index_copy(
            0, blocks, self._largest_L
        )
        clipped = torch.zeros(len(self._names), device=self._device).index_copy(0, blocks, self._clipped_L)
        of_ranks = torch.stack([largest, all_reduce_sum(clipped, mesh.tp)])
        of_blocks, counts = all_reduce_max(of_ranks, mesh.world).tolist()
        self._largest_L, self._clipped_L = self._nothing_seen()
        seen = {name: value for name, value in zip(self._names, of_blocks, strict=True) if value != -torch.inf}
        if not seen:
            return {}
        values = {f"qk_clip/max_logit/{name}": value for name, value in seen.items()}
        return {"qk_clip/max_logit": max(seen.values()), "qk_clip/clipped_heads": sum(counts), **values}

    def _nothing_seen(self) -> tuple[Tensor, Tensor]:
        layers = (len(self._watched),)
        return torch.full(layers, -torch.inf, device=self._device), torch.zeros(layers, device=self._device)


def _block_names(config: ModelConfig) -> list[str]:
    """All blocks of the model, the depths of multi-token prediction after the decoder."""
    names = [f"blocks.{index}" for index in range(len(config.blocks))]
    for depth in range(config.mtp.num_sequences):
        names += [f"mtp.{depth}.blocks.{index}" for index in range(len(config.mtp.pattern))]
    return names


def _block_of(attention: Attention) -> str:
    """The name of its block, from that of its weight: `mtp.0.blocks.1.attention.qkv.q.weight`."""
    return attention.qkv.weight.placement.rectangles[0].name.partition(".attention.")[0]
