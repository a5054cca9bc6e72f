"""What a run will need and how long it will take: the facts behind `megatron-fp4 plan`, as one dictionary.

The configuration goes through the same checks as a real run (train.checked.check_config). Each section stands in the
file of its subject: pipeline and ramp in idle.py, time and FLOPs in time.py, memory in memory.py, optimizer state
in division.py, messages in traffic.py, shapes in alignment.py.

Not here: measured speed (times come from peak rates), and the text for people (cli/render/plan.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_fp4.models.count import Flops, by_kind, count_flops, model_parameters, quantized_parameters
from megatron_fp4.planning.alignment import alignment_warnings
from megatron_fp4.planning.division import division_section
from megatron_fp4.planning.idle import PipelineLayout, imbalance, pipeline_section, ramp_section
from megatron_fp4.planning.memory import memory_section
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.time import flops_section, time_section
from megatron_fp4.planning.traffic import bytes_sent
from megatron_fp4.precision.table import PrecisionTable, summary
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.peaks import GPUS


def run_plan(
    config: RunConfig, num_gpus: int = 0, gpu: str = "GB200", efficiency: float = 0.4, *, schedule: bool = False
) -> dict[str, Any]:
    """The report, of plain values: bytes, FLOPs, seconds, tokens.

    num_gpus: world size, 0 for the product of the parallel sizes. schedule: with the timeline of the pipeline. Raises
    ValueError for everything that a run with this configuration would refuse before it starts, and for an unknown GPU
    or an efficiency outside (0, 1].
    """
    if gpu not in GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency = {efficiency}, must be above 0 and at most 1")
    if config.model.vocab_size:  # the tokenizer is not needed, and need not be on this machine
        config = replace(config, data=replace(config.data, tokenizer=""))
    parallel = config.parallel
    if schedule and parallel.pp == 1:
        raise ValueError("--schedule has no effect with parallel.pp = 1; remove it, or set parallel.pp")
    num_gpus = num_gpus or parallel.smallest_world
    checked = check_config(config, num_gpus)
    config, table = checked.config, checked.plan.table()
    settings = RankSettings.of(checked, table)
    pipeline = PipelineLayout.of(config, settings.num_microbatches)
    costs, ramp = pipeline.costs(config.model), ramp_section(checked)
    slowdowns = [(stage["from_tokens"], imbalance(costs) / (1.0 - stage["bubble"])) for stage in ramp]
    flops = count_flops(config.model, config.data.seq_length)
    return {
        "run": _run_section(checked, num_gpus, settings.num_microbatches),
        "batch_ramp": ramp if len(ramp) > 1 else [],
        "parameters": _parameter_section(config, table),
        "precision": _precision_section(checked, flops),
        "flops": flops_section(config, flops, table),
        "pipeline": pipeline_section(pipeline, costs, ramp[-1]["bubble"], timeline=schedule),
        "time": time_section(checked, flops, GPUS[gpu], num_gpus, efficiency, slowdowns),
        "memory_per_rank": memory_section(config.model, pipeline, settings, GPUS[gpu].memory_gb * 1e9),
        "division": division_section(checked, num_gpus),
        "bytes_sent_per_step": [bytes_sent(config.model, held.values(), settings) for held in pipeline.chunks],
        "notes": checked.notes,
        "warnings": alignment_warnings(checked.linears, table, tp=parallel.tp, tokens=settings.tokens),
    }


def _run_section(checked: CheckedConfig, num_gpus: int, microbatches: int) -> dict[str, Any]:
    config, parallel = checked.config, checked.config.parallel
    return {
        "gpus": num_gpus,
        "tp": parallel.tp,
        "pp": parallel.pp,
        "cp": parallel.cp,
        "dp": checked.dp,
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


def _parameter_section(config: RunConfig, table: PrecisionTable) -> dict[str, Any]:
    model = config.model
    kinds = by_kind(model_parameters(model))
    quantized = quantized_parameters(model, [row.name for row in table.rows if row.precision.quantized])
    total = sum(kinds.values())
    return {"total": total, "by_kind": kinds, "quantized": quantized, "quantized_share": quantized / total}


def _precision_section(checked: CheckedConfig, flops: Flops) -> list[dict[str, Any]]:
    """One entry per precision phase of the run."""
    phases = []
    for start, table in checked.plan.phases:
        share = flops.quantized_share({row.name: [g.quantized for g in row.precision.gemms] for row in table.rows})
        phases.append({"from_tokens": start, "summary": summary(table), "quantized_share_of_flops": share})
    return phases
