"""Which parameters have moments in blocks that share a scale: matrices, where whole blocks make a row."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.kept.codes import BLOCK
from megatron_fp4.optim.kept.config import MomentFormat
from megatron_fp4.optim.muon.choice import choose


def moment_formats(name: str, shape: Sequence[int], config: OptimConfig) -> dict[str, MomentFormat]:
    """The moments that are kept of a logical tensor, by their names in a checkpoint."""
    kinds = ("momentum",) if choose(name, shape, config).muon else ("exp_avg", "exp_avg_sq")
    formats = {kind: config.moments.by_kind[kind] for kind in kinds}
    if len(shape) == 2 and shape[1] % BLOCK == 0:
        return formats
    return {kind: MomentFormat.fp32 if each.in_blocks else each for kind, each in formats.items()}


def has_blocks(parameter: LogicalParameter, config: OptimConfig) -> bool:
    """Whether moments of a local parameter are kept in blocks.

    Raises ValueError where tensor parallelism cuts a block.
    """
    first = parameter.placement.rectangles[0]  # those of a fused weight have rows of one length
    formats = moment_formats(first.name, first.global_shape, config)
    if not any(each.in_blocks for each in formats.values()):
        return False
    if first.offset[1] % BLOCK or first.shape[1] % BLOCK:
        raise ValueError(
            f"{first.name}: rows of {first.global_shape[1]} are cut into {first.shape[1]} from {first.offset[1]}, but"
            f" optim.moments in int8 or fp8 share a scale in blocks of {BLOCK}; use a smaller parallel.tp, or bf16"
        )
    return True
