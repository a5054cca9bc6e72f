"""The mesh of ranks, and the groups cut from it.

All groups come from one grid `arange(world).view(pp, dp, cp, tp)`. Tensor parallelism is innermost, so that its many
small collectives stay inside a node; pipeline stages are outermost:

    rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank

    e.g. tp=2 cp=1 dp=2 pp=2:     stage 0: [0 1] [2 3]     stage 1: [4 5] [6 7]     (one [tp tp] pair per dp rank)

Experts are laid out beside these axes, not along one: the ranks of a stage, in their order, are cut into groups of `ep`
neighbours that share the experts, and ranks at the same place of their groups (`edp`) hold the same experts.

    e.g. tp=2 dp=4 ep=4:          ep: [0 1 2 3] [4 5 6 7]     edp: [0 4] [1 5] [2 6] [3 7]

Groups are values that are passed to whoever needs them; nothing is looked up. A group of one rank has no process
group: its collectives return their input, and the program runs without torch.distributed. Groups of the same ranks
share a process group, but for the experts': rows on their way to experts never wait behind gradients or parameters that
travel beside the computation, and the sums of experts' gradients never behind tensor parallelism.

A rank makes one call of torch per axis, whatever the size of the world. NCCL splits the world's communicator, all
subgroups at once. gloo cannot split; there the members of a subgroup meet in the store and wait for nobody else, which
cannot deadlock because all ranks take the axes in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_fp4.comm.config import ParallelConfig

set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
"""The time-out of a process group from now on; public since torch 2.14."""
AXES = ("pp", "dp", "cp", "tp")  # outermost first
GROUPS = {
    "tp": ["tp"],
    "cp": ["cp"],
    "dp": ["dp"],
    "pp": ["pp"],
    "dp_cp": ["dp", "cp"],
    "tp_cp": ["cp", "tp"],
}
"""The axes of every group of a `ParallelMesh` but the world and the experts', in the order in which they are made."""
SHARED_BY_EXPERTS = {"ep": ("tp", "cp", "tp_cp"), "edp": ("dp", "dp_cp")}
"""Whose process groups those of experts may be, where the ranks are the same: what is used in the same places."""


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
    ep: Group  # ranks that share the experts
    edp: Group  # ranks that hold the same experts: their gradients are summed, their state is divided over it
    world: Group

    @staticmethod
    def single_process() -> ParallelMesh:
        """The mesh of one rank, without torch.distributed."""
        names = ("tp", "cp", "dp", "pp", "dp_cp", "tp_cp", "ep", "edp", "world")
        return ParallelMesh(*(Group.single(name) for name in names))

    @property
    def is_main(self) -> bool:
        return self.world.rank == 0


def rank_grid(config: ParallelConfig, world_size: int) -> torch.Tensor:
    """Global ranks as an int64 tensor `[pp, dp, cp, tp]`."""
    dp = config.resolve_dp(world_size)
    return torch.arange(world_size).view(config.pp, dp, config.cp, config.tp)


def build_mesh(config: ParallelConfig, world: Group, *, experts: bool = False) -> ParallelMesh:
    """Cut every group of the mesh out of the world. All ranks must call it, in the same order as everything else.

    experts: whether the model has some; without, `ep` and `edp` are groups of one rank, which nobody uses. Raises
    ValueError when the sizes do not multiply to the world size (before any process group is made), and torch's
    DistError where the ranks of a group are not connected within `init_timeout_seconds`.
    """
    grid = rank_grid(config, world.size)
    groups: dict[tuple[int, ...], Group] = {world.ranks: world}
    cut: dict[str, Group] = {}
    for name, axes in GROUPS.items():
        cut[name] = _cut_group(_rows(grid, axes), name, world, config, groups.get)
        groups.setdefault(cut[name].ranks, cut[name])
    for name, rows in expert_rows(grid, config.ep).items():
        if not experts and config.ep == 1:
            cut[name] = Group.single(name, world.rank)
            continue
        apart = cut["dp_cp" if name == "ep" else "tp_cp"].ranks
        like = {cut[each].ranks: cut[each] for each in SHARED_BY_EXPERTS[name] if cut[each].ranks != apart}
        cut[name] = _cut_group(rows, name, world, config, like.get)
    return ParallelMesh(**cut, world=world)


def draw_mesh(config: ParallelConfig, world_size: int, rank: int) -> ParallelMesh:
    """The mesh as `rank` would see it, without the other ranks: to build a shard with, not to train.

    Raises ValueError when the sizes do not multiply to the world size.
    """
    grid = rank_grid(config, world_size)
    groups = {}
    rows_of = {name: _rows(grid, axes) for name, axes in GROUPS.items()} | expert_rows(grid, config.ep)
    for name, rows in rows_of.items():
        ranks = next(row for row in rows if rank in row)
        groups[name] = DrawnGroup(name, tuple(ranks), ranks.index(rank))
    return ParallelMesh(**groups, world=DrawnGroup("world", tuple(range(world_size)), rank))


def build_ends_group(config: ParallelConfig, mesh: ParallelMesh) -> Group:
    """The first and the last rank of this pipeline, which share tied embeddings; ranks in between are alone.

    Collective over the world. Raises as `build_mesh`.
    """
    rows = rank_grid(config, mesh.world.size)[[0, -1]].flatten(1).T.tolist() if config.pp > 1 else []
    known = {group.ranks: group for group in (mesh.pp, mesh.world)}
    return _cut_group(rows, "ends", mesh.world, config, known.get)


def build_stage_group(config: ParallelConfig, mesh: ParallelMesh) -> Group:
    """The ranks of this pipeline rank's stages, in the order of the grid `[dp, cp, tp]`.

    Collective over the world. Raises as `build_mesh`.
    """
    rows = rank_grid(config, mesh.world.size).flatten(1).tolist()
    known = {group.ranks: group for group in (mesh.tp, mesh.dp_cp, mesh.tp_cp, mesh.world)}
    return _cut_group(rows, "stage", mesh.world, config, known.get)


def _cut_group(
    rows: list[list[int]],
    name: str,
    world: Group,
    config: ParallelConfig,
    known: Callable[[tuple[int, ...]], Group | None],
) -> Group:
    """The one of the subgroups `rows` that contains this rank, alone if none does. known: groups by their ranks."""
    own = tuple(next((row for row in rows if world.rank in row), [world.rank]))
    if all(len(row) == 1 for row in rows):
        return Group.single(name, world.rank)
    if equal := known(own):
        return replace(equal, name=name)
    process_group = _connect(rows, own, world, config)
    return Group(name, own, own.index(world.rank), process_group if len(own) > 1 else None)


def _connect(
    rows: list[list[int]], own: tuple[int, ...], world: Group, config: ParallelConfig
) -> dist.ProcessGroup | None:
    """The process group of the ranks `own`, None for one rank. Every rank calls it; see the module."""
    patience = timedelta(seconds=min(config.init_timeout_seconds, config.timeout_seconds))
    if dist.get_backend(world.process_group) == "nccl":
        process_group = dist.split_group(world.process_group, rows, timeout=patience)
    elif len(own) > 1:
        process_group = dist.new_group(list(own), timeout=patience, use_local_synchronization=True)
    else:
        return None
    if process_group is not None and dist.get_backend(process_group) in ("nccl", "gloo"):
        set_timeout(timedelta(seconds=config.timeout_seconds), process_group)
    return process_group


def _rows(grid: torch.Tensor, axes: Sequence[str]) -> list[list[int]]:
    """The ranks of every subgroup along `axes`."""
    kept = [AXES.index(axis) for axis in axes]
    others = [d for d in range(len(AXES)) if d not in kept]
    size = math.prod(grid.shape[d] for d in kept)
    rows: list[list[int]] = grid.permute(*others, *kept).reshape(-1, size).tolist()
    return rows


def expert_rows(grid: torch.Tensor, ep: int) -> dict[str, list[list[int]]]:
    """The ranks of every group of "ep" and of "edp". grid: as `rank_grid` makes it."""
    stages = grid.reshape(grid.shape[0], -1, ep)
    return {"ep": stages.reshape(-1, ep).tolist(), "edp": stages.transpose(1, 2).reshape(-1, stages.shape[1]).tolist()}


def describe(config: ParallelConfig, world_size: int) -> str:
    """The rank grid as text, for a log's start: one line a stage and data-parallel rank, one of a stage's experts."""
    grid = rank_grid(config, world_size)
    sizes = " x ".join(f"{axis} {size}" for axis, size in zip(("pp", "dp", "cp", "tp"), grid.shape, strict=True))
    lines = [f"{world_size} rank{'s' if world_size > 1 else ''} = {sizes}"]
    if config.ep > 1:
        lines[0] += f"; of a stage, for experts: edp {grid[0].numel() // config.ep} x ep {config.ep}"
    if world_size > 64:
        return lines[0] + " (rank = ((pp*DP + dp)*CP + cp)*TP + tp)"
    for stage, per_dp in enumerate(grid.tolist()):
        for dp, per_cp in enumerate(per_dp):
            cells = " ".join("[" + " ".join(str(rank) for rank in per_tp) + "]" for per_tp in per_cp)
            lines.append(f"  stage {stage}, dp {dp}: {cells}")
    by_stage = grid.reshape(grid.shape[0], -1, config.ep).tolist() if config.ep > 1 else []
    for stage, groups in enumerate(by_stage):
        cells = " ".join("[" + " ".join(map(str, ranks)) + "]" for ranks in groups)
        lines.append(f"  stage {stage}, experts: {cells}")
    return "\n".join(lines)
