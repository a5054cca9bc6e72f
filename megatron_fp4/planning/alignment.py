"""Whether the local shapes of linears suit the kernels of a quantized GEMM.

Each GEMM contracts one dimension of a local shape, and Transformer Engine's rules are about multiples: every
dimension of 16, the contracted one of 32, and 128 for the fast path (fused quantization, no padding). A shape that the
model allows can stop fitting after tensor parallelism has divided it: 22656 is 177 * 128, an eighth of it 177 * 16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_fp4.models.block import LinearInfo
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable

REQUIRED = 16
CONTRACTED = 32
FAST = 128


def alignment_warnings(
    linears: Sequence[LinearInfo], table: PrecisionTable, *, tp: int, tokens: int
) -> list[dict[str, str]]:
    """One entry per kind of linear and finding: severity (`error`: Transformer Engine refuses it, `slow`), text.

    tokens: rows of one microbatch on a rank.
    """
    names_of: dict[tuple[str, str], list[str]] = {}
    for info in linears:
        for severity, text in _objections(info, table[info.name], tp, tokens):
            kind = re.sub(r"^blocks\.\d+\.", "", info.name)
            names_of.setdefault((severity, f"{kind}: {text}"), []).append(info.name)
    return [
        {"severity": severity, "text": f"{text} ({len(names)} linears)"} for (severity, text), names in names_of.items()
    ]


def _objections(info: LinearInfo, precision: LinearPrecision, tp: int, tokens: int) -> list[tuple[str, str]]:
    """(severity, text) for each quantized GEMM whose contracted dimension does not fit."""
    rows, columns = info.local_shape(tp)
    tokens = info.local_rows(tokens, tp)
    tp = 1 if info.whole else tp
    split = f" ({info.out_features if info.column else info.in_features} / tp {tp})"
    labels = {
        "fprop": (columns, f"{columns} input features{'' if info.column else split}"),
        "dgrad": (rows, f"{rows} output features{split if info.column else ''}"),
        "wgrad": (tokens, f"{tokens} tokens"),
    }
    quantized = [gemm.name for gemm in precision.gemms if gemm.quantized]
    sizes = [(labels[name][0], f"{name} contracts {labels[name][1]}") for name in quantized]
    return [objection for size, text in sizes for objection in _judge(size, text)]


def _judge(size: int, text: str) -> list[tuple[str, str]]:
    if size % CONTRACTED:
        need = CONTRACTED if size % REQUIRED == 0 else f"{REQUIRED}, let alone {CONTRACTED}"
        return [("error", f"{text}, not a multiple of {need}: not quantizable in Transformer Engine")]
    if size % FAST:
        return [("slow", f"{text}, not a multiple of {FAST}: padded or unfused kernels")]
    return []
