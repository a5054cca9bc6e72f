"""The weights of a checkpoint of ours into the masters of a new run, each rank its rectangles.

Not here: weights of other libraries (foreign_origin.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.checkpoint import CheckpointConfig, Verified
from megatron_fp4.checkpoint.load import CheckpointReader
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.storage.durable import MANIFEST, hash_of
from megatron_fp4.train.resume.foreign_origin import MASTER
from megatron_fp4.train.resume.same_model import checkpoint_in

NO_WEIGHT = ".router.overload"
"""End of the names of what begins at 0 in a new run: it tells of the global batch before."""


def drawn_masters(state: Sequence[Shard], names: tuple[str, ...]) -> dict[Rectangle, Tensor]:
    """The masters, as they were drawn, of the parameters whose names begin with one of `names`."""
    return {one.where: one.read(MASTER) for one in state if one.name.startswith(names)}


def masters_to_fill(state: Sequence[Shard], drawn: Mapping[Rectangle, Tensor]) -> list[Shard]:
    """The masters of an optimizer's state, without what is no weight and what stays `drawn`, which is put there."""
    shards = []
    for one in state:
        if one.where in drawn:
            one.tensors[MASTER].copy_(drawn[one.where])
        elif not one.name.endswith(NO_WEIGHT):
            shards.append(Shard(one.where, {MASTER: one.tensors[MASTER]}, writes=False))
    return shards


def _no_weights(chosen: Verified) -> list[Shard]:
    """Places for what is stored of `NO_WEIGHT`, from where nobody takes it."""
    names = {key.removeprefix(f"{MASTER}/"): shape for key, shape in chosen.pieces.shapes().items()}
    return [
        Shard(Rectangle.whole(name, shape), {MASTER: torch.empty(shape)}, writes=False)
        for name, shape in names.items()
        if name.endswith(NO_WEIGHT)
    ]


def fill_from_checkpoint(
    folder: Path, shards: list[Shard], world: Group, beat: Callable[[], None], config: CheckpointConfig
) -> dict[str, Any]:
    """Fill the shards' masters; what is stored of it. Collective. Raises ValueError for what does not fit or damage."""
    directory = decided_by_rank0(lambda: checkpoint_in(folder), world)
    reader = CheckpointReader(directory.parent, world, config, beat)
    chosen = reader.verified(directory)
    reader.load(chosen, [*shards, *_no_weights(chosen)])
    record = {
        "from": str(directory.absolute()),
        "format": "checkpoint",
        "step": chosen.step,
        "files": {MANIFEST: decided_by_rank0(lambda: hash_of(directory / MANIFEST, beat), world)},
    }
    if "init_from" in chosen.meta:
        record["whose_weights_came_from"] = chosen.meta["init_from"]
    return record
