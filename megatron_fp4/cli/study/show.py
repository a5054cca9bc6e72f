"""What a study says, as text and as a page: the claims first, then every gap with its interval, then the curves."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.page import as_svg, write_page
from megatron_fp4.cli.render.report.facts import table
from megatron_fp4.cli.study.gradients import gradient_table, gradients_as_markdown
from megatron_fp4.cli.study.table import as_table, interval_text
from megatron_fp4.storage.durable import write_durably
from megatron_fp4.studies.design import Quantity, Study
from megatron_fp4.studies.intervals import LEVEL, POWER
from megatron_fp4.studies.measures import ArmResult
from megatron_fp4.studies.outcome import ArmGap, JudgedClaim, StudyOutcome

SMOOTH = 20
"""Steps whose mean is drawn as one point of a curve of gaps."""


def as_markdown(outcome: StudyOutcome) -> str:
    """All of it, as a page of docs holds it."""
    study = outcome.study
    lines = [f"# {study.name}", "", study.question, "", *_design(study)]
    if outcome.missing:
        lines += ["", f"**Not complete**: {len(outcome.missing)} of {len(study.arms) * len(study.seeds)} runs missing."]
    lines += [*_claims(outcome), "", "## Gaps", "", *as_table(GAP_HEAD, [_gap_cells(gap) for gap in outcome.gaps])]
    if outcome.gradients:
        lines += ["", "## Gradients", "", *gradients_as_markdown(study, outcome.gradients)]
    return "\n".join([*lines, "", HOW_TO_READ]) + "\n"


def gradients_page(outcome: StudyOutcome) -> str:
    """What `--gradients` prints: the gradients, and every claim, those on losses too."""
    measured = gradients_as_markdown(outcome.study, outcome.gradients)
    return "\n".join([f"# {outcome.study.name}: gradients", "", *measured, *_claims(outcome)])


def _claims(outcome: StudyOutcome) -> list[str]:
    cells = [_claim_cells(one) for one in outcome.claims]
    return ["", "## Claims", "", *as_table(CLAIM_HEAD, cells)] if cells else []


def _design(study: Study) -> list[str]:
    return [
        f"{len(study.arms)} arms x {len(study.seeds)} seeds, paired by seed: equal initial weights and batches.",
        f"Measure: {study.measure}. Base: `{' '.join(study.base)}`.",
    ]


CLAIM_HEAD = ("claim", "expected", "seen", "verdict", "pairs to tell", "source")
GAP_HEAD = (
    "arm",
    "against",
    "pairs",
    f"gap, {LEVEL:.0%} interval",
    "whole run",
    "smallest gap it could see",
    "by seed",
)


HOW_TO_READ = (
    "A gap is 100 (loss / loss of the other arm - 1), smaller is better. The interval holds the mean of all seeds"
    f" in {LEVEL:.0%} of such studies; the smallest gap is what this one finds with a probability of {POWER:.0%}."
    " A claim is reproduced if the whole interval lies in its range, contradicted if it lies outside, else"
    " undecided; `pairs to tell` is how many seeds of this spread would decide it if the gap stayed what it is."
)


def _claim_cells(judged: JudgedClaim) -> list[str]:
    claim = judged.claim
    pairs = "-" if judged.pairs is None else f"{judged.pairs}"
    seen = interval_text(judged.gap.final, judged.gap.diverged)
    if judged.gap.against_diverged:
        seen += f"; {claim.against} diverged (seeds {', '.join(map(str, judged.gap.against_diverged))})"
    name = f"{claim.arm} against {claim.against}"
    if claim.measure is not Quantity.loss:
        name += f": {claim.measure.value}"
        seen = seen if judged.gap.gaps else "not measured (--gradients)"
    return [name, str(claim), seen, judged.verdict.value, pairs, claim.because]


def _gap_cells(gap: ArmGap) -> list[str]:
    pairs = str(len(gap.gaps))
    smallest = "-" if gap.final is None else f"{gap.final.smallest:.2f} %"
    by_seed = ", ".join(f"{value:+.2f}" for value in gap.gaps.values())
    final, whole = interval_text(gap.final, gap.diverged), interval_text(gap.integrated, ())
    return [gap.arm, gap.against, pairs, final, whole, smallest, by_seed]


def as_json(outcome: StudyOutcome, results: Sequence[ArmResult]) -> dict[str, Any]:
    """Everything but the curves, with the hash of each run's configuration."""
    runs = [{"arm": one.arm, "seed": one.seed, "key": one.key, "about": one.about} for one in results]
    claims = [
        {
            **asdict(one.claim),
            "low": _finite(one.claim.low),
            "high": _finite(one.claim.high),
            "measure": one.claim.measure.value,
            "seen": None if one.gap.final is None else asdict(one.gap.final),
            "verdict": one.verdict.value,
            "pairs": one.pairs,
        }
        for one in outcome.claims
    ]
    gaps = [
        {**asdict(gap), "gaps": {str(seed): _finite(value) for seed, value in gap.gaps.items()}} for gap in outcome.gaps
    ]
    return {
        "study": asdict(outcome.study) | {"claims": claims},
        "gaps": gaps,
        "gradients": [asdict(one) for one in outcome.gradients],
        "runs": runs,
        "missing": outcome.missing,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_outcome(outcome: StudyOutcome, results: Sequence[ArmResult], root: Path) -> None:
    """`study.md`, `study.json` and `study.html` in `root`."""
    text = as_markdown(outcome)
    write_durably(root / "study.md", text.encode())
    write_durably(root / "study.json", json.dumps(as_json(outcome, results), indent=1).encode())
    write_page(f"study {outcome.study.name}", _page(outcome, results), root / "study.html")


def _page(outcome: StudyOutcome, results: Sequence[ArmResult]) -> list[str]:
    study = outcome.study
    body = [f"<p>{html.escape(text)}</p>" for text in (study.question, *_design(study)) if text]
    if outcome.missing:
        body.append(f"<p><b>Not complete:</b> {len(outcome.missing)} runs are missing.</p>")
    if outcome.claims:
        body += ["<h2>Claims</h2>", table(CLAIM_HEAD, [_claim_cells(one) for one in outcome.claims])]
    body += ["<h2>Gaps</h2>", table(GAP_HEAD, [_gap_cells(gap) for gap in outcome.gaps])]
    if outcome.gradients:
        about, *_ = gradients_as_markdown(study, outcome.gradients)
        cells = table(*gradient_table(study, outcome.gradients))
        body += ["<h2>Gradients</h2>", f"<p>{html.escape(about)}</p>", cells]
    body += [f'<p class="note">{html.escape(HOW_TO_READ)}</p>', "<h2>Curves</h2>", '<div class="plots">']
    return [*body, *_plots(outcome, results), "</div>"]


def _plots(outcome: StudyOutcome, results: Sequence[ArmResult]) -> list[str]:
    """The intervals, and every arm's gap to the first over the run, its mean over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = []
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": outcome.study.name}):
        for draw in (_draw_intervals, _draw_curves):
            figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
            draw(axes, outcome, results)
            pictures.append(as_svg(figure.savefig))
            plt.close(figure)
    return pictures


def _draw_intervals(axes: Any, outcome: StudyOutcome, _results: Sequence[ArmResult]) -> None:
    shown = [(gap, gap.final) for gap in outcome.gaps if gap.final is not None]
    for row, (gap, interval) in enumerate(shown):
        axes.plot([interval.low, interval.high], [row, row], color=f"C{row % 10}", lw=3)
        axes.plot(list(gap.gaps.values()), [row] * len(gap.gaps), "|", color=f"C{row % 10}", ms=10)
        axes.plot([interval.mean], [row], "o", color=f"C{row % 10}")
    axes.axvline(0, color="#000000", lw=0.8)
    axes.set_yticks(range(len(shown)), [f"{gap.arm} / {gap.against}".replace("$", r"\$") for gap, _ in shown])
    axes.invert_yaxis()
    axes.set_xlabel("gap in percent (dashes: single seeds)")
    axes.set_title("Gaps and their intervals", loc="left", fontsize=10)


def _draw_curves(axes: Any, outcome: StudyOutcome, results: Sequence[ArmResult]) -> None:
    study = outcome.study
    by_run = {(one.arm, one.seed): one for one in results}
    for arm in study.arms:
        pairs = [
            (by_run[arm, s], by_run[study.reference, s])
            for s in study.seeds
            if {(arm, s), (study.reference, s)} <= by_run.keys()
        ]
        if arm == study.reference or not pairs:
            continue
        steps = min(len(one.losses) for pair in pairs for one in pair)
        points = range(SMOOTH, steps + 1, max(1, SMOOTH // 2))
        means = [
            sum(100 * (sum(a.losses[p - SMOOTH : p]) / sum(b.losses[p - SMOOTH : p]) - 1) for a, b in pairs)
            / len(pairs)
            for p in points
        ]
        axes.plot(list(points), means, lw=1.2, label=arm.replace("$", r"\$"))
    axes.axhline(0, color="#000000", lw=0.8)
    axes.set_xlabel("steps")
    axes.set_title(
        f"Gap to {study.reference} in percent, mean of {SMOOTH} steps".replace("$", r"\$"), loc="left", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
