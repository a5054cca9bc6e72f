"""Rules and stage placement of the schedules: refused in one process, before any rank starts."""

from __future__ import annotations

import pytest

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.pipeline.schedules import SCHEDULES, check_pipeline, stages_of_rank, stages_per_rank


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches", "says"),
    [
        ("1f1b", 4, 3, "at least as many microbatches as pipeline ranks"),
        ("dualpipev", 2, 3, "at least as many microbatches as stages"),
        ("interleaved_1f1b", 2, 5, "multiple of max"),
        ("interleaved_zero_bubble", 4, 9, "multiple of max"),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(schedule: str, pp: int, microbatches: int, says: str) -> None:
    """torch refuses them only when all ranks have met, or (some schedules) hangs."""
    with pytest.raises(ValueError, match=says) as error:
        check_pipeline(ParallelConfig(pp=pp, schedule=schedule), microbatches)
    assert f"{microbatches} microbatches" in str(error.value), "the message must name the number"
    assert f"pp = {pp}" in str(error.value), "the message must name the pipeline size"


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches", "stages"),
    [
        ("gpipe", 4, 1, 4),
        ("1f1b", 4, 4, 4),
        ("interleaved_1f1b", 2, 3, 4),
        ("interleaved_zero_bubble", 4, 8, 4),
        ("zbv", 4, 1, 8),
        ("dualpipev", 2, 4, 4),
    ],
)
def test_number_of_stages(schedule: str, pp: int, microbatches: int, stages: int) -> None:
    assert check_pipeline(ParallelConfig(pp=pp, schedule=schedule), microbatches) == stages


def test_unknown_schedule_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="interleaved_zero_bubble, zbv") as error:
        check_pipeline(ParallelConfig(pp=2, schedule="2f2b"), 4)
    assert "'2f2b'" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pp": 2, "virtual_stages": 2}, "exactly 1"),
        ({"pp": 2, "virtual_stages": 3, "schedule": "zbv"}, "exactly 2"),
        ({"pp": 2, "virtual_stages": 1, "schedule": "interleaved_1f1b"}, "2 or more"),
        ({"virtual_stages": 2}, "no effect"),
        ({"schedule": "zbv"}, "no effect"),
        ({"stage_split": "2,2"}, "no effect"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        stages_per_rank(ParallelConfig(**settings))


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_every_stage_lives_on_one_rank(schedule: str, pp: int) -> None:
    """A stage twice or nowhere would be trained twice or hang the pipeline."""
    config = ParallelConfig(pp=pp, schedule=schedule if pp > 1 else "1f1b")
    held = [stage for rank in range(pp) for stage in stages_of_rank(rank, config)]
    assert sorted(held) == list(range(pp * stages_per_rank(config)))


def test_a_v_brings_both_ends_to_the_first_rank() -> None:
    """Tied embeddings rely on it: the two stages share one table."""
    assert [stages_of_rank(rank, ParallelConfig(pp=3, schedule="zbv")) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
