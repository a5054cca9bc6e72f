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
from enum import Enum

import torch
import torch.distributed as dist

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

    ranks: global ranks in group order. rank: my index in `ranks`. process_group: None if and only if the size is 1.
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


class Overlap(Enum):
    """Whether communication runs beside computation; `auto`: on CUDA. (`on` and `off` would be booleans in YAML.)"""

    auto = "auto"
    always = "always"
    never = "never"

    def enabled(self, device_type: str) -> bool:
        return self is Overlap.always or (self is Overlap.auto and device_type == "cuda")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the four axes. `dp = 0` means: as many as the world size leaves.

    schedule: order of the microbatches in a pipeline, a name of pipeline.schedules. virtual_stages: stages per pipeline
    rank, 0 for what the schedule needs. stage_split: `cost`, or blocks per stage such as `9,8,8,7`. overlap_tensor:
    send the input gradient of a column-parallel linear while its weight gradient is computed; it changes no bit.
    timeout_seconds: of a collective. init_timeout_seconds: for all ranks to meet at the start.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 0
    schedule: str = "1f1b"
    virtual_stages: int = 0
    stage_split: str = "cost"
    overlap_tensor: Overlap = Overlap.auto
    timeout_seconds: float = 600.0
    init_timeout_seconds: float = 180.0

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "cp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis} = {getattr(self, axis)}, must be at least 1")
        if self.dp < 0:
            raise ValueError(f"parallel.dp = {self.dp}, must be positive, or 0 for 'what the world size leaves'")
        if self.overlap_tensor is Overlap.always and self.tp == 1:
            raise ValueError(
                "parallel.overlap_tensor = always has no effect with parallel.tp = 1; leave it at auto, or set"
                " parallel.tp"
            )

    @property
    def smallest_world(self) -> int:
        """Ranks of this layout, with one data-parallel copy where `dp` is left open."""
        return self.tp * self.pp * self.cp * max(1, self.dp)

    def resolve_dp(self, world_size: int) -> int:
        """The data-parallel size for `world_size` ranks. Raises ValueError with the equation if it does not fit."""
        model = self.tp * self.pp * self.cp
        dp = self.dp or world_size // model
        if dp < 1 or model * dp != world_size:
            asked = self.dp if self.dp else "?"
            raise ValueError(
                f"layout does not fit the world size: tp * pp * cp * dp = {self.tp} * {self.pp} * {self.cp} * {asked}"
                f" must equal {world_size} ranks; start {model * max(self.dp, 1)} ranks, or change the sizes so that"
                f" their product is {world_size}"
            )
        return dp


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
    """The first and the last rank of my pipeline, which share tied embeddings; ranks in between are alone.

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
