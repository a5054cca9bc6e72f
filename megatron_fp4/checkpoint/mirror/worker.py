"""The thread of rank 0 that keeps a mirror of the checkpoints on the disk.

It looks at what lies on the disk and what it knows to lie in the store, and sends what is missing, the newest first; so
nothing is queued, and what a killed launch has left undone is done by the next. What the store refuses is tried again
after a longer and longer pause, for as long as the run lives; each failure is reported, and training goes on.

Not here: who may write to the store (storage/remote/lease.py, taken before this starts).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from contextlib import suppress
from pathlib import Path

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import complete_steps, latest_step, read_state, step_name
from megatron_fp4.checkpoint.mirror import keep
from megatron_fp4.checkpoint.mirror.contents import MirrorContents, MirroredName, local_name, look_at_mirror
from megatron_fp4.checkpoint.mirror.send import DamagedSource, UploadStopped, advance_latest, send_checkpoint
from megatron_fp4.checkpoint.mirror.state import MirrorReport, MirrorState
from megatron_fp4.checkpoint.retention import KeptStep, steps_to_delete
from megatron_fp4.storage.remote.client import Remote

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0
PRESSING_SECONDS = 3.0
"""The longest pause while a run waits for its end."""
PAUSES = (1.0, 4.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds before the next try, by failures in a row; the last for all further ones."""


class MirrorWorker:
    """Sends what is complete under `root` to `remote`. start() begins; stop() leaves what is not sent."""

    def __init__(self, remote: Remote, root: Path, config: CheckpointConfig) -> None:
        self.remote, self.root = remote, root
        self._config = keep.rules_of(config)
        self._contents: MirrorContents | None = None  # None: to be listed
        self._facts: dict[MirroredName, KeptStep] = {}
        self._unwanted: set[str] = set(keep.dropped(root))
        self._state = MirrorState(remote.url)
        self._reports: list[MirrorReport] = []
        self._failures = 0
        self._presses = False
        self._awake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Look now: a checkpoint may have been completed."""
        self._awake.set()

    def poll(self) -> list[MirrorReport]:
        """What has happened since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def discard_after(self, step: int) -> None:
        """A rollback to `step` is about to remove later checkpoints from the disk: none of them is sent any more, and
        those in the store are removed by the thread. Raises OSError."""
        self._unwanted |= keep.note_dropped(self.root, step)
        self.wake()

    def missing(self) -> list[int]:
        """Steps on the disk that belong into the store and are not known to be there, newest first."""
        return [name.step for name in self._wanted()]

    def wait(self, seconds: float) -> bool:
        """Wait for `seconds` at most; whether all is done. What fails is tried again soon from here on."""
        deadline = time.monotonic() + seconds
        self._presses = True
        while self.missing() or keep.dropped(self.root):
            if time.monotonic() > deadline:
                return False
            self.wake()
            time.sleep(0.05)
        return True

    def stop(self) -> list[int]:
        """End the thread after the block that it sends; the steps that are missing."""
        self._stop.set()
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        return self.missing()

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.is_set():
            if pause:  # a new checkpoint is no reason to ask a busy store at once
                self._stop.wait(min(pause, PRESSING_SECONDS) if self._presses else pause)
            else:
                self._awake.wait(LOOK_SECONDS)
            self._awake.clear()
            pause = self._look()

    def _look(self) -> float:
        """Do what is to be done; the seconds to wait before the next try, 0 if all is done."""
        began, name = time.monotonic(), None
        try:
            settled = not self._list_again()
            while not self._stop.is_set() and (wanted := self._wanted()):
                name, began = wanted[0], time.monotonic()
                num_bytes = self._send(name)
                self._reports.append(MirrorReport(name.step, num_bytes, time.monotonic() - began, "", self._failures))
                self._failures = 0
                self._settle()
                settled = True
            if not settled:
                self._settle()
            self._failures = 0
            self._tell()
            return 0.0
        except UploadStopped as stopped:
            log.info("mirror: %s", stopped)
            return 0.0
        except DamagedSource as damage:  # it will not get better; a resume passes over it, too
            self._unwanted.add(str(name))
            self._reports.append(MirrorReport(name.step if name else 0, error=f"not mirrored: {damage}", failures=1))
            return 0.0
        except Exception as error:  # the thread must not die silently, whatever it was
            self._failures += 1
            text = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - began
            self._reports.append(MirrorReport(name.step if name else 0, 0, seconds, text, self._failures))
            self._tell(text)
            self._contents = None  # whether the last request came through is not known
            return PAUSES[min(self._failures, len(PAUSES)) - 1] * random.uniform(0.8, 1.2)

    def _list_again(self) -> bool:
        """Know what lies in the store, and remove what a rollback has undone; whether the store was asked."""
        if self._contents is not None and not keep.dropped(self.root):
            return False
        self._contents = self._listed()
        if keep.remove_dropped(self.remote, self.root, self._contents):
            self._contents = self._listed()
        return True

    def _listed(self) -> MirrorContents:
        contents = look_at_mirror(self.remote)
        for name in contents.complete:
            if name not in self._facts:
                self._facts[name] = keep.read_kept(self.remote, name)
        return contents

    def _wanted(self) -> list[MirroredName]:
        """Complete checkpoints of the disk that the rules keep in the store and that are not there, newest first."""
        newest = latest_step(self.root)
        if newest is None:
            return []
        names = []
        for step in [one for one in complete_steps(self.root) if one <= newest]:
            with suppress(OSError, ValueError):  # removed while it was looked at, or not to be read for a moment
                name = local_name(self.root / step_name(step))
                if name not in self._facts:
                    state = read_state(self.root / step_name(step), pauses=())
                    self._facts[name] = KeptStep(step, state.get("tokens"), state.get("score"))
                names.append(name)
        present = self._contents.complete if self._contents else []
        by_step = {name.step: self._facts[name] for name in (*present, *names) if name in self._facts}
        doomed = steps_to_delete(list(by_step.values()), newest, self._config)
        return [
            name
            for name in names[::-1]
            if name not in present and name.step not in doomed and str(name) not in self._unwanted
        ]

    def _send(self, name: MirroredName) -> int:
        def stops() -> bool:
            return self._stop.is_set() or str(name) in self._unwanted

        assert self._contents is not None
        present = self._contents.files.get(name, {})
        return send_checkpoint(self.remote, self.root / step_name(name.step), name, present, stops)

    def _settle(self) -> None:
        """Let `latest` name the newest checkpoint of the disk, once it is in the store; remove what no rule keeps."""
        self._contents = contents = self._listed()
        step = latest_step(self.root)
        name = local_name(self.root / step_name(step)) if step is not None else None
        if name is None or name not in contents.complete or str(name) in self._unwanted:
            return
        if contents.latest != name:
            advance_latest(self.remote, name)
        doomed = keep.names_to_remove(contents, self._facts, name, self._config)
        for one in doomed:
            keep.remove_from_store(self.remote, one, contents.files[one])
        kept = {one: files for one, files in contents.files.items() if one not in doomed}
        self._contents = MirrorContents(kept, name)

    def _tell(self, error: str = "") -> None:
        """Write mirror.json if it says something new."""
        step = self._contents.complete[-1].step if self._contents and self._contents.complete else self._state.step
        state = MirrorState(self.remote.url, step, self.missing(), self._failures, error)
        if state != self._state:
            self._state = state
            state.write(self.root.parent)
