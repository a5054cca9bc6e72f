"""`megatron-fp4 rehearse`: one real optimizer step of any rank of any layout, without a GPU and the other ranks.

The trainer's own objects make the step on tensors that have shapes and no memory (planning/rehearsal). It tells what
the step copies between host and device and where, the peak of memory and what every rank sends, both beside the plan's
figures, and the kernels that it launches. What a GPU would refuse is refused with its file and line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_fp4.cli.arguments import CommandParser, above_zero
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.cli.render.rehearsal import deviations, render
from megatron_fp4.comm.bootstrap import exit_process

EXITS = {0: "as planned", 1: "not as planned, or ranks wait for each other for ever"}
EXAMPLE = "experiment=paper_12b_10t parallel.tp=8 --gpus 2944 --ranks first,last,1477"


def main(arguments: Sequence[str]) -> int:
    """Print the report; returns the exit code."""
    parser = CommandParser("rehearse", __doc__, EXITS, EXAMPLE, configured=True)
    gpus = "world size (default: the product of the parallel sizes)"
    parser.add_argument("--gpus", type=above_zero, default=0, help=gpus)
    parser.add_argument(
        "--ranks",
        default="first,last,worst",
        help="by commas: first, last, worst (by memory), cell (all of two data-parallel copies), numbers",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    args = parser.parse(arguments)
    from megatron_fp4.planning.rehearsal.report import rehearse  # here: it imports torch._dynamo, which takes seconds
    from megatron_fp4.planning.rehearsal.watch import RehearsalRefused

    try:
        config = to_run_config(compose_config(args.overrides, args.config_dir))
        report = rehearse(config, args.gpus, args.ranks, _refuse_at_once)
    except (ValueError, FileNotFoundError, RehearsalRefused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 1 if deviations(report) else 0


def _refuse_at_once(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    exit_process(2)
