"""A plan as pictures: memory by kind per pipeline rank, where the time of a step goes and in which order, days by GPUs.

All is drawn from the report alone (`plan --plot` adds the section `plot`), so a stored one can be drawn later.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.page import as_svg, write_page
from megatron_fp4.planning.cost.time import KINDS

COLORS = {"F": "C0", "B": "C1", "W": "C2"}
WORK = {"F": "forward", "B": "backward", "W": "weight gradients"}


def write_plan(report: Mapping[str, Any], text: str, path: Path) -> None:
    """A PNG of all pictures, or a page with them and the plan's text, by the ending of `path`."""
    if path.suffix == ".html":
        run = report["run"]
        title = (
            f"plan: {run['gpus']} {report['time']['gpu']}, tp {run['tp']} pp {run['pp']} cp {run['cp']} dp {run['dp']}"
        )
        plots = ['<div class="plots">', *plan_plots(report), "</div>"]
        has_tables = "roofline" in report or "timeline" in report["pipeline"]
        style = "" if has_tables else " style='white-space: pre-wrap'"
        write_page(title, [*plots, f"<pre{style}>{html.escape(text)}</pre>"], path)
        return
    panels = _panels(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(panels, (5.4 * len(panels), 4.8), path, dpi=120)


def plan_plots(report: Mapping[str, Any]) -> list[str]:
    """Each picture as an SVG element."""
    return [as_svg(partial(_save, [panel], (6, 4.2))) for panel in _panels(report)]


def _panels(report: Mapping[str, Any]) -> list[Callable[[Any], None]]:
    drawn = report.get("plot", {})
    panels: list[Callable[[Any], None]] = [
        partial(_draw_memory, memory=report["memory_per_rank"]),
        partial(_draw_step, time=report["time"]),
    ]
    if drawn.get("timeline"):
        panels.append(partial(_draw_timeline, timeline=drawn["timeline"], seconds=report["time"]["compute"]))
    if drawn.get("scaling"):
        panels.append(partial(_draw_scaling, scaling=drawn["scaling"], asked=report["run"]["gpus"]))
    return panels


def _save(panels: Sequence[Callable[[Any], None]], size: tuple[float, float], out: Any, **how: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "plan"}):
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
        for panel, one in zip(panels, axes[0], strict=True):
            panel(one)
        figure.tight_layout()
        figure.savefig(out, **how)
        plt.close(figure)


def _draw_memory(axes: Any, memory: Mapping[str, Any]) -> None:
    ranks = memory["pipeline_ranks"]
    below = [0.0] * len(ranks)
    for kind in ranks[0]["bytes"]:
        heights = [rank["bytes"][kind] / 1e9 for rank in ranks]
        axes.bar(range(len(ranks)), heights, bottom=below, label=kind)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    gpu = memory["gpu_bytes"] / 1e9
    axes.set(title=f"memory (the GPU has {gpu:.0f} GB)", xlabel="pipeline rank", ylabel="GB")
    axes.set(xticks=range(0, len(ranks), -(-len(ranks) // 16)), xlim=(-0.7, len(ranks) - 0.3))
    if max(below) > 0.5 * gpu:
        axes.axhline(gpu, color="black", linewidth=0.8)
    axes.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_step(axes: Any, time: Mapping[str, Any]) -> None:
    """The terms one after the other, which is the worst case; the lines say what is expected, and bytes alone."""
    begin = 0.0
    terms = {name: 1e3 * seconds for name, seconds in time["terms"].items() if seconds}
    for row, width in enumerate(terms.values()):
        axes.barh(row, width, left=begin)
        begin += width
    texts = [f"{name} {width:.3g}" if width < 1e3 else f"{name} {width:,.0f}" for name, width in terms.items()]
    axes.set_yticks(range(len(terms)), texts, fontsize=7)
    axes.invert_yaxis()
    for kind, style in (("hidden", ":"), ("exposed", "--"), ("expected", "-")):
        axes.axvline(1e3 * time["step_seconds"][kind], color="black", linestyle=style, linewidth=0.8, label=kind)
    axes.set(title=f"a step on {time['gpu']}, one term after the other", xlabel="ms")
    axes.legend(frameon=False, fontsize=7)


def _draw_timeline(axes: Any, timeline: Any, seconds: Mapping[str, float]) -> None:
    """What each pipeline rank computes when, as if stages were equal; pixels, for there may be thousands of boxes."""
    edge = 0.2 if len(timeline[0]) < 100 else 0.0  # white edges of narrow boxes would be all that one sees
    unit = 1e3 * seconds["step_seconds"] / max(entry["end"] for entries in timeline for entry in entries)
    for kind, color in COLORS.items():
        for rank, entries in enumerate(timeline):
            boxes = [
                (unit * one["begin"], unit * (one["end"] - one["begin"])) for one in entries if one["kind"] == kind
            ]
            style = {"facecolor": color, "edgecolor": "white", "linewidth": edge, "rasterized": True}
            axes.broken_barh(boxes, (rank - 0.4, 0.8), **style)
        if any(one["kind"] == kind for one in timeline[0]):
            axes.plot([], [], color=color, linewidth=5, label=WORK[kind])
    axes.set(yticks=range(0, len(timeline), -(-len(timeline) // 16)))
    axes.invert_yaxis()
    axes.set(title="products of a step by pipeline rank, stages taken as equal", xlabel="ms", ylabel="pipeline rank")
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_scaling(axes: Any, scaling: Any, asked: int) -> None:
    gpus = [one["gpus"] for one in scaling]
    for kind in KINDS:
        axes.plot(gpus, [one["days"][kind] for one in scaling], marker=".", label=kind)
    axes.axvline(asked, color="black", linewidth=0.6)
    axes.set(title="this layout with more or fewer data-parallel ranks", xlabel="GPUs", ylabel="days")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
