"""What is said before the first step: the settings of a run and what follows from them, and where a resume goes on.

Not here: what is said of every step (step_log.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.comm.mesh import describe
from megatron_fp4.data.text.files import fingerprint_of
from megatron_fp4.data.text.tokenizer import Tokenizer, describe_tokenizer
from megatron_fp4.precision.backends.choose import eager_reason
from megatron_fp4.precision.backends.triton_limits import emulated_gemms
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.table import difference_to_stored
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.slow_paths import slow_paths_on
from megatron_fp4.train.telemetry.throughput import Throughput


def describe_run(checked: CheckedConfig, world_size: int, device: torch.device) -> list[str]:
    """Layout, tokenizer, precision, the sizes of a step, and what the device could do at best, as paragraphs."""
    config = checked.config
    paragraphs = [describe(config.parallel, world_size)]
    if reason := eager_reason(config.precision):
        paragraphs.append(f"precision.compile is on, but {reason}: the quantizer runs eagerly (same numbers, slower)")
    if emulated := emulated_gemms(config.precision):
        paragraphs.append(
            "WARNING: precision.backend=triton has no kernels for these GEMMs, which are emulated (same operands):\n  "
            + "\n  ".join(emulated)
        )
    paragraphs += [f"WARNING: {line}" for line in slow_paths_on(config, checked.plan, device)]
    if checked.tokenizer:
        paragraphs.append(describe_tokenizer(checked.tokenizer, config.model.vocab_size))
    accumulation = config.train.gradient_accumulation(checked.dp, config.train.global_batch)
    paragraphs += [
        checked.plan.describe(),
        f"global batch {config.train.global_batch} = micro batch {config.train.micro_batch} * accumulation"
        f" {accumulation} * dp {checked.dp}; {config.tokens_per_step:,} tokens a step, {config.total_steps:,} steps",
    ]
    if note := _wgrad_groups(config, checked.plan):
        paragraphs.append(note)
    stages = config.stages()
    if len(stages) > 1:
        ramp = ", ".join(f"{stage.num_steps:,} of {stage.size}" for stage in stages)
        paragraphs.append(f"batch-size ramp, steps and their samples: {ramp}")
    paragraphs.append(Throughput(config, world_size, device).describe())
    return paragraphs + [f"note: {note}" for note in checked.notes]


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


def describe_origin(origin: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[str]:
    """Where the weights of a new run came from; a warning if the folder has another tokenizer than the run.

    The files are compared, not what they do: one that was saved anew may number the same tokens.
    """
    paragraphs = [f"weights of {origin['from']} ({origin['format']})"]
    if tokenizer is None:
        return paragraphs
    beside = Path(origin["from"]) / f"tokenizer{Path(tokenizer.path).suffix}"
    if beside.is_file() and fingerprint_of(beside.read_bytes()) != tokenizer.fingerprint:
        paragraphs.append(
            f"WARNING: data.tokenizer={tokenizer.path} is another file than {beside}, whose ids the weights know; the"
            " data must be tokenized as the model's were"
        )
    return paragraphs


def describe_resume(checked: CheckedConfig, meta: dict[str, Any], changes: str, rollback: str) -> list[str]:
    """Where the run goes on, and in what it differs from the checkpoint whose small state is `meta`.

    changes: table of the settings that differ; rollback: one of which the checkpoint does not know; "" for none, each.
    """
    config, plan = checked.config, checked.plan
    paragraphs = [f"resuming after step {meta['step']} of {config.train.run_dir}"]
    if rollback:
        paragraphs.append(rollback)
    if changes:
        paragraphs.append(f"settings that differ from the checkpoint's:\n{changes}")
    table = plan.table(plan.phase_at(meta["consumed_samples"] * config.data.seq_length))
    if precision := difference_to_stored(meta["precision"], table):
        paragraphs.append("precision differs from the checkpoint's:\n" + "\n".join(precision))
    return paragraphs
