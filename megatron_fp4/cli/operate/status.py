"""`megatron-fp4 status RUN`: how a run stands, from its directory alone, on whatever host it runs.

With --watch a line is printed every so many seconds until it no longer runs; the exit code is then that of its end.
With --json one object (a line each with --watch).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.storage.local import local_path
from megatron_fp4.train.telemetry.console import format_seconds
from megatron_fp4.train.telemetry.operator.status import RunState, RunStatus, look_at, look_at_start

WATCH_SECONDS = 10.0

EXITS = {0: "it runs or has finished", 1: "it has stopped or failed"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = CommandParser("status", __doc__, EXITS, "runs/mine --watch 30")
    parser.add_argument("run", type=local_path, help="run directory (train.run_dir)")
    parser.add_argument("--json", action="store_true", help="an object for programs")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=WATCH_SECONDS, metavar="SECONDS",
        help=f"look every so many seconds (default: {WATCH_SECONDS:g}) until it no longer runs",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        if args.watch is not None and not args.watch > 0:
            raise ValueError(f"--watch = {args.watch:g}, must be above 0 seconds")
        while True:
            status = _status_of(args.run)
            runs = status.state in (RunState.starting, RunState.running)
            text = json.dumps(status.as_json()) if args.json else describe(status)
            if args.watch is not None and not args.json and runs:
                text = " ".join(text.splitlines()[1].split())
            print(text, flush=True)
            if args.watch is None or not runs:
                return status.state.exit_code
            time.sleep(args.watch)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _status_of(run_dir: Path) -> RunStatus:
    starting = None if (run_dir / "config.yaml").exists() else look_at_start(run_dir)
    return starting or look_at(load_run_config(run_dir))


def describe(status: RunStatus) -> str:
    """Four lines for people."""
    metric = "no metric yet"
    if status.last_metric_age_seconds is not None:
        host = f" on host {status.host}" if status.host else ""
        metric = f"last metric {_ago(status.last_metric_age_seconds)}{host}"
    facts = [f"step {status.step:,} of {status.last_step:,}"] if status.last_step else []
    facts += [f"loss {status.loss:.4f}"] if status.loss is not None else []
    facts += [f"{status.tokens_per_second:,.0f} tokens/s"] if status.tokens_per_second is not None else []
    facts += [f"ETA {format_seconds(status.eta_seconds)}"] if status.eta_seconds is not None else []
    save, event = "none", "none"
    if status.save_step is not None and status.save_age_seconds is not None:
        save = f"step {status.save_step:,}, {_ago(status.save_age_seconds)}"
    if status.event:
        event = f"{status.event['event']}, {_ago(time.time() - status.event['time'])}: {status.event['text']}"
    mirror = [f"  mirror: {status.mirror.describe()}"] if status.mirror else []
    return "\n".join(
        [
            f"{status.run}: {status.state.value}, {status.why}",
            f"  {'   '.join([*facts, metric])}",
            f"  last save: {save}",
            *mirror,
            f"  last event: {event}",
        ]
    )


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)  # clocks of two hosts, or a record that came while this one looked
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{format_seconds(seconds)} ago"
