import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.data.ramp import BatchRampConfig, batch_size, batch_sizes, batch_stages, check_ramp, steps_from

OFF, RAMP = BatchRampConfig(), BatchRampConfig(start_samples=4, increment_samples=4, ramp_samples=96)


def sizes(ramp, global_batch, number, consumed=0):
    return [size for _, size in itertools.islice(steps_from(consumed, ramp, global_batch), number)]


def test_without_a_ramp():
    assert list(itertools.islice(steps_from(5, OFF, 16), 3)) == [(5, 16), (21, 16), (37, 16)]
    assert batch_stages(0, 50, OFF, 16) == [(0, 16, 3)]
    assert batch_stages(0, 15, OFF, 16) == []
    assert batch_sizes(OFF, 16) == [16]


def test_three_increments_over_96_samples():
    """Intervals end at samples 32, 64 and 96; the last step before 96 begins at 88 and has the old size."""
    assert sizes(RAMP, 16, 17) == [4] * 8 + [8] * 4 + [12] * 3 + [16] * 2
    assert batch_stages(0, 140, RAMP, 16) == [(0, 4, 8), (32, 8, 4), (64, 12, 3), (100, 16, 2)]
    assert batch_sizes(RAMP, 16) == [4, 8, 12, 16]
    assert batch_sizes(BatchRampConfig(1, 1, 96), 3) == [1, 2, 3]


def test_megatrons_rule():
    """Megatron-LM: start + int(consumed / (ramp / increments)) * increment, capped after the ramp."""
    ramp, full = BatchRampConfig(16, 16, 3000), 128
    for consumed in range(0, 4000, 7):
        want = full if consumed > 3000 else min(full, 16 + int(consumed / (3000 / 7)) * 16)
        assert batch_size(consumed, ramp, full) == want, consumed


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 400),
    st.integers(0, 500),
    st.integers(0, 99),
)
def test_stages_are_the_steps_that_fit(start, increment, rise, ramp_samples, end, done):
    """The closed form against the walk, from every step on: a resume inside or at a border sees the same steps."""
    ramp, full = BatchRampConfig(start, increment, ramp_samples), start + rise * increment
    check_ramp(ramp, full)
    walked = list(itertools.takewhile(lambda step: sum(step) <= end, steps_from(0, ramp, full)))
    for first in [0, *(a + n for a, n in walked[:done])][-2:]:
        stages = batch_stages(first, end, ramp, full)
        flat = [(s.first + n * s.size, s.size) for s in stages for n in range(s.num_steps)]
        assert flat == [step for step in walked if step[0] >= first]
        assert {s.size for s in stages} <= set(batch_sizes(ramp, full))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((4, 0, 0), "have no effect"),
        ((0, 4, 10), "must be positive"),
        ((4, 0, 10), "must be positive"),
        ((4, 4, -1), "must be positive"),
        ((16, 4, 10), "must reach train.global_batch = 16"),
        ((4, 5, 10), "4 \\+ a whole number of increments of 5"),
        ((20, 4, 10), "must reach"),
    ],
)
def test_impossible_ramps(values, message):
    with pytest.raises(ValueError, match=message):
        check_ramp(BatchRampConfig(*values), 16)


def test_ten_trillion_tokens():
    """A closed form per size: no walk over the millions of steps."""
    stages = batch_stages(0, 10**13 // 8192, BatchRampConfig(32, 32, 12_000_000), 736)
    assert len(stages) == 23
    assert stages[-1].size == 736
    assert 0 <= 10**13 // 8192 - stages[-1].end < 736
