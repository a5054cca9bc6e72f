"""A small model for tests of parallel layouts, as a parity case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_fp4.data.config import DataConfig
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.config import ComputeDtype, PrecisionConfig, Rule
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.proofs.parity import Case
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.sections import TrainConfig

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "pattern": "*-*-",
    "hidden": 32,
    "ffn_hidden": 64,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "vocab_size": 101,  # no tensor-parallel size but 1 divides it
}
HYBRID: dict[str, Any] = {
    "pattern": "M-*-",
    "num_kv_heads": 2,
    "mamba_num_heads": 32,
    "mamba_head_dim": 4,
    "mamba_num_groups": 2,
    "mamba_state": 16,
    "mamba_chunk": 16,
    "rope_base": 0.0,
}
NVFP4 = PrecisionConfig(
    compute_dtype=ComputeDtype.fp32,
    recipes={"nvfp4": nvfp4_paper()},
    rules=[Rule("head"), Rule("*", use="nvfp4")],
)
FP32 = PrecisionConfig(compute_dtype=ComputeDtype.fp32)
BF16 = PrecisionConfig(compute_dtype=ComputeDtype.bf16)


def parity_case(
    precision: PrecisionConfig = NVFP4,
    *,
    name: str = "recipe",
    steps: int = 3,
    seq_length: int = 32,
    reset_documents: bool = False,
    targets: tuple[float, float] = (0.0, 1.0),
    train: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    **model: Any,
) -> Case:
    """Overrides of the model by keyword; NVFP4 with stochastic rounding in FP32 compute unless told otherwise."""
    settings = {**MODEL, **model}
    settings["num_layers"] = len(settings["pattern"])
    config = RunConfig(
        model=ModelConfig(**settings),
        precision=precision,
        data=DataConfig(seq_length=seq_length, reset_documents=reset_documents),
        train=TrainConfig(**{"micro_batch": 1, "global_batch": 4, **(train or {})}),
    )
    if optim:
        config = replace(config, optim=replace(config.optim, **optim))
    table = PrecisionPlan(precision, model_linears(config.model)).table()
    return Case(name, config, table, steps, targets)
