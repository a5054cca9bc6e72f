"""What is said of a mirror: a report of each upload and of each failure, and `mirror.json` in the run directory."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_fp4.storage.durable import write_durably
from megatron_fp4.storage.patience import read_json

log = logging.getLogger(__name__)
STATE_FILE = "mirror.json"


@dataclass(frozen=True)
class MirrorReport:
    """One upload that ended, or a try that failed. step: of the checkpoint; 0 where none was at hand. seconds: of this
    try. error: "" if it is in the store. failures: tries in a row that have failed, this one included."""

    step: int
    num_bytes: int = 0
    seconds: float = 0.0
    error: str = ""
    failures: int = 0


@dataclass(frozen=True)
class MirrorState:
    """How the mirror of a run stands. step: the newest checkpoint there, None while none is known. waiting: steps that
    are to go there. failures: tries in a row that have failed; error: the last one's. time: seconds since 1970."""

    url: str
    step: int | None = None
    waiting: list[int] = field(default_factory=list)
    failures: int = 0
    error: str = ""
    time: float = 0.0

    def write(self, run_dir: Path) -> None:
        """A disk that refuses it is logged, and no reason to stop."""
        content = json.dumps({**asdict(self), "time": time.time()})
        try:
            write_durably(run_dir / STATE_FILE, content.encode())
        except OSError as error:
            log.warning("%s: %s", run_dir / STATE_FILE, error)

    @staticmethod
    def read(run_dir: Path) -> MirrorState | None:
        """None where there is no mirror, or the file is damaged."""
        with suppress(OSError, ValueError, TypeError):
            return MirrorState(**read_json(run_dir / STATE_FILE, pauses=()))
        return None

    def describe(self) -> str:
        """One line for people."""
        text = f"step {self.step:,}" if self.step is not None else "none yet"
        if self.waiting:
            text += f", waiting: {', '.join(f'{step:,}' for step in self.waiting[:5])}"
        if self.failures:
            text += f"; {self.failures} failed tries in a row, the last: {self.error}"
        return f"{text} ({self.url})"
