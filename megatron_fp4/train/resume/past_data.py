"""Which settings of the data say something else about samples that were read before a checkpoint.

A blend or a skip that only begins later may change at a resume: what was read stays as it was, and nothing is repeated
(data/order/plan.py, `Plan.continued`). So a change is judged by what it says of the ids before the resumed sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_fp4.data.order.plan import Plan, merge_ranges


def past_changes(state: Mapping[str, Any], saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """The entries of data.phases and data.skip that differ before the resumed sample.

    state: of the training loader, in the checkpoint. saved, configured: the section `data`, as JSON values.
    """
    plan, length = Plan.from_json(state["plan"]), state["seq_length"]
    end = plan.id_of(state["consumed_samples"])
    past = [
        {
            "data.phases": _blends(data.get("phases", []), length, end),
            "data.skip": merge_ranges([(first, min(stop, end)) for first, stop in data.get("skip", []) if first < end]),
        }
        for data in (saved, configured)
    ]
    return [key for key, value in past[0].items() if value != past[1][key]]


def _blends(phases: Sequence[Mapping[str, Any]], seq_length: int, end: int) -> list[tuple[int, dict[str, float]]]:
    """(first sample id, weights) of the blends that hold before sample `end`."""
    blends: list[tuple[int, dict[str, float]]] = []
    tokens = 0
    for phase in phases or [{}]:
        first, weights = -(-tokens // seq_length), dict(phase.get("weights", {}))
        if first < end and (not blends or blends[-1][1] != weights):
            blends.append((first, weights))
        tokens += phase.get("tokens", 0)
    return blends
