"""The mesh of ranks, and the groups cut from it.

All groups come from one grid `arange(world).view(pp, dp, cp, tp)`. Tensor parallelism is innermost, so that its many
small collectives stay inside a node; pipeline stages are outermost:

    rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank

    e.g. tp=2 cp=1 dp=2 pp=2:     stage 0: [0 1] [2 3]     stage 1: [4 5] [6 7]     (one [tp tp] pair per dp rank)

Groups are values that are passed to whoever needs them; nothing is looked up. A group of one rank has no process
group: its collectives return their input, and the program runs without torch.distributed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_fp4.comm.config import ParallelConfig

AXES = ("pp", "dp", "cp", "tp")  # outermost first
GROUPS = {
    "tp": ["tp"],
    "cp": ["cp"],
    "dp": ["dp"],
    "pp": ["pp"],
    "dp_cp": ["dp", "cp"],
    "tp_cp": ["cp", "tp"],
    "model": ["pp", "tp"],
}
"""The axes of every group of a `ParallelMesh` but the world, in the order in which they are made."""


@dataclass(frozen=True)
class Group:
    """Ranks that share something.

    ranks: global ranks in group order. rank: this one in `ranks`. process_group: None if and only if the size is 1.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        assert (self.process_group is None) == (len(self.ranks) == 1), f"group {self.name}: {self.ranks}"
        assert 0 <= self.rank < len(self.ranks)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @staticmethod
    def single(name: str = "self", global_rank: int = 0) -> Group:
        """The group of one rank."""
        return Group(name, (global_rank,), 0)


class DrawnGroup(Group):
    """A group of a layout that does not run: sizes and ranks, to build with. Its collectives pass on shapes only."""

    def __post_init__(self) -> None:
        assert self.process_group is None
        assert 0 <= self.rank < len(self.ranks)


@dataclass(frozen=True)
class ParallelMesh:
    """My place in the grid, as groups. Made once by `build_mesh` and passed down in parts."""

    tp: Group
    cp: Group
    dp: Group
    pp: Group
    dp_cp: Group  # gradients are summed and optimizer state is sharded over it
    tp_cp: Group  # ranks that hold parts of one activation tensor
    model: Group  # all stages and tensor shards of one model copy (tp x pp)
    world: Group

    @staticmethod
    def single_process() -> ParallelMesh:
        """The mesh of one rank, without torch.distributed."""
        names = ("tp", "cp", "dp", "pp", "dp_cp", "tp_cp", "model", "world")
        return ParallelMesh(*(Group.single(name) for name in names))

    @property
    def is_main(self) -> bool:
        return self.world.rank == 0


def rank_grid(config: ParallelConfig, world_size: int) -> torch.Tensor:
    """Global ranks as an int64 tensor `[pp, dp, cp, tp]`."""
    dp = config.resolve_dp(world_size)
    return torch.arange(world_size).view(config.pp, dp, config.cp, config.tp)


def build_mesh(config: ParallelConfig, world: Group) -> ParallelMesh:
    """Cut every group of the mesh out of the world. All ranks must call it, in the same order as everything else.

    Raises ValueError when the sizes do not multiply to the world size (before any process group is made).
    """
    grid = rank_grid(config, world.size)
    timeout = timedelta(seconds=config.timeout_seconds)
    return ParallelMesh(
        **{name: _cut_group(grid, name, axes, world, timeout) for name, axes in GROUPS.items()}, world=world
    )


def draw_mesh(config: ParallelConfig, world_size: int, rank: int) -> ParallelMesh:
    """The mesh as `rank` would see it, without the other ranks: to build a shard with, not to train.

    Raises ValueError when the sizes do not multiply to the world size.
    """
    grid = rank_grid(config, world_size)
    groups = {}
    for name, axes in GROUPS.items():
        ranks = next(row for row in _rows(grid, axes) if rank in row)
        groups[name] = DrawnGroup(name, tuple(ranks), ranks.index(rank))
    return ParallelMesh(**groups, world=DrawnGroup("world", tuple(range(world_size)), rank))


def build_ends_group(config: ParallelConfig, world: Group) -> Group:
    """The first and the last rank of this pipeline, which share tied embeddings; ranks in between are alone.

    Collective over the world.
    """
    grid = rank_grid(config, world.size)
    timeout = timedelta(seconds=config.timeout_seconds)
    own_group = Group.single("ends", world.rank)
    for ranks in grid[[0, -1]].flatten(1).T.tolist() if config.pp > 1 else []:
        whole = len(ranks) == world.size
        process_group = world.process_group if whole else dist.new_group(ranks, timeout=timeout)
        if world.rank in ranks:
            own_group = Group("ends", tuple(ranks), ranks.index(world.rank), process_group)
    return own_group


def _cut_group(grid: torch.Tensor, name: str, axes: Sequence[str], world: Group, timeout: timedelta) -> Group:
    """The subgroup along `axes` that contains me; every rank creates every subgroup, as torch.distributed demands."""
    rows = _rows(grid, axes)
    if len(rows[0]) == 1:
        return Group.single(name, world.rank)
    if len(rows) == 1:  # the whole world: no second process group for the same ranks
        return Group(name, tuple(rows[0]), rows[0].index(world.rank), world.process_group)
    own_group: Group | None = None
    for ranks in rows:
        process_group = dist.new_group(ranks, timeout=timeout)
        if world.rank in ranks:
            own_group = Group(name, tuple(ranks), ranks.index(world.rank), process_group)
    assert own_group is not None
    return own_group


def _rows(grid: torch.Tensor, axes: Sequence[str]) -> list[list[int]]:
    """The ranks of every subgroup along `axes`."""
    kept = [AXES.index(axis) for axis in axes]
    others = [d for d in range(len(AXES)) if d not in kept]
    size = math.prod(grid.shape[d] for d in kept)
    rows: list[list[int]] = grid.permute(*others, *kept).reshape(-1, size).tolist()
    return rows


def describe(config: ParallelConfig, world_size: int) -> str:
    """The rank grid as text: one line a stage and data-parallel rank, for the start of a log."""
    grid = rank_grid(config, world_size)
    lines = [f"{world_size} ranks = pp {grid.shape[0]} x dp {grid.shape[1]} x cp {grid.shape[2]} x tp {grid.shape[3]}"]
    if world_size > 64:
        return lines[0] + " (rank = ((pp*DP + dp)*CP + cp)*TP + tp)"
    for stage, per_dp in enumerate(grid.tolist()):
        for dp, per_cp in enumerate(per_dp):
            cells = " ".join("[" + " ".join(str(rank) for rank in per_tp) + "]" for per_tp in per_cp)
            lines.append(f"  stage {stage}, dp {dp}: {cells}")
    return "\n".join(lines)
