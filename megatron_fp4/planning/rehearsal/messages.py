"""What a rank sends and receives, in order: every collective that torch dispatches, on any backend.

Bytes are those that this rank sends, counted as planning/traffic.py does: of n ranks each sends (n - 1) / n of the
whole in an all-gather or a reduce-scatter, twice that in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.planning.rehearsal.origin import origin

SHARES: Mapping[str, Callable[[int], float]] = {
    "_allgather_base_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "alltoall_base_": lambda n: (n - 1) / n,
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "allgather_": lambda n: (n - 1) / n,
    "broadcast_": lambda n: 1.0,
    "send": lambda n: 1.0,
}
"""What part of the largest tensor of a collective a rank sends, in a group of n."""


AXES = {"tp": "tensor", "tp_cp": "tensor", "cp": "context", "pp": "pipeline", "ends": "pipeline"}


class Message(NamedTuple):
    """One collective, or one half of a message between two ranks.

    group: name of the mesh's group; ranks: its global ranks. sent: bytes. peer: global rank of a send or receive.
    """

    phase: str
    kind: str
    group: str
    ranks: tuple[int, ...]
    sent: float
    shape: tuple[int, ...]
    dtype: str
    peer: int | None
    origin: str

    @property
    def axis(self) -> str:
        """The plan's word for what it is for; data, context and the experts' data may share a group."""
        if self.origin.startswith("optim/muon/"):
            return "matrices"
        if self.origin.startswith("layers/moe/dispatch"):
            return "experts"
        if self.origin.startswith("optim/bucket_comm") and self.group not in ("dp", "dp_cp", "cp"):
            return "expert_data"
        of_optimizer = self.origin.startswith("optim/") and self.group in ("dp", "dp_cp", "cp")
        return "data" if of_optimizer else AXES.get(self.group, "others")

    @property
    def content(self) -> tuple[tuple[int, ...], str]:
        """What sender and receiver must say alike."""
        return self.shape, self.dtype

    @property
    def must_agree(self) -> tuple[object, ...]:
        """What every member of the group must issue alike, in the same order."""
        return self.ranks, self.kind, self.shape, self.dtype


class Messages:
    """phase: of the step, when asked. names: of groups, by their ranks."""

    def __init__(self, phase: Callable[[], str], names: Mapping[tuple[int, ...], str] | None = None) -> None:
        self.sequence: list[Message] = []
        self.names = names or {}
        self._phase = phase

    def see(self, kind: str, args: Sequence[Any]) -> None:
        """Record the operation `c10d::kind` on `args`."""
        group = next(group for group in map(_as_group, args) if group is not None)
        ranks = tuple(dist.get_process_group_ranks(group))
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        whole = max(tensors, key=lambda tensor: tensor.numel()) if tensors else None
        share = SHARES.get(kind, lambda n: 0.0)(len(ranks))
        peer = ranks[args[2]] if kind in ("send", "recv_") else None
        self.sequence.append(
            Message(
                self._phase(),
                kind.strip("_"),
                self.names.get(ranks, "others"),
                ranks,
                0.0 if whole is None else share * whole.numel() * whole.itemsize,
                () if whole is None else tuple(whole.shape),
                "" if whole is None else str(whole.dtype).removeprefix("torch."),
                peer,
                origin(),
            )
        )


class Recording(TorchDispatchMode):
    """Records the messages of real ranks."""

    def __init__(self, messages: Messages) -> None:
        super().__init__()
        self._messages = messages

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and to skip it torch would import torch._dynamo, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, kind = func._schema.name.partition("::")
        if namespace == "c10d":
            self._messages.see(kind, args)
        return func(*args, **(kwargs or {}))


def group_names(mesh: ParallelMesh) -> dict[tuple[int, ...], str]:
    """The name of each group of at least two ranks; of two groups with the same ranks the narrower one's."""
    groups = [getattr(mesh, field.name) for field in reversed(fields(mesh))]
    ends = {(mesh.pp.ranks[0], mesh.pp.ranks[-1]): "ends"}  # they share tied embeddings
    return ends | {group.ranks: group.name for group in groups if group.size > 1}


def _as_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, dist.ProcessGroup):
        return value
    try:
        group: dist.ProcessGroup = dist.ProcessGroup.unbox(value)
    except (TypeError, RuntimeError):
        return None
    return group
