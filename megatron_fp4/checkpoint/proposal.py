"""What the ranks say before a save and after one: a byte of each, and a text only of who has trouble.

Where thousands of ranks have the same trouble (a full disk), the first few speak, and of those only who knows the
cause: the others were given up because of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fp4.checkpoint.outcome import NotSaved
from megatron_fp4.comm.agree import MAX_LISTED, listed_errors
from megatron_fp4.comm.collectives import gather_bytes, told_by
from megatron_fp4.comm.mesh import Group

FAILED, CONSEQUENCE = 1, 2
REFUSES, REPLANS = 4, 8
NO_DIRECTORY = 16


@dataclass(frozen=True)
class SaveProposal:
    """What one rank says.

    previous: how the save before failed here. refusal: what is wrong with this rank's shards or meta. replan: its
    layout is not the planned one. no_directory: why rank 0 could not make the directory.
    """

    previous: NotSaved | None = None
    refusal: str | None = None
    replan: bool = False
    no_directory: str | None = None

    @property
    def flags(self) -> int:
        """Which of all that there is, and whether a failure is the consequence of another."""
        flags = REFUSES * (self.refusal is not None) | REPLANS * self.replan
        flags |= NO_DIRECTORY * (self.no_directory is not None)
        if self.previous is not None:
            flags |= CONSEQUENCE if self.previous.is_consequence else FAILED
        return flags


@dataclass(frozen=True)
class SaveAgreement:
    """What all ranks then know, the same on each; texts name the ranks that said them.

    previous: why the save before failed, None if it did not, which is for rank 0 to say. replan: whether any rank's
    layout is another.
    """

    previous: str | None
    refusal: str | None
    replan: bool
    no_directory: str | None


def exchange_proposals(proposal: SaveProposal, group: Group) -> SaveAgreement:
    """Collective: a byte of each rank, and the texts."""
    flags = gather_bytes(proposal.flags, group)

    def texts(flag: int, text: str | None) -> str | None:
        speakers = (flags & flag).nonzero().flatten().tolist()[:MAX_LISTED]
        return listed_errors(told_by(speakers, text, group).items())

    previous = None
    if int(flags[0]) & (FAILED | CONSEQUENCE):
        reason = proposal.previous.reason if proposal.previous else None
        previous = texts(FAILED, reason) or texts(CONSEQUENCE, reason) or ""
    return SaveAgreement(
        previous=previous,
        refusal=texts(REFUSES, proposal.refusal),
        replan=bool((flags & REPLANS).any()),
        no_directory=texts(NO_DIRECTORY, proposal.no_directory),
    )
