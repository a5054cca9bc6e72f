"""What happened to a run, one line each in `events.jsonl`: start, resume, stop, finish, fail, spike, hang and the like.

    {"step": 120, "event": "save_failed", "text": "checkpoint 120: failed, ...", "time": 1.7e9, "host": "n1", ...}

The same object goes to the command or URL of `logging.on_event` (hook.py). The file is history: a resume or a rollback
takes nothing out of it. Rank 0 writes; what ends that process itself (SIGKILL, a dead node) writes nothing, and is seen
from outside by the age of the lock (status.py).

Not here: the numbers of steps (metrics.py).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_fp4.storage.append import AppendFile
from megatron_fp4.train.sections import LoggingConfig
from megatron_fp4.train.telemetry.operator.hook import Hook

log = logging.getLogger(__name__)
EVENTS_FILE = "events.jsonl"
EventKind = Literal[
    "start", "resume", "stop", "finish", "fail", "spike", "skip", "rollback",
    "save_failed", "mirror_failed", "hang", "rewind",
]  # fmt: skip
"""start, resume: a launch begins, from nothing or from a checkpoint. stop: it ends on request, its state saved. finish:
it made its last step. fail: it ended by an error. spike: a loss spike whose batch is skipped. skip: a step without an
update, because of NaN, Inf or no target. rollback: back to a checkpoint, by the ladder of spikes. save_failed: a
checkpoint was not written. mirror_failed: one is not in the mirror, or not yet. hang: the watchdog ends the job.
rewind: `checkpoint rewind`, by hand."""
EVENT_KINDS: tuple[str, ...] = get_args(EventKind)


def first_steps(events: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """The first step of each launch, which compiles and waits for what starts up."""
    return frozenset(one["step"] + 1 for one in events if one["event"] in ("start", "resume"))


class Events:
    """Writes and tells the events of one launch, or of a command that changes a run. Trouble with the disk is logged.

    run_dir: None on ranks that keep none. config: names the hook; None: nobody is told.
    """

    def __init__(self, run_dir: Path | None, config: LoggingConfig | None = None) -> None:
        self._run_dir = run_dir
        self._hook = Hook(config.on_event) if run_dir is not None and config and config.on_event else None

    def add(self, kind: EventKind, step: int, text: str) -> None:
        """Returns at once: the hook has a thread of its own."""
        if self._run_dir is None:
            return
        event = {
            "step": step,
            "event": kind,
            "text": text,
            "time": time.time(),
            "host": socket.gethostname(),
            "run": str(self._run_dir),
        }
        try:
            file = AppendFile(self._run_dir / EVENTS_FILE)
            file.add(event)
            file.close()
        except OSError as error:
            log.warning("%s: %s", self._run_dir / EVENTS_FILE, error)
        if self._hook:
            self._hook.deliver(event)

    def close(self, seconds: float | None = None) -> None:
        """Wait, not for long, until what was told is delivered. seconds: how long, hook.CLOSE_SECONDS if not said."""
        if self._hook:
            self._hook.close(seconds)
