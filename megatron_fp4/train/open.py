"""Weights of a checkpoint into a model without an optimizer: for evaluation, generation and export.

A checkpoint has no layout, so a trained model of any size of job opens in one process; and on as many ranks as its
tensor and pipeline sizes ask for, with a copy of the model on every so many more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_fp4.checkpoint import CheckpointStore, load_weights
from megatron_fp4.comm.bootstrap import Process, connect_mesh, start_alone
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.linear import assign_input_amax, assign_precision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.evaluation.inputs import INPUTS
from megatron_fp4.train.refusals.requirements import by_torch, check_machine
from megatron_fp4.train.trainable import NOT_EVALUATED, draw_evaluation


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in evaluation mode and precision, as it was after its last step.

    engine: this rank's part of it. phase: of the precision plan, in which that step computed; an evaluation in the
    precision `same` computes in it too.
    """

    checked: CheckedConfig
    engine: Engine
    mesh: ParallelMesh
    device: torch.device
    phase: int

    def table(self, precision: str) -> PrecisionTable:
        """What the run would have evaluated in with `precision.evaluation` set to this. Raises ValueError."""
        config = self.checked.config
        config = replace(config, precision=replace(config.precision, evaluation=precision))
        return check_config(config, self.mesh.world.size).plan.evaluation_table(self.phase)

    def assign(self, table: PrecisionTable) -> None:
        """Compute by this table from now on."""
        for stage in self.engine.stages:
            assign_precision(stage, table)


def open_trained(
    config: RunConfig,
    step: int | None = None,
    process: Process | None = None,
    *,
    documents_apart: bool = False,
    checkpoint: Path | None = None,
) -> TrainedModel:
    """The trained model of a run on the ranks of `process` (None: this one's CPU). Collective over them.

    step: None for the newest checkpoint. checkpoint: the directory of another one of the same model, such as a mean of
    several, instead of the run's own. A CPU computes all of it by torch, whatever the run itself uses.
    documents_apart: keep documents of a row apart even if the run does not. Raises ValueError or FileNotFoundError
    where run, data or checkpoint are not there, or the ranks are not a multiple of the run's tp * pp.
    """
    process = process or start_alone("cpu")
    config = replace(config, parallel=_layout(config.parallel, process.world.size))
    config = by_torch(config) if process.device.type == "cpu" else config
    checked = check_config(config, process.world.size)
    config = checked.config
    check_machine(config, process.device)
    mesh = connect_mesh(config.parallel, process)
    clock, engine = draw_evaluation(config, mesh, process.device, documents_apart=documents_apart)
    store = CheckpointStore(Path(config.train.run_dir) / "checkpoints", mesh.world, config.checkpoint)
    meta = load_weights(torch.nn.ModuleList(engine.stages), store.reader, step, checkpoint, unread=NOT_EVALUATED)
    clock.step = max(0, meta["step"] - 1)  # rounding noise of an evaluation after a step is that of the step
    tokens = meta.get("consumed_samples", 0) * config.data.seq_length  # nothing in one that `import` made
    phase = checked.plan.phase_before(tokens, meta.get("precision", {}))
    for stage in engine.stages:
        assign_input_amax(stage, meta.get(INPUTS, {}))
    trained = TrainedModel(checked, engine, mesh, process.device, phase)
    trained.assign(checked.plan.evaluation_table(trained.phase))
    return trained


def _layout(trained: ParallelConfig, world_size: int) -> ParallelConfig:
    """The layout of a model that is not trained: whole sequences, one stage a rank."""
    if world_size == 1:
        return ParallelConfig()
    if world_size % (trained.tp * trained.pp):
        raise ValueError(
            f"the run has parallel.tp={trained.tp} and parallel.pp={trained.pp}; start 1 rank, or a multiple of"
            f" {trained.tp * trained.pp}, not {world_size}"
        )
    return ParallelConfig(
        tp=trained.tp,
        pp=trained.pp,
        ep=math.gcd(trained.tp, trained.ep),
        timeout_seconds=trained.timeout_seconds,
        init_timeout_seconds=trained.init_timeout_seconds,
    )
