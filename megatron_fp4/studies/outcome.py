"""The gaps of all arms, and the verdict on every registered claim; a claim that cannot be decided says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from megatron_fp4.studies.design import Claim, Quantity, Study
from megatron_fp4.studies.intervals import Interval, interval_of, percent_gaps
from megatron_fp4.studies.measures import ArmResult, GradientError


class ClaimVerdict(Enum):
    """What the interval of a gap says of a claim's range."""

    reproduced = "reproduced"  # the interval lies inside
    contradicted = "contradicted"  # the interval lies outside, or the arm diverged
    undecided = "undecided"  # it reaches over an end


@dataclass(frozen=True)
class ArmGap:
    """An arm against another, over the seeds that both have.

    final, integrated: None where fewer than two pairs are finite. diverged, against_diverged: seeds whose loss is not
    finite in the arm alone, in the other one alone. gaps: of the final measure, by seed.
    """

    arm: str
    against: str
    final: Interval | None
    integrated: Interval | None
    gaps: dict[int, float]
    diverged: tuple[int, ...] = ()
    against_diverged: tuple[int, ...] = ()


@dataclass(frozen=True)
class JudgedClaim:
    """A claim and what the study says of it.

    pairs: how many it takes to tell the gap that was seen from the nearest end of the range; None where nothing was
    seen, or where no study could.
    """

    claim: Claim
    gap: ArmGap
    verdict: ClaimVerdict
    pairs: int | None


@dataclass(frozen=True)
class StudyOutcome:
    """Everything that a page tells. missing: (arm, seed) without a result. gradients: what was measured of them."""

    study: Study
    gaps: list[ArmGap]
    claims: list[JudgedClaim]
    missing: list[tuple[str, int]]
    gradients: list[GradientError] = field(default_factory=list)


def conclude(study: Study, results: Sequence[ArmResult], gradients: Sequence[GradientError] = ()) -> StudyOutcome:
    """Compare what there is. results, gradients: at most one of each arm and seed.

    Raises ValueError as `ArmResult.final`.
    """
    by_run = {(result.arm, result.seed): result for result in results}
    gaps = {pair: _gap(study, by_run, *pair) for pair in study.pairs}
    claims = [
        _judge(
            claim,
            gaps[claim.arm, claim.against]
            if claim.measure is Quantity.loss
            else gradient_gap(study, gradients, claim.arm, claim.against, claim.measure),
        )
        for claim in study.claims
    ]
    missing = [(arm, seed) for seed in study.seeds for arm in study.arms if (arm, seed) not in by_run]
    return StudyOutcome(study, list(gaps.values()), claims, missing, list(gradients))


def gradient_gap(
    study: Study, gradients: Sequence[GradientError], arm: str, against: str, quantity: Quantity
) -> ArmGap:
    """The gap of what was measured on equal weights, paired by seed."""
    measured = {(one.arm, one.seed): one.number(quantity) for one in gradients}
    if quantity is Quantity.equal_weights_loss:
        measured |= {(study.reference, one.seed): one.reference_loss for one in gradients}
    seeds = [seed for seed in study.seeds if (arm, seed) in measured and (against, seed) in measured]
    ours, theirs = ([measured[one, seed] for seed in seeds] for one in (arm, against))
    gaps = dict(zip(seeds, percent_gaps(ours, theirs), strict=True)) if all(theirs) else {}
    return ArmGap(arm, against, _interval(gaps), None, gaps)


def _gap(study: Study, by_run: dict[tuple[str, int], ArmResult], arm: str, against: str) -> ArmGap:
    seeds = [seed for seed in study.seeds if (arm, seed) in by_run and (against, seed) in by_run]

    def compared(measure: Callable[[ArmResult], float]) -> dict[int, float]:
        ours, theirs = ([measure(by_run[one, seed]) for seed in seeds] for one in (arm, against))
        return dict(zip(seeds, percent_gaps(ours, theirs), strict=True))

    def final(result: ArmResult) -> float:
        return result.final(study.measure)

    gaps, whole = compared(final), compared(lambda result: result.integrated)
    ended = {one: {seed for seed in seeds if math.isfinite(final(by_run[one, seed]))} for one in (arm, against)}
    alone = (tuple(sorted(ended[other] - ended[one])) for one, other in ((arm, against), (against, arm)))
    return ArmGap(arm, against, _interval(gaps), _interval(whole), gaps, *alone)


def _interval(gaps: dict[int, float]) -> Interval | None:
    finite = [gap for gap in gaps.values() if math.isfinite(gap)]
    return interval_of(finite) if len(finite) > 1 else None


def _judge(claim: Claim, gap: ArmGap) -> JudgedClaim:
    interval = gap.final
    if gap.diverged or gap.against_diverged:  # a loss of NaN is above any
        low = -math.inf if gap.against_diverged else math.inf
        high = math.inf if gap.diverged else -math.inf
        return JudgedClaim(claim, gap, _verdict(claim, low, high), None)
    if interval is None:
        return JudgedClaim(claim, gap, ClaimVerdict.undecided, None)
    distance = min(abs(interval.mean - end) for end in (claim.low, claim.high) if math.isfinite(end))
    return JudgedClaim(claim, gap, _verdict(claim, interval.low, interval.high), interval.pairs_for(distance))


def _verdict(claim: Claim, low: float, high: float) -> ClaimVerdict:
    if (claim.low < low or claim.low == low == high) and (high < claim.high or claim.high == low == high):
        return ClaimVerdict.reproduced
    if high < claim.low or claim.high < low:
        return ClaimVerdict.contradicted
    return ClaimVerdict.undecided
