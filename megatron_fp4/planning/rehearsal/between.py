"""What lies between the steps of a run: an evaluation, the copies of two saves, a step of which everything is told.

Not here: files. A save is rehearsed up to the copy in host memory, after which the next step begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_fp4.checkpoint.pieces.plan import in_writing_order
from megatron_fp4.checkpoint.write import Staging
from megatron_fp4.planning.rehearsal.step import RehearsedRank
from megatron_fp4.planning.rehearsal.watch import Watch
from megatron_fp4.train.telemetry.norms import parameter_norm
from megatron_fp4.train.telemetry.stragglers import straggler_metrics

EVALUATED = 2
"""Microbatches of an evaluation: the second repeats what each further one does."""


def between_steps(rehearsed: RehearsedRank) -> dict[str, Callable[[], None]]:
    """What lies between the steps of a run, by its name in the report, in order."""
    staging = Staging()
    acts = {
        "evaluation": lambda: rehearsed.evaluate(EVALUATED),
        "first_save": lambda: _copy_state(rehearsed, staging),
        "later_save": lambda: _copy_state(rehearsed, staging),
    }
    if rehearsed.run.probes.statistics is None:
        return acts

    def measured_step() -> None:
        rehearsed.step()
        _log(rehearsed)

    return {**acts, "measured_step": measured_step}


def _copy_state(rehearsed: RehearsedRank, staging: Staging) -> None:
    """What a save does before the next step may begin."""
    rehearsed.watch.clear()
    rehearsed.run.phases.enter("save")
    staging.copy(in_writing_order(rehearsed.run.optimizer.state_shards()))


def _log(rehearsed: RehearsedRank) -> None:
    """Tell of the last step what is told of one that is due in every way; what that does is added to the watch.

    Not here: the names of statistics, which the ranks of the main pipeline send each other as objects.
    """
    run = rehearsed.run
    run.phases.enter("log")
    parameter_norm(run.optimizer, run.mesh.world, run.device)
    if run.mesh.world.size > 1:
        straggler_metrics(run.phases, run.mesh.world, run.device)
    if run.probes.statistics is not None:
        run.probes.statistics.take()


def crossings(watch: Watch) -> dict[str, Any]:
    """Peak of the device, copies and read-backs by place, kernels. pinned_bytes: what was asked for anew."""
    copies = watch.copies
    return {
        "peak": watch.live.peak,
        "copies_in": dict(copies.copies_in.most_common()),
        "copies_out": dict(copies.copies_out.most_common()),
        "read_backs": dict(copies.read_backs.most_common()),
        "bytes_out": copies.bytes_out,
        "pinned_bytes": copies.pinned_bytes,
        "kernels": watch.kernels.total,
    }
