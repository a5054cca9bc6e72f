"""`megatron-fp4 replay RUN/spikes/step_00001234 [--precision bf16]`: run up to a bad step again, on the run's device.

In one process, or under torchrun at the run's tp, pp and cp, with as many copies (dp) as ranks are left:

    launch/torchrun.sh --nproc-per-node 8 replay RUN/spikes/step_00001234

What the numbers say about the spike: proofs/replay.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.trained.opening import on_ranks
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.proofs.replay import replay
from megatron_fp4.proofs.replay_config import in_bf16
from megatron_fp4.storage.local import local_path
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.bundle import REPORT

EXITS = {0: "the steps were computed"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 for what is no bundle."""
    parser = CommandParser("replay", __doc__, EXITS, "runs/mine/spikes/step_00001234 --precision bf16")
    parser.add_argument("bundle", type=local_path, help="a directory that a loss spike left")
    parser.add_argument("--precision", choices=("run", "bf16"), default="run")
    args = parser.parse_args(arguments)

    def use(config: RunConfig, process: Process) -> None:
        if not (args.bundle / REPORT).is_file():
            raise ValueError(_what_to_give(args.bundle))
        report = json.loads((args.bundle / REPORT).read_text())
        step = report["step"]
        losses = replay(args.bundle, in_bf16(config) if args.precision == "bf16" else config, step, process)
        for number, loss in losses.items():
            print(f"step {number}: loss {loss:.6f}")
        if process.world.rank == 0:
            print(f"step {step} in the run: loss {report['loss']:.6f}, running mean {report['mean']:.6f}")

    return on_ranks(args.bundle, use)


def _what_to_give(folder: Path) -> str:
    bundles = sorted(str(report.parent) for report in folder.glob(f"spikes/*/{REPORT}"))
    remedy = f"give one of its spikes: {', '.join(bundles)}" if bundles else "a run has them in its folder spikes"
    return f"{folder} is not what a loss spike left (it holds no {REPORT}); {remedy}"
