"""Run torchrun's agent so that the program's exit code and its stop signals get through.

One idea: a launcher must be transparent. Plain torchrun turns every failure into exit code 1, and on SIGTERM it
ends itself with a traceback while the ranks still save. Here SIGTERM and SIGUSR1 go to the ranks and nothing else
happens; the agent then sees them leave, and this program leaves with the code of the rank that left first: 85
(stopped on request, state saved) stays 85, 2 (configuration error) stays 2, a signal becomes 128 + its number.

Not here: rendezvous and process start, which are torch.distributed.run's. Used by launch/torchrun.sh.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

STOPPED_ON_REQUEST, CONFIGURATION_ERROR = 85, 2
# After the first rank has left, the others get this long before SIGKILL: enough to finish a save.
# The same as `srun --wait` in launch/slurm.sbatch.
SHUTDOWN_TIMEOUT_SECONDS = 60


def children() -> list[int]:
    """Process ids of the direct children, which are the ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended while we looked
            continue
        parent = int(stat.rpartition(")")[2].split()[1])  # the name before ")" may hold spaces
        if parent == os.getpid():
            found.append(int(entry.name))
    return found


def forward(signum: int, _frame: FrameType | None) -> None:
    """Hand the signal to the ranks; they agree on a step, save, and leave."""
    for pid in children():
        os.kill(pid, signum)


def main(argv: list[str]) -> int:
    """Start the ranks, wait for them, return their exit code."""
    args = run.parse_args(argv)
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"  # SIGTERM is ours
    args.shutdown_timeout = SHUTDOWN_TIMEOUT_SECONDS
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR1, forward)
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code not in (STOPPED_ON_REQUEST, CONFIGURATION_ERROR):  # those two have said why themselves
            print(error, file=sys.stderr)
        print(f"launch/torchrun.sh: rank {rank} left first, with exit code {code}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
