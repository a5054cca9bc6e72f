"""Pretraining: `python -m megatron_fp4.pretrain experiment=quickstart model.num_layers=4 ...`.

Arguments are hydra overrides of `configs/`. Exit codes: 0 done; 2 the configuration is refused (nothing was started);
85 stopped on request with the state saved, start the same command again; 86 a rank hung; anything else is a failure.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config, to_yaml
from megatron_fp4.comm.bootstrap import (
    Launch,
    choose_device,
    exit_process,
    read_launch,
    start_process,
    stop_process,
)
from megatron_fp4.comm.collectives import broadcast_object
from megatron_fp4.comm.host_memory import keep_freed_memory
from megatron_fp4.comm.mesh import describe
from megatron_fp4.data.text.tokenizer import describe_tokenizer
from megatron_fp4.precision import table as precision_table
from megatron_fp4.precision.backends.choose import eager_reason
from megatron_fp4.settings import to_json_values
from megatron_fp4.storage.lock import STALE_SECONDS, RunLocked
from megatron_fp4.train.build import Run, build
from megatron_fp4.train.checked import CheckedConfig, check_config, open_data
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.signals import EXIT_CONFIG, StopRequest
from megatron_fp4.train.faults.watchdog import Watchdog
from megatron_fp4.train.job import lock_run_directory
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.requirements import check_machine
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.trainer import Trainer

SILENT_SECONDS = 10.0
INDEX_SECONDS = 3600.0
"""The first start may build the indices of billions of documents; benchmarks/data.py: about ten million a second."""

HELP = """usage: pretrain [experiment=NAME] [group=option ...] [key=value ...] [--config-dir DIR] [--cfg]

  experiment=quickstart            a whole experiment (configs/experiment)
  model=gpt_tiny precision=bf16    options of a group (configs/<group>)
  optim.lr=3e-4 parallel.tp=2      single values
  --cfg                            print the resolved configuration and exit
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        launch = read_launch()
    except ValueError as error:
        return _refuse(error, main_rank=True)
    try:
        config_dir, show, overrides = _split_arguments(arguments)
        tree = compose_config(overrides, config_dir)
        if show:
            print(to_yaml(tree))
            return 0
        config = to_run_config(tree)
    except (ConfigError, ValueError) as error:
        return _refuse(error, main_rank=launch.rank == 0)
    except FileNotFoundError as error:
        return _refuse_here(error, launch)
    phases = Phases(torch.device("cpu"))  # the device is known when the ranks have met
    with _watchdog(config, phases, launch) as watchdog:
        phases.enter("prepare")
        try:
            checked = check_config(config, launch.world_size)
        except (ConfigError, ValueError) as error:
            return _refuse(error, main_rank=launch.rank == 0)
        except FileNotFoundError as error:
            return _refuse_here(error, launch)
        phases.enter("index")
        try:
            device = choose_device(config.train.device, launch.local_rank)
            open_data(checked, dp_rank=0)
            check_machine(checked.config, device)
        except (ValueError, FileNotFoundError) as error:
            return _refuse_here(error, launch)
        return _train(checked, tree, launch, phases, watchdog)


def _watchdog(config: RunConfig, phases: Phases, launch: Launch) -> Watchdog:
    """For the whole command. What has a time-out of its own, which says more, gets that on top."""
    extra = {
        "index": INDEX_SECONDS,
        "rendezvous": config.parallel.init_timeout_seconds,
        "lock": STALE_SECONDS,
        "save": config.checkpoint.timeout_seconds,
    }
    return Watchdog(phases, launch.rank, config.train.hang_timeout_seconds, extra)


def _split_arguments(arguments: Sequence[str]) -> tuple[Path | None, bool, list[str]]:
    config_dir, show, overrides = None, False, []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config-dir":
            config_dir = Path(next(remaining, "")).resolve()
        elif argument == "--cfg":
            show = True
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument!r}; see --help")
        else:
            overrides.append(argument)
    return config_dir, show, overrides


def _refuse(error: Exception, *, main_rank: bool) -> int:
    """Say why, on one rank. The others leave later: a launcher ends all ranks as soon as one has left."""
    if main_rank:
        print(f"error: {error}", file=sys.stderr)
    else:
        time.sleep(SILENT_SECONDS)
    return EXIT_CONFIG


def _refuse_here(error: Exception, launch: Launch) -> int:
    """What only one node may have met, or only the local ranks above its number of GPUs: the first of them says it."""
    local = launch.num_nodes > 1
    speaks = launch.local_rank in (0, torch.cuda.device_count())
    return _refuse(ValueError(f"on {socket.gethostname()}: {error}") if local else error, main_rank=speaks)


def _train(checked: CheckedConfig, tree: DictConfig, launch: Launch, phases: Phases, watchdog: Watchdog) -> int:
    config = checked.config
    stop = StopRequest(config.train.exit_after_seconds)
    stop.install()
    parallel = config.parallel
    phases.enter("rendezvous")
    try:
        process = start_process(
            config.train.device, parallel.timeout_seconds, launch, init_timeout_seconds=parallel.init_timeout_seconds
        )
    except ValueError as error:
        return _refuse(error, main_rank=launch.rank == 0)
    phases.device = process.device
    watchdog.meet(process.world)
    if process.device.type == "cpu":
        keep_freed_memory()
    main_rank = process.world.rank == 0
    console = Console(enabled=main_rank, interval_steps=config.train.log_interval_steps)
    try:
        try:
            phases.enter("lock")
            lock = lock_run_directory(config.train.run_dir, process.world, on_lost=lambda: exit_process(1))
            run = build(checked, process, phases)
        except (ValueError, RunLocked) as error:  # what only a started job can see: the run directory, a checkpoint
            return _refuse(error, main_rank=main_rank)
        phases.enter("announce")
        wandb_id = run.resumed["wandb_id"] if run.resumed else uuid.uuid4().hex[:12]
        wandb_id = broadcast_object(wandb_id, process.world)
        _announce(run, checked, tree, console)
        metrics = _open_metrics(run, wandb_id) if main_rank else Metrics()
        try:
            return Trainer(run, metrics, console, stop, wandb_id).fit()
        finally:
            phases.enter("leave")
            metrics.close()
            lock.release()
    finally:
        console.close()
        stop_process(process)


def _announce(run: Run, checked: CheckedConfig, tree: DictConfig, console: Console) -> None:
    """Say what will run, and store it in the run directory."""
    config = run.config
    console.say(to_yaml(tree))
    console.say(describe(config.parallel, run.mesh.world.size))
    if reason := eager_reason(config.precision):
        console.say(f"precision.compile is on, but {reason}: the quantizer runs eagerly (same numbers, slower)")
    if checked.tokenizer:
        console.say(describe_tokenizer(checked.tokenizer, config.model.vocab_size))
    table = checked.plan.describe()
    console.say(table)
    accumulation = config.train.gradient_accumulation(checked.dp, config.train.global_batch)
    console.say(
        f"global batch {config.train.global_batch} = micro batch {config.train.micro_batch} * accumulation"
        f" {accumulation} * dp {checked.dp}; {config.tokens_per_step:,} tokens a step, {config.total_steps:,} steps"
    )
    stages = config.stages()
    if len(stages) > 1:
        ramp = ", ".join(f"{stage.num_steps:,} of {stage.size}" for stage in stages)
        console.say(f"batch-size ramp, steps and their samples: {ramp}")
    if run.resumed:
        console.say(f"resuming after step {run.resumed['step']} of {config.train.run_dir}")
    if run.remembered:
        console.say(str(run.remembered))
    if run.changes:
        console.say(f"settings that differ from the checkpoint's:\n{run.changes}")
    if run.resumed:
        consumed_tokens = run.resumed["consumed_samples"] * config.data.seq_length
        now = checked.plan.table(checked.plan.phase_at(consumed_tokens))
        changes = precision_table.difference_to_stored(run.resumed["precision"], now)
        if changes:
            console.say("precision differs from the checkpoint's:\n" + "\n".join(changes))
    if run.mesh.is_main:
        run_dir = Path(config.train.run_dir)
        (run_dir / "config.yaml").write_text(to_yaml(tree))
        (run_dir / "precision.txt").write_text(table + "\n")


def _open_metrics(run: Run, wandb_id: str) -> Metrics:
    settings = to_json_values(run.config)
    step = run.resumed["step"] if run.resumed else 0
    run_dir = Path(run.config.train.run_dir)
    return Metrics.open(run.config.logging, run_dir, resume_step=step, wandb_id=wandb_id, settings=settings)


def console_main() -> None:
    """Entry of `python -m megatron_fp4.pretrain`: never leaves a rank hanging in interpreter shutdown."""
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        code = 1
    exit_process(code)


if __name__ == "__main__":
    console_main()
