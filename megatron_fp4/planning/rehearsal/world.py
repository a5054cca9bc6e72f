"""A world of any size in which only this rank exists: torch's fake process groups, which send nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fp4.comm import collectives
from megatron_fp4.comm.mesh import Group
from megatron_fp4.optim import bucket_comm
from megatron_fp4.planning.rehearsal.device import NAME


@contextmanager
def fake_world(size: int, rank: int, *, over_gloo: bool = False) -> Iterator[Group]:
    """The world of a rank, for as long as the context lasts. Not inside another process group.

    over_gloo: the collectives are told that it is one of gloo, else it is NCCL's.
    """
    if size == 1:
        yield Group.single("world")
        return
    devices = dist.Backend.backend_capability[dist.Backend.FAKE]
    if NAME not in devices:  # messages between two ranks ask for the backend of their device
        devices.append(NAME)
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with ExitStack() as stack:
            for module in (collectives, bucket_comm):
                stack.enter_context(patch.object(module, "uses_gloo", lambda group: over_gloo))
            yield Group("world", tuple(range(size)), rank, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
