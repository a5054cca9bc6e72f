"""Multi-token prediction (DeepSeek-V3, section 2.2; Nemotron 3): what predicts the tokens behind the next one.

At position i, whose token is t_i and whose next token is the label t_(i+1), for depth d = 1 .. D:

    h_0      = what the head multiplies, behind the decoder's final norm
    x_d      = projection(cat(norm_embedding(embedding(t_(i+d))), norm_hidden(h_(d-1))))
    h_d      = final_norm(blocks(x_d))
    logits_d = head(h_d)                                        judged by t_(i+d+1)

The embedding is the model's own, the head too. Which of the two halves comes first, and that h_0 is normalized, papers
leave open or say differently; here it is as in Megatron-core and in the checkpoints that DeepSeek published.

Depths that share their blocks multiply the same rows by the same weights, and all of them use the head. So that they
do not draw the same rounding noise and dropout, the address of a row says at which depth it is.

Not here: which token and which label a position has at a depth (train/inputs.py), the losses (train/engine.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_fp4.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import ReplicatedLinear
from megatron_fp4.layers.recompute import run_recomputed
from megatron_fp4.models.block import Block, make_norm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.loss_shares import LossShareProbe


class Depth(nn.Module):
    """h_TD and e_TD `[T/tp, D]`, the depth before and the embeddings of later tokens -> `[T/tp, D]`.

    number: in logical names, `mtp.0.projection.weight`. recompute: keep only what is handed to the blocks.
    """

    def __init__(
        self, number: int, config: ModelConfig, context: LayerContext, *, keep_documents_apart: bool, recompute: bool
    ) -> None:
        super().__init__()
        self._recompute = recompute
        name, D = f"mtp.{number}", config.hidden
        self.norm_embedding = make_norm(f"{name}.norm_embedding", config, context)
        self.norm_hidden = make_norm(f"{name}.norm_hidden", config, context)
        self.projection = ReplicatedLinear(f"{name}.projection", 2 * D, D, context, std=config.init_std)
        self.blocks = nn.ModuleList(
            Block(f"{name}.blocks.{index}", letter, config, context, keep_documents_apart=keep_documents_apart)
            for index, letter in enumerate(config.mtp.pattern)
        )
        self.final_norm = make_norm(f"{name}.final_norm", config, context)

    def forward(self, h_TD: Tensor, e_TD: Tensor, tokens: Tokens) -> Tensor:
        x_TD = run_recomputed(self._join, h_TD, e_TD, tokens, when=self._recompute)
        for block in self.blocks:
            x_TD = run_recomputed(block, x_TD, tokens, when=self._recompute)
        return self.final_norm(x_TD)

    def _join(self, h_TD: Tensor, e_TD: Tensor, tokens: Tokens) -> Tensor:
        joined_TK = torch.cat([self.norm_embedding(e_TD), self.norm_hidden(h_TD)], dim=-1)
        return self.projection(joined_TK, tokens)


class MultiTokenPrediction(nn.Module):
    """All depths, on the last stage. embedding: the model's, or the last stage's copy of it."""

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        embedding: VocabParallelEmbedding,
        *,
        keep_documents_apart: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.loss_shares = LossShareProbe()
        self._depth = config.mtp.depth
        self.embedding = embedding
        self.depths = nn.ModuleList(
            Depth(number, config, context, keep_documents_apart=keep_documents_apart, recompute=recompute)
            for number in range(config.mtp.num_sequences)
        )

    def forward(self, h_TD: Tensor, tokens: Tokens, ahead_BS: list[Tensor], head: VocabParallelHead) -> list[Tensor]:
        """h_TD `[T/tp, D]`: what the head multiplied. ahead_BS: the token ids of each depth. Returns logits of each."""
        logits = []
        for number, ids_BS in enumerate(ahead_BS):
            tokens = tokens.next_round()
            depth = self.depths[number % len(self.depths)]
            h_TD = depth(h_TD, self.embedding(ids_BS, apart=True), tokens)
            logits.append(head(h_TD, tokens))
        return logits
