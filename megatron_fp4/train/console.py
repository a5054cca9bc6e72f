"""What a person sees on the terminal: plain lines from the main rank, readable in a log file as well."""

from __future__ import annotations

import time


class Console:
    """Prints on the main rank and is silent elsewhere.

    interval_steps: a line every so many steps, and for the first and last step.
    """

    def __init__(self, *, enabled: bool, interval_steps: int) -> None:
        self._enabled, self._interval = enabled, max(1, interval_steps)
        self._first = self._last = 0
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        if self._enabled:
            print(text, flush=True)

    def start(self, first_step: int, last_step: int) -> None:
        """Begin to count: the run goes from after `first_step` to `last_step`."""
        self._first, self._last, self._began = first_step, last_step, time.monotonic()

    def step(self, step: int, values: dict[str, float]) -> None:
        """One line of progress."""
        if step % self._interval and step not in (self._first + 1, self._last):
            return
        per_step = (time.monotonic() - self._began) / (step - self._first)
        self.say(
            f"step {step:>6}/{self._last}  loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}"
            f"  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
            f"  ETA {format_seconds(per_step * (self._last - step))}"
        )


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
