"""The configuration of a rehearsal: what CUDA would choose, and no more microbatches than show what a step does."""

from __future__ import annotations

from dataclasses import replace

from megatron_fp4.comm.config import Overlap
from megatron_fp4.data.ramp import BatchRampConfig
from megatron_fp4.pipeline.schedules import schedule_rule
from megatron_fp4.train.config import RunConfig

MEASURED_STEP = 3
"""The step whose operands are measured, where some step's are."""


def on_cuda(config: RunConfig) -> RunConfig:
    """The configuration with its `auto` as it is on CUDA, and without what looks at the first steps."""
    parallel, optim = config.parallel, config.optim
    defers_wgrad = parallel.pp > 1 and schedule_rule(parallel.schedule).defers_wgrad
    if parallel.tp > 1 and not defers_wgrad:
        parallel = replace(parallel, overlap_tensor=_chosen(parallel.overlap_tensor))
    optim = replace(optim, overlap_reduce=_chosen(optim.overlap_reduce), overlap_gather=_chosen(optim.overlap_gather))
    interval = MEASURED_STEP if config.train.statistics_interval_steps else 0
    train = replace(config.train, check_gemms=False, statistics_interval_steps=interval)
    return replace(config, model=config.model.by_torch(), parallel=parallel, optim=optim, train=train)


def _chosen(overlap: Overlap) -> Overlap:
    return Overlap.always if overlap is Overlap.auto else overlap


def shortened(config: RunConfig, num_gpus: int) -> RunConfig:
    """The configuration with no more microbatches a step than show all that a step of it does.

    Without a pipeline two do, the first and the last; with one, twice as many as ranks, which fill and empty it.
    """
    dp = config.parallel.resolve_dp(num_gpus)
    whole = config.train.gradient_accumulation(dp, config.train.global_batch)
    samples = min(whole, 2 * config.parallel.pp) * config.train.micro_batch * dp
    return replace(config, train=replace(config.train, global_batch=samples, batch_ramp=BatchRampConfig()))
