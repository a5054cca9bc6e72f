"""The trainer, one rank at fault: `MEGATRON_FP4_MODULE=tests.train.faults.faulty TEST_FAULT=hang,1,5,reduce`.

Fault, rank, step and phase in which it strikes. The rest is `megatron_fp4.pretrain`, as users start it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

from megatron_fp4 import pretrain
from megatron_fp4.train.phases import Phases


def hang() -> None:
    """A rank that never comes back, in Python."""
    time.sleep(1e6)


def hang_in_native_code() -> None:
    """A rank that never comes back and keeps Python's lock, as a stuck driver call would."""
    ctypes.PyDLL(None).sleep(100_000)


def stopped() -> None:
    """A rank that does not run at all."""
    os.kill(os.getpid(), signal.SIGSTOP)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pause() -> None:
    """A rank that takes its time: what is done to the job meanwhile is done in mid-run."""
    time.sleep(20.0)


FAULTS = {fault.__name__: fault for fault in (hang, hang_in_native_code, stopped, killed, pause)}


def plant(name: str, rank: str, step: str, phase: str) -> None:
    right = Phases.enter

    def enter(self: Phases, entered: str) -> None:
        right(self, entered)
        if os.environ.get("RANK", "0") == rank and (str(self.current.step), entered) == (step, phase):
            FAULTS[name]()

    Phases.enter = enter  # type: ignore[method-assign]


if __name__ == "__main__":
    if fault := os.environ.get("TEST_FAULT", ""):
        plant(*fault.split(","))
    pretrain.console_main()
