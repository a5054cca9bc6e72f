"""Verdicts on registered claims, from results that are put in."""

from __future__ import annotations

import math

import pytest

from megatron_fp4.studies.design import Claim, Measure, Study
from megatron_fp4.studies.measures import ArmResult
from megatron_fp4.studies.outcome import ClaimVerdict, conclude

SEEDS = (1, 2, 3, 4)
LAST_TWO = Measure(window_steps=2)


def study(*claims: Claim, measure: Measure = LAST_TWO) -> Study:
    return Study("s", "?", [], {"base": [], "worse": ["a=1"], "same": ["b=1"]}, SEEDS, measure, claims)


def result(arm: str, seed: int, level: float) -> ArmResult:
    losses = [10.0, 3.0 + 0.1 * seed, level * (2.0 + 0.1 * seed), level * (1.8 + 0.1 * seed)]
    return ArmResult(arm, seed, f"{arm}{seed}", [1.0, 2.0, 3.0, 4.0], losses, {"held": level * seed})


def results(worse: float = 1.01, jitter: float = 0.0005) -> list[ArmResult]:
    levels = {"base": 1.0, "worse": worse, "same": 1.0}
    return [
        result(arm, seed, level + (jitter * (-1) ** seed if arm != "base" else 0.0))
        for arm, level in levels.items()
        for seed in SEEDS
    ]


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (Claim("worse", "base", 0.0, math.inf), ClaimVerdict.reproduced),
        (Claim("worse", "base", 0.5, 1.5), ClaimVerdict.reproduced),
        (Claim("worse", "base", -math.inf, 0.0), ClaimVerdict.contradicted),
        (Claim("worse", "base", 2.0, 3.0), ClaimVerdict.contradicted),
        (Claim("worse", "base", 1.0, math.inf), ClaimVerdict.undecided),
        (Claim("same", "base", 0.0, math.inf), ClaimVerdict.undecided),
        (Claim("same", "worse", -math.inf, 0.0), ClaimVerdict.reproduced),
    ],
)
def test_a_claim_is_judged_by_its_whole_interval(claim: Claim, verdict: ClaimVerdict) -> None:
    (judged,) = conclude(study(claim), results()).claims
    assert judged.verdict is verdict


def test_a_gap_is_of_the_window_and_the_whole_run_has_its_own() -> None:
    gap = conclude(study(), results(jitter=0.0)).gaps[0]
    assert gap.final is not None
    assert gap.integrated is not None
    assert gap.final.mean == pytest.approx(1.0)
    assert 0 < gap.integrated.mean < 0.5  # half of the steps are equal


def test_a_held_out_set_is_measured_by_name() -> None:
    measured = conclude(study(measure=Measure("held")), results(jitter=0.0))
    assert measured.gaps[0].final is not None
    assert measured.gaps[0].final.mean == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no held-out loss 'other'; measured were held"):
        conclude(study(measure=Measure("other")), results())


def test_an_arm_that_diverges_is_above_every_bound() -> None:
    diverged = [one if (one.arm, one.seed) != ("worse", 2) else result("worse", 2, math.nan) for one in results()]
    claims = [Claim("worse", "base", 0.0, math.inf), Claim("worse", "base", -1.0, 1.5)]
    outcome = conclude(study(*claims), diverged)
    assert outcome.gaps[0].diverged == (2,)
    assert [one.verdict for one in outcome.claims] == [ClaimVerdict.reproduced, ClaimVerdict.contradicted]


@pytest.mark.parametrize(
    ("broken", "verdicts"),
    [
        ({"worse": (2,), "same": (2,)}, ("reproduced", "contradicted")),  # of the other three pairs
        ({"worse": SEEDS, "same": SEEDS}, ("undecided", "undecided")),
        ({"worse": (2,)}, ("reproduced", "contradicted")),
        ({"same": (2,)}, ("contradicted", "reproduced")),
        ({"worse": (2,), "same": (3,)}, ("undecided", "undecided")),
    ],
)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_who_diverges_alone_is_worse(
    broken: dict[str, tuple[int, ...]], verdicts: tuple[str, str], loss: float
) -> None:
    """Where both arms diverge, that seed says nothing of which is better; an infinite loss is one that diverged."""
    some = [
        result(one.arm, one.seed, loss) if one.seed in broken.get(one.arm, ()) else one for one in results(jitter=0.0)
    ]
    claims = [Claim("worse", "same", 0.0, math.inf), Claim("worse", "same", -math.inf, 0.0)]
    for measure in (LAST_TWO, Measure("held")):
        outcome = conclude(study(*claims, measure=measure), some)
        assert tuple(one.verdict.value for one in outcome.claims) == verdicts


def test_missing_runs_are_named_and_the_pairs_that_there_are_count() -> None:
    some = [one for one in results() if (one.arm, one.seed) not in {("worse", 1), ("base", 4)}]
    outcome = conclude(study(), some)
    assert outcome.missing == [("worse", 1), ("base", 4)]
    assert list(outcome.gaps[0].gaps) == [2, 3]


def test_a_run_that_is_shorter_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 steps, fewer than measure.window_steps = 5"):
        conclude(study(measure=Measure(window_steps=5)), results())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, "1 seed"),
        ({"seeds": [1, 1]}, "stands twice"),
        ({"arms": {"one": []}}, "needs two"),
        ({"arms": {"one": [], "a/b": []}}, "names folders"),
        ({"claims": [Claim("one", "three", 0.0, 1.0)]}, "the arm three; the arms are one, two"),
        ({"claims": [Claim("one", "one", 0.0, 1.0)]}, "with itself"),
    ],
)
def test_a_study_that_decides_nothing_is_refused(change: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"arms": {"one": [], "two": []}, "seeds": [1, 2], "claims": []}
    with pytest.raises(ValueError, match=message):
        Study(name="s", question="", base=[], **(settings | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(("low", "high", "message"), [(1.0, 0.0, "no range"), (-math.inf, math.inf, "every gap")])
def test_a_claim_has_a_range(low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Claim("a", "b", low, high)
