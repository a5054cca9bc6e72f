"""The order of actions of every schedule, as torch gives it, and its simulated time."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.pipeline.order import Work, bubble, duration, in_flight, pipeline_order, simulate
from megatron_fp4.pipeline.schedules import SCHEDULES, schedule_rule, stages_of_rank, stages_per_rank

CASES = [(name, pp, m, 0) for name in SCHEDULES for pp, m in ((2, 4), (2, 6), (4, 8))]
CASES += [("interleaved_1f1b", 4, 8, 3), ("interleaved_zero_bubble", 2, 4, 3), ("zbv", 4, 3, 0), ("gpipe", 4, 1, 0)]


@pytest.mark.parametrize(("schedule", "pp", "m", "virtual"), CASES)
def test_every_microbatch_is_computed_once(schedule: str, pp: int, m: int, virtual: int) -> None:
    """A wrong reading of torch's actions loses, doubles or misnumbers one, or moves it to another rank."""
    config = ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual)
    order = pipeline_order(config, m)
    assert len(order) == pp
    for rank, works in enumerate(order):
        count = Counter(work.key for work in works)
        stages = stages_of_rank(rank, config)
        expected = {(kind, stage, n) for kind in "FB" for stage in stages for n in range(m)}
        split = {("W", work.stage, work.microbatch) for work in works if work.kind == "B" and work.units == 1}
        assert set(count) == expected | split, "an F or a B is missing, or a split backward has no W of the same number"
        assert set(count.values()) == {1}
        assert not split or schedule_rule(schedule).defers_wgrad, "the engine would not queue these weight gradients"
        assert sum(work.units for work in works) == 3 * m * stages_per_rank(config)


@pytest.mark.parametrize(("schedule", "pp", "m", "virtual"), CASES)
def test_dependencies_hold(schedule: str, pp: int, m: int, virtual: int) -> None:
    """Nothing begins before what it needs has ended, and a rank does one thing at a time."""
    timeline = simulate(pipeline_order(ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual), m))
    by_key = {timed.work.key: timed for done in timeline for timed in done}
    last = max(stage for _, stage, _ in by_key)
    for kind, stage, n in by_key:
        begin = by_key[kind, stage, n].begin
        before = {"F": [("F", stage - 1)], "B": [("F", stage), ("B", stage + 1)], "W": [("B", stage)]}[kind]
        assert all(by_key[k, s, n].end <= begin for k, s in before if 0 <= s <= last)
    for done in timeline:
        assert all(one.end <= two.begin for one, two in pairwise(done))
    assert 0.0 < bubble(timeline) < 1.0


@pytest.mark.parametrize(("schedule", "pp", "m", "virtual"), CASES)
def test_activations_in_flight(schedule: str, pp: int, m: int, virtual: int) -> None:
    """By brute force: after every action, the forwards behind it whose last backward is still to come."""
    for works in pipeline_order(ParallelConfig(pp=pp, schedule=schedule, virtual_stages=virtual), m):
        counts = []
        for now in range(1, len(works) + 1):
            done = {(work.stage, work.microbatch) for work in works[:now] if work.kind == "F"}
            counts.append(len(done & {(work.stage, work.microbatch) for work in works[now:]}))
        assert in_flight(works) == max(counts)


def test_activations_in_flight_by_hand() -> None:
    """pp 4, 8 microbatches. Deferred weight gradients hold activations: without them 4, 3, 2, 1 for zero bubble."""
    held = {
        name: [in_flight(works) for works in pipeline_order(ParallelConfig(pp=4, schedule=name), 8)]
        for name in SCHEDULES
    }
    assert held["gpipe"] == [8, 8, 8, 8]
    assert held["1f1b"] == [4, 3, 2, 1]
    assert held["interleaved_1f1b"] == [11, 9, 7, 5]
    assert held["interleaved_zero_bubble"] == [4, 4, 4, 4]
    assert held["zbv"] == [8, 8, 8, 8]
    assert held["dualpipev"] == [9, 9, 9, 9]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "m"), [(2, 2), (2, 7), (4, 8), (8, 32)])
def test_bubble_of_the_plain_schedules(schedule: str, pp: int, m: int) -> None:
    """The only exact formula: a simulation with a wrong dependency or duration misses it."""
    timeline = simulate(pipeline_order(ParallelConfig(pp=pp, schedule=schedule), m))
    assert bubble(timeline) == pytest.approx((pp - 1) / (m + pp - 1))
    assert duration(timeline) == 3 * (m + pp - 1)


def test_bubbles_of_the_others() -> None:
    """By hand for pp 4, 8 microbatches; stages that slept instead of computing were idle for about as long."""
    idle = {
        name: bubble(simulate(pipeline_order(ParallelConfig(pp=4, schedule=name), 8)))
        for name in ("interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
    }
    assert idle["interleaved_1f1b"] == pytest.approx(3 / (2 * 8 + 3))
    assert idle["interleaved_zero_bubble"] == pytest.approx(3 / (3 * 8 + 3))
    assert idle["zbv"] == pytest.approx(3 / 51), "not free of bubbles at m = 2 p"
    assert idle["dualpipev"] == pytest.approx(3 / (3 * 8 + 3)), "its forwards are sent after the backward beside them"


def test_joined_results_leave_together() -> None:
    """What the next rank waits for in dualpipev: the forward of microbatch 1 ends at 2, but leaves at 6."""
    first = [Work("F", 0, 0, 1), Work("F", 0, 1, 1, joined=True), Work("B", 0, 0, 2), Work("B", 0, 1, 2)]
    second = [Work("F", 1, 0, 1), Work("B", 1, 0, 2), Work("F", 1, 1, 1), Work("B", 1, 1, 2)]
    timeline = simulate([first, second])
    assert [timed.begin for timed in timeline[0]] == [0, 1, 4, 9]
    assert [timed.begin for timed in timeline[1]] == [1, 2, 6, 7]


def test_one_rank_never_waits() -> None:
    timeline = simulate(pipeline_order(ParallelConfig(), 3))
    assert bubble(timeline) == 0.0
    assert duration(timeline) == 9


def test_order_that_cannot_end_is_found() -> None:
    """A backward before its forward would otherwise be waited for forever."""
    with pytest.raises(AssertionError, match="never ends"):
        simulate([[Work("B", 0, 0, 2), Work("F", 0, 0, 1)]])


def test_microbatches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many microbatches"):
        pipeline_order(ParallelConfig(pp=4, schedule="dualpipev"), 4)
