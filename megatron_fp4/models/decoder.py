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
from megatron_fp4.layers.embedding import VocabParallelEmbedding, VocabParallelHead, vocab_table
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.recompute import recompute_cores, run_recomputed
from megatron_fp4.models.block import Block, make_norm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.mtp.predict import MultiTokenPrediction
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

    Both ends need the embedding where it is tied to the head or where later tokens are predicted: shared_table is the
    table of the first stage if that is on this rank; otherwise the last stage has a copy of its own, and ends, the
    ranks of the two stages, tells the optimizer to sum the two gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        stage: StageRange,
        *,
        keep_documents_apart: bool = False,
        recompute: Recompute = Recompute.none,
        ends: Group | None = None,
        shared_table: LogicalParameter | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.stage = stage
        self.recompute = recompute
        self.residuals = ResidualProbe()
        vocab_size, std = config.vocab_size, config.init_std
        table = shared_table
        if stage.has_embedding or (stage.has_head and config.embeds_at_both_ends and table is None):
            table = vocab_table(
                "embedding.weight", vocab_size, config.hidden, context, std=std, writes=stage.first == 0
            )
            table.tied_group = ends if config.embeds_at_both_ends and ends is not None and ends.size > 1 else None
        if stage.has_embedding:
            assert table is not None
            self.embedding = VocabParallelEmbedding(vocab_size, table, context)
        self.blocks = nn.ModuleDict(
            {
                str(index): Block(f"blocks.{index}", letter, config, context, keep_documents_apart=keep_documents_apart)
                for index, letter in enumerate(config.blocks)
                if stage.first <= index < stage.stop
            }
        )
        self.mtp: MultiTokenPrediction | None = None
        if stage.has_head and config.mtp.depth:
            assert table is not None
            self.mtp = MultiTokenPrediction(
                config,
                context,
                self.embedding if stage.has_embedding else VocabParallelEmbedding(vocab_size, table, context),
                keep_documents_apart=keep_documents_apart,
                recompute=recompute is Recompute.full,
            )
        if recompute is Recompute.selective:
            recompute_cores(self)
        if stage.has_head:
            self.final_norm = make_norm("final_norm", config, context)
            if not config.tied_embeddings:
                table = vocab_table("head.weight", vocab_size, config.hidden, context, std=std)
            assert table is not None
            self.head = VocabParallelHead(vocab_size, config.hidden, table, context)

    def forward(
        self, x: Tensor, address: Tensor, positions: Tensor, documents: Tensor, ahead: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Token ids `[B, S]` (first stage) or x_TD `[T/tp, D]` -> x_TD, or logits `[T, V/tp]` (last stage).

        address, positions, documents: int64 `[B, S]`, see `Tokens`. ahead: as `train.inputs.Inputs.ahead`; then the
        last stage returns the logits of the next token and of each depth of multi-token prediction.
        """
        return self.run(x, Tokens(address, positions, documents), ahead)

    def run(self, x: Tensor, tokens: Tokens, ahead: Tensor | None = None) -> Tensor | list[Tensor]:
        """See `forward`; layers find the tables of their tokens in `tokens`, or leave them there."""
        if self.stage.has_embedding:
            x = self.embedding(x)
        for index, block in self.blocks.items():
            x = run_recomputed(block, x, tokens, when=self.recompute is Recompute.full)
            if self.residuals.recording:
                self.residuals.add(int(index), x)
        if not self.stage.has_head:
            return x
        x = self.final_norm(x)
        logits: Tensor = self.head(x, tokens)
        if ahead is None or self.mtp is None:
            return logits
        every = [logits, *self.mtp(x, tokens, list(ahead[..., 0].unbind(-1)), self.head)]
        if self.mtp.loss_shares.recording:
            self.mtp.loss_shares.watch(every)
        return every


def whole_model(config: ModelConfig) -> StageRange:
    """The stage that is the whole model."""
    total = len(config.blocks)
    return StageRange(0, total, total)
