"""The choice of experts: ties, signs, groups, a bias that changes the choice and no weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.layers.moe.choice import best, choose_experts, weights_of
from megatron_fp4.layers.moe.config import MoeConfig

CONFIG = MoeConfig(num_experts=8, top_k=3, ffn_hidden=4)


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.5, 0.5, 0.25, 0.5, 0.0, 0.0], [0.0] * 8])
    assert choose_experts(scores, None, CONFIG).tolist() == [[0, 2, 3], [0, 1, 2]]


def test_order_of_all_floating_point_numbers() -> None:
    """Negative ones (a bias), both zeros, subnormal and infinite ones."""
    values = torch.tensor([[-torch.inf, -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, torch.inf]])
    assert best(values, 8).tolist() == [[7, 6, 5, 3, 4, 2, 1, 0]]


def test_the_best_of_random_scores() -> None:
    scores = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(best(scores, 3), scores.topk(3).indices)


def test_a_bias_changes_the_choice_and_no_weight() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1]])
    bias = torch.zeros(8)
    bias[3] = 1.0
    chosen = choose_experts(scores, bias, CONFIG)
    assert chosen.tolist() == [[0, 1, 3]]
    assert torch.allclose(weights_of(scores, chosen, CONFIG), torch.tensor([[0.9, 0.8, 0.6]]) / 2.3)


def test_groups() -> None:
    """Two of four groups of two, by the sum of both scores; the best expert of all is in none of them."""
    scores = torch.tensor([[0.95, 0.0, 0.5, 0.5, 0.6, 0.5, 0.1, 0.2]])
    grouped = replace(CONFIG, num_groups=4, top_groups=2)
    assert choose_experts(scores, None, grouped).tolist() == [[2, 3, 4]]
    assert choose_experts(scores, torch.full((8,), -2.0), grouped).tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_scaling_comes_last(factor: float) -> None:
    scores = torch.tensor([[0.2, 0.4, 0.4, 0.0]], dtype=torch.float64)
    config = replace(CONFIG, num_experts=4, scaling_factor=factor)
    assert weights_of(scores, torch.tensor([[0, 1, 2]]), config).sum() == pytest.approx(factor)
