"""Loss spikes: when is a loss one, and what is done about it.

A ladder whose rungs are decided from the loss that all ranks have agreed on, before the update, so that a spike changes
no weight and all ranks act alike.

    1  the first `max_skips` spikes in a row: the batch is skipped, no state changes
    2  the next one: back to the newest checkpoint before the first of them, the samples since are never read again
    3  after `max_rollbacks` of those: the run ends with what it knows

The window of the running mean is part of the checkpoint, so a resumed run judges as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from megatron_fp4.train.sections import SpikeConfig


class Action(Enum):
    go_on = "go on"
    skip = "skip the batch"
    roll_back = "roll back"
    abort = "abort"


@dataclass(frozen=True)
class Judgement:
    """What to do about one loss. mean, deviation: those of the losses in the window before it."""

    action: Action
    loss: float
    mean: float = math.nan
    deviation: float = math.nan

    def __str__(self) -> str:
        z = (self.loss - self.mean) / self.deviation if self.deviation else math.inf
        return f"loss {self.loss:.4f} is {self.loss / self.mean:.2f} x the running mean {self.mean:.4f} (z = {z:.1f})"


@dataclass
class SpikeState:
    """What the ladder knows, as a checkpoint stores it.

    losses: those of the last good steps. in_a_row: spikes since the last good step. first_spike: step of the first of
    them. good_steps: good steps since the last spike. rollbacks: how many count against `max_rollbacks`.
    """

    losses: list[float] = field(default_factory=list)
    in_a_row: int = 0
    first_spike: int = 0
    good_steps: int = 0
    rollbacks: int = 0


class SpikeLadder:
    """Judges every loss once, in order; deterministic, the same on all ranks."""

    def __init__(self, config: SpikeConfig, saved: dict[str, Any] | None = None) -> None:
        self.config = config
        self.state = SpikeState(**saved) if saved else SpikeState()

    def judge(self, step: int, loss: float) -> Judgement:
        """What to do about the loss of `step`. One that is not finite is no spike: the optimizer skips that step."""
        if not self.config.enabled or not math.isfinite(loss):
            return Judgement(Action.go_on, loss)
        state, known = self.state, len(self.state.losses)
        mean = statistics.fmean(state.losses) if known else math.nan
        deviation = statistics.pstdev(state.losses) if known else math.nan
        if known < self.config.min_steps or not self._is_spike(loss, mean, deviation):
            self._remember(loss)
            return Judgement(Action.go_on, loss, mean, deviation)
        state.first_spike = state.first_spike if state.in_a_row else step
        state.in_a_row, state.good_steps = state.in_a_row + 1, 0
        if state.in_a_row <= self.config.max_skips:
            action = Action.skip
        else:
            action = Action.roll_back if state.rollbacks < self.config.max_rollbacks else Action.abort
        return Judgement(action, loss, mean, deviation)

    def rolled_back(self, saved: dict[str, Any], rollbacks: int) -> None:
        """Judge as at the checkpoint, but remember how many rollbacks there were."""
        self.state = SpikeState(**saved)
        self.state.rollbacks, self.state.in_a_row = rollbacks, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self.state)

    def _is_spike(self, loss: float, mean: float, deviation: float) -> bool:
        ratio, z_score = self.config.ratio, self.config.z_score
        return bool((ratio and loss > ratio * mean) or (z_score and loss > mean + z_score * deviation))

    def _remember(self, loss: float) -> None:
        state = self.state
        state.losses = [*state.losses, loss][-self.config.window_steps :]
        state.in_a_row, state.good_steps = 0, state.good_steps + 1
        if state.good_steps >= self.config.window_steps:
            state.rollbacks = 0
