"""A step whose loss spiked, computed again: is it the data or the precision?

A bundle of the run (train/faults/bundle.py) holds its configuration and the newest checkpoint before the step; the
samples follow from both. If the spike is there in BF16 too, it is the data or the learning rate; if only in the run's
precision, it is that. Batches that the run skipped on the way are trained on here. One process computes it at any
layout of the run; several at the run's tp, pp and cp.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.train.arrival.backend import settle_backend
from megatron_fp4.train.build import build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.bundle import link_or_copy
from megatron_fp4.train.faults.guard import SpikeGuard
from megatron_fp4.train.faults.signals import StopRequest
from megatron_fp4.train.sections import LoggingConfig, Resume, SpikeConfig
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics, read_metrics
from megatron_fp4.train.trainer import Outputs, fit


def replay(bundle: Path, config: RunConfig, last_step: int, process: Process) -> dict[int, float]:
    """Training losses by step, from the checkpoint of the bundle (or from the start) to `last_step`; on rank 0.

    Nothing in the bundle is changed. config: the run's, or `in_bf16` of it. Collective over the ranks of `process`.
    Raises ValueError.
    """
    world = process.world
    with _own_folder(bundle, process) as run_dir:
        config = _quiet(config, run_dir, last_step, world.size)
        checked = settle_backend(check_config(config, world.size), world.size, process.rendezvous, process.device)
        run, start = build(checked, process)
        metrics = Metrics()
        if world.rank == 0:
            metrics = Metrics.open(config.logging, run_dir, resume_step=0, wandb_id="replay", settings={})
        console = Console(enabled=False, interval_steps=1)
        fit(run, start, Outputs(metrics, console, StopRequest(), SpikeGuard(run, console), "replay"))
        metrics.close()
        records = read_metrics(run_dir) if world.rank == 0 else []
        return {record["step"]: record["loss"] for record in records if "loss" in record}


@contextmanager
def _own_folder(bundle: Path, process: Process) -> Iterator[Path]:
    """A run directory with the bundle's checkpoint, which all ranks see, removed at the end. Collective.

    Several ranks have it beside the bundle, which all nodes see; there it holds links and no copies.
    """
    world = process.world

    def make() -> Path:
        folder = Path(tempfile.mkdtemp(prefix="replay-", dir=bundle.parent if world.size > 1 else None))
        if (bundle / "checkpoints").is_dir():
            shutil.copytree(bundle / "checkpoints", folder / "checkpoints", copy_function=link_or_copy)
        return folder.absolute()

    folder = decided_by_rank0(make, world, OSError)
    try:
        yield folder
        decided_by_rank0(lambda: shutil.rmtree(folder, ignore_errors=True), world)
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def in_bf16(config: RunConfig) -> RunConfig:
    """The same run with nothing quantized."""
    return replace(config, precision=PrecisionConfig(compute_dtype=config.precision.compute_dtype))


def _quiet(config: RunConfig, run_dir: Path, last_step: int, world_size: int) -> RunConfig:
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
