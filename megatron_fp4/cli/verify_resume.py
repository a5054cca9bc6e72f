"""`megatron-fp4 verify-resume experiment=quickstart --layout tp2 --others "dp2, pp2"`: does a killed run go on exactly?

A small model with every feature of the configured one (proofs/shrink.py) is trained on synthetic tokens: once without
a stop; once it saves, goes on, and is killed by SIGKILL in mid-step. The checkpoint is then loaded by new processes at
the same layout and at others. At the same layout every loss, parameter and moment must be equal bit for bit; at
another one the difference must stay within what sums in another order explain. Exit code 0 if so, 1 if not, 2 if
something cannot be run.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.local import kill_local, run_local
from megatron_fp4.data.ramp import steps_from
from megatron_fp4.proofs.layouts import Layout, parse_layout, parse_layouts
from megatron_fp4.proofs.parity import Case
from megatron_fp4.proofs.resume import Distance, Report, Stretch, distance, run_stretch
from megatron_fp4.proofs.shrink import shrink

OTHER_LOSS, OTHER_STATE = 1e-6, 1e-4
"""Largest relative difference at another layout, in FP32 compute without quantization; measured: 1e-7 each. With
quantized GEMMs one code that falls the other way changes every later step, so those are compared at the same layout.
"""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="megatron-fp4 verify-resume", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="configuration, as for pretrain")
    parser.add_argument("--layout", default="tp2", help="of the run that is killed (default: tp2)")
    parser.add_argument("--others", default="dp1, dp2", help='layouts that go on, by commas (default: "dp1, dp2")')
    parser.add_argument("--steps", type=int, default=3, help="steps before the save, and again after it (default: 3)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run")
    args = parser.parse_intermixed_args(arguments)
    try:
        if args.steps < 2:
            raise ValueError(f"--steps = {args.steps}, must be at least 2")
        layout, others = parse_layout(args.layout), parse_layouts(args.others)
        cases = shrink(to_run_config(compose_config(args.overrides)), [layout, *others])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    train = cases[0].config.train
    if train.batch_ramp.ramp_samples:
        steps = itertools.islice(steps_from(0, train.batch_ramp, train.global_batch), 2 * args.steps)
        print(f"batch-size ramp: steps of {', '.join(str(size) for _, size in steps)} samples")
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        failed = sum(
            Check(case, layout, args.steps, Path(folder) / case.name, args.timeout).run(others) for case in cases
        )
    print("every resume is as good as no stop" if not failed else f"{failed} resume(s) FAILED")
    return 1 if failed else 0


class Check:
    """One case: the run without a stop, the killed one, and those that go on from its checkpoint."""

    def __init__(self, case: Case, layout: Layout, steps: int, root: Path, timeout: float) -> None:
        self._case, self._layout, self._steps, self._root, self._timeout = case, layout, steps, root, timeout
        self._killed = root / "killed"

    def run(self, others: Sequence[Layout]) -> int:
        """Print a line per resume; returns how many failed."""
        self._root.mkdir(parents=True)
        reference = self._stretch(self._layout, self._root / "whole")
        self._kill()
        failed = self._compare(self._layout, reference, exact=True)
        exact_case = self._case.name == "fp32"
        return failed + sum(self._compare(other, reference, exact=False) for other in others if exact_case)

    def _stretch(self, layout: Layout, root: Path) -> list[Report]:
        stretch = Stretch(str(root), self._steps, 2 * self._steps)
        return run_local(
            run_stretch, layout.world_size, self._case, layout.parallel, stretch, timeout_seconds=self._timeout
        )

    def _kill(self) -> None:
        """Ends in the second step after the save at the earliest, when the checkpoint is complete."""
        mark = self._root / "mark"
        stretch = Stretch(str(self._killed), self._steps, 100_000, str(mark), self._steps + 2)
        layout = self._layout
        kill_local(
            run_stretch,
            layout.world_size,
            self._case,
            layout.parallel,
            stretch,
            when=mark.exists,
            timeout_seconds=self._timeout,
        )

    def _compare(self, layout: Layout, reference: list[Report], *, exact: bool) -> int:
        root = self._root / f"resumed-{layout.name.replace(' ', '-')}-{exact}"
        shutil.copytree(self._killed, root)
        resumed = self._stretch(layout, root)
        began = {report.began for report in resumed}
        if began != {self._steps}:
            print(f"{self._title(layout)}  FAILED: resumed after step {sorted(began)}, saved was {self._steps}")
            return 1
        found = distance(reference, resumed)
        good = found.equal if exact else found.loss <= OTHER_LOSS and max(found.tensors.values()) <= OTHER_STATE
        print(f"{self._title(layout)}  {'ok' if good else 'FAILED'}: {_text(found)}", flush=True)
        return int(not good)

    def _title(self, layout: Layout) -> str:
        return f"{self._case.name:<7} {self._layout.name} killed, resumed at {layout.name:<12}"


def _text(found: Distance) -> str:
    if found.equal:
        return "losses, parameters and moments equal bit for bit"
    tensors = ", ".join(f"{kind} {error:.0e}" for kind, error in found.tensors.items())
    return f"relative difference of a loss {found.loss:.0e}, of tensors: {tensors} (worst: {found.worst})"
