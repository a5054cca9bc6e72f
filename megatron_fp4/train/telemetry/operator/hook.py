"""Hands events to a command or a URL (`logging.on_event`): a pager, a chat, a scheduler.

A thread delivers one event after the other, each within DELIVERY_SECONDS; whoever tells an event never waits. What goes
wrong is said once in a launch, and at its end how many events were not delivered. A command is killed with all that it
started when its time is over, or that of the launch: the process ends by os._exit, which would leave it behind.

A setting is stored in config.yaml and in every checkpoint, and printed: a token in it would be too. So `$NAME` in a URL
is read from the environment of rank 0 when it is used, a command has its `$NAME` from its shell, and what looks like a
literal secret is refused (train/sections.py). What is said of a failure never holds what `$NAME` stands for.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from string import Template
from typing import Any

log = logging.getLogger(__name__)
DELIVERY_SECONDS = 10.0
CLOSE_SECONDS = 15.0
"""How long the end of a launch waits for what is still to be delivered; then it is cut off."""
KILL_SECONDS = 1.0
"""How long the thread has to count what was cut off."""
MAX_WAITING = 1000
URL = re.compile(r"https?://", re.IGNORECASE)


def check_environment(target: str) -> None:
    """Raises ValueError for a `$NAME` of a URL that this process does not have."""
    if URL.match(target):
        _expanded(target)


def _expanded(url: str) -> str:
    try:
        return Template(url).substitute(os.environ)
    except KeyError as error:
        raise ValueError(
            f"logging.on_event = {url} needs the environment variable {error.args[0]}, which rank 0 does not have"
        ) from None
    except ValueError:
        raise ValueError(f"logging.on_event = {url}: a lone $ stands for nothing; write $NAME, or $$ for $") from None


class Hook:
    """Delivers to `target`, from a thread."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(MAX_WAITING)
        self._undelivered = 0
        self._commands = Commands()
        self._thread = threading.Thread(target=self._work, name="event-hook", daemon=True)
        self._thread.start()

    def deliver(self, event: Mapping[str, Any]) -> None:
        """Returns at once."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._failed(event, f"{MAX_WAITING} wait before it")

    def close(self, seconds: float | None = None) -> None:
        """Wait so long, CLOSE_SECONDS if not said, and cut off the rest. Safe to call twice."""
        if not self._thread.is_alive():
            return
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(CLOSE_SECONDS if seconds is None else seconds)
        if self._thread.is_alive():
            self._commands.end()
            self._thread.join(KILL_SECONDS)
        waiting = self._queue.qsize() if self._thread.is_alive() else 0
        if self._undelivered + waiting:
            log.warning("logging.on_event: %d event(s) were not delivered", self._undelivered + waiting)

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                send = _post if URL.match(self._target) else self._commands.run
                send(self._target, json.dumps(event).encode())
            except (OSError, ValueError) as error:
                self._failed(event, _reason(error))

    def _failed(self, event: Mapping[str, Any], why: str) -> None:
        if not self._undelivered:
            log.warning("logging.on_event: %s was not delivered (%s); this is said once", event["event"], why)
        self._undelivered += 1


def _reason(error: Exception) -> str:
    """What went wrong, without the address: an exception's own text may hold it."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    if isinstance(error, urllib.error.URLError):
        cause = error.reason
        number = cause.errno if isinstance(cause, OSError) else None
        return os.strerror(number) if number else type(cause).__name__
    return str(error) if isinstance(error, HookFailed) else type(error).__name__


class HookFailed(OSError):
    """The command did not end well."""


def _post(url: str, body: bytes) -> None:
    """Raises OSError (of which URLError is one) or ValueError."""
    request = urllib.request.Request(_expanded(url), body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=DELIVERY_SECONDS):
        pass


class Commands:
    """Runs one command at a time, each in a process group of its own, until `end`, which another thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def run(self, command: str, body: bytes) -> None:
        """A shell, with the event on its standard input. Raises OSError."""
        with self._lock:
            if self._ended:
                raise HookFailed("the launch has ended")
            process = self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            process.communicate(body + b"\n", timeout=DELIVERY_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            process.wait()
            raise HookFailed(f"the command took longer than {DELIVERY_SECONDS:g} s") from None
        finally:
            with self._lock:
                self._process = None
        if process.returncode:
            ended = "was killed at the end of the launch" if self._ended else None
            raise HookFailed(f"the command {ended or f'ended with exit code {process.returncode}'}")

    def end(self) -> None:
        """Kill what runs, with all that it started, and start nothing more."""
        self._ended = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
