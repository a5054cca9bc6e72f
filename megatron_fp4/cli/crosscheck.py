"""`megatron-fp4 crosscheck experiment=quickstart`: Transformer Engine against the emulation, code by code.

For each distinct local shape and precision of the run, proofs/operands.py compares the codes, block scales and amaxes
that Transformer Engine makes, and the products.

Exit codes: 0 all equal, 1 a difference (the first one of each operand is named), 2 nothing could be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.comm.bootstrap import choose_device
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.operand import ScaleOrder
from megatron_fp4.proofs.operands import cross_check
from megatron_fp4.proofs.shards import build_shards, distinct_linears, typical_ranks
from megatron_fp4.train.checked import check_config

ORDERS = {ScaleOrder.te: "amax_b * (S_enc * (1/6))", ScaleOrder.paper: "(amax_b / 6) * S_enc"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per operand and product; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in arguments or "--help" in arguments:
        print("usage: crosscheck [experiment=NAME] [key=value ...]")
        return 0
    try:
        config = to_run_config(compose_config(arguments))
        world_size = config.parallel.smallest_world
        checked = check_config(config, world_size)
        backend = TransformerEngineBackend(replace(config.precision, backend=BackendName.transformer_engine))
        device = choose_device(config.train.device, 0)
        ranks = typical_ranks(config.parallel, world_size)
        shards = build_shards(checked, backend, device, world_size=world_size, ranks=ranks)
        linears = [linear for linear in distinct_linears(checked, shards, device) if linear.precision.quantized]
        if not linears:
            raise ValueError("the precision rules quantize no GEMM at the start, so there is nothing to compare")
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    order = backend.api.features.scale_order
    print(f"Transformer Engine {backend.api.version}, block scale = {ORDERS[order]}, on {device}")
    differences = 0
    for linear in linears:
        print(linear)
        for finding in cross_check(linear, backend, device):
            differences += finding.wrong
            print(f"  {'DIFFERS' if finding.wrong else 'equal  '} {finding}")
    print(f"{differences} differences" if differences else "no difference")
    return 1 if differences else 0
