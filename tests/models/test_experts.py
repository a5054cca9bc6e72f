"""Mixtures of experts as a value: what is refused, what they hold and cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import Drop, MoeConfig
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import active_parameters, count_flops, logical_shapes, model_parameters

EXPERTS = MoeConfig(num_experts=16, top_k=2, ffn_hidden=48, shared_ffn_hidden=96, latent=16)
TINY = ModelConfig(
    num_layers=7, pattern="MEM*EME", hidden=32, vocab_size=64, mamba_num_heads=8, mamba_head_dim=8, moe=EXPERTS
)
SUPER = ModelConfig(
    num_layers=88,
    pattern="ME" * 40 + "*" * 8,
    hidden=4096,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=131072,
    mamba_num_heads=128,
    mamba_head_dim=64,
    mamba_num_groups=8,
    moe=MoeConfig(num_experts=512, top_k=22, ffn_hidden=2688, shared_ffn_hidden=5376, latent=1024),
)
"""Nemotron 3 Super 120B-A12B, the order of its blocks apart."""

REFUSED: dict[str, dict[str, Any]] = {
    "top_k = 17 is more than": {"top_k": 17},
    "ffn_hidden = 0": {"ffn_hidden": 0},
    "learns nothing": {"top_k": 1},
    "not divisible by model.moe.num_groups = 3": {"num_groups": 3},
    "excludes no group": {"num_groups": 4, "top_groups": 4},
    "are not in model.moe.top_groups = 1 groups of 4": {"num_groups": 4, "top_k": 5},
    "no effect without a bias": {"bias_rate": 1e-3},
    "no expert is ever full": {"drop": Drop.address},
    "model.moe.z_loss = -1": {"z_loss": -1.0},
    "model.moe.capacity_factor = nan": {"capacity_factor": float("nan")},
}


@pytest.mark.parametrize("text", REFUSED)
def test_contradictions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(EXPERTS, **REFUSED[text])


def test_experts_and_pattern_need_each_other() -> None:
    with pytest.raises(ValueError, match="pattern has no E"):
        ModelConfig(moe=EXPERTS)
    with pytest.raises(ValueError, match=r"num_experts is 0"):
        ModelConfig(num_layers=1, pattern="E")


def test_names_of_linears() -> None:
    names = [info.name for info in model_linears(TINY) if ".moe." in info.name][:6]
    parts = ["latent.down", "experts.up", "experts.down", "latent.up", "shared.up", "shared.down"]
    assert names == [f"blocks.1.moe.{part}" for part in parts]
    gated = model_linears(replace(TINY, activation=Activation.swiglu))
    assert {"blocks.1.moe.experts.gate_up", "blocks.1.moe.shared.gate_up"} <= {info.name for info in gated}


def test_every_expert_is_a_logical_tensor() -> None:
    shapes = logical_shapes(replace(TINY, activation=Activation.swiglu))
    assert shapes["blocks.1.moe.experts.15.gate_up.gate.weight"] == (48, 16)
    assert shapes["blocks.1.moe.experts.0.down.weight"] == (16, 48)
    assert shapes["blocks.1.moe.latent.down.weight"] == (16, 32)
    assert shapes["blocks.1.moe.router.weight"] == (16, 32)
    assert "blocks.1.moe.router.bias" not in shapes
    states = replace(EXPERTS, expert_bias=True, global_loss=1e-2)
    assert {"blocks.1.moe.router.bias", "blocks.1.moe.router.overload"} <= logical_shapes(
        replace(TINY, moe=states)
    ).keys()


def test_the_published_totals() -> None:
    """120.67 B in all, 12.77 B for a token (vocabulary tables included), as the report says: 120.6 and 12.7."""
    assert sum(parameter.numel for parameter in model_parameters(SUPER)) / 1e9 == pytest.approx(120.67, abs=0.01)
    assert active_parameters(SUPER) / 1e9 == pytest.approx(12.77, abs=0.01)


def test_flops_are_of_the_experts_that_act() -> None:
    flops = count_flops(TINY, 128)
    assert flops.linears["blocks.1.moe.experts.up"] == 2 * 2 * 16 * 48
    assert flops.router == 3 * 2 * 32 * 16
