"""How a rank comes to its job: what it was given, and how it refuses so that all ranks end, and one of them says why.

Not here: what is checked by each rank (checked.py) and by all (agreement.py).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.rendezvous import RanksNotMet, Rendezvous, meet
from megatron_fp4.train.arrival.agreement import Part, agree_on
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.signals import EXIT_CONFIG, EXIT_FAILED

SETTINGS = "the settings"
"""What rank 0 tells those that have interpolations, which it may not have itself."""
TELL_SECONDS = 60.0
"""How long a rank that refuses waits for rank 0, to tell it."""


@dataclass(frozen=True)
class GivenSettings:
    """What a rank was given. text: the resolved settings as YAML. written: nested, with interpolations as written.

    rendezvous: where the ranks have met already, because of interpolations, which are rank 0's.
    """

    config: RunConfig
    text: str
    written: Mapping[str, Any]
    rendezvous: Rendezvous | None = None


def refuse(error: Exception, *, speaks: bool = True) -> int:
    """Say why, on the rank that speaks."""
    if speaks:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_CONFIG


def refuse_start(
    error: Exception, launch: Launch, parts: Mapping[str, Part] | None = None, rendezvous: Rendezvous | None = None
) -> int:
    """Refuse before the ranks have met. Rank 0 leaves at once, and its launcher ends the others.

    The others tell rank 0, if it comes: it may have no reason to refuse, and would wait for them. If it does not come,
    the first rank of the node speaks (or the first above the node's number of GPUs), because rank 0 may not know.
    """
    if launch.rank == 0 and rendezvous is None:
        return refuse(error)
    try:
        rendezvous = rendezvous or meet(launch, TELL_SECONDS)
    except (ValueError, RanksNotMet):
        text = f"on {socket.gethostname()}: {error}" if launch.num_nodes > 1 else str(error)
        return refuse(ValueError(text), speaks=launch.local_rank in (0, torch.cuda.device_count()))
    try:
        agree_on(parts or {}, rendezvous, TELL_SECONDS, refusal=str(error))
    except ValueError as refusal:
        return refuse_together(refusal, rendezvous)
    except RanksNotMet as absence:
        return give_up(absence)
    raise AssertionError("a refusal is never agreed on")


def give_up(error: RanksNotMet) -> int:
    """End because a rank did not come. The exit code says that a restart may help."""
    print(f"error: {error}", file=sys.stderr)
    return EXIT_FAILED


def refuse_together(error: ValueError, rendezvous: Rendezvous) -> int:
    """Refuse on all ranks what rank 0 has decided."""
    rendezvous.leave()
    return refuse(error, speaks=rendezvous.rank == 0)
