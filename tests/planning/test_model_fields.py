"""Whatever a model's configuration says is in the plan, or is named there as left out."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from megatron_fp4.data.config import DataConfig
from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.mamba.kernels import MambaKernel
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.planning.report import LEFT_OUT, run_plan
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.sections import TrainConfig

BASE = ModelConfig(
    num_layers=4,
    pattern="M*-T",
    hidden=128,
    ffn_hidden=256,
    vocab_size=512,
    mamba_num_heads=8,
    mamba_head_dim=32,
    mamba_chunk=64,
)
OTHER: dict[str, Any] = {
    "num_layers": {"num_layers": 5, "pattern": "M*-TT"},
    "pattern": "MM-T",
    "moe": {"num_layers": 5, "pattern": "M*-TE", "moe": MoeConfig(num_experts=8, ffn_hidden=64)},
    "mtp": MtpConfig(1, "T"),
    "activation": Activation.swiglu,
    "rope_base": 0.0,
    "rope_fraction": 0.5,
    "qk_norm": QkNorm.head,
    "sliding_window": 32,
    "dropout": 0.1,
    "head_dim": 64,
    "mamba_kernel": MambaKernel.mamba_ssm,
    "norm_impl": NormImpl.te,
    "loss_impl": LossImpl.te,
}
"""Values; where none is here the opposite of a flag, or twice a number."""
FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
WITHOUT_EFFECT = {"norm_eps", "init_std", "scale_residual_init", "rope_scaling", "mamba_kernel", "pointwise_impl"}


def planned(model: ModelConfig, recompute: Recompute = Recompute.none) -> dict[str, Any]:
    train = TrainConfig(global_batch=4, total_tokens=1e6, recompute=recompute)
    return run_plan(RunConfig(model=model, data=DataConfig(seq_length=128), train=train), 1, "B200")


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_changes_the_plan_or_is_named(name: str) -> None:
    if name in WITHOUT_EFFECT:
        assert any(name in text for text in LEFT_OUT)
        return
    value = getattr(BASE, name)
    other = OTHER[name] if name in OTHER else (not value if isinstance(value, bool) else 2 * value)
    changed = replace(BASE, **(other if isinstance(other, dict) else {name: other}))
    assert changed != BASE
    report, base = planned(changed), planned(BASE)
    counted = ("parameters", "flops", "memory_per_rank")
    assert any(report[section] != base[section] for section in counted), f"model.{name} is nowhere in the plan"


def test_each_way_to_recompute_has_its_own_figures() -> None:
    none, selective, full = (planned(BASE, mode) for mode in Recompute)
    ranks = [one["memory_per_rank"]["pipeline_ranks"][0]["bytes"] for one in (none, selective, full)]
    needed = [rank["activations"] for rank in ranks]
    seconds = [one["time"]["terms"]["products"] for one in (none, selective, full)]
    assert needed[0] > needed[1] > needed[2]
    assert seconds[0] < seconds[1] < seconds[2]
