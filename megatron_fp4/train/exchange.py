"""The one small message that all ranks exchange at the end of a step.

One idea: whatever ranks must agree on (the loss, a request to stop, that peers were fed the same tokens) fits
into a few float64 numbers per rank. Every rank gathers all rows and computes the same answer from them, in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash

from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.train.inputs import Inputs


class TokensDifferError(RuntimeError):
    """Ranks that must train on the same tokens were fed different ones."""


@dataclass(frozen=True)
class StepMessage:
    """What one rank says. loss: its part of the sum, counted once per sequence shard. stop: a stop was requested.
    tokens_hash: of the token ids that this rank was fed.
    """

    loss: float
    stop: int
    tokens_hash: int


@dataclass(frozen=True)
class StepAgreement:
    """What all ranks now know."""

    loss: float
    stop: int


def hash_tokens(inputs: Inputs) -> int:
    """52 bits of a hash of the ids, exact in a float64."""
    return xxhash.xxh3_64_intdigest(inputs.tokens.cpu().numpy().tobytes()) & ((1 << 52) - 1)


def exchange(message: StepMessage, mesh: ParallelMesh, device: torch.device) -> StepAgreement:
    """Gather every rank's message. Raises TokensDifferError on all ranks if peers of one data shard disagree."""
    mine = torch.tensor([[message.loss, message.stop, message.tokens_hash]], dtype=torch.float64, device=device)
    rows = all_gather_rows(mine, mesh.world).cpu()
    shards = rows[:, 2].view(mesh.pp.size, mesh.dp_cp.size, mesh.tp.size).transpose(0, 1).flatten(1)
    for shard, hashes in enumerate(shards):
        if bool((hashes != hashes[0]).any()):
            wrong = [int(rank) for rank in range(len(hashes)) if hashes[rank] != hashes[0]]
            raise TokensDifferError(
                f"data shard {shard}: its (pp, tp) ranks {wrong} were fed other tokens than its first rank; the loaders"
                " of these ranks read different files or are at different samples"
            )
    return StepAgreement(loss=float(rows[:, 0].sum()), stop=int(rows[:, 1].max()))
