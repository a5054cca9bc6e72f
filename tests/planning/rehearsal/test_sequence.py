"""Messages of ranks that fit together, and of ranks that do not."""

from __future__ import annotations

from megatron_fp4.planning.rehearsal.messages import Message
from megatron_fp4.planning.rehearsal.sequence import misfits


def collective(name: str, *ranks: int, size: int = 4) -> Message:
    return Message("reduce", "allreduce", name, ranks, 0.0, (size,), "float32", None, "optim/clip.py:1")


def pair(kind: str, peer: int, size: int = 4) -> Message:
    return Message("forward_backward", kind, "pp", (0, 1), 0.0, (size,), "bfloat16", peer, "pipeline/engine.py:1")


def test_what_fits() -> None:
    """Two ranks that send to each other and then meet; a third one, of which nothing is known, keeps nobody waiting."""
    first = [pair("send", 1), pair("recv_", 1), collective("dp", 0, 1, 2)]
    second = [pair("send", 0), pair("recv_", 0), collective("dp", 0, 1, 2)]
    assert misfits({0: first, 1: second}) == []


def test_two_groups_in_another_order() -> None:
    """Every group sees the same sequence on its members, and yet nobody comes to the end."""
    one, other = collective("tp", 0, 1), collective("dp", 0, 1, 2)
    lines = misfits({0: [one, other], 1: [other, one]})
    assert len(lines) == 2
    assert (
        lines[0] == "rank 0 waits for ever in message 1 of 2: allreduce [4] float32, tp group of 2, at optim/clip.py:1"
    )


def test_a_message_that_is_not_what_the_other_expects() -> None:
    assert "recv_ [8]" in misfits({0: [pair("send", 1)], 1: [pair("recv_", 0, size=8)]})[0]
    assert misfits({0: [], 1: [pair("recv_", 0)]})
    assert len(misfits({0: [collective("tp", 0, 1)], 1: [collective("tp", 0, 1, size=8)]})) == 2
    assert len(misfits({0: [collective("tp", 0, 1)], 1: []})) == 1


def test_a_message_that_nobody_receives() -> None:
    """A send waits for its receive on a GPU. What goes to a rank that was not rehearsed is received."""
    assert "rank 0 waits for ever to send [4] bfloat16 to rank 1: 1 more" in misfits({0: [pair("send", 1)], 1: []})[0]
    assert misfits({0: [pair("send", 1)], 5: []}) == []
