"""The one small message that all ranks exchange at the end of a step.

One idea: whatever ranks must agree on (the loss, a request to stop, that peers were fed the same tokens) fits into a
few 64-bit numbers per rank. Every rank gathers all rows and computes the same answer from them, in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.ledger import combine_hashes


class TokensDifferError(RuntimeError):
    """Ranks that must train on the same tokens were fed different ones."""


@dataclass(frozen=True)
class StepMessage:
    """What one rank says. loss: its part of the sum, counted once per sequence shard. stop: a stop was requested.
    tokens_hash: `data.ledger.step_hash` of the samples that this rank was fed.
    """

    loss: float
    stop: bool
    tokens_hash: int


@dataclass(frozen=True)
class StepAgreement:
    """What all ranks now know. tokens_hash: of the whole global batch."""

    loss: float
    stop: bool
    tokens_hash: int


def exchange(message: StepMessage, mesh: ParallelMesh, device: torch.device) -> StepAgreement:
    """Gather every rank's message. Raises TokensDifferError on all ranks if peers of one data shard disagree."""
    loss_bits = int(torch.tensor(message.loss, dtype=torch.float64).view(torch.int64))
    mine = torch.tensor([[loss_bits, message.stop, message.tokens_hash]], dtype=torch.int64, device=device)
    rows = all_gather_rows(mine, mesh.world).cpu()
    hashes = rows[:, 2].view(mesh.pp.size, mesh.dp.size, -1).transpose(0, 1).flatten(1)  # [dp, pp * cp * tp]
    for shard, of_shard in enumerate(hashes):
        wrong = int((of_shard != of_shard[0]).sum())
        if wrong:
            raise TokensDifferError(
                f"data shard {shard}: {wrong} of its {len(of_shard)} ranks were fed other tokens than its first rank;"
                " their loaders read different files, or are at different samples"
            )
    return StepAgreement(
        loss=float(rows[:, 0].contiguous().view(torch.float64).sum()),
        stop=bool(rows[:, 1].any()),
        tokens_hash=combine_hashes(hashes[:, 0].tolist()),
    )
