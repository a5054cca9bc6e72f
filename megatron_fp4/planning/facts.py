"""Facts of a plan that follow from the configuration alone: sizes, parameters, precision."""

from __future__ import annotations

from typing import Any

from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import Flops, active_parameters, by_kind, model_parameters, quantized_parameters
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.planning.cost.experts import padding_share
from megatron_fp4.planning.cost.hardware import Assumptions
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision.table import PrecisionTable, summary
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig


def run_section(checked: CheckedConfig, num_gpus: int, microbatches: int) -> dict[str, Any]:
    """Sizes of world, layout, batch and run."""
    config, parallel = checked.config, checked.config.parallel
    return {
        "gpus": num_gpus,
        "tp": parallel.tp,
        "pp": parallel.pp,
        "cp": parallel.cp,
        "dp": checked.dp,
        "ep": parallel.ep,
        "seq_length": config.data.seq_length,
        "micro_batch": config.train.micro_batch,
        "microbatches_per_step": microbatches,
        "global_batch": config.train.global_batch,
        "tokens_per_step": config.tokens_per_step,
        "steps": config.total_steps,
        "total_tokens": int(config.train.total_tokens),
        "recompute": config.train.recompute.name,
        "backend": config.precision.backend.name,
    }


def parameter_section(config: RunConfig, table: PrecisionTable) -> dict[str, Any]:
    """How many there are, by kind, and in quantized linears."""
    model = config.model
    kinds = by_kind(model_parameters(model))
    quantized = quantized_parameters(model, [row.name for row in table.rows if row.precision.quantized])
    total = sum(kinds.values())
    acting = active_parameters(model.with_blocks(model.blocks, MtpConfig()))  # as trained models are counted
    return {
        "total": total,
        "active": acting,
        "by_kind": kinds,
        "quantized": quantized,
        "quantized_share": quantized / total,
    }


def precision_section(checked: CheckedConfig, flops: Flops) -> list[dict[str, Any]]:
    """One entry per precision phase of the run."""
    phases = []
    for start, table in checked.plan.phases:
        share = flops.quantized_share({row.name: [g.quantized for g in row.precision.gemms] for row in table.rows})
        phases.append({"from_tokens": start, "summary": summary(table), "quantized_share_of_flops": share})
    return phases


def experts_section(config: ModelConfig, settings: RankSettings, assumptions: Assumptions) -> dict[str, Any]:
    """What comes to the experts of a rank; empty for a model without. segments: of all its experts together."""
    moe = config.moe
    if not moe.num_experts:
        return {}
    routed = settings.routed(moe)
    segments = routed.experts * routed.segments
    return {
        "experts": moe.num_experts,
        "per_rank": routed.experts,
        "top_k": moe.top_k,
        "width": moe.latent or config.hidden,
        "rows": routed.rows,
        "segments": segments,
        "rows_per_segment": routed.rows / segments,
        "padding": padding_share(config, settings),
        "grouped_share": assumptions.grouped_share,
    }
