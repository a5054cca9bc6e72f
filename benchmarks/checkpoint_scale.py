"""What a checkpoint of a real layout costs beside its bytes, on thousands of ranks that are not there.

    python -m benchmarks.checkpoint_scale --ranks 128 512 2048 8192 --tp 8

The optimizer's own code divides the model (the 12B hybrid) among the ranks, on the meta device. What each rank does
alone is timed on rank 0; what rank 0 does with what all ranks say is timed as a whole. Not in it: the network, and the
bytes of the tensors.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fp4.checkpoint.commit import seal
from megatron_fp4.checkpoint.marks import Marks
from megatron_fp4.checkpoint.pieces.layout import file_name, ranks_per_file
from megatron_fp4.checkpoint.pieces.plan import (
    Part,
    SaveLayout,
    in_writing_order,
    layout_signature,
    own_layout,
    planned_by_rank0,
)
from megatron_fp4.checkpoint.pieces.stored import Description
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.rect import Shard
from megatron_fp4.optim.layout import Bucket
from megatron_fp4.planning.division import drawn_buckets
from megatron_fp4.storage.durable import FileRecord, read_manifest
from megatron_fp4.train.checked import check_config

KINDS = ("master", "exp_avg", "exp_avg_sq")
HEADER = (
    "| ranks | pieces | gathered | layout.bin | first save: a rank, rank 0 | later saves: rank 0 | load: each rank"
    " | files |\n|---|---|---|---|---|---|---|---|"
)


class Watch:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now, last = time.perf_counter(), self._last
        self._last = now
        return now - last


def buckets_of(experiment: str, num_ranks: int, tp: int) -> list[list[Bucket]]:
    """The buckets of each tensor-parallel rank."""
    overrides = [f"experiment={experiment}", f"parallel.tp={tp}", 'data.tokenizer=""']
    overrides.append(f"train.global_batch={num_ranks // tp}")
    checked = check_config(to_run_config(compose_config(overrides)), num_ranks)
    return [drawn_buckets(checked, num_ranks, rank) for rank in range(tp)]


def shards_of(buckets: Sequence[Bucket], tp_rank: int, dp_rank: int) -> Iterator[Shard]:
    """What the rank's optimizer saves, as the optimizer says it (optim/zero1.py), without values."""
    for bucket in buckets:
        for piece in bucket.pieces(dp_rank):
            placement = piece.slot.placement
            writes = placement.writes and (not placement.tp_replicated or tp_rank == 0)
            for where in placement.elements(piece.start, piece.stop):
                yield Shard(where, {kind: torch.empty(where.shape, device="meta") for kind in KINDS}, writes)


def measure(experiment: str, num_ranks: int, tp: int) -> str:
    """A row of the table."""
    buckets = buckets_of(experiment, num_ranks, tp)
    descriptions = []
    for rank in range(num_ranks):
        shards = list(shards_of(buckets[rank % tp], rank % tp, rank // tp))
        watch = Watch()
        written = in_writing_order(shards)
        signature = layout_signature(written)
        descriptions.append(own_layout(written).encode())
        if rank == 0:
            on_a_rank, first = watch.lap(), signature
    watch = Watch()
    content, places = planned_by_rank0(descriptions)
    planning = watch.lap()
    per_file = ranks_per_file(num_ranks)
    parts = tuple(Part(file_name(rank // per_file), *place) for rank, place in enumerate(places))
    layout = SaveLayout(first, parts[0], content, parts)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        marks = Marks(dist.HashStore(), "save", num_ranks)
        for rank, part in enumerate(parts):
            marks.leave(rank, FileRecord(part.num_bytes, f"{rank:016x}", part.start))
        watch.lap()
        records = marks.collect()
        assert records is not None
        seal(directory, 1, layout, b"{}", records)
        later = watch.lap()
        manifest = read_manifest(directory)
        watch.lap()
        description = Description(manifest, "layout.bin", content)
        pieces = description.parsed(directory)
        loading = watch.lap()
        num_files = len(manifest.files) + 1
    return (
        f"| {num_ranks:,} | {pieces.layout.num_pieces:,} | {sum(map(len, descriptions)) / 1e6:.1f} MB"
        f" | {len(content) / 1e3:,.0f} kB | {on_a_rank:.3f} s, {planning:.2f} s | {later:.3f} s | {loading:.2f} s"
        f" | {num_files} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--experiment", default="paper_12b_10t")
    args = parser.parse_args()
    print(HEADER)
    for num_ranks in args.ranks:
        print(measure(args.experiment, num_ranks, args.tp), flush=True)


if __name__ == "__main__":
    main()
