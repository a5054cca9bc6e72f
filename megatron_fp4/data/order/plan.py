"""Which source gives sample n, for the whole run: phases, blends, what was read before, what is skipped.

The run is a list of segments; a segment is (first sample id, integer weights, cursor of every source at its
beginning). A phase boundary or a blend changed at a restart starts a segment whose cursors are what the past consumed,
so nothing is repeated and nothing is lost, whatever the new weights are. The plan is small and JSON-able: it goes
into the checkpoint and into the ledger, and it alone explains the order.

Two numbers: a sample's `id` is its place in the order before skipping; its `index` counts delivered samples only.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.config import PhaseConfig
from megatron_fp4.data.order.blend import BlendSchedule, integer_weights


@dataclass(frozen=True)
class Segment:
    """From sample `first` on: sources with integer weights, and how many samples of each were consumed before."""

    first: int
    phase: str
    sources: tuple[str, ...]
    weights: tuple[int, ...]
    cursors: dict[str, int]
    schedule: BlendSchedule = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", BlendSchedule(self.weights))

    def cursors_at(self, sample: int) -> dict[str, int]:
        """Consumed samples of every source after samples first .. sample-1 of this segment."""
        counts = self.schedule.counts(sample - self.first)
        taken = {n: self.cursors.get(n, 0) + int(c) for n, c in zip(self.sources, counts, strict=True)}
        return {**self.cursors, **taken}

    def at_most(self, sample: int) -> dict[str, int]:
        """Bounds of `cursors_at`, not more than one sample above it, without working out the schedule."""
        taken, total = sample - self.first, sum(self.weights)
        most = {
            n: self.cursors.get(n, 0) - (-taken * w // total) for n, w in zip(self.sources, self.weights, strict=True)
        }
        return {**self.cursors, **most}

    def describe(self, seq_length: int) -> str:
        """One line: name, first token of the order, share of every source."""
        total = sum(self.weights)
        shares = ", ".join(f"{name} {w / total:.6g}" for name, w in zip(self.sources, self.weights, strict=True))
        return f"data phase {self.phase!r} from token {self.first * seq_length:,} on: {shares}"

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "phase": self.phase,
            "sources": list(self.sources),
            "weights": list(self.weights),
            "cursors": dict(self.cursors),
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Segment:
        return Segment(
            value["first"],
            value["phase"],
            tuple(value["sources"]),
            tuple(value["weights"]),
            dict(value["cursors"]),
        )


class Plan:
    """The global sample order of a run. `segments` ascend by `first`; `skip`: disjoint ascending [first, end) ids."""

    def __init__(self, segments: Sequence[Segment], skip: Sequence[Sequence[int]] = ()) -> None:
        self.segments = list(segments)
        self.skip = merge_ranges(skip)

    @staticmethod
    def from_config(
        phases: Sequence[PhaseConfig],
        sizes: dict[str, int],
        seq_length: int,
        skip: Sequence[Sequence[int]] = (),
    ) -> Plan:
        """`sizes`: samples in one epoch of each source, the weights of a phase that gives none."""
        segments: list[Segment] = []
        tokens, cursors = 0, dict.fromkeys(sizes, 0)
        for phase in phases or [PhaseConfig(name="all")]:
            first = -(-tokens // seq_length)  # a sample that straddles the boundary belongs to the earlier phase
            if segments:
                cursors = segments[-1].cursors_at(first)
            segments.append(Segment(first, phase.name, tuple(sizes), _weights(phase, sizes), cursors))
            tokens += phase.tokens
        return Plan(segments, skip)

    def continued(self, new: Plan, at_id: int) -> Plan:
        """This plan's past up to sample `at_id`, then the new plan's blends and skips, from this plan's cursors."""
        kept = [segment for segment in self.segments if segment.first < at_id]
        coming = [segment for segment in new.segments if segment.first >= at_id]
        current = [segment for segment in new.segments if segment.first < at_id][-1:]
        same = kept and current and (kept[-1].sources, kept[-1].weights) == (current[0].sources, current[0].weights)
        starts = coming if same else [*current, *coming]
        for segment in starts:
            first = max(segment.first, at_id)
            cursors = dict.fromkeys(segment.sources, 0) | (kept[-1].cursors_at(first) if kept else {})
            kept.append(Segment(first, segment.phase, segment.sources, segment.weights, cursors))
        skip = [[a, min(b, at_id)] for a, b in self.skip if a < at_id]
        skip += [[max(a, at_id), b] for a, b in new.skip if b > at_id]
        return Plan(kept, skip)

    def ids(self, first_index: int, num_samples: int) -> NDArray[np.int64]:
        """Ids of the delivered samples first_index .. + num_samples, skipped ids left out."""
        out = np.arange(first_index, first_index + num_samples, dtype=np.int64)
        for begin, end in self.skip:  # ascending, so that each shift is seen by the later ranges
            out[out >= begin] += end - begin
        return out

    def id_of(self, index: int) -> int:
        """The id of delivered sample `index`."""
        return int(self.ids(index, 1)[0])

    def index_of(self, sample_id: int) -> int:
        """Delivered samples before `sample_id`: the inverse of `id_of`."""
        return sample_id - sum(max(0, min(end, sample_id) - begin) for begin, end in self.skip)

    def locate(self, ids: NDArray[np.int64]) -> list[tuple[str, int]]:
        """(source name, number of the sample in that source's own order) of each id."""
        firsts = np.array([segment.first for segment in self.segments])
        owners = np.searchsorted(firsts, ids, side="right") - 1
        out: list[tuple[str, int]] = [("", 0)] * len(ids)
        for number in np.unique(owners):
            segment, rows = self.segments[number], np.flatnonzero(owners == number)
            sources, ranks = segment.schedule.locate(ids[rows] - segment.first)
            for row, source, rank in zip(rows.tolist(), sources.tolist(), ranks.tolist(), strict=True):
                name = segment.sources[source]
                out[row] = (name, segment.cursors.get(name, 0) + rank)
        return out

    def segment_of(self, sample_id: int) -> int:
        """Number of the segment that holds the sample."""
        return bisect.bisect_right([segment.first for segment in self.segments], sample_id) - 1

    def cursors_at(self, sample_id: int) -> dict[str, int]:
        """Samples of every source among the ids before `sample_id` (skipped ones count as used up)."""
        return self.segments[self.segment_of(sample_id)].cursors_at(sample_id)

    def most_cursors_at(self, sample_id: int) -> dict[str, int]:
        """Bounds of `cursors_at`, see `Segment.at_most`."""
        return self.segments[self.segment_of(sample_id)].at_most(sample_id)

    def to_json(self) -> dict[str, Any]:
        return {"segments": [s.to_json() for s in self.segments], "skip": [list(r) for r in self.skip]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Plan:
        return Plan([Segment.from_json(s) for s in value["segments"]], value["skip"])


def merge_ranges(ranges: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Union of [first, end) ranges as disjoint ascending ones."""
    out: list[tuple[int, int]] = []
    for begin, end in sorted((int(a), int(b)) for a, b in ranges):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def _weights(phase: PhaseConfig, sizes: dict[str, int]) -> tuple[int, ...]:
    unknown = sorted(set(phase.weights) - set(sizes))
    if unknown:
        raise ValueError(f"phase {phase.name!r} weighs unknown sources {unknown}; the sources are {sorted(sizes)}")
    if phase.weights:
        try:
            return integer_weights([float(phase.weights.get(name, 0.0)) for name in sizes])
        except ValueError as error:
            raise ValueError(f"phase {phase.name!r}, sources {list(sizes)}: {error}") from None
    return integer_weights([max(1, size) for size in sizes.values()])
