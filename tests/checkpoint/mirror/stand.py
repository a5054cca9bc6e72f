"""A run directory with a mirror in memory, without a trainer: saves, rounds of the mirror's thread, other launches."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, offline
from megatron_fp4.checkpoint.directory import step_name
from megatron_fp4.checkpoint.mirror import mirror as mirror_module
from megatron_fp4.checkpoint.mirror.contents import MirrorContents, look_at_mirror
from megatron_fp4.checkpoint.mirror.state import MirrorReport
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.remote.client import Remote
from tests.checkpoint.synthetic import whole_shard
from tests.helpers.stores import FaultyRemote

CONFIG = CheckpointConfig(asynchronous=False, keep_last=2)


def value_of(directory: Path) -> float:
    """The value of which `Stand.save` has made a checkpoint, if it is whole."""
    assert offline.verify(directory) == []
    tensor = offline.read_tensor(directory, "master/w")
    assert bool((tensor == tensor[0, 0]).all())
    return float(tensor[0, 0])


def new_url() -> str:
    return f"memory:///{uuid.uuid4().hex}"


@dataclass
class Stand:
    """One launch. before: called before each request, with its number."""

    root: Path
    url: str = field(default_factory=new_url)
    config: CheckpointConfig = CONFIG
    before: Callable[[int], None] = lambda number: None
    make: Callable[[str, Callable[[int], None]], Remote] = FaultyRemote

    def __post_init__(self) -> None:
        config = replace(self.config, mirror=self.url)
        with mock.patch.object(mirror_module, "Remote", lambda url: self.make(url, self.before)):
            self.store = CheckpointStore(self.root, Group.single("world"), config, mirror=self.url)
        assert self.store.mirror is not None
        self.mirror = self.store.mirror
        assert self.mirror.worker is not None
        self.worker = self.mirror.worker

    def save(self, step: int, value: float | None = None, rows: int = 8) -> Path:
        tensor = torch.full((rows, 4), float(step if value is None else value))
        self.store.save(step, [whole_shard("w", {"master": tensor})], {"step": step}, tokens=step)
        return self.root / step_name(step)

    def look(self) -> list[MirrorReport]:
        """One round of the thread, here and now; what it reports."""
        self.worker._look()
        return self.worker.poll()

    def resumed(self) -> tuple[int, float] | None:
        """Step and value that a launch in this run directory goes on from; None for a new run."""
        chosen = self.store.choose_newest()
        return (chosen.step, value_of(chosen.directory)) if chosen else None

    def contents(self) -> MirrorContents:
        return look_at_mirror(Remote(self.url))

    def steps(self) -> list[int]:
        """Complete checkpoints of the store."""
        return [name.step for name in self.contents().complete]
