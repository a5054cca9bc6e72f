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
from typing import Any

from megatron_fp4.checkpoint import CheckpointStore, Verified
from megatron_fp4.comm.agree import agreed, decided_by_rank0
from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.models.foreign.source import is_foreign
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.resume.checkpoint_origin import drawn_masters, fill_from_checkpoint, masters_to_fill
from megatron_fp4.train.resume.foreign_origin import fill_from_foreign
from megatron_fp4.train.resume.mirrored_origin import origin_folder
from megatron_fp4.train.resume.same_model import check_model, has_mtp
from megatron_fp4.train.resume.teacher import teach
from megatron_fp4.train.sections import Resume
from megatron_fp4.train.trainable import NOT_EVALUATED, Trainable


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
    optimizer = trainable.optimizer
    with origin_folder(config, world, beat) as (folder, came_from):
        agreed(partial(_refusing, lambda: check_model(folder, config.model, config.train.init_from)), world)
        draws = bool(config.model.mtp.depth) and decided_by_rank0(lambda: not has_mtp(folder), world)
        drawn = drawn_masters(optimizer.state_shards(), NOT_EVALUATED) if draws else {}
        shards = masters_to_fill(optimizer.state_to_fill(), drawn)
        fill = fill_from_foreign if is_foreign(folder) else partial(fill_from_checkpoint, config=config.checkpoint)
        record = fill(folder, shards, world, beat)
    if came_from:
        record["from"] = came_from
    optimizer.after_load(0)
    if draws:
        record["notes"] = [*record.get("notes", ()), "multi-token prediction is not in them: its weights are drawn"]
    return record


def _refusing(look: Callable[[], None]) -> None:
    try:
        look()
    except FileNotFoundError as error:  # ranks agree on ValueErrors
        raise ValueError(str(error)) from None
