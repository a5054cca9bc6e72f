"""A plan as a picture: memory by kind per pipeline rank, where the time of a step goes, days against GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fp4.planning.cost.time import KINDS


def write_plan(report: Mapping[str, Any], scaling: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG of three plots. report: that of `run_plan`. scaling: that of `strong_scaling`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"font.size": 9}):
        figure, (memory, step, days) = plt.subplots(1, 3, figsize=(16, 4.8))
        _draw_memory(memory, report["memory_per_rank"])
        _draw_step(step, report["time"])
        _draw_scaling(days, scaling, report["run"]["gpus"])
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _draw_memory(axes: Any, memory: Mapping[str, Any]) -> None:
    ranks = memory["pipeline_ranks"]
    below = [0.0] * len(ranks)
    for kind in ranks[0]["bytes"]:
        heights = [rank["bytes"][kind] / 1e9 for rank in ranks]
        axes.bar(range(len(ranks)), heights, bottom=below, label=kind)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(title=f"memory (the GPU has {memory['gpu_bytes'] / 1e9:.0f} GB)", xlabel="pipeline rank", ylabel="GB")
    axes.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _draw_step(axes: Any, time: Mapping[str, Any]) -> None:
    """The terms one after the other, which is the worst case; the lines say what is expected, and bytes alone."""
    begin = 0.0
    terms = {name: 1e3 * seconds for name, seconds in time["terms"].items() if seconds}
    for row, width in enumerate(terms.values()):
        axes.barh(row, width, left=begin)
        begin += width
    axes.set_yticks(range(len(terms)), [f"{name} {width:.1f}" for name, width in terms.items()], fontsize=7)
    axes.invert_yaxis()
    for kind, style in (("hidden", ":"), ("exposed", "--"), ("expected", "-")):
        axes.axvline(1e3 * time["step_seconds"][kind], color="black", linestyle=style, linewidth=0.8, label=kind)
    axes.set(title=f"a step on {time['gpu']}, one term after the other", xlabel="ms")
    axes.legend(frameon=False, fontsize=7)


def _draw_scaling(axes: Any, scaling: Sequence[Mapping[str, Any]], asked: int) -> None:
    gpus = [one["gpus"] for one in scaling]
    for kind in KINDS:
        axes.plot(gpus, [one["days"][kind] for one in scaling], marker=".", label=kind)
    axes.axvline(asked, color="black", linewidth=0.6)
    axes.set(title="this layout with more or fewer data-parallel ranks", xlabel="GPUs", ylabel="days")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
