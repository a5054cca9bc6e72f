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

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config, to_yaml
from megatron_fp4.comm.bootstrap import exit_process, read_launch
from megatron_fp4.train.faults.signals import EXIT_INTERRUPTED
from megatron_fp4.train.job import refuse, refuse_here, run_rank

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
        return refuse(error, speaks=True)
    try:
        config_dir, show, overrides = _split_arguments(arguments)
        tree = compose_config(overrides, config_dir)
        if show:
            print(to_yaml(tree))
            return 0
        config = to_run_config(tree)
    except ValueError as error:
        return refuse(error, speaks=launch.rank == 0)
    except FileNotFoundError as error:
        return refuse_here(error, launch)
    return run_rank(config, to_yaml(tree), launch)


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
