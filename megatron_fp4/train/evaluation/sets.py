"""Everything that one evaluation measures: the loss on each held-out set, then the questions of each task file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.evaluation import EvalLoader
from megatron_fp4.data.tasks import TaskSet
from megatron_fp4.data.text.text_bytes import TextBytes, text_bytes
from megatron_fp4.data.text.tokenizer import Tokenizer
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.evaluation.heldout import EvaluationStopped, evaluate
from megatron_fp4.train.evaluation.tasks import answer_tasks

__all__ = ["EvaluationStopped", "Examiner", "SetResult"]


@dataclass(frozen=True)
class SetResult:
    """What was measured on one set. metrics: as a run logs them. loss: of a held-out set, None of a task file."""

    text: str
    metrics: dict[str, float]
    loss: float | None = None


@dataclass(frozen=True)
class Examiner:
    """An engine and what it is examined by, on the ranks of a mesh. micro_batch: rows of a task at once.

    tokenizer: of the data, by which losses are told per byte of text; None where the run names none.
    """

    engine: Engine
    evaluations: Sequence[EvalLoader]
    tasks: Sequence[TaskSet]
    mesh: ParallelMesh
    device: torch.device
    micro_batch: int
    vocab_size: int
    tokenizer: Tokenizer | None = None

    @cached_property
    def _text_bytes(self) -> TextBytes | None:
        """Made when it is first needed: of a large vocabulary it takes a second."""
        return text_bytes(self.tokenizer) if self.tokenizer else None

    def examine(
        self, table: PrecisionTable, beat: Callable[[], None] = lambda: None, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[SetResult]:
        """One set after the other, computed by this table. beat, stop, and what it raises: as `heldout.evaluate`."""
        for loader in self.evaluations:
            held_out = evaluate(self.engine, loader, table, self.mesh, self.device, beat, stop, self._text_bytes)
            metrics = {f"eval/{loader.name}/{name}": value for name, value in held_out.metrics().items()}
            yield SetResult(f"{loader.name} {held_out}", metrics, held_out.loss)
        for tasks in self.tasks:
            score = answer_tasks(
                self.engine,
                tasks,
                table,
                self.mesh,
                self.device,
                micro_batch=self.micro_batch,
                vocab_size=self.vocab_size,
                beat=beat,
                stop=stop,
            )
            metrics = {f"task/{tasks.name}/acc": score.accuracy, f"task/{tasks.name}/acc_norm": score.normalized}
            yield SetResult(f"{tasks.name} {score}", metrics)
