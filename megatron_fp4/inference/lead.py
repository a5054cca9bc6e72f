"""Rank 0 asks and all ranks compute, where only rank 0 knows what comes next: an evaluation harness runs there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_fp4.comm.collectives import broadcast_object
from megatron_fp4.comm.mesh import Group


class Led:
    """Collective functions by name, called on all ranks when rank 0 calls one. Arguments are pickled.

    Rank 0 calls, and releases the others at the end, whatever happens; the others follow until then.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]], world: Group) -> None:
        self._functions, self._world = functions, world

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of function `name` on rank 0."""
        assert self._world.rank == 0, "rank 0 asks"
        broadcast_object((name, arguments), self._world)
        return self._functions[name](*arguments)

    def release(self) -> None:
        """Let the others go."""
        broadcast_object(None, self._world)

    def follow(self) -> None:
        """Compute what rank 0 asks for, until it releases this rank."""
        while (call := broadcast_object(None, self._world)) is not None:
            name, arguments = call
            self._functions[name](*arguments)
