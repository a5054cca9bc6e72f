"""`megatron-fp4 pretrain` and `python -m megatron_fp4.pretrain`: the arguments of a rank, whose life is train/job.py.

Arguments are hydra overrides of `configs/`. Exit codes: 0 done; 2 the configuration is refused (nothing was started);
85 stopped on request with the state saved, start the same command again; 86 a rank hung; 130 ended at once by Ctrl-C;
anything else is a failure.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from megatron_fp4.cli.compose import (
    ConfigError,
    as_written,
    compose_config,
    from_yaml,
    resolve,
    to_run_config,
    to_yaml,
)
from megatron_fp4.comm.bootstrap import exit_process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.launch import Launch, read_launch
from megatron_fp4.comm.rendezvous import RanksNotMet, Rendezvous, meet
from megatron_fp4.settings import MAX_SECONDS
from megatron_fp4.train.arrival.refusals import SETTINGS, GivenSettings, give_up, refuse, refuse_start
from megatron_fp4.train.faults.signals import EXIT_INTERRUPTED
from megatron_fp4.train.job import run_rank

HELP = """usage: pretrain [experiment=NAME] [group=option ...] [key=value ...] [--config-dir DIR] [--cfg]

  experiment=quickstart            a whole experiment (configs/experiment)
  model=gpt_tiny precision=bf16    options of a group (configs/<group>)
  optim.lr=3e-4 parallel.tp=2      single values
  --cfg                            print the resolved configuration and exit

megatron-fp4 explain lists the settings; explain KEY says what one means, and what it may be.
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
        return refuse(error)
    rendezvous = None
    try:
        config_dir, show, overrides = _split_arguments(arguments)
        tree = compose_config(overrides, config_dir)
        if show:
            print(to_yaml(resolve(tree)))
            return 0
        rendezvous = meet_for_settings(tree, launch)
        settings = read_settings(tree, launch, rendezvous)
    except RanksNotMet as error:
        return give_up(error)
    except (ValueError, FileNotFoundError) as error:
        return refuse_start(error, launch, rendezvous=rendezvous)
    return run_rank(settings, launch)


def meet_for_settings(tree: DictConfig, launch: Launch) -> Rendezvous | None:
    """Interpolations are resolved once, on rank 0, for all: environment and clock differ. With them, the ranks meet.

    None where there are none, or no other ranks. Raises ValueError, RanksNotMet.
    """
    if launch.world_size == 1 or "${" not in to_yaml(tree):
        return None
    if launch.rank == 0:
        resolve(tree)  # what rank 0 cannot resolve is refused at once
    return meet(launch, _patience(tree))


def read_settings(tree: DictConfig, launch: Launch, rendezvous: Rendezvous | None) -> GivenSettings:
    """The resolved settings, rank 0's if the ranks have met. Raises ValueError, RanksNotMet."""
    written = as_written(tree)
    if rendezvous is None:
        tree = resolve(tree)
    else:
        text = to_yaml(resolve(tree)) if launch.rank == 0 else ""
        tree = from_yaml(rendezvous.told_by_rank0(SETTINGS, text, _patience(tree)))
    return GivenSettings(to_run_config(tree), to_yaml(tree), written, rendezvous)


def _patience(tree: DictConfig) -> float:
    """parallel.init_timeout_seconds before the settings are checked; its default if it is an interpolation itself."""
    default = ParallelConfig().init_timeout_seconds
    if OmegaConf.is_interpolation(tree.parallel, "init_timeout_seconds"):
        return default
    seconds = float(tree.parallel.init_timeout_seconds)
    return seconds if 0 < seconds <= MAX_SECONDS else default


def _split_arguments(arguments: Sequence[str]) -> tuple[Path | None, bool, list[str]]:
    """The folder of --config-dir, whether --cfg was given, and the overrides. Raises ConfigError."""
    config_dir, show = None, False
    overrides: list[str] = []
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


def console_main() -> None:
    """Entry of a process: never leaves a rank hanging in interpreter shutdown."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BaseException:
        traceback.print_exc()
        code = 1
    exit_process(code)
