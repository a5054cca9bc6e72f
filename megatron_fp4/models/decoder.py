"""The decoder, or the part of it that one pipeline stage holds.

One idea: a stage is the same module as the whole model with a shorter range of blocks; the embedding exists where the
range starts at the first block, the final norm and head where it ends at the last. Modules carry their global block
number, so that names do not depend on the split.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.layers.attention import Attention
from megatron_fp4.layers.embedding import VocabParallelEmbedding, vocab_range, vocab_table
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import ColumnParallelLinear, ParallelLinear
from megatron_fp4.layers.mlp import MLP
from megatron_fp4.models.block import Block, make_norm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision.sharding import Sharding


class Recompute(Enum):
    """What is computed a second time in the backward pass instead of being kept."""

    none = "none"
    selective = "selective"  # attention core and MLP activation (Mamba-2's core always is); no linear
    full = "full"  # every block: only the block inputs are kept


@dataclass(frozen=True)
class StageRange:
    """Blocks `[first, stop)` of a model of `total` blocks."""

    first: int
    stop: int
    total: int

    @property
    def has_embedding(self) -> bool:
        return self.first == 0

    @property
    def has_head(self) -> bool:
        return self.stop == self.total


class VocabParallelHead(ParallelLinear):
    """x_TD `[T/tp, D]` -> logits_TV `[T, V/tp]` of this rank's vocabulary rows. weight: the embedding's if tied."""

    forward = ColumnParallelLinear.forward

    def __init__(self, vocab_size: int, hidden: int, weight: LogicalParameter, context: LayerContext) -> None:
        first, stop = vocab_range(vocab_size, context.tp)
        sharding = Sharding(
            name="head",
            x_group=context.cp,
            w_group=context.tp,
            dy_group=context.tp_cp,
            n_index=torch.arange(first, stop, device=context.device),
            k_index=torch.arange(hidden, device=context.device),
        )
        super().__init__(context, sharding)
        self.weight = weight


class Decoder(nn.Module):
    """Blocks `stage.first .. stage.stop` of the model, with embedding and head where they belong.

    Tied embeddings: shared_table is the table of the first stage if that is on this rank; otherwise the last stage has
    a copy of its own, and tied_group, the ranks of the two stages, tells the optimizer to sum the two gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        stage: StageRange,
        *,
        keep_documents_apart: bool = False,
        recompute: Recompute = Recompute.none,
        tied_group: Group | None = None,
        shared_table: LogicalParameter | None = None,
    ) -> None:
        super().__init__()
        self.config, self.stage, self.recompute = config, stage, recompute
        size, hidden, std = config.vocab_size, config.hidden, config.init_std
        if stage.has_embedding:
            self.embedding = VocabParallelEmbedding("embedding", size, hidden, context, std=std)
        self.blocks = nn.ModuleDict(
            {
                str(index): Block(index, config, context, keep_documents_apart=keep_documents_apart)
                for index in range(stage.first, stage.stop)
            }
        )
        if recompute is Recompute.selective:
            for mixer in self.modules():
                if isinstance(mixer, Attention | MLP):
                    mixer.recompute_core = True
        if stage.has_head:
            self.final_norm = make_norm("final_norm", config, context)
            if config.tied_embeddings and stage.has_embedding:
                weight = self.embedding.weight
            elif config.tied_embeddings and shared_table is not None:
                weight = shared_table
            elif config.tied_embeddings:
                weight = vocab_table("embedding.weight", size, hidden, context, std=std, writes=False)
            else:
                weight = vocab_table("head.weight", size, hidden, context, std=std)
            self.head = VocabParallelHead(size, hidden, weight, context)
        if config.tied_embeddings and tied_group is not None and tied_group.size > 1:
            for module in (getattr(self, "embedding", None), getattr(self, "head", None)):
                if module is not None:
                    module.weight.tied_group = tied_group

    def forward(self, x: Tensor, address: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Token ids `[B, S]` (first stage) or x_TD `[T/tp, D]` -> x_TD, or logits `[T, V/tp]` (last stage).

        address, positions, documents: int64 `[B, S]`, see `Tokens`.
        """
        tokens = Tokens(address, positions, documents)
        if self.stage.has_embedding:
            x = self.embedding(x)
        for block in self.blocks.values():
            if self.recompute is Recompute.full and torch.is_grad_enabled():
                x = checkpoint(block, x, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, tokens)
        if self.stage.has_head:
            x = self.head(self.final_norm(x), tokens)
        return x


def whole_model(config: ModelConfig) -> StageRange:
    """The stage that is the whole model."""
    total = len(config.blocks)
    return StageRange(0, total, total)
