"""The buckets that a configuration gives: what is updated, kept and summed in different ways lies apart.

A gradient in BF16 is added to in FP32 and rounded once for each contribution, so a rank's sum over microbatches loses
what is below 2^-8 of it. Over ranks the BF16 sums travel as they are and are added in FP32, in rank order, so that no
further bit is lost. Two of the 4 bytes are saved, and 4 bytes of each rank's own part are added, which FP32 has not:
for whoever shares a tensor with nobody it stays FP32. So do vectors and what is whole on every tensor-parallel rank,
of which each has a partial gradient, and weights that are FP32 themselves (routers).

Not here: how parameters lie in a bucket (layout.py), which losses reach a tensor (train/refusals/optimizer_state.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim.config import MainGradFormat, OptimConfig
from megatron_fp4.optim.kept.choice import has_blocks
from megatron_fp4.optim.layout import Bucket, make_buckets
from megatron_fp4.optim.muon.choice import is_muons


def sums_in_bf16(config: OptimConfig, *, dtype: torch.dtype, dims: int, whole: bool, replicas: int) -> bool:
    """Whether the gradient of a tensor is summed in BF16. dtype, dims: of the weight. whole: on every tensor-parallel
    rank. replicas: the ranks that share it, over which its gradient is summed."""
    asked = config.main_grads is MainGradFormat.bf16
    return asked and dtype == torch.bfloat16 and dims > 1 and not whole and replicas > 1


def buckets_for(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    mesh: ParallelMesh,
    *,
    sum_replicated_over_tp: bool,
    sum_dtype: torch.dtype = torch.float32,
) -> list[Bucket]:
    """The buckets of a rank's trainable parameters; see `make_buckets`. sum_dtype: FP64 sums all gradients in FP64."""

    def of(parameter: LogicalParameter, replicas: int) -> torch.dtype:
        narrow = sums_in_bf16(
            config,
            dtype=parameter.dtype,
            dims=parameter.dim(),
            whole=parameter.placement.tp_replicated,
            replicas=replicas,
        )
        return torch.bfloat16 if narrow and sum_dtype == torch.float32 else sum_dtype

    return make_buckets(
        named_parameters,
        mesh.dp_cp,
        bucket_numel=config.bucket_numel,
        sum_replicated_over_tp=sum_replicated_over_tp,
        as_matrix=lambda parameter: is_muons(parameter, config),
        edp=mesh.edp,
        in_blocks=lambda parameter: has_blocks(parameter, config),
        sum_dtype=of,
    )
