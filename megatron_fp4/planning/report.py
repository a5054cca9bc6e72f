"""What a run will need and how long it will take: the report behind `megatron-fp4 plan`, without a GPU.

One idea: the configuration goes through the same checks as a real run (train.checked.check_config), and everything else
is arithmetic over the model's lists of parameters and linears, and over the pipeline's order of actions. The report is
a dictionary of plain values.

Not here: measured speed; times come from peak rates (time.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import Flops, by_kind, count_flops, model_parameters, quantized_parameters
from megatron_fp4.models.decoder import Recompute, StageRange
from megatron_fp4.models.partition import block_costs, split_stages
from megatron_fp4.pipeline.order import Order, Timeline, Work, in_flight, pipeline_order, simulate
from megatron_fp4.pipeline.schedules import stages_of_rank, stages_per_rank
from megatron_fp4.planning.alignment import alignment_warnings
from megatron_fp4.planning.idle import BUBBLES, PipelineShape, imbalance
from megatron_fp4.planning.memory import MemorySettings, rank_memory
from megatron_fp4.planning.time import flops_section, ramp_section, time_section
from megatron_fp4.planning.traffic import bytes_sent
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.operand import Format, Operand
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable, summary
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.peaks import GPUS, Gpu

STORED_BYTES = {Format.nvfp4: 0.5625, Format.mxfp4: 0.53125, Format.mxfp8: 1.03125, Format.fp8_block: 1.0}
"""Bytes per element with block scales, as Transformer Engine stores them."""


def run_plan(
    config: RunConfig, num_gpus: int = 0, gpu: str = "GB200", efficiency: float = 0.4, *, schedule: bool = False
) -> dict[str, Any]:
    """The report, of plain values: bytes, FLOPs, seconds, tokens.

    num_gpus: world size, 0 for the product of the parallel sizes. schedule: with the timeline of the
    pipeline. Raises ValueError for everything that a run with this
    configuration would refuse before it starts, and for an unknown GPU or an efficiency outside (0, 1].
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
    chunks = stages_per_rank(parallel)
    microbatches = config.train.gradient_accumulation(checked.dp, config.train.global_batch)
    shape = PipelineShape(parallel.schedule, parallel.pp, microbatches, chunks)
    stages = split_stages(config.model, parallel.pp * chunks, parallel.stage_split)
    settings = _memory_settings(checked, table)
    flops = count_flops(config.model, config.data.seq_length)
    costs = _rank_costs(config, stages)
    order = pipeline_order(parallel, microbatches)
    timeline = simulate(order) if schedule else []
    ramp = ramp_section(checked)
    slowdowns = [(stage["from_tokens"], imbalance(costs) / (1.0 - stage["bubble"])) for stage in ramp]
    return {
        "run": _run_section(checked, num_gpus, microbatches),
        "batch_ramp": ramp if len(ramp) > 1 else [],
        "parameters": _parameter_section(config.model, table),
        "precision": _precision_section(checked, flops),
        "flops": flops_section(config, flops, table),
        "pipeline": _pipeline_section(shape, stages, costs, ramp[-1]["bubble"], timeline),
        "time": time_section(checked, flops, GPUS[gpu], num_gpus, efficiency, slowdowns),
        "memory_per_rank": _memory_section(config, stages, settings, order, GPUS[gpu]),
        "bytes_sent_per_step": _traffic_section(config, stages, settings, microbatches),
        "warnings": _warnings(checked, table, settings.tokens),
    }


def _rank_costs(config: RunConfig, stages: Sequence[StageRange]) -> list[float]:
    """Multiply-adds per token of each pipeline rank."""
    costs = block_costs(config.model)
    ranks = range(config.parallel.pp)
    chunks = [[stages[number] for number in stages_of_rank(rank, config.parallel)] for rank in ranks]
    return [sum(sum(costs[chunk.first : chunk.stop]) for chunk in mine) for mine in chunks]


def _memory_settings(checked: CheckedConfig, table: PrecisionTable) -> MemorySettings:
    config = checked.config
    dtype_bytes = config.precision.compute_dtype.torch_dtype.itemsize
    copies = {row.name: weight_copy_bytes(row.precision, config.precision, dtype_bytes) for row in table.rows}
    return MemorySettings(
        tp=config.parallel.tp,
        cp=config.parallel.cp,
        dp=checked.dp,
        micro_batch=config.train.micro_batch,
        seq_length=config.data.seq_length,
        recompute=config.train.recompute is Recompute.full,
        compute_bytes=dtype_bytes,
        keep_documents_apart=config.data.reset_documents,
        emulated=config.precision.backend is not BackendName.transformer_engine,
        weight_copies=copies,
        num_microbatches=config.train.gradient_accumulation(checked.dp, config.train.global_batch),
    )


def weight_copy_bytes(precision: LinearPrecision, config: PrecisionConfig, compute_bytes: int) -> float:
    """Bytes per element of the quantized copies of a weight for Fprop and Dgrad that a backend keeps."""
    fprop, dgrad = precision.fprop.w, precision.dgrad.w
    emulated = config.backend in (BackendName.emulated, BackendName.reference)

    def stored(operand: Operand) -> float:
        if not operand.quantized:
            return 0.0
        return float(compute_bytes) if emulated else STORED_BYTES[operand.format]

    if emulated and fprop == dgrad and fprop.transposes:
        return stored(fprop)  # one copy serves both directions
    return stored(fprop) + stored(dgrad)


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


def _parameter_section(model: ModelConfig, table: PrecisionTable) -> dict[str, Any]:
    kinds = by_kind(model_parameters(model))
    quantized = quantized_parameters(model, [row.name for row in table.rows if row.precision.quantized])
    total = sum(kinds.values())
    return {"total": total, "by_kind": kinds, "quantized": quantized, "quantized_share": quantized / total}


def _precision_section(checked: CheckedConfig, flops: Flops) -> list[dict[str, Any]]:
    """One entry per phase of the run."""
    phases = []
    for start, table in checked.plan.phases:
        gemms = {name: tuple(f != Format.bf16.name for f in fmt) for name, fmt in table.formats().items()}
        share = flops.quantized_share(gemms)  # type: ignore[arg-type]
        phases.append({"from_tokens": start, "summary": summary(table), "quantized_share_of_flops": share})
    return phases


def _pipeline_section(
    shape: PipelineShape, stages: Sequence[StageRange], costs: Sequence[float], idle: float, timeline: Timeline
) -> dict[str, Any]:
    section = {
        "schedule": shape.schedule if shape.num_ranks > 1 else "none",
        "blocks_per_stage": [stage.stop - stage.first for stage in stages],
        "heaviest_rank_over_mean": imbalance(costs),
        "bubble": idle,
        "bubble_by_formula": shape.bubble,
        "bubble_formula": BUBBLES[shape.schedule],
    }
    if timeline:
        section["timeline"] = [
            [{**_names(timed.work), "begin": timed.begin, "end": timed.end} for timed in done] for done in timeline
        ]
    return section


def _names(work: Work) -> dict[str, Any]:
    return {"kind": work.kind, "stage": work.stage, "microbatch": work.microbatch, "units": work.units}


def _memory_section(
    config: RunConfig, stages: Sequence[StageRange], settings: MemorySettings, order: Order, gpu: Gpu
) -> dict[str, Any]:
    ranks = []
    for rank, works in enumerate(order):
        mine = [stages[number] for number in stages_of_rank(rank, config.parallel)]
        held = in_flight(works) / len(mine)  # in microbatches over all chunks
        kinds = rank_memory(config.model, mine, settings, held)
        ranks.append({"in_flight": held, "bytes": kinds, "total": sum(kinds.values())})
    largest = max(entry["total"] for entry in ranks)  # type: ignore[type-var]
    return {"pipeline_ranks": ranks, "largest": largest, "gpu_bytes": gpu.memory_gb * 1e9}


def _traffic_section(
    config: RunConfig, stages: Sequence[StageRange], settings: MemorySettings, microbatches: int
) -> list[dict[str, float]]:
    return [
        bytes_sent(
            config.model, [stages[number] for number in stages_of_rank(rank, config.parallel)], settings, microbatches
        )
        for rank in range(config.parallel.pp)
    ]


def _warnings(checked: CheckedConfig, table: PrecisionTable, tokens: int) -> list[dict[str, str]]:
    tp = checked.config.parallel.tp
    return alignment_warnings(checked.linears, table, tp=tp, tokens=tokens)
