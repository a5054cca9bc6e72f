"""A study as a value; whatever could not be decided by it is refused before a run is started."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
MIN_SEEDS = 2


class Quantity(Enum):
    """What a claim is on. All but `loss` need no training: `megatron-fp4 study --gradients` measures them."""

    loss = "loss"  # the study's measure, of trained runs
    equal_weights_loss = "equal_weights_loss"  # loss of one batch on weights that all arms have
    gradient_error = "gradient_error"  # |g - r|^2 / |r|^2, r: the first arm's gradient
    gradient_angle = "gradient_angle"  # 1 - cosine of g and r
    gradient_left = "gradient_left"  # the error of the mean of several draws of noise: what no step averages out


@dataclass(frozen=True)
class Claim:
    """What is expected of the gap of `arm` against another arm, written down before the runs.

    low, high: the range in percent in which it should lie; infinite on the side that is open. because: the source.
    measure: what the gap is of; smaller is better in all of them.
    """

    arm: str
    against: str
    low: float
    high: float
    because: str = ""
    measure: Quantity = Quantity.loss

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(
                f"claim on {self.arm} against {self.against}: [{self.low:g}, {self.high:g}] percent is no range; give"
                " the smaller number first, or null for a side that is open"
            )
        if math.isinf(self.low) and math.isinf(self.high):
            raise ValueError(f"claim on {self.arm} against {self.against}: every gap lies in it; give a bound")

    def __str__(self) -> str:
        """`above 0 %`, `-0.5 to 1.5 %`."""
        if math.isinf(self.high):
            return f"above {self.low:g} %"
        if math.isinf(self.low):
            return f"below {self.high:g} %"
        return f"{self.low:g} to {self.high:g} %"


@dataclass(frozen=True)
class Measure:
    """The number that stands for a run; smaller is better.

    loss: `training`, the mean over the last `window_steps` steps, or the name of a held-out set, whose newest loss it
    is.
    """

    loss: str = "training"
    window_steps: int = 100

    def __post_init__(self) -> None:
        if self.window_steps < 1:
            raise ValueError(f"measure.window_steps = {self.window_steps}; use at least 1")

    def __str__(self) -> str:
        if self.loss == "training":
            return f"mean training loss of the last {self.window_steps} steps"
        return f"held-out loss on {self.loss}"


@dataclass(frozen=True)
class Study:
    """Arms x seeds on one base experiment.

    base: overrides of every run. arms: name -> its own overrides, which come after them; the first arm is what the
    others are compared with. claims: see `Claim`.
    Raises ValueError for what no run could decide.
    """

    name: str
    question: str
    base: Sequence[str]
    arms: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    measure: Measure = Measure()
    claims: Sequence[Claim] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.arms):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} names folders; use letters, digits, dots, dashes and underscores")
        if len(self.arms) < 2:
            raise ValueError(f"study {self.name} has {len(self.arms)} arm(s); a comparison needs two")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"study {self.name}: seeds = {list(self.seeds)}: one stands twice, and would count twice")
        if len(self.seeds) < MIN_SEEDS:
            raise ValueError(
                f"study {self.name} has {len(self.seeds)} seed(s); without two pairs at least nothing is known of their"
                " spread"
            )
        for claim in self.claims:
            for arm in (claim.arm, claim.against):
                if arm not in self.arms:
                    raise ValueError(f"a claim names the arm {arm}; the arms are {', '.join(self.arms)}")
            if claim.arm == claim.against:
                raise ValueError(f"a claim compares {claim.arm} with itself")
            of_gradients = claim.measure not in (Quantity.loss, Quantity.equal_weights_loss)
            if of_gradients and self.reference in (claim.arm, claim.against):
                raise ValueError(
                    f"a claim on {claim.measure.value} names {self.reference}, whose gradient the others are compared"
                    " with: its own error is 0, and no percentage of it exists"
                )

    @property
    def reference(self) -> str:
        """The first arm."""
        return next(iter(self.arms))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Which arm's loss is compared with which: all with the first, then what claims add."""
        first = [(arm, self.reference) for arm in self.arms if arm != self.reference]
        claimed = [(claim.arm, claim.against) for claim in self.claims if claim.measure is Quantity.loss]
        return list(dict.fromkeys([*first, *claimed]))

    def overrides(self, arm: str, seed: int) -> list[str]:
        """The settings of a run; the seed decides weights, noise and the order of the data."""
        return [*self.base, *self.arms[arm], f"train.seed={seed}", f"data.seed={seed}"]
