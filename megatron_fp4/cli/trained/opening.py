"""A trained run, opened on the ranks that the launcher has started, for the commands that look at one.

megatron-fp4 evaluate RUN                                        one process, on the run's device
torchrun --nproc-per-node 4 -m megatron_fp4 evaluate RUN         the run's tp * pp ranks, copies on what is left
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.comm.bootstrap import start_process, stop_process
from megatron_fp4.comm.launch import Launch, read_launch
from megatron_fp4.comm.rendezvous import RanksNotMet
from megatron_fp4.train.arrival.refusals import give_up, refuse
from megatron_fp4.train.open import TrainedModel, open_trained


def with_trained(
    run: Path, step: int | None, use: Callable[[TrainedModel], None], *, documents_apart: bool = False
) -> int:
    """Open checkpoint `step` of a run (None: the newest) and use it; returns the exit code.

    2 where run, data or checkpoint are not there, or `use` raises ValueError; 1 where ranks do not meet.
    """
    launch = Launch()
    try:
        launch = read_launch()
        config = load_run_config(run)
        parallel = config.parallel
        process = start_process(
            config.train.device, parallel.timeout_seconds, launch, init_timeout_seconds=parallel.init_timeout_seconds
        )
        try:
            use(open_trained(config, step, process, documents_apart=documents_apart))
            sys.stdout.flush()
        finally:
            stop_process(process)
    except (ValueError, FileNotFoundError) as error:
        return refuse(error, speaks=launch.local_rank == 0)
    except RanksNotMet as error:
        return give_up(error)
    return 0
