"""What is saved beside the bytes, and whether a checkpoint fits what is to be filled from it.

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

from megatron_fp4.comm import collectives
from megatron_fp4.comm.agree import MAX_LISTED, decided_by_rank0, gather_to_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard


def shapes_of(shards: Iterable[Shard]) -> dict[str, tuple[int, ...]]:
    """The logical shape of each tensor by key. Raises ValueError when two shards disagree about one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        for kind in shard.tensors:
            key, shape = f"{kind}/{shard.name}", shard.where.global_shape
            if shapes.setdefault(key, shape) != shape:
                raise ValueError(f"{key}: two shards say {shapes[key]} and {shape}")
    return shapes


@dataclass(frozen=True, eq=False)
class SaveContent:
    """What is to be saved: the shards that this rank writes, in the order of its part, and the small state as JSON."""

    shards: tuple[Shard, ...]
    state_json: bytes


def check_matches(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], group: Group, where: str
) -> None:
    """Compare what all ranks ask for with what is stored. Collective.

    Only the kinds that are asked for count: an evaluation that asks for "master" need not name the moments.
    Raises one ValueError on all ranks, listing missing and unexpected names and wrong shapes.
    """
    names = list(stored)
    device = "cpu" if group.size == 1 or collectives.uses_gloo(group) else "cuda"
    own = torch.tensor([key in wanted for key in names], dtype=torch.uint8, device=device)
    used = collectives.all_reduce_max(own, group).tolist()  # names of all ranks on one would be a hundred megabytes
    others = {key: shape for key, shape in wanted.items() if stored.get(key) != tuple(shape)}
    others_per_rank = gather_to_rank0(others, group)  # of most ranks nothing
    asked = {key: stored[key] for key, used_by_any in zip(names, used, strict=True) if used_by_any}
    asked |= {key: shape for one in others_per_rank for key, shape in one.items()}
    decided_by_rank0(lambda: _refuse_differences(asked, stored, where), group)


def _refuse_differences(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], where: str
) -> None:
    kinds, stored_kinds = ({key.split("/", 1)[0] for key in keys} for keys in (wanted, stored))
    if lacking := sorted(kinds - stored_kinds):
        raise ValueError(
            f"{where} has {', '.join(sorted(stored_kinds))} only, without {', '.join(lacking)}: no run goes on from it;"
            f" begin a new one with its weights by train.init_from={where}, in another train.run_dir"
        )
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
