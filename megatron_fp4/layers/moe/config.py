"""Sizes and choices of the mixture-of-experts mixers of a model (`E` in `model.pattern`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from megatron_fp4.settings import FP32_MOST, Bound, Count, Size, check_bounds

Coefficient = Annotated[float, Bound(least=0, most=FP32_MOST)]
"""Something whose 0 turns it off."""


class RouterScore(Enum):
    """What a router makes of its logits."""

    sigmoid = "sigmoid"  # each expert for itself (DeepSeek-V3, Nemotron 3)
    softmax = "softmax"  # over all experts, before the choice


class Drop(Enum):
    """Which rows a full expert gives up; among equals the one of the later token."""

    weight = "weight"  # those of the smallest weight
    address = "address"  # those of the latest tokens of the segment


@dataclass(frozen=True)
class MoeConfig:
    """Mixtures of experts, one mixer per `E` of model.pattern. The activation of experts is model.activation."""

    num_experts: Annotated[int, Bound(least=0, most=1 << 16)] = 0
    """Routed experts of a mixture; 0 = the model has none, needed where the pattern has an E."""
    top_k: Size = 2
    """Experts that a token is sent to."""
    ffn_hidden: Count = 0
    """Width inside a routed expert; with swiglu, of each of its two halves."""
    shared_ffn_hidden: Count = 0
    """Width inside the shared expert, which every token passes; 0 = none."""
    latent: Count = 0
    """Width that tokens are projected to for the routed experts; router and shared expert keep model.hidden; 0 = no
    projection."""
    score: RouterScore = RouterScore.sigmoid
    """What a router makes of its logits."""
    normalize: bool = True
    """Divide the scores of a token's experts by their sum."""
    scaling_factor: Annotated[float, Bound(above=0, most=FP32_MOST)] = 1.0
    """What the weights of a token's experts are multiplied by at last."""
    num_groups: Size = 1
    """Groups of neighbouring experts, of which a token chooses top_groups first; 1 = no groups."""
    top_groups: Size = 1
    """Groups that a token's experts may be in: those with the largest sum of their two best scores."""
    expert_bias: bool = False
    """Add a bias to the scores of experts in the choice, not in the weights; checkpoints keep it."""
    bias_rate: Annotated[float, Bound(least=0, most=1)] = 0.0
    """What an expert's bias gains or loses after a global batch that sent it less or more than the mean; 0 = it stays
    as it is."""
    sequence_loss: Coefficient = 0.0
    """Coefficient of the loss that balances the experts within each sequence; 0 = off."""
    global_loss: Coefficient = 0.0
    """Coefficient of the loss that balances the experts by their load in the global batch before; 0 = off."""
    z_loss: Coefficient = 0.0
    """Coefficient of the mean square of the logits' logarithmic sum; 0 = off."""
    capacity_factor: Coefficient = 0.0
    """Rows that an expert takes of a segment in training, at most, as a multiple of its fair share; 0 = all, dropless,
    as in every evaluation."""
    drop: Drop = Drop.weight
    """Which rows a full expert gives up."""
    segment_tokens: Count = 0
    """Consecutive tokens of the global batch that are one segment, for capacities and for scales of quantized experts;
    0 = a microbatch of one data-parallel rank is."""

    def __post_init__(self) -> None:
        check_bounds(self, "model.moe")
        if not self.num_experts:
            return
        if not self.ffn_hidden:
            raise ValueError("model.moe.ffn_hidden = 0; set it to the width inside a routed expert")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k = {self.top_k} is more than model.moe.num_experts = {self.num_experts}; lower it"
            )
        if self.top_k == 1 and self.normalize:
            raise ValueError(
                "model.moe.normalize=true with model.moe.top_k = 1 gives every expert the weight 1, and the router"
                " learns nothing from the loss; set model.moe.normalize=false"
            )
        if self.num_experts == 1 and self.score is RouterScore.softmax:
            raise ValueError(
                "model.moe.score=softmax with model.moe.num_experts = 1 gives every token the weight 1, and the router"
                " learns nothing from the loss; set model.moe.score=sigmoid, or have more experts"
            )
        self._check_groups()
        if self.bias_rate and not self.expert_bias:
            raise ValueError(
                f"model.moe.bias_rate = {self.bias_rate:g} has no effect without a bias; set model.moe.expert_bias=true"
            )
        if self.drop is not Drop.weight and not self.capacity_factor:
            raise ValueError(
                f"model.moe.drop={self.drop.name} has no effect: no expert is ever full while"
                " model.moe.capacity_factor = 0; set it, or leave model.moe.drop out"
            )

    def _check_groups(self) -> None:
        groups, top = self.num_groups, self.top_groups
        if self.num_experts % groups:
            raise ValueError(
                f"model.moe.num_experts = {self.num_experts} is not divisible by model.moe.num_groups = {groups};"
                f" choose a divisor of {self.num_experts}"
            )
        if top > groups or (top == groups and groups > 1):
            raise ValueError(
                f"model.moe.top_groups = {top} of model.moe.num_groups = {groups} excludes no group; lower the first,"
                " or set both to 1"
            )
        if self.top_k > top * (self.num_experts // groups):
            raise ValueError(
                f"model.moe.top_k = {self.top_k} experts are not in model.moe.top_groups = {top} groups of"
                f" {self.num_experts // groups}; raise top_groups or lower top_k"
            )
