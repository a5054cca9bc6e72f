"""All that can be tried of a run before it starts, in order, on this rank: the checks of `megatron-fp4 preflight`."""

from __future__ import annotations

from collections.abc import Callable

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.table import summary
from megatron_fp4.proofs.checks import CheckResult, attempt
from megatron_fp4.proofs.choice import check_choice, slow_path_notes
from megatron_fp4.proofs.gemms import check_gemms
from megatron_fp4.proofs.machine import check_disk, check_index, check_links, check_memory
from megatron_fp4.proofs.shards import check_model, distinct_linears, typical_ranks
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.opened import open_data
from megatron_fp4.train.refusals.requirements import check_kernels


def run_checks(
    config: RunConfig, process: Process, planned_bytes: Callable[[RunConfig, int], float]
) -> list[CheckResult]:
    """All checks of this rank. What later ones need and an earlier one refused is left out.

    planned_bytes: (configuration, world size) -> the planner's bytes for the fullest rank. Collective over the world.
    """
    launch = process.launch
    alone = launch.world_size == 1  # then it stands for every rank of the layout whose shard differs
    world_size = config.parallel.smallest_world if alone else launch.world_size
    results: list[CheckResult] = []
    checked = attempt(results, "configuration", lambda: check_config(config, world_size), "accepted")
    if checked is not None:
        if attempt(results, "data", lambda: open_data(checked, dp_rank=0), "tokenizer and shards can be read"):
            results.append(check_index(checked.config.data))
        ranks = typical_ranks(config.parallel, world_size) if alone else [launch.rank]
        if settled := check_choice(results, checked, process, world_size):
            results += _check_computation(settled, process, world_size, ranks)
        results.append(check_disk(checked.config))
        results.append(_check_memory(checked.config, world_size, planned_bytes, process))
    return results + check_links(process)


def _check_memory(
    config: RunConfig, world_size: int, planned_bytes: Callable[[RunConfig, int], float], process: Process
) -> CheckResult:
    try:
        needed = planned_bytes(config, world_size)
    except Exception as error:  # the planner makes the layers too, and a constructor may fail in any way
        return CheckResult("memory", False, f"cannot be planned: {type(error).__name__}: {error}")
    return check_memory(needed, process.device)


def _check_computation(
    checked: CheckedConfig, process: Process, world_size: int, ranks: list[int]
) -> list[CheckResult]:
    """Backend, fused kernels, shards of the model and their GEMMs."""
    config, device = checked.config, process.device
    results: list[CheckResult] = []
    backend = attempt(results, "backend", lambda: make_backend(config.precision), config.precision.backend.name)
    model = config.model
    kernels = (
        f"optimizer by {config.optim.impl.name}, norm by {model.norm_impl.name}, loss by {model.loss_impl.name},"
        f" pointwise by {model.pointwise_impl.name}"
    )
    attempt(results, "kernels", lambda: check_kernels(config, device), kernels)
    results += slow_path_notes(checked, device)
    if backend is not None:
        results.append(CheckResult("precision", True, summary(checked.plan.table())))
        shards = check_model(results, checked, backend, device, world_size=world_size, ranks=ranks)
        if shards:
            dtype = config.precision.compute_dtype.torch_dtype
            results += check_gemms(distinct_linears(checked, shards, device), backend, device, dtype)
    return results
