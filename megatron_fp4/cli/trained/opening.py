"""A trained run, opened on the ranks that the launcher has started, for the commands that look at one.

megatron-fp4 evaluate RUN                                        one process, on the run's device
torchrun --nproc-per-node 4 -m megatron_fp4 evaluate RUN         the run's tp * pp ranks, copies on what is left
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_fp4.checkpoint import offline
from megatron_fp4.checkpoint.directory import step_name
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.comm.bootstrap import Process, start_process, stop_process
from megatron_fp4.comm.launch import Launch, read_launch
from megatron_fp4.comm.rendezvous import RanksNotMet
from megatron_fp4.storage.local import local_path
from megatron_fp4.train.arrival.refusals import give_up, refuse
from megatron_fp4.train.checked import with_vocabulary
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.open import TrainedModel, open_trained
from megatron_fp4.train.resume.same_model import checkpoint_in, differences_from


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which weights: `run`, `step`, `checkpoint`."""
    parser.add_argument("run", type=local_path, help="run directory (train.run_dir)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    which.add_argument(
        "--checkpoint",
        type=local_path,
        help="weights from elsewhere, by the run's settings: what `checkpoint average` made",
    )


def chosen_checkpoint(args: argparse.Namespace) -> Path:
    """The directory of what was asked for (`add_choice`). Raises ValueError and FileNotFoundError."""
    if args.checkpoint:
        return checkpoint_in(args.checkpoint)
    if args.step is None:
        return checkpoint_in(args.run)
    return offline.resolve(args.run / "checkpoints" / step_name(args.step))


def with_trained(
    args: argparse.Namespace, use: Callable[[TrainedModel], None], *, documents_apart: bool = False
) -> int:
    """Open what was asked for (`add_choice`) and use it; returns the exit code.

    2 where run, data or checkpoint are not there, or `use` raises ValueError; 1 where ranks do not meet.
    """

    def open_and_use(config: RunConfig, process: Process) -> None:
        elsewhere = None
        if args.checkpoint:
            if listed := differences_from(args.checkpoint, with_vocabulary(config).model):
                raise ValueError(f"--checkpoint {args.checkpoint} holds another model than {args.run}:\n{listed}")
            elsewhere = checkpoint_in(args.checkpoint)
        use(open_trained(config, args.step, process, documents_apart=documents_apart, checkpoint=elsewhere))

    return on_ranks(args.run, open_and_use)


def on_ranks(run: Path, use: Callable[[RunConfig, Process], None]) -> int:
    """Use the configuration that lies in `run` on the ranks that the launcher has started; returns the exit code."""
    launch = Launch()
    try:
        launch = read_launch()
        config = load_run_config(run)
        parallel = config.parallel
        process = start_process(
            config.train.device, parallel.timeout_seconds, launch, init_timeout_seconds=parallel.init_timeout_seconds
        )
        try:
            use(config, process)
            sys.stdout.flush()
        finally:
            stop_process(process)
    except (ValueError, OSError) as error:
        return refuse(error, speaks=launch.local_rank == 0)
    except RanksNotMet as error:
        return give_up(error)
    return 0
