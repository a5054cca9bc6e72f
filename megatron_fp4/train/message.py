"""The one message of a step: what every rank tells all others after its gradients are summed, and what all then know.

A few 64-bit numbers a rank, gathered on the device and read back once: the only time in a step that the host waits for
the device. So whatever the host wants to know of a step (its loss, its norm, a NaN) is in here, and whatever the device
needs of the host gets there as an argument of a kernel (`torch.full`), never as a copy.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.ledger import combine_hashes
from megatron_fp4.optim.clip import norm_of


class TokensDifferError(RuntimeError):
    """Ranks that must train on the same tokens were fed different ones."""


@dataclass(frozen=True, eq=False)
class StepMessage:
    """What one rank says.

    loss: a scalar on the device, its part of the sum, counted once per sequence shard. square: an FP64 scalar there,
    its part of the squared norm of the gradients. stop: a stop was requested. late: its gradients came late (see
    `Zero1Optimizer.grads_came_late`). num_targets: of the samples that it was fed. tokens_hash: their
    `data.ledger.step_hash`. further_losses: as loss, `[n]`, see `train.engine.Engine`.
    """

    loss: Tensor
    square: Tensor
    stop: bool
    late: bool
    num_targets: int
    tokens_hash: int
    further_losses: Tensor | None = None

    def row(self) -> Tensor:
        """int64 `[1, 6 + n]` on the device; of losses and square, the bits of their FP64."""
        values = torch.stack([self.loss.double(), self.square]).view(torch.int64)
        known = (int(self.stop), int(not self.late), self.num_targets, self.tokens_hash)
        filled = [torch.full((1,), value, dtype=torch.int64, device=values.device) for value in known]
        further = [] if self.further_losses is None else [self.further_losses.double().view(torch.int64)]
        return torch.cat([values, *filled, *further])[None]


@dataclass(frozen=True)
class StepAgreement:
    """What all ranks then know, the same on each. stop, late: whether any said so; the rest: of the whole batch."""

    loss: float
    norm: float
    stop: bool
    late: bool
    num_targets: int
    tokens_hash: int
    further_losses: tuple[float, ...] = ()


def exchange(message: StepMessage, mesh: ParallelMesh) -> StepAgreement:
    """Gather every rank's message. Raises TokensDifferError on all ranks if peers of one data shard disagree."""
    rows = all_gather_rows(message.row(), mesh.world).cpu()
    losses, squares = rows[:, :2].T.contiguous().view(torch.float64)
    fed = rows[:, 4:6].view(mesh.pp.size, mesh.dp.size, -1, 2).transpose(0, 1).flatten(1, 2)  # [dp, pp * cp * tp, 2]
    _check_hashes(fed[..., 1])
    return StepAgreement(
        loss=float(losses.sum()),
        norm=norm_of(functools.reduce(operator.add, squares.tolist())),  # one by one: Python's sum() compensates
        stop=bool(rows[:, 2].any()),
        late=not rows[:, 3].all(),
        num_targets=int(fed[:, 0, 0].sum()),
        tokens_hash=combine_hashes(fed[:, 0, 1].tolist()),
        further_losses=tuple(rows[:, 6:].contiguous().view(torch.float64).sum(0).tolist()),
    )


def _check_hashes(hashes: Tensor) -> None:
    """hashes: int64 `[dp, ranks of a data shard]`, equal in a row."""
    num_others = (hashes != hashes[:, :1]).sum(1)
    if num_others.any():
        shard = int(num_others.gt(0).int().argmax())
        raise TokensDifferError(
            f"data shard {shard}: {num_others[shard]} of its {hashes.shape[1]} ranks were fed other tokens than its"
            " first rank; their loaders read different files, or are at different samples"
        )
