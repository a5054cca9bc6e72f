import itertools

import pytest

from megatron_fp4.data.ramp import BatchRampConfig, ramp_levels, step_samples, steps_from


def test_off_is_constant():
    assert [step_samples(n, BatchRampConfig(), 16) for n in range(3)] == [(0, 16), (16, 16), (32, 16)]


def test_levels_and_closed_form_agree():
    ramp = BatchRampConfig(start_samples=4, increment_samples=4, ramp_samples=96)
    assert ramp_levels(ramp, 16) == [(8, 4), (4, 8), (3, 12), (-1, 16)]
    first = 0
    for step in range(40):
        begin, size = step_samples(step, ramp, 16)
        assert begin == first  # no sample lost or repeated between steps
        first += size
    assert list(itertools.islice(steps_from(14, ramp, 16), 2)) == [
        step_samples(14, ramp, 16),
        step_samples(15, ramp, 16),
    ]
    assert step_samples(15, ramp, 16) == (100, 16)


@pytest.mark.parametrize("values", [(4, 5, 96), (0, 4, 96), (16, 4, 96), (4, 0, 96), (4, 4, 0)])
def test_impossible_ramps(values):
    with pytest.raises(ValueError, match="batch ramp"):
        ramp_levels(BatchRampConfig(*values), 16)
