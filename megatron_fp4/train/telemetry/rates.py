"""Training FLOPs by the rate at which the hardware can execute them.

One idea: a GEMM runs at the rate of its slower operand, and everything that is not a quantized GEMM at BF16's.
"""

from __future__ import annotations

from megatron_fp4.models.count import Flops
from megatron_fp4.precision.table import PrecisionTable, gemm_formats

RATES = ("bf16", "fp8", "fp4")
"""Slowest first."""
RATE_OF = {"bf16": "bf16", "nvfp4": "fp4", "mxfp4": "fp4", "mxfp8": "fp8", "fp8_block": "fp8"}


def flops_by_rate(flops: Flops, table: PrecisionTable) -> dict[str, float]:
    """Training FLOPs per token by hardware rate; a GEMM of mixed operands runs at the slower one's."""
    found = dict.fromkeys(RATES, 0.0)
    found["bf16"] = 3.0 * (flops.attention + flops.scan)
    for row in table.rows:
        for text in gemm_formats(row.precision):
            found[rate_of(text)] += flops.linears[row.name]
    return found


def rate_of(text: str) -> str:
    """The rate of a GEMM, from its formats as text ("nvfp4", "nvfp4/bf16")."""
    return min((RATE_OF[part] for part in text.split("/")), key=RATES.index)
