"""One optimizer step, the same on every rank: `train_step`, in six parts.

Whatever ranks must agree on (the loss, the norm, a request to stop, that peers were fed the same tokens) is in the one
message of a step (message.py), which is also all that the host reads back from the device; the batch is all that it
copies there. A step whose NaN or Inf must be named, or whose parameter norm is logged, reads more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum, tell_first
from megatron_fp4.data.batch import Batch
from megatron_fp4.data.ledger import step_hash
from megatron_fp4.layers.linear import assign_precision
from megatron_fp4.optim import StepReport
from megatron_fp4.train.inputs import count_targets, look_ahead, make_inputs
from megatron_fp4.train.message import StepAgreement, StepMessage, exchange
from megatron_fp4.train.run import Position, Run, StepResult, TrainingDiverged
from megatron_fp4.train.sections import NonFinite
from megatron_fp4.train.telemetry.probes import watching

MAX_EVENTS = 20
"""NaN or Inf of one rank that are told of a step; the first shows where it began."""


class UpdateGuard(Protocol):
    """Decides from the loss that all ranks agree on whether the step may update (`faults.guard.SpikeGuard`)."""

    def passes(self, loss: float, position: Position, rerun_step: Callable[[], object]) -> bool:
        """Whether the step after `position` may update. rerun_step: forward and backward of the step once more."""


def train_step(
    run: Run, batch: Batch, position: Position, guard: UpdateGuard, stop_requested: Callable[[], bool]
) -> StepResult:
    """Make the step after `position`. batch: this rank's rows of its samples. Collective over the world.

    1 assign                precision and noise of the step, both functions of the position
    2 forward and backward  microbatches in turn; their gradients add up in FP32
    3 sum                   gradients over all ranks, and their norm; a NaN or Inf on one rank spoils everybody's
    4 agree                 one message of each rank: its part of loss and norm, whether to stop, the hash of its tokens
    5 update                clip and update; not after a loss spike, without a target token, or with a norm that is not
                            finite
    6 count                 the position behind the step; where the NaN or Inf was

    Raises TokensDifferError, GemmMismatch, NonFiniteStop and what `guard` raises, on all ranks.
    """
    config, optimizer = run.config, run.optimizer
    enter = run.phases.enter

    enter("assign")  # 1
    table = run.plan.table(run.plan.phase_at(position.samples * config.data.seq_length))
    for stage in run.engine.stages:
        assign_precision(stage, table)
    run.clock.step = position.step
    num_samples = run.clock.batch_samples = config.train.batch_at(position.samples)
    optimizer.zero_grad()
    run.probes.nonfinite.forget()
    ahead = look_ahead(batch, config.model.mtp.depth)
    microbatches = make_inputs(batch, run.mesh.cp, run.device, ahead).split(config.train.micro_batch)
    scale = loss_scale(run, count_targets(batch, ahead))

    def rerun_step() -> Tensor:
        return run.engine.train(microbatches, scale, lambda _num_microbatches: None)

    enter("forward_backward")  # 2
    with watching(run, position.step + 1, table, len(microbatches)):
        loss_part = run.engine.train(microbatches, scale, optimizer.begin_last_microbatch)

    enter("reduce")  # 3
    square = optimizer.sum_grads()

    enter("agree")  # 4
    agreed = _agree(run, batch, loss_part, square, stop_requested)
    if agreed.late:  # the sums are worthless; this time nothing leaves before the last gradient is there
        optimizer.zero_grad()
        agreed = _agree(run, batch, rerun_step(), optimizer.sum_grads(), stop_requested)
    nonfinite = "" if math.isfinite(agreed.norm) else _nonfinite_operands(run, batch)

    enter("update")  # 5
    lr = config.learning_rate((position.samples + num_samples) * config.data.seq_length)
    update = StepReport(lr, agreed.norm, 0.0, skipped=True)
    if (agreed.num_targets or not math.isfinite(agreed.norm)) and guard.passes(agreed.loss, position, rerun_step):
        update = optimizer.step(agreed.norm, lr=lr, max_norm=config.optim.clip_norm)

    enter("count")  # 6
    if update.nonfinite and not nonfinite:
        nonfinite = "gradients of " + ", ".join(update.nonfinite)
    useless = bool(nonfinite) or not agreed.num_targets
    position = position.after(num_samples, skipped=update.skipped, useless=useless)
    loss = agreed.loss if agreed.num_targets else None
    return StepResult(loss, update, nonfinite, agreed.tokens_hash, agreed.stop, position, agreed.further_losses)


def loss_scale(run: Run, num_targets: list[int]) -> Tensor:
    """1 / target tokens of the whole global batch, an FP64 scalar on the device; never read by the host.

    num_targets: of this rank's rows. With multi-token prediction they, and the result, are one of each loss. Where each
    document has one token only there is none: the step is computed all the same, and ranks stay in step.
    """
    mesh = run.mesh
    # Over the world, one rank of each data shard: dp may be the communicator of dp_cp, where it would queue behind all
    # parameters that travel beside the forward pass, which would then begin when the last of them is there.
    counts = mesh.tp.rank == mesh.cp.rank == mesh.pp.rank == 0
    filled = [torch.full((1,), count * counts, dtype=torch.float64, device=run.device) for count in num_targets]
    scales = 1.0 / all_reduce_sum(torch.cat(filled), mesh.world).clamp(min=1.0)
    return scales if len(num_targets) > 1 else scales[0]


def _agree(run: Run, batch: Batch, loss: Tensor, square: Tensor, stop_requested: Callable[[], bool]) -> StepAgreement:
    """What all ranks know of the step after this rank has told its part. Collective; the one read-back."""
    counts = run.mesh.tp.rank == 0 and run.engine.reports_loss
    further_losses = run.engine.further_losses
    message = StepMessage(
        loss=loss if counts else torch.zeros_like(loss),
        square=run.probes.nonfinite.spoil(square),
        stop=stop_requested(),
        late=run.optimizer.grads_came_late,
        num_targets=int(batch.loss_mask.sum()),
        tokens_hash=step_hash(batch),
        further_losses=further_losses if counts else torch.zeros_like(further_losses),
    )
    return exchange(message, run.mesh)


class NonFiniteStop(TrainingDiverged, FloatingPointError):
    """A NaN or Inf reached a quantizer on some rank, and `train.nonfinite` is `stop`."""


def _nonfinite_operands(run: Run, batch: Batch) -> str:
    """Tensor, rank and samples of each operand with NaN or Inf on any rank, "" if only gradients have one. Collective.

    Raises NonFiniteStop on all ranks if the run shall end with it.
    """
    samples = batch.sample_ids.tolist()
    local_lines = [f"{event}, samples {samples}" for event in run.probes.nonfinite.take()]
    texts = tell_first("\n".join(local_lines[:MAX_EVENTS]), run.mesh.world)  # where all diverge, all have hundreds
    lines = [line for text in texts.values() for line in text.splitlines()]
    if lines and run.config.train.nonfinite is NonFinite.stop:
        raise NonFiniteStop(f"step {run.clock.step + 1}: NaN or Inf in {lines[0]} (train.nonfinite=stop)")
    return "; ".join(lines)
