"""`megatron-fp4 preflight experiment=quickstart parallel.tp=2`: will this run work on these machines?

Everything that can be tried before thousands of GPUs start is tried with the run's own code: the configuration,
tokenizer and shards are opened, a rank's part of the model is built (proofs/shards.py), every distinct GEMM of it is
computed forward and backward (gemms.py), Transformer Engine's operands are compared with the emulation (operands.py),
and disk, memory, clocks and links are measured (machine.py). What a library says about its own abilities is not asked.
Under torchrun or srun, all ranks take part.

Not here: the speed of training, and anything that needs all layers at once (pretrain with train.stop_after_steps=1
does that). Exit codes: 0 all checks passed, 1 one failed, 2 the command itself is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.comm.bootstrap import Launch, Process, exit_process, read_launch, start_process, stop_process
from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.planning.report import run_plan
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.table import summary
from megatron_fp4.proofs.checks import CheckResult, attempt
from megatron_fp4.proofs.gemms import check_gemms
from megatron_fp4.proofs.machine import check_disk, check_links, check_memory
from megatron_fp4.proofs.shards import check_model, distinct_linears, typical_ranks
from megatron_fp4.train.checked import check_config, open_data
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.requirements import check_kernels

HELP = """usage: preflight [experiment=NAME] [key=value ...]

  alone, it checks the local shapes of any parallel layout; under torchrun or srun also the ranks and their links
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per check and a verdict; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    try:
        launch = read_launch()
        config = to_run_config(compose_config(arguments))
        parallel = config.parallel
        process = start_process(
            config.train.device, parallel.timeout_seconds, launch, init_timeout_seconds=parallel.init_timeout_seconds
        )
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        results = run_checks(config, launch, process)
        all_results = all_gather_object(results, process.world)
    finally:
        stop_process(process)
    failed = [(rank, result) for rank, of_rank in enumerate(all_results) for result in of_rank if result.ok is False]
    if process.world.rank == 0:
        _print_results(results, failed, process)
    return 1 if failed else 0


def run_checks(config: RunConfig, launch: Launch, process: Process) -> list[CheckResult]:
    """All checks of this rank, in order. What later ones need and an earlier one refused is left out."""
    alone = launch.world_size == 1  # then it stands for every rank of the layout whose shard differs
    world_size = config.parallel.smallest_world if alone else launch.world_size
    device, results = process.device, list[CheckResult]()
    checked = attempt(results, "configuration", lambda: check_config(config, world_size), "accepted")
    if checked is not None:
        attempt(results, "data", lambda: open_data(checked, dp_rank=0), "tokenizer and shards can be read")
        backend = attempt(results, "backend", lambda: make_backend(config.precision), config.precision.backend.name)
        attempt(results, "kernels", lambda: check_kernels(checked.config, device), _kernels(config))
        if backend is not None:
            results.append(CheckResult("precision", True, summary(checked.plan.table())))
            ranks = typical_ranks(config.parallel, world_size) if alone else [launch.rank]
            shards = check_model(results, checked, backend, device, world_size=world_size, ranks=ranks)
            dtype = config.precision.compute_dtype.torch_dtype
            if shards:
                results += check_gemms(distinct_linears(checked, shards, device), backend, device, dtype)
        needed = run_plan(checked.config, world_size)["memory_per_rank"]["largest"]
        results += [check_disk(checked.config), check_memory(needed, device)]
    return results + check_links(process)


def _kernels(config: RunConfig) -> str:
    model = config.model
    return f"optimizer by {config.optim.impl.name}, norm by {model.norm_impl.name}, loss by {model.loss_impl.name}"


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
