"""The losses that balance the experts of a mixture; their gradients are added in the backward pass of its router.

With s the scores of a token divided by their sum (softmax: the scores), T the tokens of a sequence or of the global
batch, and c_i how many of them have expert i among their top k by the scores alone:

    sequence_loss   sum_i (E c_i / k T) (sum_t s_ti / T), mean over the sequences of the global batch: arXiv 2412.19437,
                    (17) to (20), Megatron-LM's seq_aux_loss. It is 1 where all is even.
    global_loss     the same over the global batch, but c_i are the choices (bias and groups included) of the global
                    batch before: this one's are not known before its first backward pass. Switch's loss (arXiv
                    2101.03961, (4)) over all ranks; Megatron-LM's global_aux_loss adds c up as microbatches come.
    z_loss          mean over the tokens of logsumexp(logits)^2: arXiv 2202.08906, (5).

A sequence is a sample, whatever documents it holds. Each loss is divided by numbers of the global batch, so that no
gradient depends on how the batch is divided; those of all layers are added. What is counted is added in the backward
pass: it runs once, however often a forward pass is computed again, and only for what is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.moe.choice import EPSILON, best, counted
from megatron_fp4.layers.moe.config import MoeConfig, RouterScore

MEANS = ("sequence_loss", "global_loss", "z_loss", "entropy")
"""What a tally has behind its counts: the losses without their coefficients, 0 where one is off, and the mean over the
tokens of the entropy of s, in nats."""

NUM_SUMS = len(MEANS) + 1
"""Behind the counts of a tally."""


@dataclass(frozen=True, eq=False)
class Tally:
    """What has come together in a step so far; FP64 `[E + 5]`: tokens sent to each expert, then this rank's
    parts of `MEANS`, and of how often the tokens of the global batch passed the router (depths may share it)."""

    numbers: Tensor

    @staticmethod
    def empty(num_experts: int, device: torch.device) -> Tally:
        """A tally of no token."""
        return Tally(torch.zeros(num_experts + NUM_SUMS, dtype=torch.float64, device=device))

    @property
    def counts_E(self) -> Tensor:
        return self.numbers[:-NUM_SUMS]

    @property
    def means(self) -> Tensor:
        """Once all ranks' parts are added."""
        return self.numbers[-NUM_SUMS:-1] / self.numbers[-1].round().clamp(min=1.0)


@dataclass(frozen=True, eq=False)
class Routing:
    """What the losses are of. logits, scores: in the type that the router computes in. ranked: the scores in FP32, or
    what ranks experts instead. overload_E: see `Router`."""

    logits_TE: Tensor
    scores_TE: Tensor
    ranked_TE: Tensor
    experts_Tk: Tensor
    overload_E: Tensor | None


class _Balanced(torch.autograd.Function):
    """The weights as they are; in the backward pass `loss` gets the gradient 1, and what was counted is added up."""

    @staticmethod
    def forward(ctx: Any, weights_Tk: Tensor, loss: Tensor, counted: Tensor, tally: Tally) -> Tensor:
        ctx.counted, ctx.tally = counted, tally
        ctx.dtype = loss.dtype
        return weights_Tk.view_as(weights_Tk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.tally.numbers.add_(ctx.counted)
        return grads[0], torch.ones((), dtype=ctx.dtype, device=grads[0].device), None, None


def balanced(
    weights_Tk: Tensor, routing: Routing, config: MoeConfig, tokens: Tokens, context: LayerContext, tally: Tally
) -> Tensor:
    """The weights, whose backward pass adds the gradients of the losses and fills the tally. Collective over tp x cp
    with a sequence loss."""
    scores_TE = routing.scores_TE
    shares_TE = scores_TE
    if config.score is RouterScore.sigmoid:
        shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + EPSILON)
    num_sequences = context.clock.batch_samples
    length = tokens.address.shape[1] * context.cp.size
    zero = scores_TE.new_zeros(())
    sequence = over_all = z = zero
    if config.sequence_loss:
        load_TE = _sequence_load(routing.ranked_TE, config, tokens, context, length)
        sequence = (load_TE.to(shares_TE.dtype) * shares_TE).sum() / (length * num_sequences)
    if routing.overload_E is not None:
        load_E = routing.overload_E.to(shares_TE.dtype) + 1.0
        over_all = (load_E * shares_TE).sum() / (length * num_sequences)
    if config.z_loss:
        z = routing.logits_TE.logsumexp(-1).square().sum() / (length * num_sequences)
    loss = config.sequence_loss * sequence + config.global_loss * over_all + config.z_loss * z
    with torch.no_grad():
        entropy = torch.special.entr(shares_TE).sum() / (length * num_sequences)
        counts_E = counted(routing.experts_Tk.flatten(), config.num_experts)
        means = torch.stack([sequence, over_all, z, entropy])
        passes = means.new_full((1,), len(scores_TE) / (length * num_sequences), dtype=torch.float64)
        numbers = torch.cat([counts_E, means.double(), passes])
    result: Tensor = _Balanced.apply(weights_Tk, loss, numbers, tally)
    return result


@torch.no_grad()
def _sequence_load(ranked_TE: Tensor, config: MoeConfig, tokens: Tokens, context: LayerContext, length: int) -> Tensor:
    """E c_i / k T of the sequence of each of this rank's rows, `[T, E]`."""
    num_sequences, columns = tokens.address.shape
    num_experts = config.num_experts
    places = torch.arange(num_sequences, device=ranked_TE.device).repeat_interleave(columns)
    sequence_T = places.chunk(context.tp.size)[context.tp.rank]
    chosen_Tk = best(ranked_TE, config.top_k)
    counts = counted((sequence_T[:, None] * num_experts + chosen_Tk).flatten(), num_sequences * num_experts)
    counts_BE = all_reduce_sum(counts, context.tp_cp).view(num_sequences, num_experts)
    return (counts_BE * (num_experts / (config.top_k * length)))[sequence_T]
