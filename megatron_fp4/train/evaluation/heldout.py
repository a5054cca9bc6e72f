"""Held-out loss, in the evaluation precision.

Precision is a value on each linear, so evaluating in BF16 is assigning another table and assigning the old one back.
Weights are the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from megatron_fp4.comm.collectives import all_reduce_max, all_reduce_sum
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.evaluation import EvalLoader
from megatron_fp4.data.text.text_bytes import TextBytes
from megatron_fp4.layers.linear import assign_precision, linears_of
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.inputs import count_targets, look_ahead, make_inputs

VOTE_BATCHES = 4
"""Every so many batches of an evaluation the ranks vote on whether to stop: they must leave it at the same one."""


class EvaluationStopped(Exception):
    """A rank was asked to stop in the middle of an evaluation."""


class StopVote:
    """Whether any rank is asked to stop. Collective; it travels to the host behind the work that the device has, and
    who hears it some batches later need not wait for those."""

    def __init__(self, stop: bool, mesh: ParallelMesh, device: torch.device) -> None:
        votes = all_reduce_max(torch.full((1,), float(stop), device=device), mesh.world)
        self._votes = votes.to("cpu", non_blocking=True)  # from CUDA: into pinned memory
        self._arrival = torch.cuda.Event() if device.type == "cuda" else None
        if self._arrival:
            self._arrival.record()

    def heard(self) -> bool:
        """The outcome, the same on all ranks."""
        if self._arrival:
            self._arrival.synchronize()
        return bool(self._votes.item())


@contextmanager
def evaluating(stages: list[nn.Module], table: PrecisionTable) -> Iterator[None]:
    """Evaluation mode with another precision; restores mode and precision."""
    before = [{name: linear.precision for name, linear in linears_of(stage).items()} for stage in stages]
    for stage in stages:
        stage.eval()
        assign_precision(stage, table)
    try:
        yield
    finally:
        for stage, precisions in zip(stages, before, strict=True):
            stage.train()
            for name, linear in linears_of(stage).items():
                linear.precision = precisions[name]


@dataclass(frozen=True)
class HeldOutLoss:
    """loss: mean, in nats per target token. bits_per_byte: of text; None where the bytes are not known. depths: the
    same as `loss` of each depth of multi-token prediction, over its own targets; NaN where it has none."""

    loss: float
    bits_per_byte: float | None = None
    depths: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """e to the loss: among how many equally likely tokens the model is undecided. Infinite beyond FP64."""
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}"
        if self.bits_per_byte is not None:
            text += f", {self.bits_per_byte:.4f} bits per byte"
        return text + "".join(f", {loss:.4f} of token {depth + 1}" for depth, loss in enumerate(self.depths, start=1))

    def metrics(self) -> dict[str, float]:
        numbers = {"loss": self.loss, "perplexity": self.perplexity}
        numbers |= {f"mtp_{depth}_loss": loss for depth, loss in enumerate(self.depths, start=1)}
        return numbers if self.bits_per_byte is None else numbers | {"bits_per_byte": self.bits_per_byte}


def evaluate(
    engine: Engine,
    loader: EvalLoader,
    table: PrecisionTable,
    mesh: ParallelMesh,
    device: torch.device,
    beat: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    text_bytes: TextBytes | None = None,
) -> HeldOutLoss:
    """The loss over the whole set; the same on every rank. beat: called after each batch. text_bytes: of the tokenizer.

    stop: whether this rank is asked to stop. Raises EvaluationStopped on all ranks soon after one was. The host waits
    for the device once, for the sums at the end.
    """
    depth = engine.depth
    total = torch.zeros(1 + depth, dtype=torch.float64, device=device)
    num_targets, num_bytes = [0] * (1 + depth), 0.0
    vote: StopVote | None = None
    with evaluating(list(engine.stages), table):
        for number, batch in enumerate(loader):
            if number % VOTE_BATCHES == 0:
                if vote is not None and vote.heard():
                    raise EvaluationStopped
                vote = StopVote(stop(), mesh, device)
            ahead = look_ahead(batch, depth)
            loss = engine.evaluate(make_inputs(batch, mesh.cp, device, ahead))
            if mesh.tp.rank == 0 and engine.reports_loss:
                total += loss.double()
                if mesh.cp.rank == 0:
                    num_targets = [sum(both) for both in zip(num_targets, count_targets(batch, ahead), strict=True)]
                    num_bytes += text_bytes.of_targets(batch) if text_bytes else 0.0
            beat()
    sums = torch.cat([total, *(torch.full_like(total[:1], count) for count in (*num_targets, num_bytes))])
    *numbers, all_bytes = all_reduce_sum(sums, mesh.world).tolist()
    loss_sums, counts = numbers[: 1 + depth], numbers[1 + depth :]
    means = [one / count if count else math.nan for one, count in zip(loss_sums, counts, strict=True)]
    return HeldOutLoss(means[0], loss_sums[0] / math.log(2) / all_bytes if all_bytes > 0 else None, tuple(means[1:]))
