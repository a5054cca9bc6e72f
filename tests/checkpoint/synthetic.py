"""A model-free stand-in for the optimizer: logical tensors cut into shards for any (tp, pp, dp, ep).

Values are a function of (kind, name, element), so what a rank must hold after a load needs no reference run.
Has uneven rows, a fused weight (q|k|v as three logical tensors in one parameter), column shards, a tensor replicated
over tp, a tied copy on the last stage, and experts, whole on the ranks that hold them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard

KINDS = ("master", "exp_avg", "exp_avg_sq")
NUM_BLOCKS = 4
EXPERTS = {f"blocks.0.experts.{number}": (3, 12) for number in range(12)}
VOCAB, HIDDEN, KV = 22, 12, 4


@dataclass(frozen=True)
class Layout:
    """ep: 0 = the model has no experts."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 0

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> tuple[int, int, int]:
        return rank % self.tp, rank // self.tp // self.dp, rank // self.tp % self.dp  # tp, pp, dp ranks


def whole(kind: str, name: str, shape: tuple[int, ...], version: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{name}/{version}".encode()))
    return torch.randn(shape, generator=generator)


def whole_shard(name: str, tensors: dict[str, Tensor]) -> Shard:
    """All of a logical tensor."""
    return Shard(Rectangle.whole(name, tuple(next(iter(tensors.values())).shape)), tensors)


def logical_shapes(*, experts: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCAB, HIDDEN), "final_norm": (HIDDEN,)}
    shapes |= EXPERTS if experts else {}
    for block in range(NUM_BLOCKS):
        shapes |= {
            f"blocks.{block}.norm": (HIDDEN,),
            f"blocks.{block}.q": (HIDDEN, HIDDEN),
            f"blocks.{block}.k": (KV, HIDDEN),
            f"blocks.{block}.v": (KV, HIDDEN),
            f"blocks.{block}.out": (HIDDEN, HIDDEN),
            f"blocks.{block}.conv": (HIDDEN, 1, 3),
        }
    return shapes


def shards_of(layout: Layout, rank: int, *, filled: bool, version: int = 0, kinds: Any = KINDS) -> list[Shard]:
    """All shards of `rank`: filled with the right values, or with NaN to be loaded."""
    tp, pp, dp = layout.place(rank)
    shapes = logical_shapes(experts=bool(layout.ep))
    shards: list[Shard] = []

    def add(
        name: str,
        rows: tuple[int, int],
        columns: tuple[int, int] | None = None,
        writes: bool = True,
        part: tuple[int, int] = (dp, layout.dp),
    ) -> None:
        """Rows `[rows)` of the logical tensor, of which this dp rank owns an (uneven) part."""
        (start, stop), (number, parts) = rows, part
        size = stop - start
        low, high = start + size * number // parts, start + size * (number + 1) // parts
        where = Rectangle.whole(name, shapes[name]).rows(low, high)
        if columns is not None:
            where = Rectangle(name, shapes[name], (low, columns[0]), (high - low, columns[1] - columns[0]))
        tensors = {}
        for kind in kinds:
            values = whole(kind, name, shapes[name], version)[where.slices].clone()
            tensors[kind] = values if filled else torch.full_like(values, torch.nan)
        shards.append(Shard(where, tensors, writes))

    def share(name: str, dim: int = 0) -> tuple[int, int]:
        size = shapes[name][dim]
        return size * tp // layout.tp, size * (tp + 1) // layout.tp

    first, last = pp == 0, pp == layout.pp - 1
    if first:
        add("embedding", share("embedding"))
    for block in range(NUM_BLOCKS * pp // layout.pp, NUM_BLOCKS * (pp + 1) // layout.pp):
        add(f"blocks.{block}.norm", (0, HIDDEN), writes=tp == 0)
        for part in ("q", "k", "v", "conv"):
            add(f"blocks.{block}.{part}", share(f"blocks.{block}.{part}"))
        add(f"blocks.{block}.out", (0, HIDDEN), share(f"blocks.{block}.out", 1))
    if first and layout.ep:
        edp, ep = divmod(dp * layout.tp + tp, layout.ep)
        share_of = len(EXPERTS) // layout.ep
        for name in list(EXPERTS)[ep * share_of : (ep + 1) * share_of]:
            add(name, (0, shapes[name][0]), part=(edp, layout.dp * layout.tp // layout.ep))
    if last:
        add("final_norm", (0, HIDDEN), writes=tp == 0)
        add("embedding", share("embedding"), writes=False)  # the head's copy of a tied embedding; another tensor
    return shards


def wrong_shards(shards: list[Shard], layout: Layout, rank: int, version: int = 0) -> list[str]:
    """Names of shards that are not bitwise what they must be."""
    right = shards_of(layout, rank, filled=True, version=version)
    return [
        f"{kind}/{have.name}@{have.where.offset}"
        for have, want in zip(shards, right, strict=True)
        for kind in have.tensors
        if not torch.equal(have.tensors[kind], want.tensors[kind])
    ]


def save_one(root: Path, step: int, shards: list[Shard]) -> Path:
    """Checkpoint `step` of one process; returns its directory."""
    store = CheckpointStore(root, Group.single("world"), CheckpointConfig(asynchronous=False, keep_last=9))
    store.save(step, shards, {"tokens": step}, tokens=step, score=1.5)
    return root / f"step_{step:08d}"


def two_pieces(value: float) -> list[Shard]:
    """The tensor "master/w" [5, 3], all of `value`, in rows 0:2 and 2:5."""
    data = torch.full((5, 3), value)
    return [
        Shard(Rectangle("w", (5, 3), (low, 0), (high - low, 3)), {"master": data[low:high]})
        for low, high in ((0, 2), (2, 5))
    ]
