"""A pipeline schedule as text: a line per pipeline rank, a cell per time slot.

A slot is one forward pass of a stage, and a cell names what a rank does in it (F3 is the forward of microbatch 3); what
takes two slots is named in the first. Lines end at the width of a page, with a note of what is left out: `plan --json
--schedule` has all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

WIDTH = 120
IDLE, CONTINUED = ".", "--"


def draw(timeline: Sequence[Sequence[Mapping[str, Any]]], width: int = WIDTH) -> list[str]:
    """Lines and legend. timeline: per rank, entries of kind, stage, microbatch, begin, end (`pipeline.order.Timed`)."""
    num_slots = max(entry["end"] for entries in timeline for entry in entries)
    rows = [_cells(entries, num_slots) for entries in timeline]
    heads = [f"  rank {rank} {_stages(entries)} " for rank, entries in enumerate(timeline)]
    margin = max(len(head) for head in heads)
    cell = 1 + max(len(text) for row in rows for text in row)
    shown = min(num_slots, max(1, (width - margin) // cell))
    lines = [
        (head.ljust(margin) + "".join(text.ljust(cell) for text in row[:shown])).rstrip()
        for head, row in zip(heads, rows, strict=True)
    ]
    if shown < num_slots:
        lines.append(f"  slots 1 to {shown} of {num_slots}; all of them: --schedule --json")
    return lines + _legend(timeline)


def _letter(stage: int, stages: Sequence[int]) -> str:
    """The name of a stage among those of its rank: a, b, ..; none where there is only one."""
    if len(stages) == 1:
        return ""
    number = stages.index(stage)
    return ascii_lowercase[number] if number < len(ascii_lowercase) else f"/{number}"


def _stages_of(entries: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({entry["stage"] for entry in entries})


def _stages(entries: Sequence[Mapping[str, Any]]) -> str:
    stages = _stages_of(entries)
    if len(stages) == 1:
        return f"stage {stages[0]}"
    return " ".join(f"{_letter(stage, stages)}={stage}" for stage in stages)


def _cells(entries: Sequence[Mapping[str, Any]], num_slots: int) -> list[str]:
    cells, stages = [IDLE] * num_slots, _stages_of(entries)
    for entry in entries:
        cells[entry["begin"]] = f"{entry['kind']}{entry['microbatch']}{_letter(entry['stage'], stages)}"
        for slot in range(entry["begin"] + 1, entry["end"]):
            cells[slot] = CONTINUED
    return cells


def _legend(timeline: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """What the cells mean, as far as it is drawn."""
    every = [entry for entries in timeline for entry in entries]
    has_split = any(entry["kind"] == "W" for entry in every)
    has_full = any(entry["kind"] == "B" and entry["end"] - entry["begin"] == 2 for entry in every)
    kinds = ["F forward"]
    if has_full:
        kinds.append(f"B {CONTINUED} backward")
    if has_split:
        kinds.append("B alone: gradients of inputs, W: of weights")
    letters = any(len(_stages_of(entries)) > 1 for entries in timeline)
    where = "microbatch, then the rank's stage" if letters else "microbatch"
    return [
        f"  {'; '.join(kinds)}; {IDLE} idle",
        f"  number: {where}; a slot is one forward pass of a stage",
    ]
