"""What a run reads, opened: its training loader, its held-out sets, its task files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_fp4.comm.agree import agreed
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.rendezvous import RankFailed
from megatron_fp4.data.evaluation import EvalLoader, build_eval_loader
from megatron_fp4.data.loader import Loader, build_loader
from megatron_fp4.data.tasks import TaskSet, read_tasks
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.evaluation.sets import Examiner
from megatron_fp4.train.phases import INDEX_SECONDS


class OpenedData(NamedTuple):
    """See the module. evaluations: of one data-parallel rank; tasks: whole."""

    loader: Loader
    evaluations: list[EvalLoader]
    tasks: list[TaskSet]


def open_data(
    checked: CheckedConfig,
    dp_rank: int,
    state: dict[str, Any] | None = None,
    skip: Sequence[list[int]] = (),
    opened: OpenedData | None = None,
) -> OpenedData:
    """The training and evaluation loaders of one data-parallel rank.

    state: what a checkpoint holds of the training loader. skip: sample ranges that are not read, beside those of the
    configuration. opened: loaders of another rank, whose files are used and not opened again: on a file system that
    thousands of ranks share, opening files is what a start waits for. Raises ValueError or FileNotFoundError.
    """
    config, tokenizer = checked.config, checked.tokenizer
    fingerprint = tokenizer.fingerprint if tokenizer else None
    vocab_size = config.model.vocab_size
    share: dict[str, Any] = {"micro_batch": config.train.micro_batch, "dp_rank": dp_rank, "dp_size": checked.dp}
    loader = build_loader(
        replace(config.data, skip=[*config.data.skip, *skip]),
        global_batch=config.train.global_batch,
        total_samples=config.run_samples,
        vocab_size=vocab_size,
        tokenizer_fingerprint=fingerprint,
        state=state,
        streams=opened.loader.streams if opened else None,
        **share,
    )
    if opened:
        return OpenedData(loader, [evaluation.of_rank(dp_rank) for evaluation in opened.evaluations], opened.tasks)
    evaluations = [
        build_eval_loader(config.data, item.name, vocab_size=vocab_size, tokenizer_fingerprint=fingerprint, **share)
        for item in config.data.evaluation
    ]
    tasks = [read_tasks(task, tokenizer, config.data.seq_length) for task in config.data.tasks if tokenizer is not None]
    return OpenedData(loader, evaluations, tasks)


def open_together(
    checked: CheckedConfig,
    mesh: ParallelMesh,
    state: dict[str, Any] | None,
    skip: list[list[int]],
    given: OpenedData | None,
) -> OpenedData:
    """`open_data` on every rank. Collective. Raises ValueError on all ranks for what one of them refuses."""
    return agreed(partial(open_data, checked, mesh.dp.rank, state, skip, given), mesh.world)


def build_indices(data: OpenedData, samples: int, process: Process) -> None:
    """Collective, and not over the device: no collective is so patient. Raises ValueError on all ranks for what any
    node refuses or has no room for; who is done hears it at once."""
    try:
        with process.rendezvous.together("its indices", INDEX_SECONDS):
            data.loader.build_indices(samples)
            for evaluation in data.evaluations:
                evaluation.build_index()
    except RankFailed as error:
        process.rendezvous.leave()
        raise ValueError(str(error)) from error


def examiner(
    checked: CheckedConfig, engine: Engine, data: OpenedData, mesh: ParallelMesh, device: torch.device
) -> Examiner:
    """What measures this engine on the held-out sets and task files of `data`."""
    config = checked.config
    micro_batch, vocab_size = config.train.micro_batch, config.model.vocab_size
    return Examiner(engine, data.evaluations, data.tasks, mesh, device, micro_batch, vocab_size, checked.tokenizer)
