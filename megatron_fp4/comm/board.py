"""A notice board: one text of each rank, from which one rank concludes something for all, without a collective.

When a collective is what hangs, ranks can still talk through the store of their rendezvous, over a connection of their
own. One process serves all of them, so what the ranks ask of it must not grow faster than their number: only the first
rank that wants a conclusion reads the board, the others wait for what it says.

For emergencies; nothing that decides numbers goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import _get_default_store  # no public name in torch 2.13

from megatron_fp4.comm.mesh import Group


class NoticeBoard:
    """The texts under `name`. Usable from any one thread. With one rank it is a variable."""

    def __init__(self, world: Group, name: str) -> None:
        self.ranks = world.ranks
        self._rank, self._name = world.ranks[world.rank], name
        self._store = _get_default_store().clone() if world.size > 1 else None  # type: ignore[attr-defined]  # not in stubs
        self._posted = ""

    def post(self, text: str) -> None:
        """Replace this rank's text; "" takes it down."""
        if text == self._posted:
            return
        self._posted = text
        if self._store is not None:
            self._store.set(self._key(self._rank), text)

    def conclude(self, conclude: Callable[[dict[int, str]], str], timeout_seconds: float) -> str:
        """What `conclude` makes of the texts that hang there, by rank; called on the first rank that asks, told to all.

        Raises RuntimeError if that rank says nothing in time, or the store is gone.
        """
        if self._store is None:
            return conclude({self._rank: self._posted} if self._posted else {})
        key = self._key("conclusion")
        if self._store.add(self._key("claimed"), 1) == 1:
            self._store.set(key, conclude(self._read()))
        self._store.wait([key], timedelta(seconds=timeout_seconds))
        return str(self._store.get(key).decode())

    def _read(self) -> dict[int, str]:
        assert self._store is not None
        with_text = [rank for rank in self.ranks if self._store.check([self._key(rank)])]
        texts = self._store.multi_get([self._key(rank) for rank in with_text])
        return {rank: text.decode() for rank, text in zip(with_text, texts, strict=True) if text}

    def _key(self, part: int | str) -> str:
        return f"board/{self._name}/{part}"
