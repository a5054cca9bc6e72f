"""The learning rate at the corners of its phases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.optim.config import DecayStyle, OptimConfig, Schedule
from megatron_fp4.optim.lr import check_schedule, describe_schedule, learning_rate

TOTAL = 1000


def wsd(style: DecayStyle = DecayStyle.linear, **fields: float) -> OptimConfig:
    return OptimConfig(lr=0.1, min_lr=0.01, warmup_tokens=100, decay_fraction=0.2, decay_style=style, **fields)


@pytest.mark.parametrize("style", list(DecayStyle))
def test_wsd_corners(style: DecayStyle) -> None:
    config = wsd(style)
    assert learning_rate(config, 0, TOTAL) == 0.0, "the warm-up does not start at 0"
    assert learning_rate(config, 50, TOTAL) == pytest.approx(0.05), "the warm-up is not linear"
    assert learning_rate(config, 100, TOTAL) == 0.1, "the peak is not reached at the end of the warm-up"
    assert learning_rate(config, 800, TOTAL) == 0.1, "the decay begins too early"
    assert learning_rate(config, 801, TOTAL) < 0.1, "the decay begins too late"
    assert learning_rate(config, TOTAL, TOTAL) == 0.01, "min_lr is not reached exactly at the last token"
    assert learning_rate(config, TOTAL + 77, TOTAL) == 0.01, "the rate moves after the end"


def test_the_last_step_before_the_decay_has_the_peak_itself() -> None:
    """Not 0.0011 + (0.0034 - 0.0011), which is 0.0034000000000000002."""
    config = OptimConfig(lr=0.0034, min_lr=0.0011, decay_fraction=0.2)
    assert learning_rate(config, 800, TOTAL) == 0.0034
    assert learning_rate(replace(config, schedule=Schedule.cosine), 0, TOTAL) == 0.0034


def test_decay_styles_in_the_middle() -> None:
    def middle(style: DecayStyle) -> float:
        return (learning_rate(wsd(style), 900, TOTAL) - 0.01) / 0.09

    assert middle(DecayStyle.linear) == pytest.approx(0.5)
    assert middle(DecayStyle.cosine) == pytest.approx(0.5)
    assert middle(DecayStyle.minus_sqrt) == pytest.approx(1 - math.sqrt(0.5))
    assert middle(DecayStyle.exponential) == pytest.approx(2 * 0.5**0.5 - 1)


def test_cosine_runs_from_the_warmup_to_the_end() -> None:
    config = OptimConfig(lr=0.1, min_lr=0.01, warmup_tokens=200, schedule=Schedule.cosine)
    assert learning_rate(config, 200, TOTAL) == 0.1
    assert learning_rate(config, 600, TOTAL) == pytest.approx(0.055), "the half way point is not at the half"
    assert learning_rate(config, TOTAL, TOTAL) == 0.01


def test_power_falls_from_its_first_token_on_and_then_decays_from_where_it_is() -> None:
    config = replace(wsd(), schedule=Schedule.power, power_exponent=0.5, power_from_tokens=200)
    assert learning_rate(config, 50, TOTAL) == pytest.approx(0.05)
    assert learning_rate(config, 200, TOTAL) == 0.1
    assert learning_rate(config, 800, TOTAL) == pytest.approx(0.05), "four times the tokens, half the rate"
    assert learning_rate(config, 900, TOTAL) == pytest.approx((0.05 + 0.01) / 2), "the decay does not begin there"
    assert learning_rate(config, TOTAL, TOTAL) == 0.01
    assert learning_rate(config, 500, 10 * TOTAL) == learning_rate(config, 500, TOTAL), "it depends on the total"
    assert learning_rate(config, 450, TOTAL, decay_start=400) < learning_rate(config, 450, TOTAL)
    from_warmup = replace(config, power_from_tokens=0)
    assert learning_rate(from_warmup, 400, TOTAL) == pytest.approx(0.05)
    assert describe_schedule(config, TOTAL) == (
        "1.00e-01, power; warm-up 100 tokens, from 200 on as tokens^-0.5, decay over the last 200, to 1.00e-02"
    )


def test_power_without_a_beginning_or_below_its_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"power_from_tokens or the end of the warm-up on, and both are 0"):
        OptimConfig(schedule=Schedule.power)
    with pytest.raises(ValueError, match=r"power_from_tokens = 10 is before the end of the warm-up"):
        OptimConfig(schedule=Schedule.power, power_from_tokens=10, warmup_tokens=20)
    config = OptimConfig(lr=0.1, min_lr=0.06, schedule=Schedule.power, power_exponent=0.5, power_from_tokens=200)
    with pytest.raises(ValueError, match=r"min_lr = 0\.06 is above the 5\.00e-02 .* at token 800"):
        check_schedule(config, TOTAL)


def test_constant_and_phases_of_length_zero() -> None:
    constant = OptimConfig(lr=0.1, warmup_tokens=10, schedule=Schedule.constant)
    assert learning_rate(constant, 5, TOTAL) == pytest.approx(0.05)
    assert learning_rate(constant, TOTAL, TOTAL) == 0.1
    no_warmup = OptimConfig(lr=0.1, warmup_tokens=0)
    assert learning_rate(no_warmup, 0, TOTAL) == 0.1, "without a warm-up the first rate is the peak"
    no_decay = OptimConfig(lr=0.1, min_lr=0.01, decay_fraction=0.0)
    assert learning_rate(no_decay, TOTAL, TOTAL) == 0.1, "without a decay phase the rate must not jump at the end"
    all_decay = OptimConfig(lr=0.1, decay_fraction=1.0)
    assert learning_rate(all_decay, 500, TOTAL) == pytest.approx(0.05)
    only_warmup = OptimConfig(lr=0.1, warmup_tokens=TOTAL, schedule=Schedule.cosine)
    assert learning_rate(only_warmup, TOTAL - 1, TOTAL) == pytest.approx(0.0999)
    assert learning_rate(only_warmup, TOTAL, TOTAL) == 0.1


@given(st.sampled_from(list(DecayStyle)), st.sampled_from(list(Schedule)), st.integers(1, 10**12), st.data())
@settings(max_examples=200, deadline=None)
def test_never_leaves_its_bounds(style: DecayStyle, schedule: Schedule, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total // 2))
    config = OptimConfig(
        lr=0.1,
        warmup_tokens=warmup,
        decay_fraction=0.3,
        decay_style=style,
        schedule=schedule,
        power_from_tokens=max(1, warmup),
    )
    seen = sorted(data.draw(st.lists(st.integers(warmup, total), min_size=2, max_size=5)))
    rates = [learning_rate(config, tokens, total) for tokens in seen]
    assert all(0.0 <= rate <= 0.1 for rate in rates)
    assert rates == sorted(rates, reverse=True), "after the warm-up the rate never rises"


def test_phases_that_do_not_fit_are_refused_with_numbers() -> None:
    config = OptimConfig(warmup_tokens=900, decay_fraction=0.2)
    with pytest.raises(ValueError, match=r"900.*0\.2.*1000.*200.*1100.*by 100 tokens"):
        check_schedule(config, TOTAL)
    with pytest.raises(ValueError, match=r"900 is more than the 800"):
        check_schedule(OptimConfig(warmup_tokens=900, schedule=Schedule.cosine), 800)
    with pytest.raises(ValueError, match="0 tokens in total"):
        check_schedule(OptimConfig(), 0)
    with pytest.raises(ValueError, match="tokens_seen = -1"):
        learning_rate(OptimConfig(), -1, TOTAL)
