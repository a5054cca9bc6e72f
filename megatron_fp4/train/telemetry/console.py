"""What a person sees on the terminal: plain lines from the main rank, readable in a log file as well.

On a terminal a progress line stands below them, renewed with every step; a log file gets none.
"""

from __future__ import annotations

import sys
import time

from rich import console as rich_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_fp4.train.telemetry.operator.events import EventKind, Events


class Console:
    """Prints on the main rank and is silent elsewhere.

    interval_steps: a line every so many steps, and for the first and last step. events: where `event` goes too.
    """

    def __init__(self, *, enabled: bool, interval_steps: int, events: Events | None = None) -> None:
        self.events = events or Events(None)
        self._enabled = enabled
        self._interval = max(1, interval_steps)
        self._first = 0
        self._last = 0
        self._warm: tuple[int, float] | None = None
        """The first step and when it was over: it compiles, so the seconds of a step are counted from there."""
        self._line = _progress_line() if enabled and sys.stdout.isatty() else None

    def say(self, text: str) -> None:
        if self._line is not None:
            self._line.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(text, flush=True)

    def event(self, kind: EventKind, step: int, text: str) -> None:
        """Say what happened, and tell it those who do not look (operator/events.py)."""
        self.say(text)
        self.events.add(kind, step, text)

    def start(self, first_step: int, last_step: int) -> None:
        """Begin to count: the run goes from after `first_step` to `last_step`."""
        self._first = first_step
        self._last = last_step
        self._warm = None
        if self._line is not None:
            for task in self._line.task_ids:  # left by the attempt before a rollback
                self._line.remove_task(task)
            self._line.add_task("", total=last_step, completed=first_step)
            self._line.start()

    def step(self, step: int, values: dict[str, float]) -> None:
        """One line of progress. values: without "loss" if the step had no target."""
        loss = f"loss {values['loss']:.4f}" if "loss" in values else "loss none"
        if self._line is not None:
            text = f"{loss}  {values['tokens_per_second']:,.0f} tokens/s"
            self._line.update(self._line.task_ids[0], completed=step, description=text)
        eta = self._eta(step)
        if step % self._interval and step not in (self._first + 1, self._last):
            return
        self.say(
            f"step {step:>6}/{self._last}  {loss}  grad norm {values['grad_norm']:.3f}"
            f"  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
            f"  ETA {eta}"
        )

    def _eta(self, step: int) -> str:
        """The time of the steps to come, without what the first one took longer; "-" after that one."""
        now = time.monotonic()
        if self._warm is None:
            self._warm = step, now
            return "-" if step < self._last else format_seconds(0)
        first, since = self._warm
        return format_seconds((now - since) / (step - first) * (self._last - step))

    def close(self) -> None:
        """Take the progress line away and give the terminal back."""
        if self._line is not None:
            self._line.stop()


def _progress_line() -> Progress:
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    terminal = rich_console.Console(file=sys.stdout, force_terminal=True)
    return Progress(*columns, TimeRemainingColumn(), console=terminal, transient=True, refresh_per_second=2)


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
