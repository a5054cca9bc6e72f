"""Make steps of one rank, by the trainer's own `train_step`, and what lies between them. Batches have no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from megatron_fp4.data.batch import Batch
from megatron_fp4.planning.rehearsal.build import build_rank, label_state
from megatron_fp4.planning.rehearsal.device import rehearsal_device
from megatron_fp4.planning.rehearsal.on_cuda import on_cuda
from megatron_fp4.planning.rehearsal.watch import Watch
from megatron_fp4.planning.rehearsal.world import fake_world
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.evaluation.heldout import evaluate
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.run import Position, Run
from megatron_fp4.train.step import train_step


@dataclass
class RehearsedRank:
    """A rank whose parts exist. num_microbatches: of a step."""

    run: Run
    watch: Watch
    num_microbatches: int
    position: Position

    def step(self, num_microbatches: int | None = None) -> None:
        """Make a step; what it does is in `watch`, from nothing. num_microbatches: as in the run, unless said."""
        number = num_microbatches or self.num_microbatches
        batch = _batch(number * self.run.config.train.micro_batch, self.run.config.data.seq_length)
        self.watch.clear()
        self.position = train_step(self.run, batch, self.position, _Calm(), lambda: False).position

    def evaluate(self, num_microbatches: int) -> None:
        """Evaluate so many, after the last step; what that does is in `watch`, from nothing."""
        run = self.run
        batch = _batch(run.config.train.micro_batch, run.config.data.seq_length)
        loader: Any = [batch] * num_microbatches
        self.watch.clear()
        self.watch.copies.scalar = 0  # nobody asks to stop
        run.phases.enter("evaluate")
        evaluate(run.engine, loader, run.plan.evaluation_table(0), run.mesh, run.device)
        self.watch.copies.scalar = 1


class _Calm:
    """No loss is a spike."""

    def passes(self, loss: float, position: Position, rerun_step: Callable[[], object]) -> bool:
        return True


@contextmanager
def rehearsed_rank(
    checked: CheckedConfig,
    num_gpus: int,
    rank: int,
    on_backward_error: Callable[[str], NoReturn],
    *,
    over_gloo: bool = False,
) -> Iterator[RehearsedRank]:
    """The rank, built; it may step for as long as the context lasts. Raises RehearsalRefused.

    over_gloo: with the messages of ranks without GPUs instead of NCCL's.
    """
    if not over_gloo:
        checked = replace(checked, config=on_cuda(checked.config))
    train = checked.config.train
    device = rehearsal_device()
    phases = Phases(torch.device("cpu"))
    phases.enter("build")
    watch = Watch(lambda: phases.current.name, on_backward_error)
    with fake_world(num_gpus, rank, over_gloo=over_gloo) as world, watch.watching():
        run = build_rank(checked, world, device, phases, watch)
        label_state(run, watch.live)
        yield RehearsedRank(run, watch, train.gradient_accumulation(checked.dp, train.global_batch), Position())


def _batch(rows: int, seq_length: int) -> Batch:
    """Rows without text, in which every position is a target."""
    zeros = torch.zeros(rows, seq_length, dtype=torch.int64)
    mask = torch.ones(rows, seq_length, dtype=torch.bool)
    return Batch(zeros, zeros, mask, zeros, zeros, zeros, torch.zeros(rows, dtype=torch.int64))
