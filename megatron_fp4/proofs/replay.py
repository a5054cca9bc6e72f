"""A step whose loss spiked, computed again: is it the data or the precision?

A bundle of the run (train/faults/bundle.py) holds its configuration and the newest checkpoint before the step; the
samples follow from both. If the spike is there in BF16 too, it is the data or the learning rate; if only in the run's
precision, it is that. Batches that the run skipped on the way are trained on here. One process computes it at any
layout of the run; several at the run's tp, pp and cp.
"""

from __future__ import annotations

from pathlib import Path

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.proofs.replay_config import replayed_config
from megatron_fp4.train.arrival.backend import settle_backend
from megatron_fp4.train.build import build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.bundle import replay_folder
from megatron_fp4.train.faults.guard import SpikeGuard
from megatron_fp4.train.faults.signals import StopRequest
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics, read_metrics
from megatron_fp4.train.trainer import Outputs, fit


def replay(bundle: Path, config: RunConfig, last_step: int, process: Process) -> dict[int, float]:
    """Training losses by step, from the checkpoint of the bundle (or from the start) to `last_step`; on rank 0.

    Nothing in the bundle is changed. config: the run's, or `in_bf16` of it. Collective over the ranks of `process`.
    Raises ValueError.
    """
    world = process.world
    with replay_folder(bundle, world) as run_dir:
        config = replayed_config(config, run_dir, last_step, world.size)
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
