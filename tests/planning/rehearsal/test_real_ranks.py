"""Real ranks over gloo issue the messages that their rehearsals do: kind, group, shape, type, peer and order."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.planning.rehearsal.build import build_rank
from megatron_fp4.planning.rehearsal.messages import Message, Recording
from megatron_fp4.planning.rehearsal.on_cuda import on_cuda
from megatron_fp4.planning.rehearsal.step import RehearsedRank, rehearsed_rank
from megatron_fp4.planning.rehearsal.watch import Watch
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.run import Position
from tests.helpers.distributed import run_distributed, world_group
from tests.helpers.parity import HYBRID, NVFP4, parity_case

LAYOUT = ParallelConfig(tp=2, pp=2, schedule="interleaved_1f1b")
"""With dp = 2: every group that a step speaks in, and messages between stages of one rank."""
RANKS = 8
REHEARSED = (0, 7)


def checked() -> CheckedConfig:
    """With buckets that leave during the backward pass, as on CUDA."""
    model = {**HYBRID, "pattern": "M*M-"}
    config = parity_case(replace(NVFP4, compile=False), train={"global_batch": 4}, **model).config
    return check_config(on_cuda(replace(config, parallel=LAYOUT)), RANKS)


def refuse(sentence: str) -> NoReturn:
    raise RuntimeError(sentence)


def messages_of(rank: RehearsedRank) -> list[Message]:
    """Those of the second step, and of an evaluation that follows."""
    rank.step()
    rank.step()
    of_step = list(rank.watch.messages.sequence)
    rank.evaluate(2)
    return of_step + rank.watch.messages.sequence


def of_real_rank(rank: int, world_size: int) -> list[Message]:
    phases = Phases(torch.device("cpu"))
    watch = Watch(lambda: phases.current.name, refuse)
    with Recording(watch.messages):
        run = build_rank(checked(), world_group(rank, world_size), torch.device("cpu"), phases, watch)
        return messages_of(RehearsedRank(run, watch, 2, Position()))


def of_rehearsals(rank: int, world_size: int) -> list[list[Message]]:
    """The same of the first and the last, in one process."""
    sequences = []
    for member in REHEARSED:
        with rehearsed_rank(checked(), RANKS, member, refuse, over_gloo=True) as rehearsed:
            sequences.append(messages_of(rehearsed))
    return sequences


def test_messages_of_real_ranks() -> None:
    (rehearsals,) = run_distributed(of_rehearsals, 1)
    real = run_distributed(of_real_rank, RANKS)
    for rank, rehearsed in zip(REHEARSED, rehearsals, strict=True):
        assert len(real[rank]) >= 20
        assert {message.phase for message in real[rank]} >= {"forward_backward", "update", "evaluate"}
        assert rehearsed == real[rank], f"rank {rank}"
