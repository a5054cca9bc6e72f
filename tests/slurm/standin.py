"""A program that obeys the trainer's contract with its launcher, and nothing else.

Everything that launch/ must guarantee can be seen without a model. It joins the job through
`comm.bootstrap`, counts steps, agrees with the other ranks on stopping (SIGTERM, SIGUSR1 or a first SIGINT to any
rank), saves, and leaves with 0 (done), 85 (stopped on request, state saved) or 2 (configuration error). Each attempt
appends one line to `events.jsonl` in the run directory when it starts and one when it ends.

Arguments: train.run_dir=DIR steps=N more=N step_seconds=S crash_at=STEP slow_exit=SECONDS; any other is only recorded.
`steps` is how many an attempt makes that starts anew, `more` one that goes on from a saved state.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from megatron_fp4.comm.bootstrap import Process, exit_process, start_process, stop_process
from megatron_fp4.comm.collectives import all_gather_object, all_reduce_max

DONE, CONFIGURATION_ERROR, STOPPED_ON_REQUEST, CRASHED = 0, 2, 85, 3


def record(run_dir: Path, **event: object) -> None:
    """One line, written at once: several attempts append to the same file."""
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def train(process: Process, settings: dict[str, str], asked: list[int]) -> int:
    """Count from the saved step on; returns the exit code. `asked` is filled by the signal handler."""
    run_dir = Path(settings["train.run_dir"])
    state, rank = run_dir / "step", process.world.rank
    start = int(state.read_text()) if state.exists() else 0
    hosts = all_gather_object(os.environ.get("SLURMD_NODENAME", "local"), process.world)
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        record(
            run_dir, event="start", step=start, world=process.world.size, hosts=hosts,
            arguments=sys.argv[1:], master=os.environ.get("MASTER_ADDR"),
        )  # fmt: skip
    step, code = start, DONE
    end = start + int(settings["more" if start else "steps"])
    while step < end:
        time.sleep(float(settings.get("step_seconds", "0.2")))
        step += 1
        if rank == 1 and str(step) == settings.get("crash_at"):
            return CRASHED
        stop = all_reduce_max(torch.tensor(float(asked[0] if asked else 0)), process.world)
        if stop.item():
            code = STOPPED_ON_REQUEST
            break
    if rank == 0:
        state.with_suffix(".tmp").write_text(str(step))
        state.with_suffix(".tmp").replace(state)
        record(run_dir, event="end", step=step, code=code, signal=int(stop.item()) if code else 0)
    elif rank == 1:  # ranks never leave in the same second: the launcher must not kill the late ones at once
        time.sleep(float(settings.get("slow_exit", "0")))
    return code


def main() -> int:
    asked: list[int] = []

    def receive(number: int, _frame: object) -> None:
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, receive)
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    try:
        process = start_process("cpu", 60.0)
    except ValueError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return CONFIGURATION_ERROR
    code = train(process, settings, asked)
    if code != CRASHED:
        stop_process(process)
    return code


if __name__ == "__main__":
    exit_process(main())
