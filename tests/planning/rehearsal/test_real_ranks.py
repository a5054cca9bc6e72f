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

LAYOUTS = (ParallelConfig(tp=2), ParallelConfig(pp=2))
RANKS = 4
REHEARSED = (0, 3)


def checked(layout: ParallelConfig) -> CheckedConfig:
    """With buckets that leave during the backward pass, as on CUDA."""
    model = {**HYBRID, "pattern": "M*"}
    config = parity_case(replace(NVFP4, compile=False), train={"global_batch": 4}, **model).config
    return check_config(on_cuda(replace(config, parallel=layout)), RANKS)


def refuse(sentence: str) -> NoReturn:
    raise RuntimeError(sentence)


def of_real_rank(rank: int, world_size: int) -> list[list[Message]]:
    """The messages of the second step under each layout."""
    sequences = []
    for layout in LAYOUTS:
        phases = Phases(torch.device("cpu"))
        watch = Watch(lambda phases=phases: phases.current.name, refuse)
        with Recording(watch.messages):
            run = build_rank(checked(layout), world_group(rank, world_size), torch.device("cpu"), phases, watch)
            real = RehearsedRank(run, watch, 4 * layout.tp * layout.pp * layout.cp // RANKS, Position())
            real.step()
            real.step()
        sequences.append(list(watch.messages.sequence))
    return sequences


def of_rehearsal(rank: int, world_size: int) -> list[list[list[Message]]]:
    """The same of the first and the last, in one process."""
    return [[_rehearsed(layout, member) for layout in LAYOUTS] for member in REHEARSED]


def _rehearsed(layout: ParallelConfig, rank: int) -> list[Message]:
    with rehearsed_rank(checked(layout), RANKS, rank, refuse, over_gloo=True) as rehearsed:
        rehearsed.step()
        rehearsed.step()
        return list(rehearsed.watch.messages.sequence)


def test_messages_of_real_ranks() -> None:
    (rehearsals,) = run_distributed(of_rehearsal, 1)
    real = run_distributed(of_real_rank, RANKS)
    for rank, of_rank in zip(REHEARSED, rehearsals, strict=True):
        for layout, expected, rehearsed in zip(LAYOUTS, real[rank], of_rank, strict=True):
            assert len(expected) >= 10, layout
            assert rehearsed == expected, f"rank {rank}, {layout}"
