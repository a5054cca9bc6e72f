"""Parallel layouts as text: `tp2 pp2 dp2`, `pp4:zbv`, `tp2 pp2v3:interleaved_1f1b`, `tp2 ep4`.

A layout is written as it is spoken. Axes that are not named have size 1, but for dp, which is the smallest that `ep`
divides into; what follows the colon is the pipeline schedule, and `v3` after the pipeline size means three stages per
rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_fp4.comm.config import Overlap, ParallelConfig
from megatron_fp4.pipeline.schedules import schedule_rule, stages_per_rank

_AXIS = re.compile(r"(tp|pp|cp|dp|ep)([1-9]\d*)(?:v([1-9]\d*))?")


@dataclass(frozen=True)
class Layout:
    """A layout and how it was written."""

    name: str
    parallel: ParallelConfig

    @property
    def world_size(self) -> int:
        return self.parallel.smallest_world

    @property
    def num_stages(self) -> int:
        return self.parallel.pp * stages_per_rank(self.parallel)


def with_overlap(layout: Layout, setting: Overlap) -> Layout:
    """The layout with the overlap of tensor parallelism that `setting` means on GPUs, where it can have any."""
    if layout.parallel.tp == 1 or schedule_rule(layout.parallel.schedule).defers_wgrad:
        return layout
    overlap = Overlap.never if setting is Overlap.never else Overlap.always
    return replace(layout, parallel=replace(layout.parallel, overlap_tensor=overlap))


def parse_layouts(text: str) -> list[Layout]:
    """Layouts separated by commas. Raises ValueError for text that is no layout."""
    parts = [" ".join(part.split()) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"layouts {text!r}: empty entry; write for example 'tp2 pp2 dp2, pp4:zbv'")
    return [parse_layout(part) for part in parts]


def parse_layout(text: str) -> Layout:
    """One layout. Raises ValueError for text that is none, or whose stages do not suit its schedule."""
    axes, _, schedule = text.partition(":")
    sizes: dict[str, int] = {}
    virtual_stages = 0
    for word in axes.split():
        match = _AXIS.fullmatch(word)
        if match is None or match[1] in sizes or (match[3] and match[1] != "pp"):
            raise ValueError(
                f"layout {text!r}: {word!r} is not an axis, or names one twice; write for example 'tp2 pp2 dp2',"
                " 'cp2 dp2', 'tp2 ep4', 'pp4:zbv' or 'pp2v3:interleaved_1f1b'"
            )
        sizes[match[1]] = int(match[2])
        virtual_stages = int(match[3]) if match[3] else virtual_stages
    parallel = ParallelConfig(
        tp=sizes.get("tp", 1),
        pp=sizes.get("pp", 1),
        cp=sizes.get("cp", 1),
        dp=sizes.get("dp", 0),
        ep=sizes.get("ep", 1),
        virtual_stages=virtual_stages,
    )
    parallel = replace(parallel, dp=parallel.resolve_dp(parallel.smallest_world))
    if schedule:
        parallel = replace(parallel, schedule=schedule.strip())
    stages_per_rank(parallel)
    return Layout(text, parallel)
