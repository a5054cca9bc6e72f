"""Who made this: a process named so that another one can tell whether it still lives.

A process is (host, pid, start time). On the same host the kernel is asked; the start time tells a re-used pid. A
process on another host cannot be asked: it lives as long as something of its keeps being touched.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

# "<host>.<pid>.<start>": the host may contain dots.
TAG = re.compile(r"(?P<host>.+)\.(?P<pid>\d+)\.(?P<start>\d+)")


@dataclass(frozen=True)
class Owner:
    """A process. start: see `start_of`."""

    host: str
    pid: int
    start: int

    @staticmethod
    def me() -> Owner:
        return Owner(socket.gethostname(), os.getpid(), start_of(os.getpid()))

    @property
    def tag(self) -> str:
        """The text form, for file names."""
        return f"{self.host}.{self.pid}.{self.start}"

    @staticmethod
    def from_tag(tag: str) -> Owner | None:
        """The owner whose tag this is; None if it is no tag."""
        match = TAG.fullmatch(tag)
        return Owner(match["host"], int(match["pid"]), int(match["start"])) if match else None

    def lives(self, age_seconds: float, stale_seconds: float) -> bool:
        """Whether the process still runs.

        age_seconds: how long ago something of the owner's was last touched; decides only on another host.
        """
        if self.host != socket.gethostname():
            return age_seconds < stale_seconds
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists and is another user's
        return self.start in (0, start_of(self.pid))


def start_of(pid: int) -> int:
    """The kernel's start time of a process in clock ticks after boot; 0 if unknown, -1 for a zombie.

    It is field 22 of /proc/<pid>/stat (man proc_pid_stat), counted after the name, which may contain spaces.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in "ZX" else int(fields[19])
