"""`megatron-fp4 crosscheck experiment=quickstart`: Transformer Engine, or our kernels, against the emulation.

For each distinct local shape and precision of the run, precision/selftest/operands.py compares the codes, block scales
and amaxes that `--against transformer_engine` (the default) or `--against triton` makes, and the products. Of triton
stochastic codes are compared bit by bit too: its noise is the emulation's.

Exit codes: 0 all equal, 1 a difference (the first one of each operand is named), 2 nothing could be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

import torch

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.comm.bootstrap import choose_device
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.backends.choose import check_backend_device, make_backend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.operand import ScaleOrder
from megatron_fp4.precision.selftest.operands import cross_check
from megatron_fp4.proofs.shards import build_shards, distinct_linears, typical_ranks
from megatron_fp4.train.checked import check_config

ORDERS = {ScaleOrder.te: "amax_b * (S_enc * (1/6))", ScaleOrder.paper: "(amax_b / 6) * S_enc"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per operand and product; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in arguments or "--help" in arguments:
        print("usage: crosscheck [--against transformer_engine|triton] [experiment=NAME] [key=value ...]")
        return 0
    try:
        name = _take_against(arguments)
        config = to_run_config(compose_config(arguments))
        config = replace(config, precision=replace(config.precision, backend=name))
        world_size = config.parallel.smallest_world
        checked = check_config(config, world_size)
        backend = make_backend(config.precision)
        device = choose_device(config.train.device, 0)
        check_backend_device(name, device)
        ranks = typical_ranks(config.parallel, world_size)
        shards = build_shards(checked, backend, device, world_size=world_size, ranks=ranks)
        linears = [linear for linear in distinct_linears(checked, shards, device) if linear.precision.quantized]
        if not linears:
            raise ValueError("the precision rules quantize no GEMM at the start, so there is nothing to compare")
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{_title(backend)}, on {device}")
    differences = 0
    for linear in linears:
        print(linear)
        for finding in cross_check(linear.case, backend, linear.case.gaussian_tensors(device, torch.bfloat16)):
            differences += finding.wrong
            print(f"  {'DIFFERS' if finding.wrong else 'equal  '} {finding}")
    print(f"{differences} differences" if differences else "no difference")
    return 1 if differences else 0


def _take_against(arguments: list[str]) -> BackendName:
    """The backend of `--against`, which is taken out of the arguments. Raises ConfigError."""
    name, known = BackendName.transformer_engine.name, (BackendName.transformer_engine.name, BackendName.triton.name)
    if "--against" in arguments:
        at = arguments.index("--against")
        name = arguments[at + 1] if at + 1 < len(arguments) else ""
        del arguments[at : at + 2]
    if name not in known:
        raise ConfigError(f"--against {name}: one of {', '.join(known)}")
    return BackendName[name]


def _title(backend: Backend) -> str:
    if isinstance(backend, TransformerEngineBackend):
        return f"Transformer Engine {backend.api.version}, block scale = {ORDERS[backend.api.features.scale_order]}"
    return f"triton {metadata.version('triton')}"
