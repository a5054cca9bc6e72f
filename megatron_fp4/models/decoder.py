"""The decoder, or the part of it that one pipeline stage holds.

A stage is the same module as the whole model with a shorter range of blocks; the embedding exists where the range
starts at the first block, the final norm and head where it ends at the last. Modules carry their global block number,
so that names do not depend on the split.

Not here: which stage has which blocks (partition.py), what a block is (block.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.layers.attention import Attention
from megatron_fp4.layers.embedding import VocabParallelEmbedding, VocabParallelHead, vocab_table
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.mlp import MLP
from megatron_fp4.layers.moe.experts import GroupedExperts
from megatron_fp4.layers.recompute import run_recomputed
from megatron_fp4.models.block import Block, make_norm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.residuals import ResidualProbe


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
        self.config = config
        self.stage = stage
        self.recompute = recompute
        self.residuals = ResidualProbe()
        vocab_size, hidden = config.vocab_size, config.hidden
        tables: list[LogicalParameter] = []
        if stage.has_embedding:
            self.embedding = VocabParallelEmbedding("embedding", vocab_size, hidden, context, std=config.init_std)
            tables.append(self.embedding.weight)
        self.blocks = nn.ModuleDict(
            {
                str(index): Block(index, config, context, keep_documents_apart=keep_documents_apart)
                for index in range(stage.first, stage.stop)
            }
        )
        if recompute is Recompute.selective:
            for mixer in self.modules():
                if isinstance(mixer, Attention | MLP | GroupedExperts):
                    mixer.recompute_core = True
        if stage.has_head:
            self.final_norm = make_norm("final_norm", config, context)
            self.head = VocabParallelHead(vocab_size, hidden, self._head_table(context, shared_table), context)
            tables.append(self.head.weight)
        if config.tied_embeddings and tied_group is not None and tied_group.size > 1:
            for table in tables:
                table.tied_group = tied_group

    def _head_table(self, context: LayerContext, shared_table: LogicalParameter | None) -> LogicalParameter:
        config = self.config
        if config.tied_embeddings and self.stage.has_embedding:
            return self.embedding.weight
        if config.tied_embeddings and shared_table is not None:
            return shared_table
        name = "embedding.weight" if config.tied_embeddings else "head.weight"
        return vocab_table(
            name, config.vocab_size, config.hidden, context, std=config.init_std, writes=not config.tied_embeddings
        )

    def forward(self, x: Tensor, address: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Token ids `[B, S]` (first stage) or x_TD `[T/tp, D]` -> x_TD, or logits `[T, V/tp]` (last stage).

        address, positions, documents: int64 `[B, S]`, see `Tokens`.
        """
        return self.run(x, Tokens(address, positions, documents))

    def run(self, x: Tensor, tokens: Tokens) -> Tensor:
        """See `forward`; layers find the tables of their tokens in `tokens`, or leave them there."""
        if self.stage.has_embedding:
            x = self.embedding(x)
        for index, block in self.blocks.items():
            x = run_recomputed(block, x, tokens, when=self.recompute is Recompute.full)
            if self.residuals.recording:
                self.residuals.add(int(index), x)
        if self.stage.has_head:
            x = self.head(self.final_norm(x), tokens)
        return x


def whole_model(config: ModelConfig) -> StageRange:
    """The stage that is the whole model."""
    total = len(config.blocks)
    return StageRange(0, total, total)
