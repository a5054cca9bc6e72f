"""A step whose loss spiked, computed again in one process: is it the data or the precision?

A bundle of the run (train/faults/bundle.py) holds its configuration and the newest checkpoint before the step; the
samples follow from both. If the spike is there in BF16 too, it is the data or the learning rate; if only in the run's
precision, it is that. Batches that the run skipped on the way are trained on here.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from megatron_fp4.comm.bootstrap import start_alone
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.train.arrival.backend import settle_alone
from megatron_fp4.train.build import build
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.guard import SpikeGuard
from megatron_fp4.train.faults.signals import StopRequest
from megatron_fp4.train.sections import LoggingConfig, Resume, SpikeConfig
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics, read_metrics
from megatron_fp4.train.trainer import Outputs, fit


def replay(bundle: Path, config: RunConfig, last_step: int) -> dict[int, float]:
    """Training losses by step, from the checkpoint of the bundle (or from the start) to `last_step`.

    Nothing in the bundle is changed. config: the run's, or `in_bf16` of it.
    """
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        run_dir, checkpoints = Path(folder), bundle / "checkpoints"
        if checkpoints.is_dir():
            shutil.copytree(checkpoints, run_dir / "checkpoints")
        config = _quiet(config, run_dir, last_step)
        process = start_alone(config.train.device)
        run, start = build(settle_alone(config, process), process)
        metrics = Metrics.open(config.logging, run_dir, resume_step=0, wandb_id="replay", settings={})
        console = Console(enabled=False, interval_steps=1)
        fit(run, start, Outputs(metrics, console, StopRequest(), SpikeGuard(run, console), "replay"))
        metrics.close()
        return {record["step"]: record["loss"] for record in read_metrics(run_dir) if "loss" in record}


def in_bf16(config: RunConfig) -> RunConfig:
    """The same run with nothing quantized."""
    return replace(config, precision=PrecisionConfig(compute_dtype=config.precision.compute_dtype))


def _quiet(config: RunConfig, run_dir: Path, last_step: int) -> RunConfig:
    """The run in one process, up to `last_step`, in its own folder, without a reaction to spikes."""
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
    return replace(config, train=train, parallel=ParallelConfig(), logging=LoggingConfig(tensorboard=False))
