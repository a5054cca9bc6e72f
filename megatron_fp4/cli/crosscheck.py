"""`megatron-fp4 crosscheck experiment=quickstart`: Transformer Engine, or our kernels, against the emulation.

For each distinct local shape and precision of the run, precision/selftest/operands.py compares the codes, block scales
and amaxes that `--against transformer_engine` (the default) or `--against triton` makes, and the products. Of triton
stochastic codes are compared bit by bit too: its noise is the emulation's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

import torch

from megatron_fp4.cli.arguments import CommandParser, returns_code
from megatron_fp4.cli.compose import compose_config, to_run_config
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


EXITS = {0: "all equal", 1: "a difference; the first one of each operand is named"}


@returns_code
def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per operand and product; returns the exit code."""
    parser = CommandParser("crosscheck", __doc__, EXITS, "experiment=quickstart --against triton", configured=True)
    names = (BackendName.transformer_engine.name, BackendName.triton.name)
    parser.add_argument("--against", choices=names, default=names[0], help="whose operands and products")
    args = parser.parse(arguments)
    name = BackendName[args.against]
    try:
        config = to_run_config(compose_config(args.overrides, args.config_dir))
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
    except (ValueError, FileNotFoundError) as error:
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


def _title(backend: Backend) -> str:
    if isinstance(backend, TransformerEngineBackend):
        return f"Transformer Engine {backend.api.version}, block scale = {ORDERS[backend.api.features.scale_order]}"
    return f"triton {metadata.version('triton')}"
