"""From shards to what is stored, and back in place.

One idea: a stored tensor is called "<kind>/<logical name>" ("master/blocks.3.mlp.up.weight"), never by rank, stage or
position in a list; so a checkpoint has no layout, and any ranks that together hold the rectangles can read it. Small
state is JSON and never pickled. Strict: names and shapes of both sides must agree, and every difference is listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from megatron_fp4.checkpoint.box import Box, Boxes, BoxSavePlanner
from megatron_fp4.comm import collectives
from megatron_fp4.comm.agree import MAX_LISTED, gather_to_rank0
from megatron_fp4.comm.mesh import Group


class Shard(Protocol):
    """One rectangle of one logical tensor on this rank: `tensors` by kind, all of the rectangle's shape."""

    @property
    def name(self) -> str: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> tuple[int, ...]: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...
    @property
    def writes(self) -> bool: ...


def boxes_of(shards: Iterable[Shard]) -> dict[str, Boxes]:
    """{"<kind>/<name>": Boxes}. Raises ValueError when two shards disagree about a logical shape, or one leaves it."""
    state: dict[str, Boxes] = {}
    for shard in shards:
        for kind, data in shard.tensors.items():
            key = f"{kind}/{shard.name}"
            boxes = state.setdefault(key, Boxes(tuple(shard.global_shape)))
            if boxes.global_shape != tuple(shard.global_shape):
                raise ValueError(f"{key}: two shards say {boxes.global_shape} and {tuple(shard.global_shape)}")
            _check_inside(key, boxes.global_shape, tuple(shard.offset), tuple(data.shape))
            if data.numel():
                boxes.boxes.append(Box(data, tuple(shard.offset), shard.writes))
    return state


def _check_inside(key: str, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    fits = len(whole) == len(offset) == len(shape)
    if not fits or any(low < 0 or low + n > size for low, n, size in zip(offset, shape, whole, strict=True)):
        raise ValueError(f"{key}: a rectangle of shape {shape} at {offset} is not inside the logical shape {whole}")


def layout_signature(state: Mapping[str, Boxes]) -> tuple[Any, ...]:
    """Equal signatures of all ranks mean: the plan of the last save still holds."""
    return tuple(
        (
            key,
            boxes.global_shape,
            *((box.offset, tuple(box.data.shape), box.data.dtype, box.writes) for box in boxes.boxes),
        )
        for key, boxes in state.items()
    )


def make_plan(state: dict[str, Boxes], group: Group) -> tuple[SavePlan, Metadata | None]:
    """My write items, and on rank 0 DCP's metadata of the whole. Collective, on the calling thread.

    Raises ValueError on all ranks if the written rectangles overlap or do not cover a logical tensor.
    """
    plan = BoxSavePlanner(state).create_local_plan()
    plans = gather_to_rank0(plan, group)
    metadata, error = None, None
    if group.rank == 0:
        try:
            metadata = _whole(plans)
        except ValueError as caught:
            error = str(caught)
    error = collectives.broadcast_object(error, group)
    if error:
        raise ValueError(error)
    return plan, metadata


def _whole(plans: list[SavePlan]) -> Metadata:
    """Nothing twice (DCP would drop one copy), nothing left out, and DCP's own checks for bounds and overlap."""
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
    _, metadata = BoxSavePlanner({}).create_global_plan(plans)
    return metadata


def check_matches(state: Mapping[str, Boxes], metadata: Metadata | None, group: Group, where: str) -> None:
    """Compare what all ranks ask for with what is stored (`metadata`: rank 0 suffices). Collective.

    Only the kinds that are asked for count: an evaluation that asks for "master" need not name the moments.
    Raises one ValueError on all ranks, listing missing and unexpected names and wrong shapes.
    """
    wanted_per_rank = gather_to_rank0({key: boxes.global_shape for key, boxes in state.items()}, group)
    error = None
    if group.rank == 0:
        assert metadata is not None
        stored = {key: tuple(item.size) for key, item in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
        wanted = {key: shape for one in wanted_per_rank for key, shape in one.items()}
        error = _differences(wanted, stored, where)
    error = collectives.broadcast_object(error, group)
    if error:
        raise ValueError(error)


def _differences(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], where: str
) -> str | None:
    kinds = {key.split("/", 1)[0] for key in wanted}
    missing = sorted(key for key in wanted if key not in stored)
    unexpected = sorted(key for key in stored if key.split("/", 1)[0] in kinds and key not in wanted)
    shapes = sorted(
        f"{key}: stored {stored[key]}, model {shape}"
        for key, shape in wanted.items()
        if key in stored and stored[key] != tuple(shape)
    )
    if not (missing or unexpected or shapes):
        return None
    lines = [f"{where} does not fit this model:"]
    for title, names in (("missing in it", missing), ("not in the model", unexpected), ("other shapes", shapes)):
        if names:
            lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names[:MAX_LISTED])]
            if len(names) > MAX_LISTED:
                lines.append(f"    ... and {len(names) - MAX_LISTED} more")
    lines.append("use the model settings stored in the checkpoint's state.json, or another checkpoint")
    return "\n".join(lines)


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
