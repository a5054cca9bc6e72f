"""The time of the whole run: steps of every size and every precision, one after the other.

Not here: the terms of one step (time.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from megatron_fp4.models.count import Flops
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.links import paths
from megatron_fp4.planning.cost.time import KINDS, StepTime, speed_up, step_time
from megatron_fp4.planning.cost.whole_run import whole_run_section
from megatron_fp4.planning.idle import PipelineLayout
from megatron_fp4.planning.muon import whole_flops
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.peaks import flops_by_rate

DAY = 86400


@dataclass(frozen=True)
class Span:
    """Steps of one size in one precision. steps: how many, in parts where a precision changes within one."""

    steps: float
    time: StepTime


def flops_section(config: RunConfig, flops: Flops, table: PrecisionTable) -> dict[str, Any]:
    """FLOPs of a token and of a step in the first phase of the run."""
    kinds = {"attention": 0.0, "mlp": 0.0, "mamba": 0.0, "moe": 0.0, "mtp": 0.0, "head": 0.0}
    for name, value in flops.linears.items():
        kinds[name.split(".")[2] if name.startswith("blocks.") else name.split(".")[0]] += value
    kinds["moe"] += flops.router
    kinds |= {"attention products": flops.attention, "state-space scan": flops.scan}
    router = {"fp32": 3 * flops.router} if flops.router else {}
    return {
        "forward_per_token": flops.forward,
        "forward_per_token_by_kind": {kind: value for kind, value in kinds.items() if value},
        "training_per_token": flops.training,
        "training_per_step": flops.training * config.tokens_per_step,
        "training_per_token_by_rate": flops_by_rate(flops, table) | router,
        "orthogonalization_per_step": whole_flops(config.model, config.optim),
    }


def run_spans(
    checked: CheckedConfig, flops: Flops, pipeline: PipelineLayout, ramp: Sequence[dict[str, Any]], site: Site
) -> list[Span]:
    """The run in order. ramp: `idle.ramp_section`."""
    config, phases = checked.config, checked.plan.phases
    ends = [*(start for start, _ in phases[1:]), config.run_tokens]
    spans = []
    for stage, (begin, end) in zip(ramp, pairwise([*(s["from_tokens"] for s in ramp), config.run_tokens]), strict=True):
        for (start, table), stop in zip(phases, ends, strict=True):
            tokens = min(end, stop) - max(begin, start)
            if tokens > 0:
                settings = replace(RankSettings.of(checked, table), num_microbatches=stage["microbatches"])
                time = step_time(config, flops, pipeline, settings, stage["bubble"], site)
                spans.append(Span(tokens / (stage["samples"] * config.data.seq_length), time))
    return spans


def total_seconds(spans: Sequence[Span], kind: str) -> float:
    """Seconds of the whole run. kind: as `StepTime.seconds`."""
    return sum(span.steps * span.time.seconds(kind) for span in spans)


def time_section(
    checked: CheckedConfig, flops: Flops, spans: Sequence[Span], step: StepTime, site: Site
) -> dict[str, Any]:
    """Time of a whole global batch in the first phase of the run and of the whole run, as a range; and what dominates.

    step: of a whole global batch in the first precision.
    """
    config, assumptions = checked.config, site.assumptions
    gpu = site.machine.gpu
    tokens = config.tokens_per_step / site.num_gpus
    with_experts = bool(config.model.moe.num_experts)
    links = paths(config.parallel, checked.dp, site.machine, assumptions.rails, with_experts=with_experts)
    rails = site.machine.domain_gpus
    most = paths(config.parallel, checked.dp, site.machine, rails=rails, with_experts=with_experts)
    at_peak = assumptions.efficiency / DAY
    return {
        "gpu": gpu.name,
        "peak_tflops": gpu.tflops,
        "source": gpu.source,
        "has_fp4": "fp4" in gpu.tflops,
        "efficiency": assumptions.efficiency,
        "compute": {
            "step_seconds_at_peak": step.products * assumptions.efficiency,
            "days_at_peak": total_seconds(spans, "products") * at_peak,
            "step_seconds": step.compute,
            "days": total_seconds(spans, "compute") / DAY,
        },
        "terms": step.terms,
        "dominating": max(step.terms, key=lambda name: step.terms[name]),
        "step_seconds": {kind: step.seconds(kind) for kind in KINDS},
        "days": {kind: total_seconds(spans, kind) / DAY for kind in KINDS},
        "tokens_per_second_per_gpu": {kind: tokens / step.seconds(kind) for kind in KINDS},
        "links": {
            axis: {
                "ranks": path.size,
                "in_a_domain": path.inside,
                "crosses_network": path.crosses,
                "gb_per_second": path.bytes_per_second / 1e9,
                "gb_per_second_by_all_links": most[axis].bytes_per_second / 1e9,
            }
            for axis, path in links.items()
            if path.size > 1 and axis != "amax"
        },
        **speed_up(flops, checked.plan.table(), gpu),
    }


def cost_sections(
    checked: CheckedConfig, flops: Flops, pipeline: PipelineLayout, ramp: Sequence[dict[str, Any]], site: Site
) -> dict[str, Any]:
    """The sections `flops`, `time` and `whole_run` of a report. ramp: `idle.ramp_section`."""
    table = checked.plan.table()
    settings = RankSettings.of(checked, table)
    step = step_time(checked.config, flops, pipeline, settings, ramp[-1]["bubble"], site)
    spans = run_spans(checked, flops, pipeline, ramp, site)
    by_all_links = replace(site, assumptions=replace(site.assumptions, rails=float(site.machine.domain_gpus)))
    fastest = run_spans(checked, flops, pipeline, ramp, by_all_links)
    time = time_section(checked, flops, spans, step, site)
    return {
        "flops": flops_section(checked.config, flops, table),
        "time": {**time, "expected_days_by_all_links": total_seconds(fastest, "expected") / DAY},
        "whole_run": whole_run_section(checked, flops, total_seconds(spans, "expected"), site),
    }
