"""Run torchrun's agent so that the program's exit code and its stop signals get through.

A launcher must be transparent. Plain torchrun turns every failure into exit code 1, and on SIGTERM it
ends itself with a traceback while the ranks still save. Here SIGTERM, SIGUSR1 and Ctrl-C go to the ranks, which have a
session of their own and see no terminal, and nothing else happens; the agent then sees them leave, and this program
leaves with the code of the rank that left first: 85 (stopped on request, state saved) stays 85, 2 (configuration error)
stays 2, a signal becomes 128 + its number. The ranks end at once when Ctrl-C comes for the second time; those that do
not are killed when it comes for the third.

Not here: rendezvous and process start, which are torch.distributed.run's. Used by launch/torchrun.sh.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing torch takes seconds, and would answer with a traceback

from torch.distributed import run  # noqa: E402 (see above)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402

STOPPED_ON_REQUEST, CONFIGURATION_ERROR, INTERRUPTED = 85, 2, 128 + signal.SIGINT
# After the first rank has left, the others get this long before SIGKILL: enough to finish a save.
# The same as `srun --wait` in launch/slurm.sbatch.
SHUTDOWN_TIMEOUT_SECONDS = 60


def children() -> list[int]:
    """Process ids of the direct children, which are the ranks."""
    numbers = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended while we looked
            continue
        parent = int(stat.rpartition(")")[2].split()[1])  # the name before ")" may hold spaces
        if parent == os.getpid():
            numbers.append(int(entry.name))
    return numbers


class Forwarding:
    """Hands signals to the ranks; they agree on a step, save, and leave."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.reached = False

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        self.interrupts += signum == signal.SIGINT
        for pid in children():
            self.reached = True
            os.kill(pid, signal.SIGKILL if self.interrupts > 2 else signum)
        if not self.reached:  # no rank is started yet, and nothing would ever come of the request
            os._exit(128 + signum)


def main(argv: list[str]) -> int:
    """Start the ranks, wait for them, return their exit code."""
    args = run.parse_args(argv)
    args.signals_to_handle = "SIGHUP,SIGQUIT"  # the others are ours
    args.shutdown_timeout = SHUTDOWN_TIMEOUT_SECONDS
    forward = Forwarding()
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, forward)
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code not in (STOPPED_ON_REQUEST, CONFIGURATION_ERROR, INTERRUPTED):  # those have said why themselves
            print(error, file=sys.stderr)
        print(f"launch/torchrun.sh: rank {rank} left first, with exit code {code}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
