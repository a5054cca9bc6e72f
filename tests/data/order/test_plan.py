import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.data.config import PhaseConfig
from megatron_fp4.data.order.plan import Plan, Segment, merge_ranges

SIZES = {"web": 1000, "code": 500, "math": 100}


def plan_of(*phases, skip=()):
    return Plan.from_config([PhaseConfig(*phase) for phase in phases], SIZES, 8, skip)


def consumed(plan, start, end):
    by_source = defaultdict(list)
    for name, number in plan.locate(np.arange(start, end)):
        by_source[name].append(number)
    return by_source


def test_phases_switch_at_their_token_and_go_on_where_they_were():
    """The paper's 70/20/10%: a source's samples go on across phases without a gap or a repeat."""
    plan = plan_of(("one", 5600, {"web": 0.7, "code": 0.3}), ("two", 1600, {"web": 0.5, "math": 0.5}), ("three", 0, {}))
    assert [segment.first for segment in plan.segments] == [0, 700, 900]
    taken = consumed(plan, 0, 1000)
    assert all(numbers == list(range(len(numbers))) for numbers in taken.values())
    assert {name: len(n) for name, n in consumed(plan, 0, 700).items()} == {"web": 490, "code": 210}
    assert {name: len(n) for name, n in consumed(plan, 700, 900).items()} == {"web": 100, "math": 100}


def test_a_boundary_inside_a_sample_belongs_to_the_earlier_phase():
    plan = plan_of(("one", 17, {"web": 1.0}), ("two", 0, {"code": 1.0}))
    assert [name for name, _ in plan.locate(np.arange(5))] == ["web"] * 3 + ["code"] * 2


def test_blend_changed_at_step_k_repeats_and_loses_nothing():
    old = plan_of(("all", 0, {"web": 0.9, "code": 0.1}))
    new = plan_of(("all", 0, {"web": 0.2, "code": 0.5, "math": 0.3}))
    joined = old.continued(new, 333)
    assert joined.locate(np.arange(333)) == old.locate(np.arange(333))
    taken = consumed(joined, 0, 900)
    assert all(numbers == list(range(len(numbers))) for numbers in taken.values())
    assert len(consumed(joined, 333, 900)["math"]) == pytest.approx(0.3 * 567, abs=1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.lists(st.integers(0, 9), min_size=3, max_size=3)), max_size=5),
)
def test_any_history_of_changes_loses_nothing(changes):
    plan = plan_of(("all", 0, {}))
    for at, weights in sorted(changes):
        if any(weights):
            blend = {name: float(w) for name, w in zip(SIZES, weights, strict=True)}
            plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
            plan = plan.continued(plan_of(("all", 0, blend)), at)
    taken = consumed(plan, 0, 400)
    assert all(numbers == list(range(len(numbers))) for numbers in taken.values())


def test_the_same_blend_continues_without_a_seam():
    """A resume without a change must not restart the schedule: mid-period the order would differ."""
    plan = plan_of(("one", 80, {"web": 0.7, "code": 0.3}), ("two", 0, {"web": 0.3, "code": 0.7}))
    for at in (0, 5, 9, 10, 11, 50):
        assert plan.continued(plan_of(*PHASES), at).locate(np.arange(100)) == plan.locate(np.arange(100))


PHASES = (("one", 80, {"web": 0.7, "code": 0.3}), ("two", 0, {"web": 0.3, "code": 0.7}))


def test_skip_leaves_ids_out_and_index_of_is_the_inverse():
    plan = plan_of(("all", 0, {}), skip=[[5, 7], [0, 2], [6, 9]])
    ids = plan.ids(0, 6).tolist()
    assert ids == [2, 3, 4, 9, 10, 11]
    assert [plan.index_of(i) for i in ids] == list(range(6))
    assert plan.ids(2, 3).tolist() == [4, 9, 10]


def test_skips_added_later_do_not_move_the_past():
    old = plan_of(("all", 0, {}), skip=[[1, 3]])
    joined = old.continued(plan_of(("all", 0, {}), skip=[[2, 5], [8, 12], [20, 22]]), 10)
    assert joined.skip == [(1, 3), (10, 12), (20, 22)]
    assert joined.ids(0, 10).tolist() == [0, 3, 4, 5, 6, 7, 8, 9, 12, 13]


def test_merge_ranges():
    assert merge_ranges([[5, 6], [0, 2], [2, 4], [5, 9]]) == [(0, 4), (5, 9)]


def test_unknown_source_in_a_phase():
    with pytest.raises(ValueError, match=r"unknown sources \['wbe'\].*\['code', 'math', 'web'\]"):
        plan_of(("one", 0, {"wbe": 1.0}))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any), st.integers(0, 400))
def test_bounds_are_not_more_than_one_sample_above(weights, sample):
    plan = plan_of(("one", 800, {"web": 1.0}), ("two", 0, dict(zip(SIZES, map(float, weights), strict=True))))
    segment = plan.segments[plan.segment_of(sample)]
    for name, exact in segment.cursors_at(sample).items():
        assert exact <= segment.at_most(sample)[name] <= exact + 1


def test_a_source_that_a_segment_has_not_met_starts_at_its_first_sample():
    segment = Segment(10, "late", ("web", "math"), (3, 1), {"web": 7, "code": 5})
    assert segment.cursors_at(18) == segment.at_most(18) == {"web": 7 + 6, "code": 5, "math": 2}
    assert segment.at_most(19) == {"web": 7 + 7, "code": 5, "math": 3}, "6.75 and 2.25 more, rounded up"


def test_the_segment_of_a_sample_counts_its_sources():
    """Samples 0 to 99 are web's alone, the others half web's, half code's."""
    plan = plan_of(("one", 800, {"web": 1.0}), ("two", 0, {"web": 0.5, "code": 0.5}))
    assert [plan.segment_of(sample) for sample in (0, 99, 100, 10**9)] == [0, 0, 1, 1]
    assert plan.cursors_at(40) == {"web": 40, "code": 0, "math": 0}
    assert plan.cursors_at(110) == {"web": 105, "code": 5, "math": 0}


def test_a_plan_comes_back_from_its_text_whole():
    plan = plan_of(("one", 80, {"web": 0.7, "code": 0.3}), ("two", 0, {"math": 1.0}), skip=[[3, 5], [9, 12]])
    back = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back.segments == plan.segments
    assert [segment.phase for segment in back.segments] == ["one", "two"]
    assert back.skip == [(3, 5), (9, 12)]
    assert back.ids(0, 8).tolist() == [0, 1, 2, 5, 6, 7, 8, 12]


def test_a_new_source_begins_at_its_first_sample_and_an_empty_one_is_weighed_as_one():
    old = Plan([Segment(0, "old", ("web",), (1,), {"web": 3})])
    new = Plan([Segment(0, "new", ("web", "math"), (1, 1), {})])
    joined = old.continued(new, 4)
    assert [segment.phase for segment in joined.segments] == ["old", "new"]
    assert joined.locate(np.arange(8))[4:] == [("web", 7), ("math", 0), ("web", 8), ("math", 1)]
    assert new.locate(np.arange(2)) == [("web", 0), ("math", 0)]
    assert Plan.from_config([], {"web": 0, "code": 2}, 8).segments[0].weights == (1, 2)
    assert Plan.from_config([], {"web": 1}, 8).segments[0].phase == "all"


def test_a_change_at_a_segments_first_sample_replaces_that_segment():
    """Phase two would begin at sample 10, where the run is now: nothing of it is past."""
    old = plan_of(("one", 80, {"web": 1.0}), ("two", 0, {"code": 1.0}), skip=[[4, 6], [10, 12]])
    new = plan_of(("one", 80, {"web": 1.0}), ("three", 0, {"math": 1.0}), skip=[[8, 10], [14, 15]])
    joined = old.continued(new, 10)
    assert [(segment.first, segment.phase) for segment in joined.segments] == [(0, "one"), (10, "three")]
    assert joined.locate(np.arange(9, 12)) == [("web", 9), ("math", 0), ("math", 1)]
    assert joined.skip == [(4, 6), (14, 15)]


def test_a_segment_in_words():
    plan = plan_of(("one", 80_000, {"web": 0.7, "code": 0.3}), ("two", 0, {"math": 1.0, "web": 2.0}))
    assert [segment.describe(8) for segment in plan.segments] == [
        "data phase 'one' from token 0 on: web 0.7, code 0.3, math 0",
        "data phase 'two' from token 80,000 on: web 0.666667, code 0, math 0.333333",
    ]


def test_impossible_weights_name_their_phase():
    with pytest.raises(
        ValueError, match=r"phase 'one', sources \['web', 'code', 'math'\]: blend weights \[0.0, 0.0, 0.0\]"
    ):
        plan_of(("one", 0, {"web": 0.0}))


def test_by_size():
    plan = plan_of(("all", 0, {}))
    assert plan.cursors_at(1600) == SIZES
