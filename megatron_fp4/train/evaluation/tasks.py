"""The questions of a task file, answered by the model in training: it takes the choice that it finds likeliest.

A batch is the same rows under every layout, padded behind their end to a multiple of 64 tokens, so that scales of
quantized activations do not depend on the layout either; data-parallel ranks share the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.batch import Batch
from megatron_fp4.data.tasks import Choice, TaskSet
from megatron_fp4.layers.vocab_logits import log_probabilities
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.evaluation.heldout import VOTE_BATCHES, EvaluationStopped, StopVote, evaluating
from megatron_fp4.train.inputs import make_inputs

WIDTH = 64
"""Rows are padded to a multiple of it, and of what sequence and context parallelism need."""


@dataclass(frozen=True)
class TaskScore:
    """Parts of the questions whose right choice is the likeliest: by ln p of its tokens, and by that per character.

    As lm-eval's acc and acc_norm.
    """

    accuracy: float
    normalized: float
    num_questions: int

    def __str__(self) -> str:
        return f"acc {self.accuracy:.4f}, acc_norm {self.normalized:.4f} ({self.num_questions} questions)"


def answer_tasks(
    engine: Engine,
    tasks: TaskSet,
    table: PrecisionTable,
    mesh: ParallelMesh,
    device: torch.device,
    *,
    micro_batch: int,
    vocab_size: int,
    beat: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> TaskScore:
    """The same on every rank. micro_batch: rows at once. beat, stop, and what it raises: as `heldout.evaluate`."""
    order = sorted(range(len(tasks.choices)), key=lambda number: -len(tasks.choices[number].ids))
    batches = [order[first : first + micro_batch] for first in range(0, len(order), micro_batch)]
    totals = torch.zeros(len(order), dtype=torch.float64, device=device)
    vote: StopVote | None = None
    with evaluating(list(engine.stages), table):
        for round_ in range(-(-len(batches) // mesh.dp.size)):
            if round_ % VOTE_BATCHES == 0:
                if vote is not None and vote.heard():
                    raise EvaluationStopped
                vote = StopVote(stop(), mesh, device)
            own = round_ * mesh.dp.size + mesh.dp.rank
            if own < len(batches):
                numbers = batches[own]
                rows = [tasks.choices[number] for number in numbers]
                scores = _score(engine, rows, micro_batch, vocab_size, mesh, device)
                if scores is not None and mesh.tp.rank == 0:
                    totals[numbers] = scores[: len(rows)]
            beat()
    return _graded(tasks, all_reduce_sum(totals, mesh.world).tolist())


def _score(
    engine: Engine, rows: Sequence[Choice], micro_batch: int, vocab_size: int, mesh: ParallelMesh, device: torch.device
) -> Tensor | None:
    """ln p of each row's targets on this context-parallel rank, float64 `[B]`; None where the last stage is not."""
    full = [rows[min(number, len(rows) - 1)] for number in range(micro_batch)]
    inputs = make_inputs(_batch(full, mesh), mesh.cp, device)
    logits = engine.logits(inputs)
    if logits is None:
        return None
    values = log_probabilities(logits, inputs.labels.reshape(-1), vocab_size, mesh.tp)
    return values.double().view(inputs.labels.shape).sum(1)


def _batch(rows: Sequence[Choice], mesh: ParallelMesh) -> Batch:
    longest = max(len(row.ids) for row in rows) - 1
    multiple = math.lcm(WIDTH, mesh.tp.size * (2 * mesh.cp.size if mesh.cp.size > 1 else 1))
    width = longest + -longest % multiple
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, is_target = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row.ids) - 1
        tokens[number, :length] = torch.tensor(row.ids[:-1])
        labels[number, :length] = torch.tensor(row.ids[1:])
        is_target[number, length - row.num_targets : length] = True
    positions = torch.arange(width).expand(len(rows), -1)
    address = torch.arange(tokens.numel()).view_as(tokens)
    return Batch(tokens, labels, is_target, positions, torch.zeros_like(tokens), address, torch.arange(len(rows)))


def _graded(tasks: TaskSet, totals: Sequence[float]) -> TaskScore:
    """The first of equally likely choices counts as taken."""
    right = right_per_character = 0
    by_question: list[list[int]] = [[] for _ in tasks.answers]
    for number, choice in enumerate(tasks.choices):
        by_question[choice.question].append(number)
    for numbers, answer in zip(by_question, tasks.answers, strict=True):
        right += max(numbers, key=lambda number: totals[number]) == numbers[answer]
        best = max(numbers, key=lambda number: totals[number] / tasks.choices[number].length)
        right_per_character += best == numbers[answer]
    return TaskScore(right / len(tasks.answers), right_per_character / len(tasks.answers), len(tasks.answers))
