"""Rehearsals of steps in a process of their own, because torch takes one fake device for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_fp4.planning.rehearsal import between
from megatron_fp4.planning.rehearsal.report import rehearse
from megatron_fp4.train.config import RunConfig
from tests.helpers.distributed import run_distributed

Rehearsal = tuple[RunConfig, int, str]
"""Configuration, world size, ranks as `megatron-fp4 rehearse --ranks` takes them."""


def rehearse_all(cases: Sequence[Rehearsal], evaluated: int = between.EVALUATED) -> list[dict[str, Any]]:
    """The report of each case, as `megatron-fp4 rehearse --json` prints it; see planning/rehearsal/report.py.

    Of each rank (`report["ranks"]`) it has `copies_in` and `read_backs`: how often, by `file:line`. evaluated:
    microbatches of an evaluation.
    """
    (reports,) = run_distributed(_rehearse_all, 1, list(cases), evaluated, timeout_seconds=1200.0)
    return list(reports)


def _rehearse_all(rank: int, world_size: int, cases: list[Rehearsal], evaluated: int) -> list[dict[str, Any]]:
    between.EVALUATED = evaluated
    return [rehearse(config, num_gpus, ranks, _refuse) for config, num_gpus, ranks in cases]


def _refuse(sentence: str) -> NoReturn:
    raise RuntimeError(sentence)
