"""Numbers by logical tensor, summed over all ranks, which hold different tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_fp4.comm.collectives import all_gather_object, all_reduce_sum
from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.optim.layout import Bucket


def sum_by_name(buckets: Sequence[Bucket], local: Mapping[str, float], mesh: ParallelMesh) -> dict[str, float]:
    """Sums of `local`, of the names of all ranks and sorted, the same on all. Collective over the world.

    buckets: this rank's, at least one. A number per logical tensor is summed over the ranks of the stage that hold a
    part of it; then those that share the experts tell each other, then the pipeline ranks: what a rank receives does
    not grow with the replicas.
    """
    device, names = buckets[0].kind.device, _names(buckets)
    of_experts = _names([bucket for bucket in buckets if bucket.slots[0].placement.of_experts])
    totals = _summed(local, names - of_experts, device, mesh.dp_cp, mesh.tp)
    for of_rank in all_gather_object(_summed(local, of_experts, device, mesh.edp), mesh.ep):
        totals |= of_rank
    of_stages, totals = all_gather_object(totals, mesh.pp), {}
    for name, value in (item for of_stage in of_stages for item in of_stage.items()):
        totals[name] = totals.get(name, 0.0) + value
    return dict(sorted(totals.items()))


def _names(buckets: Sequence[Bucket]) -> set[str]:
    return {where.name for bucket in buckets for slot in bucket.slots for where in slot.placement.rectangles}


def _summed(local: Mapping[str, float], names: set[str], device: torch.device, *groups: Group) -> dict[str, float]:
    """The sums of `names` over groups whose ranks all have these."""
    if not names:
        return {}
    ordered = sorted(names)
    sums = torch.tensor([local.get(name, 0.0) for name in ordered], dtype=torch.float64, device=device)
    for group in groups:
        sums = all_reduce_sum(sums, group)
    return dict(zip(ordered, sums.tolist(), strict=True))
