"""The settings of a run whose step is computed again: in its own folder, quiet, in its precision or in BF16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.sections import LoggingConfig, Resume, SpikeConfig


def in_bf16(config: RunConfig) -> RunConfig:
    """The same run with nothing quantized."""
    return replace(config, precision=PrecisionConfig(compute_dtype=config.precision.compute_dtype))


def replayed_config(config: RunConfig, run_dir: Path, last_step: int, world_size: int) -> RunConfig:
    """The run on so many ranks, up to `last_step`, in its own folder, without a reaction to spikes."""
    parallel = ParallelConfig() if world_size == 1 else replace(config.parallel, dp=0)
    train = replace(
        config.train,
        run_dir=str(run_dir),
        resume=Resume.auto,
        stop_after_steps=last_step,
        save_interval_steps=0,
        eval_interval_steps=0,
        statistics_interval_steps=0,
        spikes=SpikeConfig(),
    )
    return replace(config, train=train, parallel=parallel, logging=LoggingConfig(tensorboard=False))
