"""Which moments a parameter has, how they are kept, in how many bytes.

Blocks that share a scale are of matrices of which whole blocks make a row: so no layout moves them. Vectors,
convolutions and other matrices, a small part of a model, keep FP32 instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.kept.config import BLOCK, MasterFormat, MomentFormat
from megatron_fp4.optim.muon.choice import choose

FP32 = 4
MASTER_BYTES = {MasterFormat.fp32: 4.0, MasterFormat.remainder: 2 + 1 / 8}
MOMENT_BYTES = {
    MomentFormat.fp32: 4.0,
    MomentFormat.bf16: 2.0,
    MomentFormat.int8: 1 + 1 / BLOCK,
    MomentFormat.fp8: 1 + 1 / BLOCK,
}

REMAINDER_BYTES = 46
"""Read and written to make FP32 of a BF16 weight and 17 bits, and them of FP32, by operations of torch."""


def moment_formats(name: str, shape: Sequence[int], config: OptimConfig) -> dict[str, MomentFormat]:
    """The moments that are kept of a logical tensor, by their names in a checkpoint."""
    kinds = ("momentum",) if choose(name, shape, config).muon else ("exp_avg", "exp_avg_sq")
    formats = {kind: config.moments.by_kind[kind] for kind in kinds}
    if len(shape) == 2 and shape[1] % BLOCK == 0:
        return formats
    return {kind: MomentFormat.fp32 if each.in_blocks else each for kind, each in formats.items()}


def check_whole_blocks(name: str, row: int, parts: int) -> None:
    """Raises ValueError where `parts` ranks that share each row of a logical tensor would cut a block."""
    if row % (parts * BLOCK):
        raise ValueError(
            f"{name}: rows of {row} over parallel.tp = {parts} are no multiples of the {BLOCK} elements that share a"
            " scale in optim.moments=int8 and fp8; use a smaller parallel.tp, or moments in bf16"
        )


def has_blocks(parameter: LogicalParameter, config: OptimConfig) -> bool:
    """Whether moments of a local parameter are kept in blocks. Raises ValueError where its shard cuts one."""
    first = parameter.placement.rectangles[0]  # those of a fused weight have rows of one length
    formats = moment_formats(first.name, first.global_shape, config)
    if not any(each.in_blocks for each in formats.values()):
        return False
    check_whole_blocks(first.name, first.global_shape[1], first.global_shape[1] // first.shape[1])
    return True


def bytes_per_element(name: str, shape: Sequence[int], config: OptimConfig, weight_bytes: int) -> float:
    """Bytes of the state of a logical tensor whose weights have `weight_bytes` an element."""
    master = 0.0 if weight_bytes == FP32 else MASTER_BYTES[config.master]
    return master + sum(MOMENT_BYTES[each] for each in moment_formats(name, shape, config).values())


def conversion_bytes(config: OptimConfig, *, muon: bool, dtype: torch.dtype) -> float:
    """Bytes that are read and written to convert the state of an element in an update. muon: whose, else AdamW's.

    dtype: of the weights. A moment is decoded to FP32; random words are written; both are read, and encoded.
    """
    moments = config.moments
    formats = [moments.muon] if muon else [moments.first, moments.second]
    master = REMAINDER_BYTES if config.master is MasterFormat.remainder and dtype == torch.bfloat16 else 0
    return master + sum(2 * MOMENT_BYTES[each] + 16 for each in formats if each is not MomentFormat.fp32)
