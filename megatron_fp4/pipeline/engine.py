"""Forward and backward of one global batch through pipeline stages, by `torch.distributed.pipelining`.

The schedules are torch's, and the engine keeps to the four rules under which they were measured to equal one process
bit for bit (torch 2.13):

    static shapes           otherwise the first step runs an extra forward and backward, which noise and main_grad see
    dw_builder              zero-bubble schedules take the queued weight gradients of exactly the microbatch whose
                            backward has just run; without it a custom Function computes both gradients twice
    scale_grads=False       the caller normalises the loss
    one shape per engine    receive buffers are made once per number of microbatches

A schedule keeps what a stage returns until its backward pass has ended, so the last stage returns its loss: logits
would outlive their gradient.

Evaluation does not go through a schedule: one microbatch passes through the stages, forward only.

Not here: models, or what a GEMM is. The engine sees modules, shapes and callables; whether linears defer their weight
gradients was decided when they were made (by the same `ScheduleRule.defers_wgrad`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import Group
from megatron_fp4.pipeline.schedules import rank_of_stage, schedule_rule, stages_of_rank, stages_per_rank

Module = TypeVar("Module", bound=nn.Module)
TakeWgrads = Callable[[], Callable[[], None]]
"""Hands over the weight gradients that wait in one stage now, as a function that computes them."""


class Loss(Protocol):
    """What is computed of the output of the last stage (train.engine.TokenLoss). depth: of multi-token prediction."""

    @property
    def depth(self) -> int: ...

    def __call__(self, output: Tensor, labels: Tensor, scale: float | Tensor, /) -> Tensor:
        """FP32 scalar."""

    def of_depths(
        self, outputs: Sequence[Tensor], labels: Tensor, ahead: Tensor, scale: float | Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """What is minimized, and each loss alone, FP32 `[1 + depth]` without gradients."""


class Microbatch(Protocol):
    """What the stages are fed; int64 `[B, S]` each. ahead: what the last one predicts beyond the next token."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def address(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor: ...
    @property
    def ahead(self) -> Tensor | None: ...


@dataclass(frozen=True)
class StageShapes:
    """Static shapes of a microbatch. hidden: `(T/tp, D)` between stages, in `dtype`."""

    tokens: tuple[int, int]
    hidden: tuple[int, int]
    dtype: torch.dtype


class PipelineEngine(Generic[Module]):
    """Runs this rank's stages over microbatches; the interface of `train.engine.Engine`.

    modules: this rank's stages, in the order of `stages_of_rank`. take_wgrads: one per stage if the schedule defers
    weight gradients, else none. The number of microbatches may change between steps (a batch-size ramp); `train` raises
    ValueError (from torch) for one that `schedules.check_pipeline` would have refused.
    """

    def __init__(
        self,
        modules: Sequence[Module],
        take_wgrads: Sequence[TakeWgrads],
        loss: Loss,
        shapes: StageShapes,
        config: ParallelConfig,
        pp: Group,
        device: torch.device,
    ) -> None:
        self.stages = list(modules)
        self._numbers = stages_of_rank(pp.rank, config)
        self._last = config.pp * stages_per_rank(config) - 1
        self._rule = schedule_rule(config.schedule)
        assert len(self.stages) == len(self._numbers), f"{len(self.stages)} stages, {self._numbers}"
        assert len(take_wgrads) == (len(self.stages) if self._rule.defers_wgrad else 0), f"{len(take_wgrads)} queues"
        self.reports_loss = self._last in self._numbers
        self.depth = loss.depth
        self._take_wgrads = list(take_wgrads)
        self._loss = loss
        self._shapes = shapes
        self._config = config
        self._pp = pp
        self._device = device
        self._num_microbatches = 0
        self._scale: float | Tensor = 1.0
        self._schedule: Any = None
        self._parts: list[Tensor] = []  # of the losses of the microbatches, with multi-token prediction
        self.further_losses = torch.zeros(loss.depth)

    def train(
        self, microbatches: Sequence[Microbatch], scale: float | Tensor, before_last_backward: Callable[[int], None]
    ) -> Tensor:
        """See `train.engine.Engine`; before_last_backward is called first of all, because microbatches overlap."""
        if len(microbatches) != self._num_microbatches:
            self._num_microbatches = len(microbatches)
            self._schedule = self._make_schedule()
        self._scale = scale
        before_last_backward(len(microbatches))
        losses: list[Tensor] = []
        first = (_joined(microbatches, "tokens"),) if 0 in self._numbers else ()
        every_stage = {name: _joined(microbatches, name) for name in ("labels", "address", "positions", "documents")}
        target = every_stage["labels"] if self.reports_loss else None  # torch asks for one where a loss is
        if self.reports_loss and self._loss.depth:
            every_stage["ahead"] = _joined(microbatches, "ahead")
        self._parts = []
        self._schedule.step(*first, target=target, losses=losses, return_outputs=False, **every_stage)
        total = torch.zeros(1 + self._loss.depth, device=self._device)
        for part in self._parts or [loss.detach()[None] for loss in losses]:
            total += part
        self.further_losses = total[1:]
        return total[0]

    @torch.no_grad()
    def evaluate(self, microbatch: Microbatch) -> Tensor:
        """Sums of the token losses of one microbatch, of any shape; see `train.engine.Engine`."""
        ahead = microbatch.ahead
        output = self._output(microbatch, ahead)
        if output is None:
            return torch.zeros(1 if ahead is None else 1 + self.depth, device=self._device)
        if ahead is None:
            return self._loss(output, microbatch.labels, 1.0)[None]
        return self._loss.of_depths(output, microbatch.labels, ahead, 1.0)[1]

    @torch.no_grad()
    def logits(self, microbatch: Microbatch) -> Tensor | None:
        """Logits of the next token for one microbatch, of any shape; None where `reports_loss` is False."""
        logits: Tensor | None = self._output(microbatch, None)
        return logits

    def _output(self, microbatch: Microbatch, ahead: Tensor | None) -> Any:
        """What the last stage makes of one microbatch, with `ahead` the logits of the depths too; None elsewhere."""
        output: Tensor | None = None
        last: Any = None
        for number, module in zip(self._numbers, self.stages, strict=True):
            if number == 0:
                x = microbatch.tokens
            elif number - 1 in self._numbers:  # the point of a V: the stage before is on this rank
                assert output is not None
                x = output
            else:
                x = self._receive(microbatch.tokens.numel(), number - 1)
            further = (ahead,) if ahead is not None and number == self._last else ()
            output = module(x, microbatch.address, microbatch.positions, microbatch.documents, *further)
            if number == self._last:
                last = output
            elif number + 1 not in self._numbers:
                dist.send(output.contiguous(), self._peer(number + 1), group=self._pp.process_group)
        return last

    def _scaled_loss(self, output: Any, labels: Tensor, ahead: Tensor | None) -> Tensor:
        if ahead is None:
            return self._loss(output, labels, self._scale)
        loss, parts = self._loss.of_depths(output, labels, ahead, self._scale)
        self._parts.append(parts)
        return loss

    def _receive(self, num_tokens: int, stage: int) -> Tensor:
        """Hidden activations from another rank, in evaluation."""
        shapes = self._shapes
        tokens_per_row = shapes.tokens[0] * shapes.tokens[1] // shapes.hidden[0]
        x = torch.empty(num_tokens // tokens_per_row, shapes.hidden[1], dtype=shapes.dtype, device=self._device)
        dist.recv(x, self._peer(stage), group=self._pp.process_group)
        return x

    def _peer(self, stage: int) -> int:
        """Global rank that holds `stage`."""
        return self._pp.ranks[rank_of_stage(stage, self._config)]

    def _make_schedule(self) -> Any:
        """torch's schedule with new stages, which hold the receive buffers of as many microbatches."""
        rule = self._rule
        stages = [
            self._make_stage(number, module, self._take_wgrads[index] if rule.defers_wgrad else None)
            for index, (number, module) in enumerate(zip(self._numbers, self.stages, strict=True))
        ]
        one_stage = rule.stages == 1 and not rule.and_more
        return rule.factory(
            stages[0] if one_stage else stages, self._num_microbatches, loss_fn=_returned_loss, scale_grads=False
        )

    def _make_stage(self, number: int, module: nn.Module, take_wgrads: TakeWgrads | None) -> Any:
        from torch.distributed.pipelining import PipelineStage  # here: it imports torch._dynamo, which takes seconds

        shapes, last = self._shapes, number == self._last

        ids = torch.empty(shapes.tokens, dtype=torch.int64, device="meta")
        hidden = torch.empty(shapes.hidden, dtype=shapes.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        return PipelineStage(
            _ScheduledStage(module, self._scaled_loss if last else None),
            number,
            self._last + 1,
            self._device,
            input_args=ids if number == 0 else hidden,
            output_args=loss if last else hidden,
            group=self._pp.process_group,
            dw_builder=take_wgrads,
        )


class _ScheduledStage(nn.Module):
    """A stage as the schedules see it. loss: of (output, labels, ahead), of the last stage, which returns it."""

    def __init__(self, module: nn.Module, loss: Callable[[Any, Tensor, Tensor | None], Tensor] | None) -> None:
        super().__init__()
        self._module = module
        self._loss = loss

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        address: Tensor,
        positions: Tensor,
        documents: Tensor,
        ahead: Tensor | None = None,
    ) -> Tensor:
        if self._loss is None:
            output: Tensor = self._module(x, address, positions, documents)
            return output
        further = () if ahead is None else (ahead,)
        return self._loss(self._module(x, address, positions, documents, *further), labels, ahead)


def _returned_loss(loss: Tensor, labels: Tensor) -> Tensor:
    return loss


def _joined(microbatches: Sequence[Microbatch], name: str) -> Tensor:
    """One tensor of all microbatches, which the schedule cuts again along dim 0."""
    return torch.cat([getattr(microbatch, name) for microbatch in microbatches])
