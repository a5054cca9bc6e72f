"""Loading: choose a checkpoint whose files are as they were written, then read it in place.

Nothing is believed before its hash was checked, each rank checking a share of the files; and each step of the choice is
agreed upon, so all ranks hold the same `Verified`. Only a `Verified` can be loaded: a resume, which looks at the small
state first and at the tensors when the model is built, hashes every byte once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_fp4.checkpoint.config import CheckpointConfig, OnCorrupt
from megatron_fp4.checkpoint.dcp import read_into
from megatron_fp4.checkpoint.directory import (
    complete_steps,
    load_order,
    present_steps,
    read_metadata,
    read_state,
    step_name,
)
from megatron_fp4.checkpoint.state import check_matches, stored_tensors
from megatron_fp4.comm import collectives
from megatron_fp4.comm.agree import agreed, decided_by_rank0, shared_error
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.durable import problem_of, read_manifest, share_of

log = logging.getLogger(__name__)


class CorruptCheckpoint(RuntimeError):
    """A checkpoint is torn or altered; the message names files, expected and actual values."""


@dataclass(frozen=True, eq=False)
class Verified:
    """A checkpoint whose files were as they were written when `choose` looked; the same one on all ranks.

    meta: the small state that was saved with the tensors, and "step". metadata: names, shapes and places of the stored
    tensors.
    """

    directory: Path
    meta: dict[str, Any]
    metadata: Metadata

    @property
    def step(self) -> int:
        return self.meta["step"]


class CheckpointReader:
    """Reads checkpoints under `root`; changes nothing there. beat: see `CheckpointStore`."""

    def __init__(self, root: Path, group: Group, config: CheckpointConfig, beat: Callable[[], None]) -> None:
        self.root, self.group = root, group
        self.config, self._beat = config, beat

    def choose(self, step: int | None) -> Verified:
        """See `CheckpointStore.choose`."""
        candidates, complete = decided_by_rank0(lambda: self._candidates(step), self.group)
        if not candidates:
            asked = "no checkpoint" if step is None else f"no checkpoint {step_name(step)}"
            raise FileNotFoundError(f"{asked} under {self.root}; complete ones: {complete}")
        for candidate in candidates:
            directory = self.root / step_name(candidate)
            try:
                return self._verified(directory)
            except CorruptCheckpoint as damage:
                if step is not None or self.config.on_corrupt is OnCorrupt.fail:
                    raise CorruptCheckpoint(f"checkpoint {directory.name} is refused: {damage}") from None
                last = damage
                if self.group.rank == 0:
                    log.warning("checkpoint %s is refused, trying the previous one: %s", directory.name, damage)
        raise CorruptCheckpoint(f"no intact checkpoint under {self.root}; tried {candidates}; the last: {last}")

    def _candidates(self, step: int | None) -> tuple[list[int], list[int]]:
        """Steps to try, and the complete ones for the error message."""
        order = load_order(self.root) if step is None else [step]
        present = present_steps(self.root)
        return [one for one in order if one in present], complete_steps(self.root)

    def _verified(self, directory: Path) -> Verified:
        """The checkpoint in `directory`. Collective. Raises CorruptCheckpoint on all ranks."""
        per_rank = collectives.all_gather_object(self._problems(directory), self.group)
        if problems := dict.fromkeys(problem for problems in per_rank for problem in problems):
            raise CorruptCheckpoint("; ".join(problems))
        try:
            metadata = agreed(lambda: read_metadata(directory), self.group)
            state = decided_by_rank0(lambda: read_state(directory), self.group)
        except ValueError as error:
            raise CorruptCheckpoint(str(error)) from None
        return Verified(directory, {"step": state["step"], **state["meta"]}, metadata)

    def _problems(self, directory: Path) -> list[str]:
        """What is wrong with the manifest, or with this rank's share of the files."""
        try:
            files = read_manifest(directory)
        except ValueError as error:
            return [str(error)]
        problems = []
        for name in share_of(files, self.group.rank, self.group.size) if self.config.verify else []:
            problems.append(problem_of(directory, name, files[name]))
            self._beat()
        return [problem for problem in problems if problem]

    def load(self, chosen: Verified, shards: Sequence[Shard]) -> None:
        """See `CheckpointStore.load`."""
        state = agreed(lambda: stored_tensors(shards), self.group)
        check_matches(state, chosen.metadata, self.group, str(chosen.directory))
        error = None
        try:
            self._beat()
            read_into(state, chosen.directory, chosen.metadata)
        except Exception as caught:  # an unreadable file in spite of a good hash: the disk, or verify=False
            error = f"{type(caught).__name__}: {caught}"
        if error := shared_error(error, self.group):
            raise CorruptCheckpoint(f"checkpoint {chosen.directory.name} is refused: {error}")
