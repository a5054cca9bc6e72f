"""The time of a run from its FLOPs by the rate at which they execute.

Time is FLOPs over peak rates, once at the peak (a bound) and once at an assumed part of it. Everything that
is not a quantized GEMM runs at the BF16 rate, which by Amdahl's law limits what FP4 can gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron_fp4.models.count import Flops
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.precision.table import PrecisionTable, gemm_formats
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.peaks import RATES, Gpu, flops_by_rate, rate_of


def _recomputed_flops(flops: Flops, table: PrecisionTable, recompute: Recompute) -> dict[str, float]:
    """FLOPs per token of second forward passes, by rate: Mamba's scan always, attention if anything is recomputed, with
    full recompute the blocks."""
    by_rate = dict.fromkeys(RATES, 0.0)
    by_rate["bf16"] = flops.scan
    if recompute is not Recompute.none:
        by_rate["bf16"] += flops.attention
    if recompute is Recompute.full:
        by_rate["bf16"] += flops.scan
        for row in table.rows:
            if row.name != "head":
                by_rate[rate_of(gemm_formats(row.precision)[0])] += flops.linears[row.name]
    return by_rate


def _seconds(by_rate: Mapping[str, float], gpu: Gpu) -> float:
    return sum(value / gpu.rate(rate) for rate, value in by_rate.items())


def flops_section(config: RunConfig, flops: Flops, table: PrecisionTable) -> dict[str, Any]:
    """FLOPs of a token and of a step in the first phase of the run."""
    kinds = {"attention": 0.0, "mlp": 0.0, "mamba": 0.0, "head": 0.0}
    for name, value in flops.linears.items():
        kinds["head" if name == "head" else name.split(".")[2]] += value
    kinds |= {"attention products": flops.attention, "state-space scan": flops.scan}
    return {
        "forward_per_token": flops.forward,
        "forward_per_token_by_kind": {kind: value for kind, value in kinds.items() if value},
        "training_per_token": flops.training,
        "training_per_step": flops.training * config.tokens_per_step,
        "training_per_token_by_rate": flops_by_rate(flops, table),
    }


def _integral(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]], end: int) -> float:
    """Integral from 0 to `end` of the product of two step functions, [(from where, value), ...]."""
    starts = sorted({start for start, _ in (*a, *b) if start < end} | {end})

    def at(steps: Sequence[tuple[int, float]], point: int) -> float:
        return [value for start, value in steps if start <= point][-1]

    return sum(at(a, begin) * at(b, begin) * (stop - begin) for begin, stop in pairwise(starts))


def time_section(
    checked: CheckedConfig,
    flops: Flops,
    gpu: Gpu,
    num_gpus: int,
    efficiency: float,
    slowdowns: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    """Time of a step of a whole global batch in the first phase and of the whole run through all phases; Amdahl's bound
    on the speed-up.

    efficiency: assumed part of the peak rates. slowdowns: factors for idle time and unequal stages, with the token from
    which each holds (batch-size ramp).
    """
    config, plan = checked.config, checked.plan
    per_token = []
    for start, table in plan.phases:
        recomputed = _recomputed_flops(flops, table, config.train.recompute)
        per_token.append((start, _seconds(flops_by_rate(flops, table), gpu) + _seconds(recomputed, gpu)))
    at_peak = _integral(per_token, [(0, 1.0)], config.run_tokens) / num_gpus
    slowed = _integral(per_token, slowdowns, config.run_tokens) / num_gpus
    first = plan.table()
    step = per_token[0][1] * config.tokens_per_step / num_gpus
    assumed = step * slowdowns[-1][1] / efficiency
    slow = flops_by_rate(flops, first)["bf16"]
    return {
        "gpu": gpu.name,
        "peak_tflops": gpu.tflops,
        "source": gpu.source,
        "step_seconds_at_peak": step,
        "days_at_peak": at_peak / 86400,
        "efficiency": efficiency,
        "step_seconds": assumed,
        "days": slowed / efficiency / 86400,
        "tokens_per_second_per_gpu": config.tokens_per_step / assumed / num_gpus,
        "speed_up_over_bf16": flops.training / gpu.rate("bf16") / _seconds(flops_by_rate(flops, first), gpu),
        "speed_up_limit": flops.training / slow if slow else None,
        "has_fp4": "fp4" in gpu.tflops,
    }
