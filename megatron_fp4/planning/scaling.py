"""Strong scaling: the same run and batch with more or fewer data-parallel ranks.

Only times are worked out for each world, and parameters and FLOPs once: a whole plan of each takes seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_fp4.models.count import count_flops
from megatron_fp4.planning.cost.duration import DAY, run_spans, total_seconds
from megatron_fp4.planning.cost.hardware import Assumptions, Site
from megatron_fp4.planning.cost.time import KINDS
from megatron_fp4.planning.idle import PipelineLayout, ramp_section, timeline_of
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.verdict import admit
from megatron_fp4.train.config import RunConfig


def plot_section(config: RunConfig, num_gpus: int, gpu: str, assumptions: Assumptions) -> dict[str, Any]:
    """What the pictures of a plan have beside its report: `timeline` of the pipeline, empty without one; `scaling`."""
    num_gpus = num_gpus or config.parallel.smallest_world
    checked = admit(config, num_gpus, assumptions.machine(gpu).gpu).checked
    microbatches = RankSettings.of(checked, checked.plan.table()).num_microbatches
    pipeline = PipelineLayout.of(checked.config, microbatches)
    timeline = timeline_of(pipeline) if config.parallel.pp > 1 else []
    return {"timeline": timeline, "scaling": strong_scaling(config, gpu, assumptions)}


def strong_scaling(config: RunConfig, gpu: str, assumptions: Assumptions) -> list[dict[str, Any]]:
    """`gpus` and `days` by kind for every dp that the global batch takes, smallest world first.

    A world that a run would refuse is left out (a schedule takes only some numbers of microbatches).
    """
    parallel, flops = config.parallel, count_flops(config.model, config.data.seq_length)
    one = parallel.tp * parallel.pp * parallel.cp
    points = []
    for dp in range(1, config.train.global_batch // config.train.micro_batch + 1):
        if any(size % (dp * config.train.micro_batch) for size in config.train.batch_sizes):
            continue
        try:
            world = replace(config, parallel=replace(parallel, dp=dp))
            checked = admit(world, one * dp, assumptions.machine(gpu).gpu).checked
        except ValueError:
            continue
        settings = RankSettings.of(checked, checked.plan.table())
        pipeline = PipelineLayout.of(checked.config, settings.num_microbatches)
        site = Site(assumptions.machine(gpu), assumptions, one * dp)
        spans = run_spans(checked, flops, pipeline, ramp_section(checked), site)
        points.append({"gpus": one * dp, "days": {kind: total_seconds(spans, kind) / DAY for kind in KINDS}})
    return points
