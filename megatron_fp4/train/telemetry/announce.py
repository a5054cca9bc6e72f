"""What is said before the first step: a run in ten lines, the precision of every linear, and what is worth a note.

The whole configuration stands in the run directory (config.yaml), and so does the precision (precision.txt).
Not here: where a resume goes on, and what comes after the end (resume/description.py); every step (step_log.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_fp4.comm.mesh import describe
from megatron_fp4.data.text.tokenizer import describe_tokenizer
from megatron_fp4.models.count import logical_shapes, model_parameters
from megatron_fp4.optim import Algorithm, choice_table, describe_schedule
from megatron_fp4.precision.backends.triton_limits import emulated_gemms
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.table import summary
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.slow_paths import eager_paths_on, slow_paths_on
from megatron_fp4.train.telemetry.throughput import Throughput

MAX_SOURCES = 4
"""So many sources of data are named in the summary."""


def describe_run(
    checked: CheckedConfig, world_size: int, device: torch.device, tokens: Mapping[str, int] | None = None
) -> list[str]:
    """The run in ten lines, the precision of every linear, and what is worth a note, as paragraphs.

    tokens: of each source of data, by its name.
    """
    config = checked.config
    in_short = summary(checked.plan.table()).partition(";")[0]
    layout, *grid = describe(config.parallel, world_size).split("\n")
    facts = {
        "model": _model(config),
        "layout": f"{layout}, on {device.type}",
        "batch": _batch(checked),
        "precision": f"{in_short}; backend {config.precision.backend.name}",
        "rate": describe_schedule(config.optim, config.run_tokens, config.decay_start),
        "data": _data(config, tokens or {}),
        "tokenizer": "none: shards hold ids",
        "speed": Throughput(config, world_size, device).describe(),
        "where": f"{config.train.run_dir} (all settings in config.yaml, precision in precision.txt)",
    }
    if checked.tokenizer:
        lines = describe_tokenizer(checked.tokenizer, config.model.vocab_size).split("\n")
        facts["tokenizer"] = ", ".join(line.strip() for line in lines).removeprefix("tokenizer ")
    paragraphs = ["\n".join(f"{name:<10} {text}" for name, text in facts.items())]
    paragraphs += ["\n".join(grid)] if world_size > 1 and grid else []
    paragraphs.append(checked.plan.describe())
    if config.optim.algorithm is Algorithm.muon:
        paragraphs.append("\n".join(["updated by", *choice_table(logical_shapes(config.model), config.optim)]))
    paragraphs += eager_paths_on(config, device)
    if emulated := emulated_gemms(config.precision):
        paragraphs.append(
            "WARNING: precision.backend=triton has no kernels for these GEMMs, which are emulated (same operands):\n  "
            + "\n  ".join(emulated)
        )
    paragraphs += [f"WARNING: {line}" for line in slow_paths_on(config, checked.plan, device)]
    if note := _wgrad_groups(config, checked.plan):
        paragraphs.append(note)
    stages = config.stages()
    if len(stages) > 1:
        ramp = ", ".join(f"{stage.num_steps:,} of {stage.size}" for stage in stages)
        paragraphs.append(f"batch-size ramp, steps and their samples: {ramp}")
    return paragraphs + [f"note: {note}" for note in checked.notes]


def _model(config: RunConfig) -> str:
    model = config.model
    count = sum(parameter.numel for parameter in model_parameters(model))
    blocks = (
        f"{len(model.blocks)} blocks {model.pattern}" if model.pattern else f"{model.num_layers} transformer blocks"
    )
    if model.mtp.depth:
        blocks += f", then {model.mtp.pattern} for each of {model.mtp.depth} tokens behind the next one"
    return f"{count:,} parameters: {blocks}, hidden {model.hidden:,}, vocabulary {model.vocab_size:,}"


def _batch(checked: CheckedConfig) -> str:
    config, train = checked.config, checked.config.train
    accumulation = train.gradient_accumulation(checked.dp, train.global_batch)
    return (
        f"{train.global_batch} = micro batch {train.micro_batch} * accumulation {accumulation} * dp {checked.dp};"
        f" {config.tokens_per_step:,} tokens a step, {config.total_steps:,} steps, {config.run_tokens:,} tokens"
    )


def _data(config: RunConfig, tokens: Mapping[str, int]) -> str:
    names = [source.name for source in config.data.sources]
    texts = [f"{name} ({tokens[name]:,} tokens)" if name in tokens else name for name in names[:MAX_SOURCES]]
    texts += [f"{len(names) - MAX_SOURCES} more"] if len(names) > MAX_SOURCES else []
    heldout = ", ".join(item.name for item in config.data.evaluation) or "nothing"
    return f"{', '.join(texts)}, in sequences of {config.data.seq_length:,}; held out: {heldout}"


def _wgrad_groups(config: RunConfig, plan: PrecisionPlan) -> str:
    """Says that weight gradients depend on the layout, where blocks of Wgrad reach over a run of tokens; else ""."""
    tables = (table for _, table in plan.phases)
    group = max(row.precision.wgrad.multiples()["T"] for table in tables for row in table.rows)
    S, cp = config.data.seq_length, config.parallel.cp
    run_of_tokens = S // (2 * cp) if cp > 1 else S
    if run_of_tokens % group == 0 or (cp == 1 and config.train.micro_batch == 1):
        return ""
    formula = f"data.seq_length / (2 * cp) = {S} / {2 * cp}" if cp > 1 else "data.seq_length"
    return (
        f"Wgrad quantizes {group} tokens together, but a run of tokens on a rank is {run_of_tokens} ({formula}), no"
        " multiple of that: weight gradients are others, equally valid ones, than at another parallel.cp or"
        f" train.micro_batch; a multiple of {group} makes them equal"
    )
