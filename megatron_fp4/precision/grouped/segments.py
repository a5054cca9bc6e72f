"""Which rows belong to which expert: sorted rows, cut into segments.

A segment is what one source (a microbatch, or a chunk of token addresses) has sent to one expert. Its start and stop
are integers on the host, because they shape GEMMs. `Padding` is where the rows lie once each segment has zeros behind
it, up to a multiple: Hadamard groups and scales along the tokens then never mix two segments.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowSegment:
    """Rows [start, stop) belong to the local expert `expert`; never empty."""

    expert: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Segments:
    """The segments of `num_rows` rows, ordered by expert and then by source.

    Rows of no segment (behind the last one, or in between, where a buffer has a fixed capacity) are nobody's: nothing
    reads them, and what is computed for them is zero. Raises ValueError for empty, overlapping or unordered segments.
    """

    parts: tuple[RowSegment, ...]
    num_rows: int
    _kept: dict[Hashable, Tensor | Padding] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        ends = [0, *(end for part in self.parts for end in (part.start, part.stop)), self.num_rows]
        empty = any(part.num_rows < 1 for part in self.parts)
        unordered = any(first.expert > second.expert for first, second in pairwise(self.parts))
        if empty or unordered or ends != sorted(ends):
            raise ValueError(f"segments {self.parts} of {self.num_rows} rows are empty, overlap or are out of order")

    @staticmethod
    def of_counts(counts: Sequence[Sequence[int]]) -> Segments:
        """counts[expert][source]: rows, which lie in this order and without gaps; 0: no segment."""
        parts, start = [], 0
        for expert, of_sources in enumerate(counts):
            for count in of_sources:
                if count:
                    parts.append(RowSegment(expert, start, start + count))
                start += count
        return Segments(tuple(parts), start)

    @property
    def dense(self) -> bool:
        """Whether every row belongs to a segment."""
        return sum(part.num_rows for part in self.parts) == self.num_rows

    def joined(self) -> Segments:
        """One segment per expert, from the first of its rows to the last; of dense ones."""
        parts: dict[int, RowSegment] = {}
        for part in self.parts:
            first = parts.get(part.expert, part)
            parts[part.expert] = RowSegment(part.expert, first.start, part.stop)
        return Segments(tuple(parts.values()), self.num_rows)

    def owners(self, device: torch.device, lines: int = 1) -> Tensor:
        """Position in `parts` of what each `lines` consecutive rows belong to; int64. Dense, of multiples of `lines`
        only."""
        key = ("owners", device, lines)
        if key not in self._kept:
            counts = torch.tensor([part.num_rows // lines for part in self.parts], dtype=torch.int64)
            owners = torch.arange(len(self.parts)).repeat_interleave(counts)
            self._kept[key] = owners.to(device, non_blocking=True)
        kept = self._kept[key]
        assert isinstance(kept, Tensor)
        return kept

    def experts(self, device: torch.device) -> Tensor:
        """The local expert of each row, int64 `[R]`; 0 for rows of no segment."""
        key = ("experts", device)
        if key not in self._kept:
            counts = torch.tensor([part.num_rows for part in self.parts], dtype=torch.int64)
            numbers = torch.tensor([part.expert for part in self.parts], dtype=torch.int64)
            experts = torch.zeros(self.num_rows, dtype=torch.int64)
            experts[_ranges([(part.start, part.num_rows) for part in self.parts])] = numbers.repeat_interleave(counts)
            self._kept[key] = experts.to(device, non_blocking=True)
        kept = self._kept[key]
        assert isinstance(kept, Tensor)
        return kept

    def padded(self, multiple: int, device: torch.device) -> Padding:
        """The same segments, each with room up to a multiple of `multiple` rows, and without gaps."""
        key = ("padded", device, multiple)
        if key not in self._kept:
            self._kept[key] = Padding.of(self, multiple, device)
        kept = self._kept[key]
        assert isinstance(kept, Padding)
        return kept


@dataclass(frozen=True, eq=False)
class Padding:
    """Where the rows of `Segments` lie in a tensor in which each segment is extended by zeros.

    segments: the extended ones. source, target: int64, which row `source[i]` becomes row `target[i]`; None: all rows
    stay where they are. last, behind: int64, of each row of zeros the last row of its segment, and how far behind it
    it is.
    """

    segments: Segments
    multiple: int
    source: Tensor | None
    target: Tensor | None
    last: Tensor | None
    behind: Tensor | None

    @staticmethod
    def of(segments: Segments, multiple: int, device: torch.device) -> Padding:
        extended, start = [], 0
        for part in segments.parts:
            stop = start + -(-part.num_rows // multiple) * multiple
            extended.append(RowSegment(part.expert, start, stop))
            start = stop
        larger = Segments(tuple(extended), start)
        if larger.parts == segments.parts and start == segments.num_rows:
            return Padding(larger, multiple, None, None, None, None)
        pairs = list(zip(segments.parts, extended, strict=True))
        spare = [new.num_rows - old.num_rows for old, new in pairs]
        source = _ranges([(old.start, old.num_rows) for old, _ in pairs])
        target = _ranges([(new.start, old.num_rows) for old, new in pairs])
        last = torch.tensor([old.stop - 1 for old, _ in pairs], dtype=torch.int64)
        last = last.repeat_interleave(torch.tensor(spare, dtype=torch.int64))
        behind = _ranges([(0, count) for count in spare])
        on_device = (index.to(device, non_blocking=True) for index in (source, target, last, behind))
        return Padding(larger, multiple, *on_device)

    def rows(self, x: Tensor, columns: int = 1) -> Tensor:
        """`x [R, C]` in the extended layout, contiguous, with zeros up to a multiple of `columns` at the right."""
        right = -x.shape[1] % columns
        if self.source is None or self.target is None:
            return F.pad(x, (0, right)) if right else x.contiguous()
        larger = x.new_zeros(self.segments.num_rows, x.shape[1] + right)
        larger[:, : x.shape[1]].index_copy_(0, self.target, x[self.source])
        return larger

    def addresses(self, index: Tensor) -> Tensor:
        """Noise addresses `[R]` in the extended layout; the rows of zeros have those of `padded.padded_index`."""
        if self.source is None or self.target is None or self.last is None or self.behind is None:
            return index
        larger = index.new_empty(self.segments.num_rows)
        larger.index_copy_(0, self.target, index[self.source])
        zeros = torch.ones_like(larger, dtype=torch.bool).index_fill_(0, self.target, False)
        return larger.masked_scatter_(zeros, -1 - index[self.last] * self.multiple - self.behind)


def _ranges(ranges: Sequence[tuple[int, int]]) -> Tensor:
    """(first, count) of consecutive numbers, one range after the other; int64."""
    counts = torch.tensor([count for _, count in ranges], dtype=torch.int64)
    firsts = torch.tensor([first for first, _ in ranges], dtype=torch.int64)
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (firsts - before).repeat_interleave(counts)
