"""The step clock: the one mutable object that a model, its optimizer and its trainer share.

One idea: everything that must differ from step to step (rounding noise, per-step signs) or be renewed after an update
(cached quantized weights) reads one explicit counter instead of keeping its own. It counts; it knows no time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepClock:
    """seed: of the run. step: optimizer steps begun. weights_version: goes up whenever any weight may have changed."""

    seed: int
    step: int = 0
    weights_version: int = 0
