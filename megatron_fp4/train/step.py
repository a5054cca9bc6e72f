"""One optimizer step, the same on every rank: `train_step`, in six parts.

Whatever ranks must agree on (the loss, a request to stop, that peers were fed the same tokens) fits into a few 64-bit
numbers per rank: the one message of a step, from which every rank computes the same answer in rank order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_fp4.comm.collectives import all_gather_object, all_gather_rows, all_reduce_sum
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.batch import Batch
from megatron_fp4.data.ledger import combine_hashes, step_hash
from megatron_fp4.layers.linear import assign_precision
from megatron_fp4.optim import StepReport, learning_rate
from megatron_fp4.precision.backends import NonFiniteEvent
from megatron_fp4.train.inputs import make_inputs
from megatron_fp4.train.run import Position, Run, StepResult
from megatron_fp4.train.telemetry.probes import watching


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
    4 agree                 one message of each rank: its part of the loss, whether to stop, the hash of its tokens
    5 update                clip and AdamW; not after a loss spike, without a target token, or with a norm that is not
                            finite
    6 count                 the position behind the step; where the NaN or Inf was

    Raises TokensDifferError and GemmMismatch, and what `guard` raises, on all ranks.
    """
    config, optimizer = run.config, run.optimizer
    enter = run.phases.enter

    enter("assign")  # 1
    table = run.plan.table(run.plan.phase_at(position.samples * config.data.seq_length))
    for stage in run.engine.stages:
        assign_precision(stage, table)
    run.clock.step = position.step
    optimizer.zero_grad()
    microbatches = make_inputs(batch, run.mesh.cp, run.device).split(config.train.micro_batch)
    num_targets = _num_targets(run, batch)
    scale = 1.0 / max(1, num_targets)  # without a target the step is computed all the same: ranks stay in step

    enter("forward_backward")  # 2
    with watching(run, position.step + 1, table, len(microbatches)):
        loss = run.engine.train(microbatches, scale, optimizer.begin_last_microbatch)

    enter("reduce")  # 3
    events = run.probes.nonfinite.take() if run.probes.nonfinite else []
    if events:
        optimizer.spoil_grads()
    norm = optimizer.finish_grads()

    enter("agree")  # 4
    counts = run.mesh.tp.rank == 0 and run.engine.reports_loss
    message = StepMessage(loss.item() if counts else 0.0, stop_requested(), step_hash(batch))
    agreed = exchange(message, run.mesh, run.device)

    enter("update")  # 5
    num_samples = config.train.batch_at(position.samples)
    lr = learning_rate(config.optim, (position.samples + num_samples) * config.data.seq_length, config.run_tokens)
    update = StepReport(lr, norm, 0.0, skipped=True)
    if (num_targets or not math.isfinite(norm)) and guard.passes(
        agreed.loss, position, lambda: run.engine.train(microbatches, scale, lambda: None)
    ):
        update = optimizer.step(norm, lr=lr, max_norm=config.optim.clip_norm)

    enter("count")  # 6
    nonfinite = nonfinite_report(run, update, events, batch) if update.nonfinite else ""
    useless = bool(update.nonfinite) or not num_targets
    position = position.after(num_samples, skipped=update.skipped, useless=useless)
    return StepResult(
        agreed.loss if num_targets else None, update, nonfinite, agreed.tokens_hash, agreed.stop, position
    )


def _num_targets(run: Run, batch: Batch) -> int:
    """Target tokens of the whole global batch, the same on every rank; 0 if each document in it has one token."""
    count = batch.loss_mask.sum(dtype=torch.float64).view(1).to(run.device)
    return int(all_reduce_sum(count, run.mesh.dp).item())


def nonfinite_report(run: Run, update: StepReport, events: list[NonFiniteEvent], batch: Batch) -> str:
    """Tensor, rank and samples of a skipped step. Collective."""
    local_lines = [f"{event}, samples {batch.sample_ids.tolist()}" for event in events]
    lines = [line for lines_of_rank in all_gather_object(local_lines, run.mesh.world) for line in lines_of_rank]
    return "; ".join(lines) if lines else "gradients of " + ", ".join(update.nonfinite)


# -- the one message of a step ----------------------------------------------------------------------------------------


class TokensDifferError(RuntimeError):
    """Ranks that must train on the same tokens were fed different ones."""


@dataclass(frozen=True)
class StepMessage:
    """What one rank says.

    loss: its part of the sum, counted once per sequence shard. stop: a stop was requested. tokens_hash:
    `data.ledger.step_hash` of the samples that this rank was fed.
    """

    loss: float
    stop: bool
    tokens_hash: int


@dataclass(frozen=True)
class StepAgreement:
    """What all ranks then know. loss and tokens_hash are those of the whole global batch."""

    loss: float
    stop: bool
    tokens_hash: int


def exchange(message: StepMessage, mesh: ParallelMesh, device: torch.device) -> StepAgreement:
    """Gather every rank's message. Raises TokensDifferError on all ranks if peers of one data shard disagree."""
    loss_bits = int(torch.tensor(message.loss, dtype=torch.float64).view(torch.int64))
    local_row = torch.tensor([[loss_bits, message.stop, message.tokens_hash]], dtype=torch.int64, device=device)
    rows = all_gather_rows(local_row, mesh.world).cpu()
    hashes = rows[:, 2].view(mesh.pp.size, mesh.dp.size, -1).transpose(0, 1).flatten(1)  # [dp, pp * cp * tp]
    for shard, hashes_of_shard in enumerate(hashes):
        num_others = int((hashes_of_shard != hashes_of_shard[0]).sum())
        if num_others:
            raise TokensDifferError(
                f"data shard {shard}: {num_others} of its {len(hashes_of_shard)} ranks were fed other tokens than its"
                " first rank; their loaders read different files, or are at different samples"
            )
    return StepAgreement(
        loss=float(rows[:, 0].contiguous().view(torch.float64).sum()),
        stop=bool(rows[:, 1].any()),
        tokens_hash=combine_hashes(hashes[:, 0].tolist()),
    )
