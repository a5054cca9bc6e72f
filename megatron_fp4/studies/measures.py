"""What is compared of a run: numbers of its `metrics.jsonl`, which are kept in a study's results instead of the run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_fp4.studies.design import Measure, Quantity
from megatron_fp4.train.telemetry.series import RunSeries, matching_keys


@dataclass(frozen=True)
class ArmResult:
    """What is left of a run: its losses, step by step, and its newest held-out losses.

    key: hash of its whole configuration. tokens: consumed at each step of `losses`. about: commit, versions, seconds.
    """

    arm: str
    seed: int
    key: str
    tokens: list[float]
    losses: list[float]
    held_out: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(run: RunSeries, arm: str, seed: int, key: str, about: Mapping[str, Any]) -> ArmResult:
        """The result of a run that is complete."""
        losses = run.curve("loss")
        held_out = {name.split("/")[1]: run.curve(name).values[-1] for name in matching_keys([run], "eval/.*/loss")}
        return ArmResult(arm, seed, key, losses.tokens, losses.values, held_out, dict(about))

    def json(self) -> dict[str, Any]:
        """One line of a study's results. `step` makes it a record that damaged lines are told from."""
        return {"step": len(self.losses), **asdict(self)}

    @staticmethod
    def read(record: Mapping[str, Any]) -> ArmResult:
        """What `json` made. Raises KeyError and TypeError for anything else."""
        return ArmResult(**{name: value for name, value in record.items() if name != "step"})

    def final(self, measure: Measure) -> float:
        """The number that `measure` asks for; NaN where a loss of its window is not finite.

        Raises ValueError where the run has none.
        """
        if measure.loss != "training":
            if measure.loss not in self.held_out:
                raise ValueError(
                    f"{self.arm}, seed {self.seed} has no held-out loss {measure.loss!r}; measured were"
                    f" {', '.join(self.held_out) or 'none'} (data.evaluation, train.eval_interval)"
                )
            return self.held_out[measure.loss]
        if len(self.losses) < measure.window_steps:
            raise ValueError(
                f"{self.arm}, seed {self.seed} has {len(self.losses)} steps, fewer than measure.window_steps ="
                f" {measure.window_steps}"
            )
        return _mean(self.losses[-measure.window_steps :])

    @property
    def integrated(self) -> float:
        """The mean of the training loss over the whole run."""
        return _mean(self.losses)


@dataclass(frozen=True)
class GradientError:
    """One arm against the study's first on one batch and equal weights. key: hash of both configurations and `draws`.

    error: |g - r|^2 / |r|^2, mean over the draws of noise. cosine: of g and r. bias: the part of the error that the
    mean of the draws keeps, None where one was drawn. loss, reference_loss: of the batch, in nats per target; that of
    the arm is a mean over the draws.
    """

    error: float
    cosine: float
    bias: float | None
    loss: float
    reference_loss: float
    arm: str = ""
    seed: int = 0
    key: str = ""
    draws: int = 1

    def json(self) -> dict[str, Any]:
        """One line of a study's results."""
        return {"step": 0, **asdict(self)}

    @staticmethod
    def read(record: Mapping[str, Any]) -> GradientError:
        """What `json` made. Raises TypeError for anything else."""
        return GradientError(**{name: value for name, value in record.items() if name != "step"})

    def number(self, quantity: Quantity) -> float:
        """NaN where it was not measured (`gradient_left` with one draw, `loss` always)."""
        left = math.nan if self.bias is None else self.error * self.bias
        numbers = {
            Quantity.equal_weights_loss: self.loss,
            Quantity.gradient_error: self.error,
            Quantity.gradient_angle: 1.0 - self.cosine,
            Quantity.gradient_left: left,
        }
        return numbers.get(quantity, math.nan)


def _mean(losses: list[float]) -> float:
    return statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.nan
