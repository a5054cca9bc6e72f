"""What a run begins with: its own newest checkpoint, or weights from elsewhere (`train.init_from`), or drawn ones.

From elsewhere only the weights are taken, of a checkpoint of ours (also an extracted or averaged one, or one of another
layout) or of a folder of `transformers` or Megatron-LM; optimizer, step, data and schedules are those of the new run.
Every rank reads the rectangles that it updates. What was read is stored in every checkpoint of the run, so that a
resume does not read it again and an audit can tell. A teacher (`train.distillation`) is read at every launch, and has
to be the same one.

Not here: whether the weights are of this model (same_model.py); what may differ from a checkpoint that a run goes on
from (differences.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointReader, CheckpointStore, Verified
from megatron_fp4.comm.agree import agreed, decided_by_rank0
from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.models.foreign.source import is_foreign
from megatron_fp4.storage.durable import MANIFEST, hash_of
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.resume.foreign_origin import MASTER, fill_from_foreign
from megatron_fp4.train.resume.same_model import check_model, checkpoint_in
from megatron_fp4.train.resume.teacher import teach
from megatron_fp4.train.sections import Resume
from megatron_fp4.train.trainable import Trainable

NO_WEIGHT = ".router.overload"
"""End of the names of what begins at 0 in a new run: it tells of the global batch before."""


def choose_checkpoint(policy: Resume, store: CheckpointStore) -> Verified | None:
    """The newest intact checkpoint, None to begin anew. Collective.

    policy: `train.resume`. Raises ValueError where it forbids what is there.
    """
    if policy is Resume.never:
        newest, mirrored = store.latest(), store.mirror.fetcher.names() if store.mirror else []
        if newest is None and not mirrored:
            return None
        held = f"{store.root} already holds checkpoint {newest}" if newest is not None else ""
        held = held or f"the mirror {store.reader.config.mirror} already holds checkpoint {mirrored[0].step}"
        raise ValueError(
            f"{held} and train.resume=never; choose another {'train.run_dir' if newest else 'checkpoint.mirror'}, or"
            " train.resume=auto to go on from it"
        )
    chosen = store.choose_newest()
    if policy is Resume.required and chosen is None:
        raise ValueError(f"train.resume=required, but there is no complete checkpoint under {store.root}")
    return chosen


def begin(
    config: RunConfig, chosen: Verified | None, trainable: Trainable, mesh: ParallelMesh, beat: Callable[[], None]
) -> dict[str, Any]:
    """Read what a run begins with beside a checkpoint of its own, `chosen`; what every checkpoint stores of it.

    Collective. Raises ValueError as `begin_from` and `teach`.
    """
    meta = chosen.meta if chosen else {}
    teacher = teach(config, trainable, mesh, beat, meta.get("teacher"))
    weights = meta.get("init_from") if chosen else begin_from(config, trainable, mesh.world, beat)
    return {key: record for key, record in {"init_from": weights, "teacher": teacher}.items() if record}


def begin_from(
    config: RunConfig, trainable: Trainable, world: Group, beat: Callable[[], None]
) -> dict[str, Any] | None:
    """Fill the masters of a new run from `train.init_from`; what is stored of it, None where nothing is set.

    Collective. Raises ValueError on all ranks for what does not fit or is damaged.
    """
    if not config.train.init_from:
        return None
    folder = Path(config.train.init_from)
    shards = [
        Shard(one.where, {MASTER: one.tensors[MASTER]}, writes=False)
        for one in trainable.optimizer.state_to_fill()
        if not one.name.endswith(NO_WEIGHT)
    ]
    agreed(partial(_refusing, lambda: check_model(folder, config.model)), world)
    fill = fill_from_foreign if is_foreign(folder) else partial(_from_checkpoint, config=config.checkpoint)
    record = fill(folder, shards, world, beat)
    trainable.optimizer.after_load(0)
    return record


def _refusing(look: Callable[[], None]) -> None:
    try:
        look()
    except FileNotFoundError as error:  # ranks agree on ValueErrors
        raise ValueError(str(error)) from None


def _no_weights(chosen: Verified) -> list[Shard]:
    """Places for what is stored of `NO_WEIGHT`, from where nobody takes it."""
    names = {key.removeprefix(f"{MASTER}/"): shape for key, shape in chosen.pieces.shapes().items()}
    return [
        Shard(Rectangle.whole(name, shape), {MASTER: torch.empty(shape)}, writes=False)
        for name, shape in names.items()
        if name.endswith(NO_WEIGHT)
    ]


def _from_checkpoint(
    folder: Path, shards: list[Shard], world: Group, beat: Callable[[], None], config: CheckpointConfig
) -> dict[str, Any]:
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
