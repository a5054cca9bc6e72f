"""Ends a job in which a rank hangs, from start-up to the last file, and says which rank, where, and why.

A rank that waits for others stands in a collective, the late rank does not. A thread of each rank looks at how long the
main thread has been in its phase. After half the time-out it posts step, phase and place on a board that needs no
collective; after the whole time-out the first rank reads the board and prints the summary, a late one prints the stack
of its main thread (one of each kind, where many are late), and all end with EXIT_HUNG.

Before the ranks have met there is no board: a rank that hangs then prints its own stack and ends.

A main thread that hangs in native code and keeps Python's lock stops this thread too. Then `faulthandler`, whose timer
is not re-armed, prints all stacks and ends the process, from C. A process that does not run at all (stopped by a
signal, dead node) is named by the others: it is the one that posted nothing.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from types import FrameType

from megatron_fp4.comm.agree import number_ranges
from megatron_fp4.comm.board import NoticeBoard
from megatron_fp4.comm.bootstrap import exit_process
from megatron_fp4.comm.mesh import Group
from megatron_fp4.train.faults.signals import EXIT_HUNG
from megatron_fp4.train.phases import CurrentPhase, Phases

MAX_KINDS = 20
"""Ranks at the same place are one kind; of so many the log tells."""


@dataclass(frozen=True)
class Notice:
    """Where a rank stands that does not get on.

    collective: the one in which it waits, "" if in none. place: file, line, function of the innermost Python frame.
    """

    step: int
    phase: str
    collective: str
    place: str
    host: str

    def __str__(self) -> str:
        where = f"waiting in the collective {self.collective}" if self.collective else f"at {self.place}"
        return f"step {self.step}, phase {self.phase}, {where} (host {self.host})"


class Watchdog:
    """Watches the calling thread while used in a `with`. timeout_seconds: longest time in one phase; 0 = no watch.

    rank: this process's in the world. extra_seconds: what a phase may take on top, by name. last_act: what the end of a
    job still does on this rank, if it is done in a moment.
    """

    def __init__(
        self, phases: Phases, rank: int, timeout_seconds: float, extra_seconds: dict[str, float] | None = None
    ) -> None:
        self.last_act: Callable[[], None] = lambda: None
        self._phases = phases
        self._rank = rank
        self._timeout = timeout_seconds
        self._extra = extra_seconds or {}
        self._poll = min(5.0, timeout_seconds / 10)
        self._watched = threading.get_ident()
        self._board = NoticeBoard(Group.single("world", rank), "watchdog")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def meet(self, world: Group) -> None:
        """The ranks of `world` have met: from here on they tell each other where they are."""
        if self._timeout:
            self._board = NoticeBoard(world, "watchdog")

    def __enter__(self) -> Watchdog:
        if self._timeout:
            self._phases.beat()
            self._arm(self._phases.current)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join(timeout=10.0)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(self._poll):
            current = self._phases.current
            self._arm(current)
            late = time.monotonic() - current.since - self._extra.get(current.name, 0.0)
            try:
                self._board.post(self._notice(current) if late > self._timeout / 2 else "")
                if late > self._timeout:
                    self._end(current)
            except RuntimeError as error:  # the store is gone: its rank is dead, and the others are about to end
                if late > self._timeout:
                    self._say(f"rank {self._rank} {self._describe(current)}; the others are not reached: {error}")
                    exit_process(EXIT_HUNG)

    def _arm(self, current: CurrentPhase) -> None:
        """Let C end the process if this thread does not come back here, after all that it would do by itself."""
        longest = self._timeout + self._extra.get(current.name, 0.0)
        faulthandler.dump_traceback_later(longest + 5 * self._poll, exit=True, file=sys.__stderr__ or 2)

    def _describe(self, current: CurrentPhase) -> Notice:
        collective, place = where(sys._current_frames()[self._watched])
        return Notice(current.step, current.name, collective, place, socket.gethostname())

    def _notice(self, current: CurrentPhase) -> str:
        return json.dumps(asdict(self._describe(current)))

    def _end(self, current: CurrentPhase) -> None:
        time.sleep(2 * self._poll)  # until the others have posted
        if self._phases.current.since != current.since:
            return  # it goes on after all
        if self._rank in json.loads(self._board.conclude(self._judge, 4 * self._poll)):
            stack = "".join(traceback.format_stack(sys._current_frames()[self._watched]))
            self._say(f"stack of the main thread of rank {self._rank}:\n{stack}")
        threading.Thread(target=self.last_act, daemon=True).start()
        time.sleep(self._poll)  # nobody leaves before the others have heard, of a store which one of them may hold
        exit_process(EXIT_HUNG)

    def _judge(self, texts: dict[int, str]) -> str:
        """Print the summary; returns the ranks that print their stacks. On the first rank that comes to its end."""
        notices = {rank: Notice(**json.loads(text)) for rank, text in texts.items()}
        late = late_ranks(notices, self._board.ranks)
        self._say(summary(notices, late, self._timeout))
        return json.dumps([ranks[0] for ranks in by_place(notices, late)[:MAX_KINDS]])

    def _say(self, text: str) -> None:
        print(f"watchdog: {text}", file=sys.stderr, flush=True)


def where(frame: FrameType) -> tuple[str, str]:
    """(collective or "", place) of the innermost Python frame of a thread."""
    name, line = frame.f_code.co_filename, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    place = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
    if "torch/distributed/" in name:
        return frame.f_code.co_name, place
    return (line, place) if line.endswith(".wait()") else ("", place)  # of a collective that was started earlier


def late_ranks(notices: dict[int, Notice], ranks: Sequence[int]) -> list[int]:
    """The ranks for which the others wait: who is in no collective, at the earliest step; else who says nothing; else
    (all wait for each other, so they differ in what they wait for) those at the earliest step.
    """
    busy = {rank: notice.step for rank, notice in notices.items() if not notice.collective}
    silent = [rank for rank in ranks if rank not in notices]
    if silent and not busy:
        return silent
    steps = busy or {rank: notice.step for rank, notice in notices.items()}
    return [rank for rank, step in steps.items() if step == min(steps.values())]


def by_place(notices: dict[int, Notice], ranks: Iterable[int]) -> list[list[int]]:
    """The `ranks` that have a notice, ascending, those at the same place in one list; the longest list first."""
    kinds: dict[Notice, list[int]] = {}
    for rank in sorted(ranks):
        if rank in notices:
            kinds.setdefault(replace(notices[rank], host=""), []).append(rank)
    return sorted(kinds.values(), key=lambda kind: -len(kind))


def summary(notices: dict[int, Notice], late: list[int], timeout_seconds: float) -> str:
    """The text of the log: late ranks and the others, together where they stand at the same place."""
    lines = [f"no progress for {timeout_seconds:g} s (train.hang_timeout_seconds); the job ends"]
    kinds = by_place(notices, late)[:MAX_KINDS]
    lines += [f"  {_named(kind, 'hangs', 'hang')}: {notices[kind[0]]}" for kind in kinds]
    if silent := [rank for rank in late if rank not in notices]:
        verb = _named(silent, "gives no sign of life", "give no sign of life")
        lines.append(f"  {verb} (stopped, or the node is gone)")
    kinds = by_place(notices, notices.keys() - set(late))[:MAX_KINDS]
    lines += [f"  {len(kind)} other rank(s): {notices[kind[0]]}" for kind in kinds]
    return "\n".join(lines)


def _named(ranks: Sequence[int], one: str, several: str) -> str:
    return f"rank {ranks[0]} {one}" if len(ranks) == 1 else f"{len(ranks)} ranks {several}, {number_ranges(ranks)}"
