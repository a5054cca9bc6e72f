"""`megatron-fp4 pretrain` and `python -m megatron_fp4.pretrain`: the arguments of a rank, whose life is train/job.py.

Arguments are hydra overrides of `configs/`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from megatron_fp4.cli.arguments import CommandParser, returns_code
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
from megatron_fp4.train.faults.signals import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_REQUEUE
from megatron_fp4.train.job import run_rank

ABOUT = """Train a model: one rank of a run, or all of them under torchrun or srun.

  experiment=quickstart            a whole experiment: one of configs/experiment, or the path of a YAML file
  model=gpt_tiny precision=bf16    options of a group (configs/<group>)
  optim.lr=3e-4 parallel.tp=2      single values

megatron-fp4 explain lists the settings; explain KEY says what one means, and what it may be.
"""
EXITS = {
    0: "done",
    EXIT_REQUEUE: "stopped on request with the state saved; the same command goes on",
    EXIT_HUNG: "a rank hung",
    EXIT_INTERRUPTED: "ended at once by Ctrl-C",
    1: "failed, as does anything else",
}


@returns_code
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        launch = read_launch()
    except ValueError as error:
        return refuse(error)
    rendezvous = None
    try:
        if args.multirun and not args.cfg:
            return _sweep(args, launch)
        tree = compose_config(args.overrides, args.config_dir)
        if args.cfg:
            print(to_yaml(resolve(tree)))
            return 0
        rendezvous = meet_for_settings(tree, launch)
        settings = read_settings(tree, launch, rendezvous)
    except RanksNotMet as error:
        return give_up(error)
    except (ValueError, FileNotFoundError) as error:
        return refuse_start(error, launch, rendezvous=rendezvous)
    return run_rank(settings, launch)


def _sweep(args: argparse.Namespace, launch: Launch) -> int:
    """Raises ConfigError, also where every rank was told to start one."""
    from megatron_fp4.cli.sweep.run import sweep  # here: it draws the report

    if launch.world_size > 1:
        raise ConfigError(
            f"--multirun on {launch.world_size} ranks would start as many sweeps; start it once, and say by"
            ' --launch "COMMAND" what starts the ranks of each run (docs/configs.md)'
        )
    return sweep(args.overrides, args.config_dir, args.launch)


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


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own spelling, `--cfg job`, is taken too; a resolved tree is what both print."""
    parser = CommandParser("pretrain", ABOUT, EXITS, "experiment=quickstart parallel.tp=1", configured=True)
    parser.add_argument("--cfg", "-c", action="store_true", help="print the resolved configuration and end")
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="a run for each combination: optim.lr=1e-3,3e-3 model=a,b"
    )
    parser.add_argument("--launch", default="", metavar="COMMAND", help="what starts the ranks of each run of a sweep")
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in ("--cfg", "-c") and value in ("hydra", "all"):
            parser.error(f"{flag} {value}: only the settings of the run are used and printed, {flag} job")
    jobs = [at for at, flag in enumerate(arguments[:-1]) if flag in ("--cfg", "-c") and arguments[at + 1] == "job"]
    return parser.parse([argument for at, argument in enumerate(arguments) if at - 1 not in jobs])


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
