"""A run: the objects that compute and are saved, how far it is, and what one step of it did.

Everything that a step depends on (learning rate, precision, samples, noise) is a function of the samples consumed
before it, so a `Position` is all that a resume needs beside the tensors.

Not here: what is told of a run (telemetry/), what a launch starts from (build.py), the loop (trainer.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_fp4.checkpoint import CheckpointStore
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.rendezvous import Rendezvous
from megatron_fp4.data.loader import Loader
from megatron_fp4.optim import StepReport, Zero1Optimizer
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.probes import Probes
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.evaluation.sets import Examiner
from megatron_fp4.train.phases import INDEX_SECONDS, Phases


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were skipped, or a loss spike outlasted the ladder."""


@dataclass(frozen=True)
class Position:
    """How far a run is: steps made, and samples consumed by them.

    skipped_in_a_row: the last steps without an update, because something was not finite or nothing was a target.
    skipped_steps: all steps without an update, whatever the reason.
    """

    step: int = 0
    samples: int = 0
    skipped_in_a_row: int = 0
    skipped_steps: int = 0

    @staticmethod
    def from_meta(meta: dict[str, Any]) -> Position:
        """The position that a checkpoint's small state holds."""
        return Position(meta["step"], meta["consumed_samples"], meta["skipped"], meta.get("skipped_steps", 0))

    def to_meta(self) -> dict[str, int]:
        """What a checkpoint stores of it; the step is the checkpoint's own."""
        return {
            "consumed_samples": self.samples,
            "skipped": self.skipped_in_a_row,
            "skipped_steps": self.skipped_steps,
        }

    def after(self, num_samples: int, *, skipped: bool, useless: bool) -> Position:
        """The position behind a step of `num_samples` samples.

        skipped: without an update. useless: because something was not finite, or nothing was a target.
        """
        return Position(
            self.step + 1,
            self.samples + num_samples,
            self.skipped_in_a_row + 1 if skipped and useless else 0,
            self.skipped_steps + skipped,
        )


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on all ranks.

    loss: nats per target token of the global batch; None if it has no target. nonfinite: where a NaN or Inf was met,
    for people; "" if nowhere. tokens_hash: the global batch's, for the data ledger. stop: a rank was asked to stop.
    position: behind the step. further_losses: as `Engine.further_losses`, in nats per target
    of each.
    """

    loss: float | None
    update: StepReport
    nonfinite: str
    tokens_hash: int
    stop: bool
    position: Position
    further_losses: tuple[float, ...] = ()


@dataclass
class Run:
    """Everything that the trainer drives, on one rank. origin: what is stored of where weights came from, and of a
    teacher. rendezvous: where the ranks have met (alone, if not said)."""

    config: RunConfig
    mesh: ParallelMesh
    device: torch.device
    clock: StepClock
    plan: PrecisionPlan
    engine: Engine
    optimizer: Zero1Optimizer
    store: CheckpointStore
    loader: Loader
    examiner: Examiner
    probes: Probes
    phases: Phases
    origin: dict[str, Any] = field(default_factory=dict)
    rendezvous: Rendezvous = field(default_factory=Rendezvous.alone)

    def waiting_for_index(self) -> AbstractContextManager[None]:
        """Around what may build an index: all ranks leave it together. Raises RankFailed on all of them."""
        return self.rendezvous.together("an index of its data", INDEX_SECONDS)
