"""`megatron-fp4 replay RUN/spikes/step_00001234 [--precision bf16]`: run up to a bad step again, in one process.

The bundle holds the run's configuration and the newest checkpoint before the step; the samples follow from both. If
the spike is there in BF16 too, it is the data or the learning rate; if only in the run's precision, it is that.
Nothing in the run's directory is changed. Batches that the run skipped on the way are trained on here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.comm.bootstrap import Launch, start_process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.train.build import build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.bundle import REPORT
from megatron_fp4.train.faults.guard import SpikeGuard
from megatron_fp4.train.faults.signals import StopRequest
from megatron_fp4.train.sections import LoggingConfig, Resume, SpikeConfig
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics, read_metrics
from megatron_fp4.train.trainer import Outputs, fit


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-fp4 replay", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a directory that a loss spike left")
    parser.add_argument("--precision", choices=("run", "bf16"), default="run")
    args = parser.parse_args(arguments)
    try:
        report = json.loads((args.bundle / REPORT).read_text())
        config = load_run_config(args.bundle)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        if (args.bundle / "checkpoints").is_dir():
            shutil.copytree(args.bundle / "checkpoints", Path(folder) / "checkpoints")
        losses = replay(replayed(config, args.precision, folder, report["step"]))
    for step, loss in losses.items():
        print(f"step {step}: loss {loss:.6f}")
    step = report["step"]
    print(f"step {step} in the run: loss {report['loss']:.6f}, running mean {report['mean']:.6f}")
    return 0


def replayed(config: RunConfig, precision: str, folder: str, step: int) -> RunConfig:
    """The run's configuration for one process, up to `step`, in its own folder, without a reaction to spikes."""
    train = replace(
        config.train,
        run_dir=folder,
        resume=Resume.auto,
        stop_after_steps=step,
        save_interval_steps=0,
        eval_interval_steps=0,
        statistics_interval_steps=0,
        spikes=SpikeConfig(),
    )
    if precision == "bf16":
        config = replace(config, precision=PrecisionConfig(compute_dtype=config.precision.compute_dtype))
    return replace(config, train=train, parallel=ParallelConfig(), logging=LoggingConfig(tensorboard=False))


def replay(config: RunConfig) -> dict[int, float]:
    """Losses by step."""
    run_dir = Path(config.train.run_dir)
    run, start = build(check_config(config, 1), start_process(config.train.device, launch=Launch()))
    metrics = Metrics.open(config.logging, run_dir, resume_step=0, wandb_id="replay", settings={})
    console = Console(enabled=False, interval_steps=1)
    fit(run, start, Outputs(metrics, console, StopRequest(), SpikeGuard(run, console), "replay"))
    metrics.close()
    return {record["step"]: record["loss"] for record in read_metrics(run_dir) if "loss" in record}
