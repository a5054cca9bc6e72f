"""Strong scaling: the same run and batch with more or fewer data-parallel ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_fp4.planning.cost.hardware import Assumptions
from megatron_fp4.planning.report import run_plan
from megatron_fp4.train.config import RunConfig


def strong_scaling(config: RunConfig, gpu: str, assumptions: Assumptions) -> list[dict[str, Any]]:
    """`gpus` and `days` by kind for every dp that the global batch takes, smallest world first.

    A world that a run would refuse is left out (a schedule takes only some numbers of microbatches).
    """
    parallel = config.parallel
    one = parallel.tp * parallel.pp * parallel.cp
    points = []
    for dp in range(1, config.train.global_batch // config.train.micro_batch + 1):
        layout = replace(config, parallel=replace(parallel, dp=dp))
        try:
            report = run_plan(layout, one * dp, gpu, assumptions)
        except ValueError:
            continue
        points.append({"gpus": one * dp, "days": report["time"]["days"]})
    return points
