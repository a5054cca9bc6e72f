"""Who will compute a run on this rank's device, and what of it without kernels: two checks of `preflight`."""

from __future__ import annotations

import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.rendezvous import Rendezvous
from megatron_fp4.proofs.checks import CheckResult
from megatron_fp4.train.arrival.backend import settle_backend
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.telemetry.slow_paths import slow_paths_on


def check_choice(
    results: list[CheckResult], checked: CheckedConfig, process: Process, world_size: int
) -> CheckedConfig | None:
    """The backend that `auto` would take on this rank alone; a better one that fails its self-test is a failure."""
    alone = Rendezvous(Launch(), None)
    try:
        settled = settle_backend(checked, world_size, alone, process.device)
    except ValueError as error:
        results.append(CheckResult("backend", False, str(error)))
        return None
    if settled.choice:
        sentence, *failures = settled.choice
        results.append(CheckResult("auto", not failures, "; ".join([sentence, *failures])))
    return settled


def slow_path_notes(checked: CheckedConfig, device: torch.device) -> list[CheckResult]:
    """What is computed without the kernels that this device has."""
    texts = slow_paths_on(checked.config, checked.plan, device)
    return [CheckResult("kernels", None, f"WARNING: {text}") for text in texts]
