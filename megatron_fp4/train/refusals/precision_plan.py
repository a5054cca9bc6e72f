"""The precision of a run over its tokens: the plan, at the run's own length, decay and shapes.

Not here: what rules and switches mean (precision/plan.py).
"""

from __future__ import annotations

from megatron_fp4.models.block import LinearInfo
from megatron_fp4.optim.config import Schedule
from megatron_fp4.optim.lr import check_schedule, decay_tokens
from megatron_fp4.precision.backends.choose import check_backend_shapes
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train.config import RunConfig


def make_plan(config: RunConfig, linears: list[LinearInfo], tokens: int) -> PrecisionPlan:
    """The precision of every linear in every phase, all local shapes checked. tokens: a rank's, of one microbatch.

    Raises ValueError, also for a switch before the first step or after the beginning of the last one.
    """
    total, tp = config.run_tokens, config.parallel.tp
    check_schedule(config.optim, total, config.decay_start)
    _check_decay_switches(config)
    decay_start = total - decay_tokens(config.optim, total) if config.decay_start is None else config.decay_start
    plan = PrecisionPlan(config.precision, linears, total_tokens=total, decay_start=decay_start)
    last_step = total - config.stages()[-1].size * config.data.seq_length
    for start, _ in plan.phases[1:]:
        if start < 1:
            raise ValueError(
                "precision.switch at token 0 leaves no step to what precision.use and precision.rules say; say it there"
            )
        if start > last_step:
            raise ValueError(
                f"precision.switch at {start} tokens has no effect: the last step begins after {last_step} tokens, and"
                " a step keeps the precision that it begins with; let it begin earlier, or remove it"
            )
    plan.check_shapes(linears, tp=tp, tokens=tokens)
    check_backend_shapes(plan, linears, tp=tp, tokens=tokens)
    return plan


def _check_decay_switches(config: RunConfig) -> None:
    schedule = config.optim.schedule
    if schedule is not Schedule.wsd and any(switch.at_decay for switch in config.precision.switch):
        raise ValueError(
            f"precision.switch: at_decay with optim.schedule={schedule.name}, which has no last phase that a switch"
            " could begin with; set at_tokens or at_fraction"
        )
