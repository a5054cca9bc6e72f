"""From shards to what is stored, and back in place.

A stored tensor is called "<kind>/<logical name>" ("master/blocks.3.mlp.up.weight"), never by rank, stage or position in
a list; so a checkpoint has no layout, and any ranks that together hold the rectangles can read it. Small state is JSON
and never pickled. Strict: names and shapes of both sides must agree, and every difference is listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from megatron_fp4.checkpoint.dcp import ShardSavePlanner, StoredTensor, stored_metadata
from megatron_fp4.comm.agree import MAX_LISTED, agreed, decided_by_rank0, gather_to_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard


def stored_tensors(shards: Iterable[Shard]) -> dict[str, StoredTensor]:
    """{"<kind>/<name>": StoredTensor}. Raises ValueError when two shards disagree about a logical shape."""
    state: dict[str, StoredTensor] = {}
    for shard in shards:
        for kind, data in shard.tensors.items():
            key, shape = f"{kind}/{shard.name}", shard.where.global_shape
            stored = state.setdefault(key, StoredTensor(kind, shape))
            if stored.global_shape != shape:
                raise ValueError(f"{key}: two shards say {stored.global_shape} and {shape}")
            if data.numel():
                stored.shards.append(shard)
    return state


@dataclass(frozen=True, eq=False)
class SaveContent:
    """What is to be saved: tensors by key, and the small state as JSON."""

    tensors: dict[str, StoredTensor]
    state_json: bytes


def layout_signature(state: Mapping[str, StoredTensor]) -> tuple[Any, ...]:
    """Equal signatures of all ranks mean: the plan of the last save still holds."""
    return tuple(
        (
            key,
            stored.global_shape,
            *((shard.where, stored.data(shard).dtype, shard.writes) for shard in stored.shards),
        )
        for key, stored in state.items()
    )


@dataclass(frozen=True, eq=False)
class SaveLayout:
    """Who writes what; planned once in a run, because it holds as long as the signature does.

    plan: this rank's write items. metadata: DCP's, of the whole, on rank 0.
    """

    signature: tuple[Any, ...]
    plan: SavePlan
    metadata: Metadata | None


def plan_layout(state: dict[str, StoredTensor], group: Group) -> SaveLayout:
    """Collective, on the calling thread.

    Raises ValueError on all ranks if the written rectangles overlap or do not cover a logical tensor.
    """
    plan = ShardSavePlanner(state).create_local_plan()
    plans = gather_to_rank0(plan, group)
    metadata = agreed(lambda: _whole(plans) if group.rank == 0 else None, group)
    return SaveLayout(layout_signature(state), plan, metadata)


def _whole(plans: list[SavePlan]) -> Metadata:
    """The plans as one, with every element once: DCP would drop a second copy, and compares all pairs of rectangles."""
    seen: set[MetadataIndex] = set()
    covered: dict[str, int] = {}
    shapes: dict[str, torch.Size] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            key, data = item.index.fqn, item.tensor_data
            assert data is not None
            if item.index in seen:
                raise ValueError(
                    f"{key} at {tuple(item.index.offset or ())} is written twice, the second time by rank {rank};"
                    " replicas must have writes=False"
                )
            seen.add(item.index)
            shapes[key] = data.size
            covered[key] = covered.get(key, 0) + data.chunk.sizes.numel()
    for key, shape in shapes.items():
        if covered[key] < shape.numel():
            raise ValueError(
                f"{key}: the shards of all ranks hold {covered[key]} of the {shape.numel()} elements of shape"
                f" {tuple(shape)}"
            )
    _, metadata = create_default_global_save_plan(plans)
    for key in shapes:
        _refuse_overlap(key, stored_metadata(metadata, key).chunks)
    return metadata


def _refuse_overlap(key: str, chunks: Iterable[ChunkStorageMetadata]) -> None:
    """Sweep along the rows, in which the pieces of the ranks follow each other: few are open at a time."""
    opened: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda chunk: tuple(chunk.offsets)):
        opened = [other for other in opened if chunk.offsets[0] < other.offsets[0] + other.sizes[0]]
        for other in opened:
            places = zip(chunk.offsets, chunk.sizes, other.offsets, other.sizes, strict=True)
            if all(low < start + size and start < low + length for low, length, start, size in places):
                raise ValueError(f"{key}: the shards {chunk} and {other} are overlapping")
        if chunk.offsets:
            opened.append(chunk)


def check_matches(state: Mapping[str, StoredTensor], metadata: Metadata, group: Group, where: str) -> None:
    """Compare what all ranks ask for with what is stored. Collective.

    Only the kinds that are asked for count: an evaluation that asks for "master" need not name the moments.
    Raises one ValueError on all ranks, listing missing and unexpected names and wrong shapes.
    """
    wanted_per_rank = gather_to_rank0({key: tensor.global_shape for key, tensor in state.items()}, group)
    wanted = {key: shape for one in wanted_per_rank for key, shape in one.items()}
    stored = {key: tuple(stored_metadata(metadata, key).size) for key in metadata.state_dict_metadata}
    decided_by_rank0(lambda: _refuse_differences(wanted, stored, where), group)


def _refuse_differences(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], where: str
) -> None:
    kinds = {key.split("/", 1)[0] for key in wanted}
    missing = sorted(key for key in wanted if key not in stored)
    unexpected = sorted(key for key in stored if key.split("/", 1)[0] in kinds and key not in wanted)
    shapes = sorted(
        f"{key}: stored {stored[key]}, model {shape}"
        for key, shape in wanted.items()
        if key in stored and stored[key] != tuple(shape)
    )
    if not (missing or unexpected or shapes):
        return
    lines = [f"{where} does not fit this model:"]
    for title, names in (("missing in it", missing), ("not in the model", unexpected), ("other shapes", shapes)):
        if names:
            lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names[:MAX_LISTED])]
            if len(names) > MAX_LISTED:
                lines.append(f"    ... and {len(names) - MAX_LISTED} more")
    lines.append("use the model settings stored in the checkpoint's state.json, or another checkpoint")
    raise ValueError("\n".join(lines))


def encode_meta(meta: Mapping[str, Any]) -> bytes:
    """JSON of small state. Raises ValueError naming the first entry that would not come back the same."""
    _check_json(meta, "meta")
    return (json.dumps(meta, indent=1) + "\n").encode()


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path}: key {key!r} is not a string, and would come back from JSON as one")
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_json(item, f"{path}[{number}]")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise ValueError(
            f"{path} = {value!r} ({type(value).__name__}) cannot be stored as JSON; use plain values, lists, dicts"
        )
