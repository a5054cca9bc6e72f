"""`megatron-fp4 study STUDY --gradients`: the arms' gradients on equal weights and batches, measured once and kept.

A measurement is known by the hash of both configurations and the number of draws, and lies in `gradients.jsonl` under
it: what is stopped loses a seed at most, and a new arm is measured alone.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from megatron_fp4.cli.compose import to_run_config
from megatron_fp4.cli.study.runs import configuration_key, with_seed
from megatron_fp4.cli.study.table import as_table, interval_text
from megatron_fp4.storage.append import AppendFile, read_values
from megatron_fp4.studies.design import Study
from megatron_fp4.studies.gradients import gradient_errors
from megatron_fp4.studies.intervals import interval_of, percent_gaps
from megatron_fp4.studies.measures import GradientError

MEASURED = "gradients.jsonl"
HEAD = (
    "arm",
    "error |g - r|^2 / |r|^2",
    "cosine",
    "left in the mean of the draws",
    "loss on equal weights, in percent",
    "error against {base}, in percent",
)


def with_weights(trees: Mapping[str, DictConfig], run: str) -> dict[str, DictConfig]:
    """The configurations with the weights of a run or checkpoint instead of drawn ones."""
    trained = {arm: copy.deepcopy(tree) for arm, tree in trees.items()}
    for tree in trained.values():
        tree.train.init_from = run
    return trained


def known_gradients(root: Path, study: Study, trees: Mapping[str, DictConfig], draws: int) -> list[GradientError]:
    """What was measured before. trees: the arms' configurations."""
    known: dict[str, GradientError] = {}
    for record in read_values(root / MEASURED):
        try:
            one = GradientError.read(record)
        except TypeError:
            continue  # of another version; it is measured again
        known[one.key] = one
    keys = _keys(study, trees, draws)
    return [replace(known[key], arm=arm, seed=seed) for (arm, seed), key in keys.items() if key in known]


def gradients_of(root: Path, study: Study, trees: Mapping[str, DictConfig], draws: int) -> list[GradientError]:
    """The errors of each arm but the first, measured where they are not known.

    Raises ValueError and FileNotFoundError.
    """
    known = {(one.arm, one.seed) for one in known_gradients(root, study, trees, draws)}
    keys = _keys(study, trees, draws)
    root.mkdir(parents=True, exist_ok=True)
    file = AppendFile(root / MEASURED)
    try:
        for seed in study.seeds:
            missing = [arm for arm, of in keys if of == seed and (arm, seed) not in known]
            if not missing:
                continue
            arms = {arm: to_run_config(with_seed(trees[arm], seed)) for arm in (study.reference, *missing)}
            for arm, error in gradient_errors(arms, draws=draws).items():
                file.add(replace(error, arm=arm, seed=seed, key=keys[arm, seed]).json())
    finally:
        file.close()
    return known_gradients(root, study, trees, draws)


def _keys(study: Study, trees: Mapping[str, DictConfig], draws: int) -> dict[tuple[str, int], str]:
    keys = {}
    for seed in study.seeds:
        base = configuration_key(with_seed(trees[study.reference], seed))
        for arm in study.arms:
            if arm != study.reference:
                keys[arm, seed] = f"{base}-{configuration_key(with_seed(trees[arm], seed))}-{draws}"
    return keys


def gradient_table(study: Study, gradients: Sequence[GradientError]) -> tuple[list[str], list[list[str]]]:
    """Head, and a row an arm; the last column is paired by seed against the second arm."""
    by_arm: dict[str, dict[int, GradientError]] = {arm: {} for arm in study.arms}
    for one in gradients:
        by_arm[one.arm][one.seed] = one
    base, *_ = (arm for arm, of_arm in by_arm.items() if of_arm)
    return [cell.format(base=base) for cell in HEAD], [
        [arm, *_cells(of_arm, {} if arm == base else by_arm[base])] for arm, of_arm in by_arm.items() if of_arm
    ]


def _cells(of_arm: Mapping[int, GradientError], of_base: Mapping[int, GradientError]) -> list[str]:
    values = list(of_arm.values())
    left = [one.bias for one in values if one.bias is not None]
    loss = percent_gaps([one.loss for one in values], [one.reference_loss for one in values])
    seeds = [seed for seed in of_arm if seed in of_base and of_base[seed].error]
    gaps = percent_gaps([of_arm[seed].error for seed in seeds], [of_base[seed].error for seed in seeds])
    return [
        f"{statistics.fmean(one.error for one in values):.5f}",
        f"{statistics.fmean(one.cosine for one in values):.6f}",
        f"{statistics.fmean(left):.3f}" if left else "-",
        interval_text(interval_of(loss)) if len(loss) > 1 else f"{loss[0]:+.2f} %",
        interval_text(interval_of(gaps)) if len(gaps) > 1 else "-",
    ]


def gradients_as_markdown(study: Study, gradients: Sequence[GradientError]) -> list[str]:
    """What was done, and the table."""
    draws = gradients[0].draws
    seeds = len({one.seed for one in gradients})
    return [
        f"Against {study.reference} on equal weights and batches; {seeds} seeds, {draws} draws of noise on"
        f" each batch. An unbiased error leaves 1/{draws} = {1 / draws:.3f} of itself in the mean of the draws, one"
        " that is the same in each leaves 1.",
        "",
        *as_table(*gradient_table(study, gradients)),
    ]
