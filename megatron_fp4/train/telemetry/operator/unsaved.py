"""A warning for a long run that saves at its end only: a kill in its last minute would cost all of it."""

from __future__ import annotations

import time

from megatron_fp4.train.config import RunConfig

MEASURED_STEPS = 20
"""So many steps of a launch are timed, behind its first one, which compiles."""
LONG_SECONDS = 3600.0
PROPOSED_SECONDS = 1800.0


class UnsavedWatch:
    """Times the first steps of a launch; `train.save_interval_steps=0` alone is watched."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._steps = 0
        self._began = 0.0

    def warning(self, step: int, samples: int) -> str:
        """Called after each step, `samples` consumed until then; the text once, else ""."""
        self._steps += 1
        if self._steps == 1:
            self._began = time.monotonic()
        if self._config.train.save_interval_steps or self._steps != 1 + MEASURED_STEPS:
            return ""
        pace = (time.monotonic() - self._began) / MEASURED_STEPS
        seconds = pace * (self._config.last_step(step, samples) - step)
        if seconds <= LONG_SECONDS:
            return ""
        interval = max(1, round(PROPOSED_SECONDS / pace))
        return (
            f"WARNING: the only save of this run is at its end, in {seconds / 3600:,.1f} h at {pace:.3g} s a step; a"
            f" kill before that loses all of it. train.save_interval_steps={interval} saves every"
            f" {PROPOSED_SECONDS / 60:.0f} min"
        )
