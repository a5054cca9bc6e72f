"""`megatron-fp4 preflight experiment=quickstart parallel.tp=2`: will this run work on these machines?

Everything that can be tried before thousands of GPUs start is tried with the run's own code: the configuration,
tokenizer and shards are opened, a rank's part of the model is built, every distinct GEMM of it is computed forward and
backward, Transformer Engine's operands are compared with the emulation, and disk, memory, clocks and links are measured
(proofs/preflight.py). What a library says about its own abilities is not asked. Alone it checks the
local shapes of any layout; under torchrun or srun all ranks take part, and their links are measured.

Not here: the speed of training, and anything that needs all layers at once (pretrain with train.stop_after_steps=1
does that).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from megatron_fp4.cli.arguments import CommandParser, returns_code
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.bootstrap import Process, exit_process, start_process, stop_process
from megatron_fp4.comm.collectives import tell_first
from megatron_fp4.comm.launch import read_launch
from megatron_fp4.comm.mesh import Group
from megatron_fp4.planning.report import run_plan
from megatron_fp4.proofs.checks import CheckResult
from megatron_fp4.proofs.preflight import run_checks
from megatron_fp4.train.config import RunConfig

EXITS = {0: "all checks passed", 1: "one failed"}


@returns_code
def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per check and a verdict; returns the exit code."""
    parser = CommandParser("preflight", __doc__, EXITS, "experiment=quickstart parallel.tp=2", configured=True)
    args = parser.parse(arguments)
    try:
        launch = read_launch()
        config = to_run_config(compose_config(args.overrides, args.config_dir))
        parallel = config.parallel
        process = start_process(
            config.train.device, parallel.timeout_seconds, launch, init_timeout_seconds=parallel.init_timeout_seconds
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        results = run_checks(config, process, _planned_bytes)
        failed = _failed_on_any(results, process.world)
    finally:
        stop_process(process)
    if process.world.rank == 0:
        _print_results(results, failed, process)
    return 1 if failed else 0


def _failed_on_any(results: Sequence[CheckResult], world: Group) -> list[tuple[int, CheckResult]]:
    """What failed on the first ranks on which anything did, with the rank; the same on all. Collective."""
    failed = [[result.name, result.text] for result in results if result.ok is False]
    texts = tell_first(json.dumps(failed) if failed else "", world)
    return [(rank, CheckResult(name, False, text)) for rank, own in texts.items() for name, text in json.loads(own)]


def _planned_bytes(config: RunConfig, world_size: int) -> float:
    largest: float = run_plan(config, world_size)["memory_per_rank"]["largest"]
    return largest


def _print_results(results: Sequence[CheckResult], failed: Sequence[tuple[int, CheckResult]], process: Process) -> None:
    for result in results:
        word = {True: "ok", False: "FAILED", None: "note"}[result.ok]
        print(f"{word:<7} {result.name:<14} {result.text}")
    for rank, result in failed:
        if rank:
            print(f"FAILED  {result.name:<14} rank {rank}: {result.text}")
    names = ", ".join(dict.fromkeys(result.name for _, result in failed))
    if process.device.type == "cpu":
        print("note    device         no GPU was used: kernels, GPU memory and NCCL were not checked")
    print(f"verdict: {f'do not start this run ({names})' if failed else 'this run can start'}")


if __name__ == "__main__":  # several ranks: MEGATRON_FP4_MODULE=megatron_fp4.cli.preflight launch/torchrun.sh ...
    exit_process(main())
