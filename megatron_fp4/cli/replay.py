"""`megatron-fp4 replay RUN/spikes/step_00001234 [--precision bf16]`: run up to a bad step again, in one process.

What the numbers say about the spike: proofs/replay.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.proofs.replay import in_bf16, replay
from megatron_fp4.train.faults.bundle import REPORT

EXITS = {0: "the steps were computed"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 for what is no bundle."""
    parser = CommandParser("replay", __doc__, EXITS, "runs/mine/spikes/step_00001234 --precision bf16")
    parser.add_argument("bundle", type=Path, help="a directory that a loss spike left")
    parser.add_argument("--precision", choices=("run", "bf16"), default="run")
    args = parser.parse_args(arguments)
    try:
        report = json.loads((args.bundle / REPORT).read_text())
        config, step = load_run_config(args.bundle), report["step"]
        losses = replay(args.bundle, in_bf16(config) if args.precision == "bf16" else config, step)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, loss in losses.items():
        print(f"step {number}: loss {loss:.6f}")
    print(f"step {step} in the run: loss {report['loss']:.6f}, running mean {report['mean']:.6f}")
    return 0
