"""Whether the messages of several ranks fit together: a deadlock of a layout that nobody can start, found by replay.

Each rank's messages are taken in its order. A collective happens when every member of its group that was rehearsed has
come to it; a receive when its message was sent; a send waits for nobody, but must be received in the end. Ranks that
were not rehearsed never keep anybody waiting. If nobody can go on before all have ended, what they wait for is the
fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_fp4.planning.rehearsal.messages import Message

Sequences = Mapping[int, Sequence[Message]]
"""The messages of each rank, in order."""
Sent = tuple[int, int, tuple[int, ...], str]
"""Sender, receiver, shape and type of a message."""


def misfits(sequences: Sequences) -> list[str]:
    """One line per rank that never comes to its end, and per pair whose messages are not all received."""
    places = dict.fromkeys(sequences, 0)
    sent: Counter[Sent] = Counter()
    went_on = True
    while went_on:
        went_on = False
        for rank, messages in sequences.items():
            while places[rank] < len(messages) and _happens(rank, messages[places[rank]], sequences, places, sent):
                went_on = True
    waiting = [
        f"rank {rank} waits for ever in message {place + 1} of {len(sequences[rank])}: {_text(sequences[rank][place])}"
        for rank, place in places.items()
        if place < len(sequences[rank])
    ]
    return waiting or [
        f"rank {sender} waits for ever to send {list(shape)} {dtype} to rank {peer}: {count} more sent than received"
        for (sender, peer, shape, dtype), count in sent.items()
        if count > 0 and peer in sequences
    ]


def _happens(rank: int, message: Message, sequences: Sequences, places: dict[int, int], sent: Counter[Sent]) -> bool:
    """Whether the next message of `rank` can be done now; then it is, by everybody who takes part."""
    if message.peer is not None and message.kind == "send":
        sent[rank, message.peer, *message.content] += 1
        places[rank] += 1
        return True
    if message.peer is not None:
        key = (message.peer, rank, *message.content)
        if message.peer in sequences and not sent[key]:
            return False
        sent[key] -= 1
        places[rank] += 1
        return True
    members = [member for member in message.ranks if member in sequences]
    nexts = [sequences[member][places[member]] for member in members if places[member] < len(sequences[member])]
    if len(nexts) < len(members) or any(other.must_agree != message.must_agree for other in nexts):
        return False
    for member in members:
        places[member] += 1
    return True


def _text(message: Message) -> str:
    whom = f"rank {message.peer}" if message.peer is not None else f"{message.group} group of {len(message.ranks)}"
    return f"{message.kind} {list(message.shape)} {message.dtype}, {whom}, at {message.origin}"
