"""Masters of a new run from a folder of another library: each rank reads its rectangles, hashes some files.

Not here: what the tensors are and where they lie (models/foreign/), weights from a checkpoint of ours (origin.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.comm.agree import agreed, decided_by_rank0
from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.models.foreign.source import open_source, provenance
from megatron_fp4.storage.durable import hash_of

MASTER = "master"


def fill_from_foreign(folder: Path, shards: list[Shard], world: Group, beat: Callable[[], None]) -> dict[str, Any]:
    """Fill the masters of `shards` from a folder of another library; what is stored of it. Collective.

    Raises ValueError on all ranks.
    """
    weights = agreed(lambda: open_source(folder), world)
    digests = all_gather_object(weights.headers_digest(), world)
    if len(set(digests)) > 1:
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise ValueError(f"train.init_from={folder} is another model on rank {other} than on rank 0; copy it anew")
    decided_by_rank0(weights.check_tied, world)

    def fill() -> dict[str, str]:
        with torch.no_grad():
            for shard in shards:
                shard.tensors[MASTER].copy_(weights.read(shard.where))
                beat()
        return {path.name: hash_of(path, beat) for path in weights.files()[world.rank :: world.size]}

    hashes: dict[str, str] = {}
    for of_rank in all_gather_object(agreed(fill, world), world):
        hashes |= of_rank
    return provenance(weights, hashes)
