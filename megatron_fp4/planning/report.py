"""What a run will need and how long it will take: the facts behind `megatron-fp4 plan`, as one dictionary.

The configuration goes through the same checks as a real run (train.checked.check_config). Each section stands in the
file of its subject: pipeline and ramp in idle.py, time in cost/, memory in memory.py, optimizer state in division.py,
messages in traffic.py, warnings in verdict.py.

Not here: measured speed (times come from published rates), other layouts (search.py), and the text for people
(cli/render/plan.py).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from megatron_fp4.models.count import count_flops
from megatron_fp4.planning.cost.duration import cost_sections
from megatron_fp4.planning.cost.gains import roofline_with_gains
from megatron_fp4.planning.cost.hardware import DEFAULT_GPU, Assumptions, Site
from megatron_fp4.planning.division import division_section
from megatron_fp4.planning.facts import experts_section, parameter_section, precision_section, run_section
from megatron_fp4.planning.idle import PipelineLayout, pipeline_section, ramp_section
from megatron_fp4.planning.memory import memory_section
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.traffic import bytes_sent
from megatron_fp4.planning.verdict import admit, obstacles, warnings_of
from megatron_fp4.train.config import RunConfig


def run_plan(
    config: RunConfig,
    num_gpus: int = 0,
    gpu: str = DEFAULT_GPU,
    assumptions: Assumptions | None = None,
    *,
    schedule: bool = False,
    roofline: bool = False,
) -> dict[str, Any]:
    """The report, of plain values: bytes, FLOPs, seconds, tokens.

    num_gpus: world size, 0 for the product of the parallel sizes. schedule: with the timeline of the pipeline.
    roofline: with the products of each linear against its quantizers. Raises ValueError for an unknown GPU, and for
    everything that a run with this configuration would refuse before it starts, but for shapes that Transformer Engine
    refuses.
    """
    assumptions = assumptions or Assumptions()
    machine = assumptions.machine(gpu)
    config = without_tokenizer(config)
    parallel = config.parallel
    if schedule and parallel.pp == 1:
        raise ValueError("--schedule has no effect with parallel.pp = 1; remove it, or set parallel.pp")
    num_gpus = num_gpus or parallel.smallest_world
    admission = admit(config, num_gpus, machine.gpu)
    checked = admission.checked
    config, table = checked.config, checked.plan.table()
    site = Site(machine, assumptions, num_gpus)
    settings = RankSettings.of(checked, table)
    pipeline = PipelineLayout.of(config, settings.num_microbatches)
    ramp = ramp_section(checked)
    flops = count_flops(config.model, config.data.seq_length)
    costs = cost_sections(checked, flops, pipeline, ramp, site)
    memory = memory_section(config.model, pipeline, settings, machine.gpu.memory_gb * 1e9)
    warnings = warnings_of(admission, memory, costs["whole_run"], settings.tokens, site)
    reasons = obstacles(warnings, config.precision.backend)
    report = {
        "fits": not reasons,
        "obstacles": reasons,
        "backend": {"name": config.precision.backend.name, "reason": admission.choice},
        "run": run_section(checked, num_gpus, settings.num_microbatches),
        "batch_ramp": ramp if len(ramp) > 1 else [],
        "parameters": parameter_section(config, table),
        "precision": precision_section(checked, flops),
        "experts": experts_section(config.model, settings, assumptions),
        "pipeline": pipeline_section(pipeline, pipeline.costs(config.model), ramp[-1]["bubble"], timeline=schedule),
        **costs,
        "memory_per_rank": memory,
        "division": division_section(checked, num_gpus),
        "bytes_sent_per_step": [bytes_sent(config.model, held.values(), settings) for held in pipeline.chunks],
        "assumptions": {"gpu": gpu, "sources": machine.sources, **asdict(assumptions)},
        "left_out": LEFT_OUT,
        "notes": checked.notes,
        "warnings": warnings,
    }
    if roofline:
        layout = (flops, pipeline, settings, ramp[-1]["bubble"], site)
        report["roofline"] = roofline_with_gains(config, checked.linears, *layout)
    return report


LEFT_OUT = (
    "the allocator's fragmentation, CUDA's and NCCL's own memory (a few GB)",
    "what a step that measures statistics needs besides (train.statistics_interval_steps); rehearse has its peak",
    "documents kept apart attend to fewer tokens than counted; padding of short ones",
    "dropout, norms, activations, the short convolution: inside the assumed efficiency",
    "fused Mamba kernels (model.mamba_kernel), which keep less than torch's scan; their activations are counted as its",
    "compiled activations (model.pointwise_impl), which keep less of SwiGLU than torch's; counted as torch's",
    "what changes numbers and no cost: model.norm_eps, init_std, scale_residual_init, rope_scaling",
    "an expert that gets more rows than the mean, for whose rank all wait",
    "conversions of moments that are not compiled (optim.compile), which take several times as long as counted",
    "compilation and the first steps; data loading, which runs beside the step",
    "the quantizers of the emulated backends, which take many times as long as those counted",
)
"""What the numbers do not hold."""


def without_tokenizer(config: RunConfig) -> RunConfig:
    """Where the size of the vocabulary is set the tokenizer is not needed, and need not be on this machine."""
    return replace(config, data=replace(config.data, tokenizer="")) if config.model.vocab_size else config
