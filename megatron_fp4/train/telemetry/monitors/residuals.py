"""The residual stream of a step, as metrics: `residual/blocks.N/rms`, on the steps whose operands are measured."""

from __future__ import annotations

import math

from megatron_fp4.models.residuals import residual_rms
from megatron_fp4.train.run import Run
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.quantization import measures

PREFIX = "residual"


def write_residuals(run: Run, step: int, metrics: Metrics, console: Console) -> None:
    """Write what was measured during `step`, if it was. Collective over the world.

    The console is told of the first block behind which something is not finite.
    """
    if not measures(run, step):
        return
    probes = [stage.residuals for stage in run.engine.stages]
    rms = residual_rms(probes, len(run.config.model.blocks), run.mesh.world, run.device)
    metrics.write(step, {f"{PREFIX}/blocks.{index}/rms": value for index, value in enumerate(rms)})
    broken = next((index for index, value in enumerate(rms) if not math.isfinite(value)), None)
    if broken is not None:
        console.say(f"step {step}: the residual stream is not finite behind blocks.{broken}, the first such block")
