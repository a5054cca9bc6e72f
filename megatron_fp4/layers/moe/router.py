"""The router of a mixture of experts: which experts a token is sent to, and with what weight.

    logits = x W^T              scores = sigmoid or softmax(logits)
    chosen = top k of scores + bias    weights = scores[chosen], by the settings divided by their sum, times a factor

Every number is a function of the token alone, and ties go to the expert of the lower index, so that a layout changes no
choice. Logits are FP32; on CPUs and in the proof mode sums are made in FP64 and rounded once. The bias acts in the
choice only (arXiv 2408.15664), so that no gradient pays for a balanced load.

Shape letters beside those of `layer_context`: E experts here, k experts of a token, T rows of this rank (T/tp there).

Not here: the choice itself (choice.py), what balances the experts (losses.py, balance.py), which rows a full expert
gives up (capacity.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.moe.capacity import rows_kept
from megatron_fp4.layers.moe.choice import choose_experts, weights_of
from megatron_fp4.layers.moe.config import MoeConfig, RouterScore
from megatron_fp4.layers.moe.losses import Routing, Tally, balanced
from megatron_fp4.layers.parameter import constant_init, make_parameter, normal_init, replicated_vector


@dataclass(frozen=True, eq=False)
class Routes:
    """Where the T rows of this rank go.

    experts_Tk: int64, ascending in a row. weights_Tk: FP32, with the gradient of the router. kept_Tk: False where a
    full expert gives the row up; None: none does.
    """

    experts_Tk: Tensor
    weights_Tk: Tensor
    kept_Tk: Tensor | None = None


class Router(nn.Module):
    """x_TD `[T, D]` -> `Routes`.

    weight: FP32 `[E, D]`, whole on every tensor-parallel rank. bias, overload: FP32 `[E]`, without gradients, see
    `balance.LoadBalance`; None where the settings have no use for them. tally: what this rank has counted since the
    step began. ranking: of addresses `[T]`, what ranks the experts instead of the scores, FP32 `[T, E]`; for proofs in
    types whose rounding would decide between experts.
    """

    def __init__(self, name: str, config: MoeConfig, hidden: int, context: LayerContext, *, std: float) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self._context = context
        shape = (config.num_experts, hidden)
        placement = Placement((Rectangle.whole(f"{name}.weight", shape),), tp_replicated=True)
        self.weight = make_parameter(shape, placement, normal_init(std), torch.float32, context.device)
        self.bias = self._state("bias") if config.expert_bias else None
        self.overload = self._state("overload") if config.global_loss else None
        self.tally = Tally.empty(config.num_experts, context.device)
        self.ranking: Callable[[Tensor], Tensor] | None = None

    def _state(self, part: str) -> LogicalParameter:
        size = self.config.num_experts
        placement = replicated_vector(f"{self.name}.{part}", size)
        parameter = make_parameter((size,), placement, constant_init(0.0), torch.float32, self._context.device)
        parameter.requires_grad_(False)
        return parameter

    def extra_repr(self) -> str:
        return f"{self.name}, top {self.config.top_k} of {self.config.num_experts}"

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routes:
        config, context = self.config, self._context
        exact = context.dtype == torch.float32 or x_TD.device.type == "cpu"
        work = torch.float64 if exact else torch.float32
        logits_TE = _RouterLogits.apply(x_TD, self.weight, work).to(work)
        scores_TE = logits_TE.sigmoid() if config.score is RouterScore.sigmoid else logits_TE.softmax(-1)
        with torch.no_grad():
            ranked_TE = scores_TE.float() if self.ranking is None else self.ranking(tokens.local_rows(context.tp))
            experts_Tk = choose_experts(ranked_TE, self.bias, config)
        weights_Tk = weights_of(scores_TE, experts_Tk, config).float()
        trained = torch.is_grad_enabled() and weights_Tk.requires_grad
        if trained:
            routing = Routing(logits_TE, scores_TE, ranked_TE, experts_Tk, self.overload)
            weights_Tk = balanced(weights_Tk, routing, config, tokens, context, self.tally)
        full = trained and config.capacity_factor  # what is evaluated depends on no token beside it
        return Routes(
            experts_Tk, weights_Tk, rows_kept(experts_Tk, weights_Tk, tokens, config, context) if full else None
        )


class _RouterLogits(torch.autograd.Function):
    """FP32 `x W^T`, x `[T, D]` and W `[E, D]`, in the type `work`; x is kept for the backward pass as it came."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, work: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.work = work
        return (x_TD.to(work) @ weight_ED.to(work).T).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_TE = grads[0].to(ctx.work)
        dx_TD = (grad_TE @ weight_ED.to(ctx.work)).to(x_TD.dtype)
        return dx_TD, (grad_TE.T @ x_TD.to(ctx.work)).to(weight_ED.dtype), None
