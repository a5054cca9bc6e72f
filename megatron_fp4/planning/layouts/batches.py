"""Which data-parallel sizes a global batch takes in a world, and batches near it that take more."""

from __future__ import annotations

import math
from typing import Any

from megatron_fp4.train.config import RunConfig

NEAR = 0.15
"""Part by which a batch size that is proposed may differ from the one that was asked for."""


def batch_section(config: RunConfig, num_gpus: int) -> dict[str, Any]:
    """Which dp the global batch takes in this world, and batch sizes near it that take more."""
    asked = config.train.global_batch

    def sizes(batch: int) -> list[int]:
        return [dp for dp in range(1, batch + 1) if batch % dp == 0 and num_gpus % dp == 0]

    ours = sizes(asked)
    span = int(asked * NEAR)
    near = {batch: sizes(batch) for batch in range(max(1, asked - span), asked + span + 1)}
    better = {batch: dps for batch, dps in near.items() if len(dps) > len(ours)}
    best = sorted(better, key=lambda batch: (-len(better[batch]), abs(batch - asked)))[:3]
    return {
        "global_batch": asked,
        "factors": factors(asked),
        "dp": ours,
        "near": [{"global_batch": b, "factors": factors(b), "dp": better[b]} for b in best],
    }


def factors(number: int) -> str:
    """`2^5 * 23`."""
    parts, rest = [], number
    for prime in range(2, math.isqrt(number) + 1):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        if power:
            parts.append(f"{prime}^{power}" if power > 1 else str(prime))
    return " * ".join([*parts, *([str(rest)] if rest > 1 or number == 1 else [])])
