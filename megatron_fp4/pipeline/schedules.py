"""The pipeline schedules by configuration name: their rules, and where their stages live.

    name                      stages per rank   microbatches m (p ranks)            weight gradients
    gpipe                     1                 any                                 at once
    1f1b                      1                 m >= p                              at once
    interleaved_1f1b          2 or more         m a multiple of max(1, m // p)      at once
    interleaved_zero_bubble   1 or more         m a multiple of max(1, m // p)      later, in the bubbles
    zbv                       2, in a V         any                                 later, in the bubbles
    dualpipev                 2, in a V         m >= 2 p                            later, in the bubbles

Everything that torch would refuse after the ranks have met is refused here, in one process, with the rule and the
numbers. Looped stages go round the ranks (stage s on rank s mod p); in a V they come back, so that the first and the
last stage share a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_fp4.comm.config import Overlap, ParallelConfig

Fits = Callable[[int, int], bool]
"""(microbatches per step and data-parallel rank, pipeline ranks) -> whether a schedule takes them."""


def _rounds_divide(microbatches: int, ranks: int) -> bool:
    return microbatches % max(1, microbatches // ranks) == 0


@dataclass(frozen=True)
class ScheduleRule:
    """One schedule.

    class_name: of torch's class. stages: stages per rank. and_more: or any larger number. v_shaped:
    the stages come back, so that the first rank has the last one. defers_wgrad: weight gradients wait for the bubbles.
    fits: whether it takes m microbatches on p ranks; rule says it in words.
    """

    class_name: str
    stages: int
    and_more: bool = False
    v_shaped: bool = False
    defers_wgrad: bool = False
    fits: Fits = lambda microbatches, ranks: True
    rule: str = ""

    @property
    def factory(self) -> Any:
        """torch's class."""
        from torch.distributed.pipelining import schedules  # here: it imports torch._dynamo, which takes seconds

        return getattr(schedules, self.class_name)


_ROUNDS = "the number of microbatches m must be a multiple of max(1, m // pp)"
SCHEDULES: dict[str, ScheduleRule] = {
    "gpipe": ScheduleRule("ScheduleGPipe", 1),
    "1f1b": ScheduleRule(
        "Schedule1F1B", 1, fits=lambda m, p: m >= p, rule="at least as many microbatches as pipeline ranks"
    ),
    "interleaved_1f1b": ScheduleRule("ScheduleInterleaved1F1B", 2, and_more=True, fits=_rounds_divide, rule=_ROUNDS),
    "interleaved_zero_bubble": ScheduleRule(
        "ScheduleInterleavedZeroBubble", 1, and_more=True, defers_wgrad=True, fits=_rounds_divide, rule=_ROUNDS
    ),
    "zbv": ScheduleRule("ScheduleZBVZeroBubble", 2, v_shaped=True, defers_wgrad=True),
    "dualpipev": ScheduleRule(
        "ScheduleDualPipeV",
        2,
        v_shaped=True,
        defers_wgrad=True,
        fits=lambda m, p: m >= 2 * p,
        rule="at least as many microbatches as stages, 2 * pp",
    ),
}


def schedule_rule(name: str) -> ScheduleRule:
    """Raises ValueError with the list for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(f"parallel.schedule = {name!r} does not exist; use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def stages_per_rank(config: ParallelConfig) -> int:
    """Stages on each pipeline rank. Raises ValueError where the schedule does not allow `virtual_stages`."""
    rule, virtual = schedule_rule(config.schedule), config.virtual_stages
    if config.pp > 1 and rule.defers_wgrad and config.overlap_tensor is Overlap.always:
        raise ValueError(
            f"parallel.overlap_tensor = always has no effect with schedule {config.schedule}, which computes weight"
            " gradients in its bubbles, not beside the sends of tensor parallelism; leave it at auto"
        )
    if config.pp == 1:
        default = ParallelConfig()
        for name, value in (("schedule", config.schedule), ("stage_split", config.stage_split)):
            if value != getattr(default, name):
                raise ValueError(
                    f"parallel.{name} = {value!r} has no effect with parallel.pp = 1; remove it, or set parallel.pp"
                )
        if virtual > 1:
            raise ValueError(f"parallel.virtual_stages = {virtual} has no effect with parallel.pp = 1; remove it")
        return 1
    if virtual and (virtual < rule.stages or (virtual > rule.stages and not rule.and_more)):
        allowed = f"{rule.stages} or more" if rule.and_more else f"exactly {rule.stages}"
        raise ValueError(
            f"parallel.virtual_stages = {virtual}, but schedule {config.schedule} takes {allowed} stages per rank;"
            " 0 chooses for you"
        )
    return virtual or rule.stages


def check_pipeline(config: ParallelConfig, num_microbatches: int) -> int:
    """Stages of the whole pipeline, after everything that `parallel` says about it was checked.

    Raises ValueError with the rule and the numbers. num_microbatches: per step and data-parallel rank.
    """
    num_stages = config.pp * stages_per_rank(config)
    rule = schedule_rule(config.schedule)
    if config.pp > 1 and not rule.fits(num_microbatches, config.pp):
        raise ValueError(
            f"schedule {config.schedule} needs {rule.rule}: got {num_microbatches} microbatches per step and"
            f" data-parallel rank, pp = {config.pp}, {num_stages} stages. Microbatches = global_batch / (micro_batch *"
            " dp): change train.global_batch, train.micro_batch or the layout, or choose schedule gpipe or zbv, which"
            " take any number"
        )
    return num_stages


def rank_of_stage(stage: int, config: ParallelConfig) -> int:
    """Pipeline rank that holds stage `stage`."""
    if schedule_rule(config.schedule).v_shaped and config.pp > 1:
        return stage if stage < config.pp else 2 * config.pp - 1 - stage
    return stage % config.pp


def stages_of_rank(rank: int, config: ParallelConfig) -> list[int]:
    """Stages that pipeline rank `rank` holds, in order."""
    num_stages = config.pp * stages_per_rank(config)
    return [stage for stage in range(num_stages) if rank_of_stage(stage, config) == rank]
