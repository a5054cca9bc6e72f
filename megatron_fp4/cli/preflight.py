"""`megatron-fp4 preflight experiment=quickstart parallel.tp=2`: will this run work on these machines?

One idea: everything that can be tried before thousands of GPUs start is tried with the run's own code: the
configuration, tokenizer and shards are opened, a rank's part of the model is built (shard_probe.py), every distinct
GEMM of it is computed forward and backward, Transformer Engine's operands are compared with the emulation, and disk,
memory, clocks and links are measured. What a library says about its own abilities is not asked. Under torchrun or srun,
all ranks take part.

Not here: the speed of training, and anything that needs all layers at once (pretrain with train.stop_after_steps=1
does that). Exit codes: 0 all checks passed, 1 one failed, 2 the command itself is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.cli.crosscheck import cross_check
from megatron_fp4.comm.bootstrap import Launch, Process, exit_process, read_launch, start_process, stop_process
from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.planning.report import run_plan
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.table import summary
from megatron_fp4.proofs.gemms import distinct_probes, run_probe
from megatron_fp4.proofs.machine import Check, check_disk, check_links, check_memory
from megatron_fp4.proofs.shards import Shard, build_shards, typical_ranks
from megatron_fp4.train.checked import CheckedConfig, check_config, open_data
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.requirements import check_kernels

T = TypeVar("T")

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
        checks = run_checks(config, launch, process)
        everything = all_gather_object(checks, process.world)
    finally:
        stop_process(process)
    failed = [(rank, check) for rank, mine in enumerate(everything) for check in mine if check.ok is False]
    if process.world.rank == 0:
        _report(checks, failed, process)
    return 1 if failed else 0


def run_checks(config: RunConfig, launch: Launch, process: Process) -> list[Check]:
    """All checks of this rank, in order. What later ones need and an earlier one refused is left out."""
    alone = launch.world_size == 1  # then it stands for every rank of the layout whose shard differs
    world_size = config.parallel.smallest_world if alone else launch.world_size
    checks: list[Check] = []
    checked = _attempt(checks, "configuration", lambda: check_config(config, world_size), "accepted")
    if checked is not None:
        _attempt(checks, "data", lambda: open_data(checked, dp_rank=0), "tokenizer and shards can be read")
        backend = _attempt(checks, "backend", lambda: make_backend(config.precision), config.precision.backend.name)
        _attempt(checks, "kernels", lambda: check_kernels(checked.config, process.device), _kernels(config))
        if backend is not None:
            checks.append(Check("precision", True, summary(checked.plan.table())))
            ranks = typical_ranks(config.parallel, world_size) if alone else [launch.rank]
            if shards := check_model(checks, checked, backend, process.device, world_size, ranks):
                checks += check_gemms(checked, shards, backend, process.device)
        needed = run_plan(checked.config, world_size)["memory_per_rank"]["largest"]
        checks += [check_disk(checked.config), check_memory(needed, process.device)]
    return checks + check_links(process)


def check_model(
    checks: list[Check],
    checked: CheckedConfig,
    backend: Backend,
    device: torch.device,
    world_size: int,
    ranks: list[int],
) -> list[Shard]:
    """Append the check that builds the shards of `ranks`, and return what was built."""
    try:
        shards = build_shards(checked, backend, device, world_size=world_size, ranks=ranks)
    except Exception as error:  # a constructor may fail in any way, out of memory included
        checks.append(Check("model", False, f"the shards cannot be built: {type(error).__name__}: {error}"))
        return []
    largest = max(shards, key=lambda shard: shard.num_parameters)
    where = "on this GPU" if device.type == "cuda" else "without memory (no GPU)"
    checks.append(
        Check(
            "model",
            True,
            f"{len(shards)} shard(s) of {world_size} rank(s) built {where}, the largest (rank {largest.rank}) with"
            f" {largest.num_parameters:,} parameters and {len(largest.shapes)} linears",
        )
    )
    return shards


def _kernels(config: RunConfig) -> str:
    model = config.model
    return f"optimizer by {config.optim.impl.name}, norm by {model.norm_impl.name}, loss by {model.loss_impl.name}"


def _attempt(checks: list[Check], name: str, make: Callable[[], T], good: str) -> T | None:
    """Append a check that passes if `make` does not refuse; returns what it made."""
    try:
        made = make()
    except (ValueError, OSError) as error:
        checks.append(Check(name, False, str(error)))
        return None
    checks.append(Check(name, True, good))
    return made


def check_gemms(checked: CheckedConfig, shards: Sequence[Shard], backend: Backend, device: torch.device) -> list[Check]:
    """One forward and backward pass per distinct local shape and precision; Transformer Engine also code by code."""
    dtype = checked.config.precision.compute_dtype.torch_dtype
    probes = distinct_probes(checked, shards, device)
    wrong: list[str] = []
    for probe in probes:
        try:
            wrong += run_probe(probe, backend, device, dtype)
            if isinstance(backend, TransformerEngineBackend):
                wrong += [f"{probe}: {found}" for found in cross_check(probe, backend, device) if found.wrong]
        except Exception as error:  # a kernel may fail in any way; the point is to say for which linear
            wrong.append(f"{probe}: {type(error).__name__}: {error}")
    kinds = f"{len(probes)} distinct local shapes and precisions"
    if wrong:
        return [Check("gemms", False, text) for text in wrong]
    where = "compared with FP32 products" + (
        " and code by code with the emulation" if isinstance(backend, TransformerEngineBackend) else ""
    )
    return [Check("gemms", True, f"{kinds}: forward and backward finite, not zero, {where} ({device.type})")]


def _report(checks: Sequence[Check], failed: Sequence[tuple[int, Check]], process: Process) -> None:
    for check in checks:
        word = {True: "ok", False: "FAILED", None: "note"}[check.ok]
        print(f"{word:<7} {check.name:<14} {check.text}")
    for rank, check in failed:
        if rank:
            print(f"FAILED  {check.name:<14} rank {rank}: {check.text}")
    names = ", ".join(dict.fromkeys(check.name for _, check in failed))
    if process.device.type == "cpu":
        print("note    device         no GPU was used: kernels, GPU memory and NCCL were not checked")
    print(f"verdict: {f'do not start this run ({names})' if failed else 'this run can start'}")


if __name__ == "__main__":  # several ranks: MEGATRON_FP4_MODULE=megatron_fp4.cli.preflight launch/torchrun.sh ...
    exit_process(main())
