"""`megatron-fp4 study STUDY --gradients`: the arms' gradients on equal weights and batches, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from megatron_fp4.cli.compose import to_run_config
from megatron_fp4.cli.study.runs import with_seed
from megatron_fp4.cli.study.show import as_table, interval_text
from megatron_fp4.studies.design import Study
from megatron_fp4.studies.gradients import GradientError, gradient_errors
from megatron_fp4.studies.intervals import interval_of, percent_gaps

HEAD = ("arm", "error |g - r|^2 / |r|^2", "cosine", "left in the mean of the draws", "error against {base}, in percent")


def gradients_of(study: Study, trees: Mapping[str, DictConfig], draws: int) -> dict[str, list[GradientError]]:
    """The errors of each arm but the first, a seed after the other. trees: the arms' configurations.

    Raises ValueError and FileNotFoundError.
    """
    errors: dict[str, list[GradientError]] = {}
    for seed in study.seeds:
        arms = {arm: to_run_config(with_seed(tree, seed)) for arm, tree in trees.items()}
        for arm, error in gradient_errors(arms, draws=draws).items():
            errors.setdefault(arm, []).append(error)
    return errors


def gradients_as_markdown(study: Study, errors: Mapping[str, Sequence[GradientError]], draws: int) -> str:
    """A row an arm; the last column is paired by seed against the second arm."""
    base, *_ = errors
    head = [cell.format(base=base) for cell in HEAD]
    theirs = [one.error for one in errors[base]]
    rows = []
    for arm, of_arm in errors.items():
        ours = [one.error for one in of_arm]
        left = [one.bias for one in of_arm if one.bias is not None]
        gap = "-" if arm == base else interval_text(interval_of(percent_gaps(ours, theirs)))
        cosine = statistics.fmean(one.cosine for one in of_arm)
        bias = f"{statistics.fmean(left):.3f}" if left else "-"
        rows.append([arm, f"{statistics.fmean(ours):.5f}", f"{cosine:.6f}", bias, gap])
    lines = [
        f"# {study.name}: gradients",
        "",
        f"Against {study.reference} on equal weights and batches; {len(study.seeds)} seeds, {draws} draws of noise on"
        f" each batch. An unbiased error leaves 1/{draws} = {1 / draws:.3f} of itself in the mean of the draws, one"
        " that is the same in each leaves 1.",
        "",
    ]
    return "\n".join([*lines, *as_table(head, rows)])
