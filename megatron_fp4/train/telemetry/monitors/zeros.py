"""The exact zeros of every weight gradient of a step, and which GEMM made them, over all ranks.

Masks of live channels are joined over the ranks that share a channel, zeros are counted where the optimizer holds the
summed gradient, and everything is a sum of whole numbers: no layout changes a count.

Not here: when a step is measured, and where the numbers go (monitors/health.py); what a mask says (precision/health/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_max, all_reduce_sum
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.models.block import LinearInfo, model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.models.hidden_channels import around_activations
from megatron_fp4.optim import Zero1Optimizer
from megatron_fp4.precision.health.origins import FIELDS, LinearMasks, count_lines, count_pair
from megatron_fp4.precision.health.probe import SIDES, ChannelProbe, Channels
from megatron_fp4.precision.health.weights import NUM_SPREADS

OPERANDS = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")


@dataclass(frozen=True)
class LinearHealth:
    """One linear in one step. first, second: the linears around its activation, "" where it stands at none.

    numel: elements of its weight. zeros: exact zeros of its gradient; structural, fprop, dgrad, wgrad: by origin, see
    `precision.health.origins`. lost_y, lost_dx: channels that its own Fprop and Dgrad lost. dead_inputs, dead_outputs:
    part of the channels of x and of dy that is zero for every token, of all experts together. spread_columns,
    spread_rows: mean over 16x16 tiles of log2(largest / smallest channel maximum); lost_columns, lost_rows: part of the
    channels in tiles that round to zero there. floors: by `GEMM.operand`, part of the block scales that are zero or the
    smallest.
    """

    name: str
    first: str
    second: str
    numel: int
    zeros: int
    structural: int
    fprop: int
    dgrad: int
    wgrad: int
    lost_y: int
    lost_dx: int
    dead_inputs: float
    dead_outputs: float
    spread_columns: float
    lost_columns: float
    spread_rows: float
    lost_rows: float
    floors: dict[str, float]

    @property
    def underflow(self) -> int:
        """Zeros that quantization made."""
        return self.fprop + self.dgrad + self.wgrad

    def makers(self) -> list[tuple[tuple[str, str], int]]:
        """((linear, GEMM), zeros that it made here), of those that made some."""
        listed = [((self.first, "fprop"), self.fprop), ((self.second, "dgrad"), self.dgrad)]
        return [(maker, count) for maker, count in [*listed, ((self.name, "wgrad"), self.wgrad)] if count]


def linear_health(
    model: ModelConfig,
    stages: Sequence[Decoder],
    probe: ChannelProbe,
    optimizer: Zero1Optimizer,
    mesh: ParallelMesh,
    device: torch.device,
) -> list[LinearHealth]:
    """All linears of the model, in its order, of the step that `probe` has watched; the same on all ranks.

    After the sums of its gradients. Collective over the world.
    """
    infos = model_linears(model)
    local = {name: linear.precision for stage in stages for name, linear in linears_of(stage).items()}
    here = [info for info in infos if info.name in local]
    masks = {name: LinearMasks(live, local[name]) for name, live in _joined(here, probe, mesh, device).items()}
    pairs = {name: pair for pair in around_activations(infos) for name in pair}
    counts = _counts(here, masks, pairs, mesh)
    width = len(FIELDS) + 1 + NUM_SPREADS + 2 * len(OPERANDS)
    rows = torch.zeros(len(infos), width, dtype=torch.float64, device=device)
    for number, info in enumerate(infos):
        if info.name not in local:
            continue
        if info.name in counts:
            rows[number, : len(FIELDS)] = counts[info.name]
        rows[number, len(FIELDS)] = float(local[info.name].wgrad.quantized)
        rows[number, len(FIELDS) + 1 :] = _of_parts(info.name, probe, device)
    table = all_reduce_sum(rows, mesh.world).tolist()
    zeros = _zeros(model, infos, optimizer)
    named = zip(infos, table, strict=True)
    return [_health(info, *pairs.get(info.name, ("", "")), zeros[info.name], row) for info, row in named]


def _joined(
    infos: Sequence[LinearInfo], probe: ChannelProbe, mesh: ParallelMesh, device: torch.device
) -> dict[str, dict[Channels, Tensor]]:
    """Masks `[E, C]` of this stage's linears over all ranks that have rows of the same channels.

    E: this rank's experts. Dense linears have all channels of the logical tensor, on every rank.
    """
    joined: dict[str, dict[Channels, Tensor]] = {}
    for experts in (False, True):
        some = [info for info in infos if bool(info.num_experts) is experts]
        groups = [mesh.edp] if experts else [mesh.dp_cp, mesh.tp]
        local = [_mask(info, kind, probe, mesh, device) for info in some for kind in Channels]
        if not local:
            continue
        flat = torch.cat([mask.flatten() for mask in local]).float()
        for group in groups:
            flat = all_reduce_max(flat, group)
        parts = iter(flat.bool().split([mask.numel() for mask in local]))
        shapes = iter(mask.shape for mask in local)
        for info in some:
            joined[info.name] = {kind: next(parts).view(next(shapes)) for kind in Channels}
    return joined


def _mask(info: LinearInfo, kind: Channels, probe: ChannelProbe, mesh: ParallelMesh, device: torch.device) -> Tensor:
    """What this rank has seen of one kind of channels, `[E, C]`."""
    size = info.in_features if SIDES[kind] == "K" else info.out_features
    count = info.num_experts // mesh.ep.size if info.num_experts else 1
    mask = torch.zeros(count, size + 1, dtype=torch.bool, device=device)
    for number in range(count):
        expert = mesh.ep.rank * count + number if info.num_experts else None
        seen = probe.live.get((info.name, kind, expert))
        if seen is None:
            continue
        if seen.index is None:
            mask[number, :size] = seen.live[:size]
        else:
            mask[number].index_copy_(0, torch.where(seen.index < 0, size, seen.index), seen.live)
    return mask[:, :size]


def _counts(
    infos: Sequence[LinearInfo],
    masks: dict[str, LinearMasks],
    pairs: dict[str, tuple[str, str]],
    mesh: ParallelMesh,
) -> dict[str, Tensor]:
    """`FIELDS` of what this rank counts for the whole model: its experts, or on one rank of the stage the others."""
    counts: dict[str, Tensor] = {}
    for info in infos:
        counted = mesh.edp.rank == 0 if info.num_experts else mesh.tp.rank == mesh.cp.rank == mesh.dp.rank == 0
        if not counted or info.name in counts:
            continue
        if info.name in pairs:
            first, second = pairs[info.name]
            counts[first], counts[second] = count_pair(masks[first], masks[second])
        else:
            counts[info.name] = count_lines(masks[info.name])
    return counts


def _of_parts(name: str, probe: ChannelProbe, device: torch.device) -> Tensor:
    """Sums of spreads, then of block scales at the floor and of all, by operand, of this rank's part."""
    spreads = [spread for (linear, _), spread in probe.spreads.items() if linear == name]
    spread = torch.stack(spreads).sum(0) if spreads else torch.zeros(NUM_SPREADS, dtype=torch.float64, device=device)
    floors = []
    for operand in OPERANDS:
        counted = probe.floors.get((name, operand))
        if counted is None:
            floors.append(torch.zeros(2, dtype=torch.float64, device=device))
        else:
            floors.append(torch.stack([counted[0] + counted[1], counted[2]]))
    return torch.cat([spread, *floors])


def _zeros(model: ModelConfig, infos: Sequence[LinearInfo], optimizer: Zero1Optimizer) -> dict[str, float]:
    """Zeros in the summed gradient of each linear. Collective; reads back once."""
    shards = [shard for shard in optimizer.grad_shards() if shard.writes]
    counts = [(shard.tensors["grad"] == 0).sum() for shard in shards]
    local: dict[str, float] = {}
    for shard, count in zip(shards, torch.stack(counts).tolist() if counts else [], strict=True):
        local[shard.name] = local.get(shard.name, 0.0) + count
    by_tensor = optimizer.sum_by_name(local)
    return {info.name: sum(by_tensor.get(name, 0.0) for name in _tensors(info, model)) for info in infos}


def _tensors(info: LinearInfo, model: ModelConfig) -> Iterator[str]:
    """Logical tensors of a linear's weight."""
    if info.name == "head" and model.tied_embeddings:
        yield "embedding.weight"
        return
    place, _, role = info.name.rpartition(".")
    linears = [f"{place}.{expert}.{role}" for expert in range(info.num_experts)] or [info.name]
    for linear in linears:
        for part in info.outputs:
            yield f"{linear}.{part}.weight" if part else f"{linear}.weight"


def _health(info: LinearInfo, first: str, second: str, zeros: float, row: list[float]) -> LinearHealth:
    counts = dict(zip(FIELDS, (int(count) for count in row), strict=False))
    quantized, tiles, *rest = row[len(FIELDS) :]
    spread_columns, live_columns, lost_columns, spread_rows, live_rows, lost_rows, *floors = rest
    underflow = counts["fprop"] + counts["dgrad"]
    # the gradient of a tied table is also the embedding's, which may fill what is dead for the head
    structural = max(0, min(counts["structural"], int(zeros) - underflow))
    own = max(0, int(zeros) - structural - underflow)
    wgrad = own if quantized else 0  # tokens that never meet: so it would be in BF16
    of_operands = zip(OPERANDS, floors[::2], floors[1::2], strict=True)
    experts = max(1, info.num_experts)
    return LinearHealth(
        name=info.name,
        first=first,
        second=second,
        numel=info.numel,
        zeros=int(zeros),
        structural=structural + own - wgrad,
        fprop=counts["fprop"],
        dgrad=counts["dgrad"],
        wgrad=wgrad,
        lost_y=counts["lost_y"],
        lost_dx=counts["lost_dx"],
        dead_inputs=counts["dead_inputs"] / (info.in_features * experts),
        dead_outputs=counts["dead_outputs"] / (info.out_features * experts),
        spread_columns=_part(spread_columns, tiles),
        lost_columns=_part(lost_columns, live_columns),
        spread_rows=_part(spread_rows, tiles),
        lost_rows=_part(lost_rows, live_rows),
        floors={operand: _part(low, whole) for operand, low, whole in of_operands if whole},
    )


def _part(count: float, whole: float) -> float:
    return count / whole if whole else 0.0
