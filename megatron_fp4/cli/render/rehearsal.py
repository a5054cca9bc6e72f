"""The report of a rehearsal as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MEMORY = 0.03
"""Part by which the peak may differ from the plan's."""
TRAFFIC = 0.01
"""Part by which the bytes of an axis may differ from the plan's."""
BETWEEN_STEPS = {
    "evaluation": "evaluation of two microbatches",
    "first_save": "copy of the first save",
    "later_save": "copy of a later save",
    "measured_step": "step that is logged, with its statistics",
}
CROSSINGS = {"copies_in": "copies in", "copies_out": "copies out", "read_backs": "read-backs"}

EXPERTS = ("layers/moe/dispatch.py", "precision/grouped/")
"""Where mixtures of experts learn how many rows they have."""


def render(report: Mapping[str, Any]) -> str:
    """The report of `planning.rehearsal.report.rehearse`, one rank after the other, and the verdict."""
    counts = report["microbatches"]
    lines = [
        *([report["backend"]["reason"]] if report["backend"]["reason"] else []),
        f"{report['gpus']} GPUs; the second step of each rank is told",
        f"modelled: {'; '.join(report['modelled'])}",
    ]
    if counts["rehearsed"] < counts["in_run"]:
        lines.append(
            f"{counts['rehearsed']} of the {counts['in_run']} microbatches of a step are rehearsed, and planned here:"
            " the others repeat the last but one"
        )
    for entry in report["ranks"]:
        lines += _rank(entry)
    return "\n".join([*lines, "", *(deviations(report) or ["verdict: as planned"])])


def deviations(report: Mapping[str, Any]) -> list[str]:
    """One line for everything that is not as planned."""
    lines = [
        f"NOT AS PLANNED: rank {entry['rank']}: {text}" for entry in report["ranks"] for text in _deviations(entry)
    ]
    return [*lines, *(f"DEADLOCK: {text}" for text in report["waiting_for_ever"])]


def _deviations(entry: Mapping[str, Any]) -> Iterator[str]:
    memory = entry["memory"]
    owners = "matrices" in entry["messages"]["axes"]  # planned is what the one with most to hold needs
    less = memory["plan"] - memory["peak"]
    if abs(less) > MEMORY * memory["peak"] and not (owners and less > 0):
        yield f"memory {_beside(memory['peak'], memory['plan'])}"
    for axis, sent in entry["messages"]["axes"].items():
        if axis == "matrices" and sent["measured"] <= sent["plan"]:  # which is that of the busiest rank
            continue
        if axis != "others" and abs(sent["plan"] - sent["measured"]) > TRAFFIC * max(sent.values()):
            yield f"{axis} traffic {_beside(sent['measured'], sent['plan'])}"

    for name, section in (("step", entry), ("evaluation", entry.get("evaluation", {}))):
        counts = _beside_experts(section.get("read_backs", {}))
        if sum(counts.values()) > 1:
            yield f"read-backs in the {name}: {_places(counts)}; one is enough, each other one drains the queue"
    copies_in = _beside_experts(entry["copies_in"])
    if sum(copies_in.values()) > 1:
        yield f"copies in: {_places(copies_in)}; the batch is one"


def _beside_experts(counts: Mapping[str, int]) -> dict[str, int]:
    """Without the numbers of rows that mixtures of experts read back, and the indices made of them: one of each for a
    mixture and microbatch, as long as the shapes of products are made on the host."""
    return {place: count for place, count in counts.items() if not place.startswith(EXPERTS)}


def _rank(entry: Mapping[str, Any]) -> list[str]:
    peak = entry["memory"]["peak"]
    place = ", ".join(f"{name} {rank}" for name, rank in entry["place"].items())
    return [
        "",
        f"rank {entry['rank']} ({place}): rehearsed in {entry['seconds']:.0f} s,"
        f" {entry['processor_seconds']:.0f} s of the processor",
        *_crossings("copies in", entry["copies_in"]),
        *_crossings("read-backs", entry["read_backs"]),
        *_memory(entry["memory"]),
        *(f"  above 1 GB: {e['tensor']} at {e['origin']}, {e['count']} x" for e in entry["large_tensors"]),
        *_messages(entry["messages"]),
        *_kernels(entry["kernels"]),
        *(
            line
            for name, title in BETWEEN_STEPS.items()
            if name in entry
            for line in _between(title, entry[name], peak)
        ),
    ]


def _between(title: str, section: Mapping[str, Any], peak_of_step: float) -> list[str]:
    first = f"  {title}: peak {_gb(section['peak'])} GB"
    if section["peak"] > peak_of_step:
        first += f", {_gb(section['peak'] - peak_of_step)} above that of the second step"
    if "save" in title:
        pinned = f"{_gb(section['pinned_bytes'])} GB" if section["pinned_bytes"] else "none"
        first += f"; {_gb(section['bytes_out'])} GB to the host, where pinned memory is taken: {pinned}"
    crossings = ((words, section[name]) for name, words in CROSSINGS.items())
    return [first, *(f"    {words}: {_places(counts)}" for words, counts in crossings if counts)]


def _places(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {origin}" for origin, count in counts.items())


def _crossings(name: str, counts: Mapping[str, int]) -> list[str]:
    return [f"  {name}: {sum(counts.values())}", *(f"    {count:>6} x {origin}" for origin, count in counts.items())]


def _memory(section: Mapping[str, Any]) -> list[str]:
    return [
        f"  memory: peak {_beside(section['peak'], section['plan'])}, at {section['at']}",
        *(
            f"    {kind:<28} {_gb(sizes['measured']):>9} planned {_gb(sizes['plan']):>9}"
            for kind, sizes in section["kinds"].items()
            if any(sizes.values())
        ),
        *(f"      {_gb(size):>9} from {holder}" for holder, size in section["holders"].items()),
    ]


def _messages(section: Mapping[str, Any]) -> list[str]:
    return [
        "  sent, GB:",
        *(
            f"    {axis:<10} {_gb(sent['measured']):>9} planned {_gb(sent['plan']):>9}"
            for axis, sent in section["axes"].items()
            if any(sent.values())
        ),
        *(
            f"      {e['phase']:<17} {e['group']:<6} of {e['ranks']:>5}: {e['count']:>6} x {e['kind']:<20}"
            f" {_gb(e['sent']):>9}"
            for e in section["collectives"]
        ),
    ]


def _kernels(section: Mapping[str, Any]) -> list[str]:
    calls = section["calls"]
    parts = [
        f"    {part:<12} {count:>7}"
        + (f" in {calls[part]} calls, {count / calls[part]:.0f} each" if part in calls else "")
        for part, count in section["by_part"].items()
    ]
    return [
        f"  kernels: {section['total']}, of them {section['gemms']} products and {section['compiled_stages']} compiled"
        " stages",
        *parts,
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3f}" if size >= 1e6 else f"{size / 1e9:.6f}"


def _beside(measured: float, planned: float) -> str:
    difference = f"{planned / measured - 1:+.1%}" if measured else "nothing was measured"
    return f"{_gb(measured)} GB, planned {_gb(planned)} ({difference})"
