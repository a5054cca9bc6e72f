"""The step clock: the one mutable object that a model, its optimizer and its trainer share.

Everything that must differ from step to step (rounding noise, per-step signs) or be renewed after an update
(cached quantized weights) reads one explicit counter instead of keeping its own. It counts; it knows no time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepClock:
    """The seed of the run, and where it stands."""

    seed: int
    step: int = 0
    """Optimizer steps begun."""
    batch_samples: int = 1
    """Samples of the global batch in progress, over which losses that no target token has are means."""
    weights_version: int = 0
    """Goes up whenever any weight may have changed."""
