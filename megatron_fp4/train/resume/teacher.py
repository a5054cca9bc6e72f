"""The teacher of a run (`train.distillation`): a model that is trained already, in high precision, that is not updated.

It is read at every launch, so whoever resumes needs it; what a checkpoint stores of it is the digest of its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.checkpoint import CheckpointReader, load_weights
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.storage.durable import MANIFEST, hash_of
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.resume.same_model import check_teacher, checkpoint_in
from megatron_fp4.train.trainable import NOT_EVALUATED, Trainable, draw_evaluation


def teach(
    config: RunConfig,
    trainable: Trainable,
    mesh: ParallelMesh,
    beat: Callable[[], None],
    known: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Let the run learn from `train.distillation.teacher`; what is stored of it, None where nothing is set.

    known: what the checkpoint that the run goes on from stores of its teacher. Collective. Raises ValueError on all
    ranks for another teacher, and one that is damaged or of another model.
    """
    if not config.train.distillation.teacher:
        return None
    folder, world = Path(config.train.distillation.teacher), mesh.world
    directory = decided_by_rank0(partial(_checkpoint, folder, config), world)
    digest = decided_by_rank0(lambda: hash_of(directory / MANIFEST, beat), world)
    record = {"from": str(directory.absolute()), "files": {MANIFEST: digest}}
    if known and known["files"] != record["files"]:
        raise ValueError(
            f"train.distillation.teacher={folder} has other weights than the teacher of this run so far,"
            f" {known['from']}; name that one, or begin another train.run_dir with train.init_from"
        )
    device = next(trainable.engine.stages[0].parameters()).device
    _, teacher = draw_evaluation(config, mesh, device)
    reader = CheckpointReader(directory.parent, world, config.checkpoint, beat)
    load_weights(torch.nn.ModuleList(teacher.stages), reader, directory=directory, unread=NOT_EVALUATED)
    trainable.learn_from(teacher)
    return record


def _checkpoint(folder: Path, config: RunConfig) -> Path:
    try:
        check_teacher(folder, config.model)
        return checkpoint_in(folder)
    except FileNotFoundError as error:  # ranks agree on ValueErrors
        raise ValueError(str(error)) from None
