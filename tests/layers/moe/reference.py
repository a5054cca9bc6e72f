"""A mixture of experts written from its formulas, token by token, in FP64 by autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.layers.moe.config import MoeConfig, RouterScore


def scores_of(x_TD: Tensor, weights: Mapping[str, Tensor], config: MoeConfig) -> Tensor:
    logits = x_TD @ weights["router.weight"].T
    return logits.sigmoid() if config.score is RouterScore.sigmoid else logits.softmax(-1)


def chosen_by(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[:count]


def mixture(x_TD: Tensor, weights: Mapping[str, Tensor], config: MoeConfig, *, gated: bool) -> Tensor:
    """weights: FP64, by their names behind `blocks.N.moe.`."""

    def network(x_D: Tensor, name: str, weight: Tensor | float = 1.0) -> Tensor:
        if gated:
            gate, up = (weights[f"{name}.gate_up.{part}.weight"] @ x_D for part in ("gate", "up"))
            inner = F.silu(gate) * up
        else:
            inner = (weights[f"{name}.up.weight"] @ x_D).relu() ** 2
        return weights[f"{name}.down.weight"] @ (inner * weight)

    rows = []
    for x_D, score_E in zip(x_TD, scores_of(x_TD, weights, config), strict=True):
        ranked = score_E + weights["router.bias"] if config.expert_bias else score_E
        ranking = ranked.float().tolist()
        if config.num_groups > 1:
            size = config.num_experts // config.num_groups
            groups = [ranking[first : first + size] for first in range(0, config.num_experts, size)]
            allowed = chosen_by([sum(sorted(group)[-2:]) for group in groups], config.top_groups)
            ranking = [r if expert // size in allowed else -1e9 for expert, r in enumerate(ranking)]
        chosen = chosen_by(ranking, config.top_k)
        total = score_E[chosen].sum() if config.normalize else 1.0
        z_L = weights["latent.down.weight"] @ x_D if config.latent else x_D
        y_L = sum(network(z_L, f"experts.{e}", score_E[e] / total * config.scaling_factor) for e in sorted(chosen))
        y_D = weights["latent.up.weight"] @ y_L if config.latent else y_L
        rows.append(y_D + network(x_D, "shared") if config.shared_ffn_hidden else y_D)
    return torch.stack(rows)


def losses(x_TD: Tensor, weights: Mapping[str, Tensor], config: MoeConfig, num_sequences: int) -> Tensor:
    """All three with their coefficients, of a global batch that is these sequences."""
    E, k, T = config.num_experts, config.top_k, len(x_TD) // num_sequences
    total = torch.zeros((), dtype=torch.float64)
    scores_TE = scores_of(x_TD, weights, config)
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    for number in range(num_sequences):
        rows = slice(number * T, (number + 1) * T)
        counts = [0] * E
        for score in scores_TE[rows].float().tolist():
            for expert in chosen_by(score, k):
                counts[expert] += 1
        loads = torch.tensor(counts, dtype=torch.float64) * E / (k * T)
        total = total + config.sequence_loss / num_sequences * (loads * shares_TE[rows].mean(0)).sum()
    if config.global_loss:
        total = total + config.global_loss * ((1 + weights["router.overload"]) * shares_TE.mean(0)).sum()
    logits = x_TD @ weights["router.weight"].T
    return total + config.z_loss * (logits.exp().sum(-1).log() ** 2).mean()
