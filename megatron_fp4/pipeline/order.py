"""The order of actions that torch gives each pipeline rank, and the time that it takes at best.

A schedule object of torch computes the order of all ranks when it is constructed, from the numbers of its stages alone.
So it is constructed here with stages that have nothing but numbers, without process groups; its order is the one that
the engine runs. `simulate` then lets each action begin as soon as its rank is free and its inputs have come.

Time is counted in forward passes of one stage; a full backward takes two, its halves (inputs, weights) one each. All
stages cost the same and communication nothing: what is idle here is due to the order; a real run is idle for longer.

    F   forward: needs F of the stage before
    B   backward, at least of the inputs: needs F of its stage, B of the stage after
    W   weight gradients alone: needs B of its stage

Not here: which schedules exist and what they need (schedules.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.pipeline.schedules import check_pipeline, schedule_rule, stages_of_rank

KINDS = {"FORWARD": ("F", 1), "FULL_BACKWARD": ("B", 2), "BACKWARD_INPUT": ("B", 1), "BACKWARD_WEIGHT": ("W", 1)}
"""Computations of torch (`_ComputationType`): kind and duration."""

Key = tuple[str, int, int]
"""Kind, stage, microbatch."""


class Work(NamedTuple):
    """One computation of a schedule.

    units: its duration. joined: the next one belongs to the same action of torch, which sends the results of both to
    other ranks when both are done (dualpipev's forward with a backward).
    """

    kind: str
    stage: int
    microbatch: int
    units: int
    joined: bool = False

    @property
    def key(self) -> Key:
        return self.kind, self.stage, self.microbatch

    def needs(self, num_stages: int) -> list[Key]:
        """What must have ended before it begins."""
        before = {
            "F": [("F", self.stage - 1)],
            "B": [("F", self.stage), ("B", self.stage + 1)],
            "W": [("B", self.stage)],
        }[self.kind]
        return [(kind, stage, self.microbatch) for kind, stage in before if 0 <= stage < num_stages]


class Timed(NamedTuple):
    """A computation and when it runs, in forward passes of one stage since the first."""

    work: Work
    begin: int
    end: int


Order = list[list[Work]]
Timeline = list[list[Timed]]
"""One list per pipeline rank, in the order of execution."""


def pipeline_order(config: ParallelConfig, num_microbatches: int) -> Order:
    """The computations of every pipeline rank, by torch's schedule; communication left out.

    num_microbatches: per step and data-parallel rank. One rank has no schedule: each microbatch goes forward and back.
    Raises ValueError where `schedules.check_pipeline` does.
    """
    num_stages = check_pipeline(config, num_microbatches)
    if config.pp == 1:
        return [[Work(kind, 0, n, units) for n in range(num_microbatches) for kind, units in (("F", 1), ("B", 2))]]
    rule = schedule_rule(config.schedule)
    numbers = SimpleNamespace(num_stages=num_stages, group_size=config.pp, group_rank=0, submod=nn.Identity())
    stages = [SimpleNamespace(**vars(numbers), stage_index=number) for number in stages_of_rank(0, config)]
    # torch's __init__ would go on to lower the order to sends and receives, which takes seconds with many microbatches
    only_order = type("OnlyOrder", (rule.factory,), {"_prepare_schedule_with_comms": lambda self, actions: None})
    schedule = only_order(stages if rule.stages > 1 or rule.and_more else stages[0], num_microbatches)
    return [_work_of(schedule.pipeline_order[rank]) for rank in range(config.pp)]


def _work_of(actions: Sequence[Any]) -> list[Work]:
    """The computations of one rank.

    Forwards are numbered from 0: torch 2.13 numbers those of the last stage of 1F1B from 1, in the order that it shows
    (what it runs has its own loop and is right). Remove it when `Schedule1F1B._get_pipeline_order` is mended.
    """
    works = []
    for action in actions:
        parts = [] if action is None else action.sub_actions or [action]
        parts = [part for part in parts if part.computation_type.name in KINDS]
        for part in parts:
            kind, units = KINDS[part.computation_type.name]
            works.append(Work(kind, part.stage_index, part.microbatch_index, units, joined=part is not parts[-1]))
    first: dict[int, int] = {}
    for work in works:
        if work.kind == "F":
            first.setdefault(work.stage, work.microbatch)
    return [w._replace(microbatch=w.microbatch - first[w.stage]) if w.kind == "F" else w for w in works]


def in_flight(works: Sequence[Work]) -> int:
    """The most (stage, microbatch) pairs whose activations one rank holds at once while it does its `works`.

    They are held from F until the last backward: a deferred weight gradient needs what its linears have saved.
    """
    deferred = {(work.stage, work.microbatch) for work in works if work.kind == "W"}
    held = most = 0
    for work in works:
        if work.kind == "F":
            held += 1
        elif work.kind == "W" or (work.stage, work.microbatch) not in deferred:
            held -= 1
        most = max(most, held)
    return most


def simulate(order: Order) -> Timeline:
    """When each computation begins and ends if it begins as soon as its rank and its inputs are there."""
    num_stages = 1 + max(work.stage for works in order for work in works)
    stages_by_rank = [{work.stage for work in works} for works in order]
    ends: dict[Key, int] = {}  # when its own rank has the result
    sent: dict[Key, int] = {}  # when the others have it
    timeline: Timeline = [[] for _ in order]
    while any(len(done) < len(works) for done, works in zip(timeline, order, strict=True)):
        done_before = len(ends)
        for done, works, stages in zip(timeline, order, stages_by_rank, strict=True):
            while len(done) < len(works):
                work = works[len(done)]
                inputs = [(ends if need[1] in stages else sent).get(need) for need in work.needs(num_stages)]
                if None in inputs:
                    break
                begin = max([done[-1].end if done else 0, *(at for at in inputs if at is not None)])
                ends[work.key] = end = begin + work.units
                done.append(Timed(work, begin, end))
                if not work.joined:
                    sent |= dict.fromkeys(_keys_of_last_action(done), end)
        assert len(ends) > done_before, "the order of the schedule never ends"
    return timeline


def _keys_of_last_action(done: Sequence[Timed]) -> list[Key]:
    """The last computation, and those before it that are joined to it."""
    keys = [done[-1].work.key]
    for earlier in reversed(done[:-1]):
        if not earlier.work.joined:
            break
        keys.append(earlier.work.key)
    return keys


def duration(timeline: Timeline) -> int:
    """When the last computation ends."""
    return max(timed.end for done in timeline for timed in done)


def bubble(timeline: Timeline) -> float:
    """Part of the time in which a rank waits, mean over the ranks."""
    busy = sum(timed.work.units for done in timeline for timed in done)
    return 1.0 - busy / (len(timeline) * duration(timeline))
