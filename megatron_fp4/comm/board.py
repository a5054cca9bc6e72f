"""A notice board: one text of each rank, which all ranks can read without a collective.

When a collective is what hangs, ranks can still talk through the store of their rendezvous, over a connection of their
own. For emergencies; it is slow, and nothing that decides numbers goes through it.
"""

from __future__ import annotations

from torch.distributed.distributed_c10d import _get_default_store  # no public name in torch 2.13

from megatron_fp4.comm.mesh import Group


class NoticeBoard:
    """The texts under `name`. Usable from any one thread. With one rank it is a dictionary."""

    def __init__(self, world: Group, name: str) -> None:
        self._world, self._name = world, name
        self._store = _get_default_store().clone() if world.size > 1 else None  # type: ignore[attr-defined]  # not in stubs
        self._posted = ""

    def post(self, text: str) -> None:
        """Replace this rank's text; "" takes it down."""
        if text == self._posted:
            return
        self._posted = text
        if self._store is not None:
            self._store.set(self._key(self._world.rank), text)

    def read(self) -> dict[int, str]:
        """The texts that hang there now, by rank."""
        if self._store is None:
            return {self._world.rank: self._posted} if self._posted else {}
        with_text = [rank for rank in range(self._world.size) if self._store.check([self._key(rank)])]
        texts = {rank: self._store.get(self._key(rank)).decode() for rank in with_text}
        return {rank: text for rank, text in texts.items() if text}

    def claim(self) -> bool:
        """True for the first rank that asks."""
        return self._store is None or self._store.add(f"board/{self._name}/claimed", 1) == 1

    def _key(self, rank: int) -> str:
        return f"board/{self._name}/{rank}"
