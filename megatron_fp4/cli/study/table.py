"""Tables of a study as text: cells, intervals in words."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.studies.intervals import Interval


def interval_text(interval: Interval | None, diverged: Sequence[int] = ()) -> str:
    """`+0.31 % (-0.10 to +0.72, Student)`."""
    if diverged:
        return f"diverged (seeds {', '.join(map(str, diverged))})"
    if interval is None:
        return "fewer than two pairs"
    return f"{interval.mean:+.2f} % ({interval.low:+.2f} to {interval.high:+.2f}, {interval.method})"


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
