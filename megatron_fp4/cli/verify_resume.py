"""`megatron-fp4 verify-resume experiment=quickstart --layout tp2 --others "dp2, pp2"`: does a killed run go on exactly?

A small model with every feature of the configured one (proofs/shrink.py) is trained on synthetic tokens: once without
a stop; once it saves, goes on, and is killed by SIGKILL in mid-step. The checkpoint is then loaded by new processes at
the same layout and at others. At the same layout every loss, parameter and moment must be equal bit for bit; at
another one the difference must stay within what sums in another order explain.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.data.ramp import steps_from
from megatron_fp4.proofs.layouts import parse_layout, parse_layouts
from megatron_fp4.proofs.resume import Distance, Resumed, ResumeTrial
from megatron_fp4.proofs.shrink import shrink

EXITS = {0: "every resume is as good as no stop", 1: "one is not"}
EXAMPLE = 'experiment=quickstart --layout tp2 --others "dp2, pp2"'


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = CommandParser("verify-resume", __doc__, EXITS, EXAMPLE, configured=True)
    parser.add_argument("--layout", default="tp2", help="of the run that is killed")
    parser.add_argument("--others", default="dp1, dp2", help="layouts that go on, by commas")
    parser.add_argument("--steps", type=int, default=3, help="steps before the save, and again after it")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run")
    args = parser.parse(arguments)
    try:
        if args.steps < 2:
            raise ValueError(f"--steps = {args.steps}, must be at least 2")
        layout, others = parse_layout(args.layout), parse_layouts(args.others)
        cases = shrink(to_run_config(compose_config(args.overrides, args.config_dir)), [layout, *others])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    train = cases[0].config.train
    if train.batch_ramp.ramp_samples:
        steps = itertools.islice(steps_from(0, train.batch_ramp, train.global_batch), 2 * args.steps)
        print(f"batch-size ramp: steps of {', '.join(str(size) for _, size in steps)} samples")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        for case in cases:
            trial = ResumeTrial(case, layout, args.steps, Path(folder) / case.name, args.timeout)
            for resumed in trial.run(others):
                print(_line(trial, resumed), flush=True)
                failed += not resumed.passed
    print("every resume is as good as no stop" if not failed else f"{failed} resume(s) FAILED")
    return 1 if failed else 0


def _line(trial: ResumeTrial, resumed: Resumed) -> str:
    title = f"{trial.case.name:<7} {trial.layout.name} killed, resumed at {resumed.layout.name:<12}"
    if resumed.distance is None:
        return f"{title}  FAILED: resumed after step {sorted(resumed.began)}, saved was {trial.steps}"
    return f"{title}  {'ok' if resumed.passed else 'FAILED'}: {_text(resumed.distance)}"


def _text(distance: Distance) -> str:
    if distance.equal:
        return "losses, parameters and moments equal bit for bit"
    tensors = ", ".join(f"{kind} {error:.0e}" for kind, error in distance.tensors.items())
    return f"relative difference of a loss {distance.loss:.0e}, of tensors: {tensors} (worst: {distance.worst})"
