"""Whether the rows of experts that share a scale come together in a layout.

Not here: what must divide by ep (comm/config.py, models/layout.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig


def check_segments(config: RunConfig, tables: Iterable[PrecisionTable]) -> None:
    """Raises ValueError where a segment, whose rows a quantized expert gives one scale, would be on several ranks.

    tables: of the run's phases. A microbatch is on tp x cp ranks. Where these do not all share the same experts, only
    chunks of tokens that one rank has can be segments.
    """
    model, parallel = config.model, config.parallel
    S = config.data.seq_length
    if "E" not in model.letters:
        return
    tokens, chunk = config.train.micro_batch * S, model.moe.segment_tokens
    if chunk and tokens % chunk:
        raise ValueError(
            f"model.moe.segment_tokens = {chunk} does not divide the {tokens} tokens of a microbatch"
            f" (train.micro_batch * data.seq_length = {config.train.micro_batch} * {S}); choose a divisor of {tokens}"
        )
    tp, cp = parallel.tp, parallel.cp
    if parallel.ep % (tp * cp) == 0:
        return
    consecutive = math.gcd(tokens // (tp * cp), S // (2 * cp) if cp > 1 else tokens)
    if chunk and consecutive % chunk == 0:
        return
    for table in tables:
        for row in table.rows:
            if ".moe.experts." in row.name and row.precision.quantized:
                raise ValueError(
                    f"{row.name} is quantized, and parallel.ep = {parallel.ep} is no multiple of parallel.tp *"
                    f" parallel.cp = {tp} * {cp} = {tp * cp}: tokens of a microbatch that share a scale would come to"
                    f" experts on different ranks; set parallel.ep to a multiple of {tp * cp}, or"
                    f" model.moe.segment_tokens to a divisor of {consecutive}, the consecutive tokens of a rank"
                )
