"""Weights of a checkpoint into a model without an optimizer: for evaluation, generation and export.

A checkpoint has no layout, so a trained model of any size of job opens in one process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.checkpoint import CheckpointStore
from megatron_fp4.checkpoint.weights import load_weights
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.layers.linear import assign_precision
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.requirements import by_torch
from megatron_fp4.train.trainable import draw_stages


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in evaluation mode and precision, as it was after its last step.

    phase: of the precision plan, in which that step computed; an evaluation in the precision `same` computes in it too.
    """

    checked: CheckedConfig
    model: Decoder
    phase: int


def open_trained(config: RunConfig, step: int | None = None) -> TrainedModel:
    """The trained model of a run in this process, on its CPU. step: None for the newest checkpoint.

    Raises ValueError or FileNotFoundError where run, data or checkpoint are not there.
    """
    checked = check_config(replace(by_torch(config), parallel=ParallelConfig()), world_size=1)
    config = checked.config
    backend, clock = make_backend(replace(config.precision, compile=False)), StepClock(config.train.seed)
    (model,) = draw_stages(config, backend, ParallelMesh.single_process(), torch.device("cpu"), clock)
    store = CheckpointStore(Path(config.train.run_dir) / "checkpoints", Group.single("world"), config.checkpoint)
    meta = load_weights(model, store, step)
    clock.step = meta["step"] - 1  # rounding noise of an evaluation after a step is that of the step
    phase = _last_phase(checked, meta)
    assign_precision(model, checked.plan.evaluation_table(phase))
    return TrainedModel(checked, model.eval(), phase)


def _last_phase(checked: CheckedConfig, meta: dict[str, Any]) -> int:
    """The phase in which the last step before a checkpoint computed: that whose table was stored with it.

    It is not the phase at the checkpoint's tokens where the next step would be the first of another.
    """
    plan, tokens = checked.plan, meta["consumed_samples"] * checked.config.data.seq_length
    phase = plan.phase_at(max(0, tokens - 1))
    stored = [number for number in range(len(plan.phases)) if plan.table(number).texts() == meta["precision"]]
    return min(stored, key=lambda number: abs(number - phase), default=phase)
