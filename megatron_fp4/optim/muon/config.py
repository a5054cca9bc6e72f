"""What a user can set about Muon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from megatron_fp4.settings import FP32_MOST, Bound, check_bounds

Triple = tuple[float, float, float]

SIMPLE: Triple = (3.4445, -4.7750, 2.0315)


class NewtonSchulz(Enum):
    """The polynomials a x + b x^3 + c x^5 that are applied to the singular values, one after another."""

    simple = "simple"  # one triple five times: K. Jordan's, torch.optim.Muon's
    quintic = "quintic"  # five triples: Megatron-LM's default
    polar_express = "polar_express"  # eight triples, arXiv 2505.16932, with its safety factor of 1.01
    deepseek_v4 = "deepseek_v4"  # `simple` eight times, then two steps that converge to 1

    @property
    def triples(self) -> tuple[Triple, ...]:
        """The coefficients of every step."""
        return TRIPLES[self]


TRIPLES: dict[NewtonSchulz, tuple[Triple, ...]] = {
    NewtonSchulz.simple: (SIMPLE,) * 5,
    NewtonSchulz.quintic: (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    NewtonSchulz.polar_express: (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
    NewtonSchulz.deepseek_v4: (SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}


class UpdateScale(Enum):
    """What an orthogonal update `[out, in]` is multiplied with."""

    shape = "shape"  # max(1, out / in)^0.5: K. Jordan's, torch.optim.Muon's "original"
    spectral = "spectral"  # max(out, in)^0.5: Megatron-LM's default
    match_adamw_rms = "match_adamw_rms"  # 0.2 max(out, in)^0.5: the RMS of AdamW's updates (Moonlight, Kimi K2)
    unit_rms = "unit_rms"  # (out / in)^0.5

    def factor(self, rows: int, columns: int) -> float:
        """What a matrix of this shape is scaled by."""
        if self is UpdateScale.shape:
            return math.sqrt(max(1.0, rows / columns))
        if self is UpdateScale.unit_rms:
            return math.sqrt(rows / columns)
        largest = math.sqrt(max(rows, columns))
        return 0.2 * largest if self is UpdateScale.match_adamw_rms else largest


@dataclass(frozen=True)
class MuonConfig:
    """How matrices are updated where `optim.algorithm` is muon; all else is AdamW's, with its own settings."""

    momentum: Annotated[float, Bound(least=0, below=1)] = 0.95
    """Decay of the mean of the gradients, per step."""
    nesterov: bool = True
    """Orthogonalize the mean as it would be after this gradient once more, not the mean."""
    newton_schulz: NewtonSchulz = NewtonSchulz.quintic
    """Coefficients of the orthogonalization, and with them the number of its steps."""
    scale: UpdateScale = UpdateScale.match_adamw_rms
    """What an update is multiplied with, beside the learning rate."""
    adamw_lr: Annotated[float, Bound(least=0, most=FP32_MOST)] = 0.0
    """Peak learning rate of what AdamW updates, on the same schedule; 0 = optim.lr."""
    adamw_for: tuple[str, ...] = ("embedding.*", "head.*", "*.conv.*")
    """Patterns of the matrices that AdamW updates, by their logical names."""

    def __post_init__(self) -> None:
        check_bounds(self, "optim.muon")
