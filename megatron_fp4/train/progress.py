"""How far a run is, and the count of steps that changed nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import Group
from megatron_fp4.data.batch import Batch
from megatron_fp4.optim import StepReport
from megatron_fp4.precision.backends import NonFiniteEvent


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were skipped, or a loss spike outlasted the ladder."""


@dataclass
class Progress:
    """skipped: steps in a row whose update was skipped because something was not finite. skipped_steps: all steps
    without an update, whatever the reason.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    skipped_steps: int = 0

    @staticmethod
    def of(meta: dict[str, Any]) -> Progress:
        """As a checkpoint has it."""
        return Progress(meta["step"], meta["consumed_samples"], meta["skipped"], meta.get("skipped_steps", 0))

    def metrics(self, seq_length: int) -> dict[str, float]:
        return {
            "skipped_steps": float(self.skipped_steps),
            "consumed_tokens": float(self.consumed_samples * seq_length),
        }

    def count(self, report: StepReport, max_in_a_row: int) -> None:
        """Count the step that was just made. Raises TrainingDiverged."""
        self.skipped_steps += report.skipped
        not_finite = report.skipped and bool(report.nonfinite)
        self.skipped = self.skipped + 1 if not_finite else 0
        if self.skipped >= max_in_a_row:
            raise TrainingDiverged(
                f"{self.skipped} steps in a row had gradients that were not finite, up to step {self.step}; start again"
                " from the last checkpoint with a lower optim.lr, other data (data.skip) or a higher precision"
            )


def what_was_not_finite(report: StepReport, events: list[NonFiniteEvent], batch: Batch, world: Group) -> str:
    """Tensor, rank and samples of a skipped step. Collective."""
    mine = [f"{event}, samples {batch.sample_ids.tolist()}" for event in events]
    met = [text for texts in all_gather_object(mine, world) for text in texts]
    return "; ".join(met) if met else "gradients of " + ", ".join(report.nonfinite)
