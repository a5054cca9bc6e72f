"""Loading: choose a checkpoint whose files are as they were written, then read it in place.

Nothing is believed before its hash was checked, each rank checking a share of the files; and each step of the choice is
agreed upon, so all ranks hold the same `Verified`. Only a `Verified` can be loaded: a resume, which looks at the small
state first and at the tensors when the model is built, hashes every byte once. Damage leads to an earlier checkpoint; a
file system that does not answer (UnreadableFile) never does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from torch.distributed.checkpoint.metadata import Metadata

from megatron_fp4.checkpoint.config import CheckpointConfig, OnCorrupt
from megatron_fp4.checkpoint.dcp import read_into
from megatron_fp4.checkpoint.directory import (
    LATEST,
    STATE,
    check_step,
    complete_steps,
    load_order,
    named_by_latest,
    present_steps,
    read_state,
    step_name,
)
from megatron_fp4.checkpoint.metadata import METADATA, read_metadata
from megatron_fp4.checkpoint.state import check_matches, stored_tensors
from megatron_fp4.comm import collectives
from megatron_fp4.comm.agree import agreed, decided_by_rank0, errors_by_rank
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.durable import problem_of, read_manifest, share_of
from megatron_fp4.storage.patience import UnreadableFile

log = logging.getLogger(__name__)
T = TypeVar("T")


class CorruptCheckpoint(ValueError):
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
        self.damaged: set[int] = set()
        """Steps whose checkpoint was passed over, until it is written anew."""

    def choose(self, step: int | None, before: int | None = None) -> Verified:
        """See `CheckpointStore.choose`."""
        candidates, complete, gone = decided_by_rank0(lambda: self._candidates(step, before), self.group)
        if gone is not None:
            damage = CorruptCheckpoint(f"{self.root / LATEST} names {step_name(gone)}, which is not there")
            if self.config.on_corrupt is OnCorrupt.fail:
                raise damage
            self._pass_over(gone, damage)
        if not candidates and step is None and self.damaged:
            raise CorruptCheckpoint(f"no intact checkpoint under {self.root}; tried {sorted(self.damaged)}")
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
                self._pass_over(candidate, damage)
        raise CorruptCheckpoint(
            f"no intact checkpoint under {self.root}; tried {candidates}; the last: {last}. Copy it there again, or"
            " choose another train.run_dir to begin anew"
        )

    def _pass_over(self, step: int, damage: CorruptCheckpoint) -> None:
        self.damaged.add(step)
        if self.group.rank == 0:
            log.warning("checkpoint %s is refused, trying the previous one: %s", step_name(step), damage)

    def _candidates(self, step: int | None, before: int | None) -> tuple[list[int], list[int], int | None]:
        """Steps to try; the complete ones for the error message; the step that `latest` names if that is gone."""
        order = [one for one in load_order(self.root) if one not in self.damaged] if step is None else [step]
        present, named = present_steps(self.root), named_by_latest(self.root)
        candidates = [one for one in order if one in present and (before is None or one < before)]
        accounted_for = step is not None or named in self.damaged or named in present
        return candidates, complete_steps(self.root), None if accounted_for else named

    def _verified(self, directory: Path) -> Verified:
        """The checkpoint in `directory`. Collective. Raises CorruptCheckpoint and UnreadableFile on all ranks."""
        self._agreed(lambda: self._check_files(directory))
        metadata = self._agreed(lambda: read_metadata(directory))
        own_state = self._agreed(lambda: self._read_state(directory))
        state = collectives.broadcast_object(own_state, self.group)
        return Verified(directory, {**state["meta"], "step": state["step"]}, metadata)

    def _agreed(self, look: Callable[[], T]) -> T:
        """`look()` of this rank; what went wrong on any rank is raised on all, an unreadable file before damage."""
        value = None
        damage = None
        unreadable = None
        try:
            value = look()
        except UnreadableFile as error:
            unreadable = str(error)
        except ValueError as error:
            damage = str(error)
        self._beat()
        outcomes = collectives.all_gather_object((damage, unreadable), self.group)
        if texts := errors_by_rank([text for _, text in outcomes]):
            raise UnreadableFile(texts)
        if damages := dict.fromkeys(text for text, _ in outcomes if text):
            raise CorruptCheckpoint("; ".join(damages))
        return cast(T, value)

    def _check_files(self, directory: Path) -> None:
        """Raises ValueError for what is wrong with the manifest, or with this rank's share of the files."""
        files = read_manifest(directory).files
        problems = []
        to_check = files if self.config.verify else {name: files[name] for name in (METADATA, STATE) if name in files}
        for name in share_of(to_check, self.group.rank, self.group.size):
            problems.append(problem_of(directory, name, files[name]))
            self._beat()
        if text := "; ".join(problem for problem in problems if problem):
            raise ValueError(text)

    def _read_state(self, directory: Path) -> dict[str, Any]:
        """Rank 0 reads; clients of a shared file system may see it differently."""
        if self.group.rank != 0:
            return {}
        state = read_state(directory)
        check_step(directory, read_manifest(directory), state)
        return state

    def load(self, chosen: Verified, shards: Sequence[Shard]) -> None:
        """See `CheckpointStore.load`."""
        state = agreed(lambda: stored_tensors(shards), self.group)
        check_matches(state, chosen.metadata, self.group, str(chosen.directory))
        self._beat()
        self._agreed(lambda: read_into(state, chosen.directory, chosen.metadata))

    def load_or_earlier(self, chosen: Verified, shards: Sequence[Shard]) -> Verified:
        """See `CheckpointStore.load_or_earlier`."""
        while True:
            try:
                self.load(chosen, shards)
                return chosen
            except CorruptCheckpoint as damage:
                if self.config.on_corrupt is OnCorrupt.fail:
                    raise
                self._pass_over(chosen.step, damage)
                chosen = self.choose(None, before=chosen.step)
