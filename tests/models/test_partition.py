"""The split of blocks into pipeline stages."""

from __future__ import annotations

import pytest

from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.partition import block_costs, split_stages


def counts(config: ModelConfig, stages: int, split: str = "cost") -> list[int]:
    return [stage.stop - stage.first for stage in split_stages(config, stages, split)]


def test_the_head_weighs_like_the_blocks_it_costs() -> None:
    light = ModelConfig(num_layers=8, hidden=64, num_heads=4, num_kv_heads=4, ffn_hidden=256, vocab_size=64)
    assert counts(light, 2) == [4, 4]
    heavy = ModelConfig(num_layers=8, hidden=64, num_heads=4, num_kv_heads=4, ffn_hidden=256, vocab_size=3072)
    assert counts(heavy, 2) == [6, 2], "a head as heavy as four blocks must move blocks to the first stage"


def test_the_heaviest_stage_is_as_light_as_possible() -> None:
    config = ModelConfig(num_layers=7, hidden=64, num_heads=4, num_kv_heads=4, ffn_hidden=256, vocab_size=512)
    costs = block_costs(config)
    best = min(max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) for a in range(1, 6) for b in range(a + 1, 7))
    stages = split_stages(config, 3)
    assert max(sum(costs[stage.first : stage.stop]) for stage in stages) == best
    assert stages[0].has_embedding
    assert stages[-1].has_head


def test_an_explicit_list_and_its_refusals() -> None:
    config = ModelConfig(num_layers=6, vocab_size=64)
    assert counts(config, 3, "3,2,1") == [3, 2, 1]
    with pytest.raises(ValueError, match="names 2 stages with 6 blocks"):
        split_stages(config, 3, "3,3")
    with pytest.raises(ValueError, match="use 'cost' or block counts"):
        split_stages(config, 3, "even")
    with pytest.raises(ValueError, match="need at least as many blocks, got 6"):
        split_stages(config, 7)
