"""Loading: choose a checkpoint whose files are as they were written, then read it in place.

Nothing is believed before its hash was checked. Rank 0 reads the small files, for thousands of ranks that read the same
one keep a file server busy, and hands them on; of the tensors' files each rank checks a share, where it can the part
that it reads next. Each step of the choice is agreed upon, so all ranks hold the same `Verified`. Only a `Verified` can
be loaded: a resume, which looks at the small state first and at the tensors when the model is built, hashes every byte
once. Damage leads to an earlier checkpoint; a file system that does not answer (UnreadableFile) never does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from megatron_fp4.checkpoint.config import CheckpointConfig, OnCorrupt
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
from megatron_fp4.checkpoint.pieces.read import read_into
from megatron_fp4.checkpoint.pieces.stored import Description, StoredPieces, read_description
from megatron_fp4.checkpoint.state import check_matches, shapes_of
from megatron_fp4.comm import collectives
from megatron_fp4.comm.agree import MAX_LISTED, agreed, decided_by_rank0, listed_errors
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.durable import Manifest, problem_of, share_of
from megatron_fp4.storage.patience import UnreadableFile

log = logging.getLogger(__name__)
T = TypeVar("T")
DAMAGED, UNREADABLE = 1, 2
"""What a rank may say of files that it was to look at."""


class CorruptCheckpoint(ValueError):
    """A checkpoint is torn or altered; the message names files, expected and actual values."""


@dataclass(frozen=True, eq=False)
class Verified:
    """A checkpoint whose files were as they were written when `choose` looked; the same one on all ranks.

    meta: the small state that was saved with the tensors, and "step". pieces: names, shapes and places of the stored
    tensors.
    """

    directory: Path
    meta: dict[str, Any]
    pieces: StoredPieces

    @property
    def step(self) -> int:
        return self.meta["step"]


class CheckpointReader:
    """Reads checkpoints under `root`; changes nothing there. beat: see `CheckpointStore`."""

    def __init__(self, root: Path, group: Group, config: CheckpointConfig, beat: Callable[[], None]) -> None:
        self.root, self.group = root, group
        self.config, self.beat = config, beat
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
                return self.verified(directory)
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

    def verified(self, directory: Path) -> Verified:
        """The checkpoint in `directory`, wherever it lies. Collective.

        Raises CorruptCheckpoint and UnreadableFile on all ranks.
        """
        own = self.agreed(lambda: _read_small_files(directory) if self.group.rank == 0 else None)
        description, state = collectives.broadcast_object(own, self.group)
        self.agreed(lambda: self._check_files(directory, description))
        pieces = self.agreed(lambda: description.parsed(directory))
        return Verified(directory, {**state["meta"], "step": state["step"]}, pieces)

    def agreed(self, look: Callable[[], T]) -> T:
        """`look()` of this rank; what went wrong on any rank is raised on all, an unreadable file before damage.

        Collective. Raises UnreadableFile, and CorruptCheckpoint where `look` raises another ValueError.
        """
        value = None
        damage = None
        unreadable = None
        try:
            value = look()
        except UnreadableFile as error:
            unreadable = str(error)
        except ValueError as error:
            damage = str(error)
        self.beat()
        kinds = collectives.gather_bytes(UNREADABLE if unreadable else DAMAGED if damage else 0, self.group)
        if speakers := (kinds == UNREADABLE).nonzero().flatten().tolist()[:MAX_LISTED]:
            texts = collectives.told_by(speakers, unreadable, self.group)
            raise UnreadableFile(str(listed_errors(texts.items())))
        if speakers := (kinds == DAMAGED).nonzero().flatten().tolist()[:MAX_LISTED]:
            damages = collectives.told_by(speakers, damage, self.group).values()
            raise CorruptCheckpoint("; ".join(dict.fromkeys(damages)))
        return cast(T, value)

    def _check_files(self, directory: Path, description: Description) -> None:
        """Raises ValueError for what is wrong with this rank's share of the files that rank 0 has not checked."""
        if not self.config.verify:
            return
        manifest = description.manifest
        parts = manifest.parts(name for name in manifest.files if name not in (STATE, description.name))
        if len(parts) == self.group.size:  # as many ranks as wrote: each reads the same again, then from memory
            share = [parts[self.group.rank]]
        else:
            share = share_of(parts, self.group.rank, self.group.size)
        problems = []
        for name, part in share:
            problems.append(problem_of(directory, name, part, manifest.file_bytes(name)))
            self.beat()
        if text := "; ".join(problem for problem in problems if problem):
            raise ValueError(text)

    def load(self, chosen: Verified, shards: Sequence[Shard], unread: tuple[str, ...] = ()) -> None:
        """See `CheckpointStore.load`."""
        wanted = agreed(lambda: shapes_of(shards), self.group)
        shapes = chosen.pieces.shapes()
        stored = {key: shape for key, shape in shapes.items() if not key.partition("/")[2].startswith(unread)}
        check_matches(wanted, stored, self.group, str(chosen.directory))
        self.beat()
        self.agreed(lambda: read_into(shards, chosen.directory, chosen.pieces))

    def load_or_earlier(self, chosen: Verified, shards: Sequence[Shard], unread: tuple[str, ...] = ()) -> Verified:
        """See `CheckpointStore.load_or_earlier`."""
        while True:
            try:
                self.load(chosen, shards, unread)
                return chosen
            except CorruptCheckpoint as damage:
                if self.config.on_corrupt is OnCorrupt.fail:
                    raise
                self._pass_over(chosen.step, damage)
                chosen = self.choose(None, before=chosen.step)


def _read_small_files(directory: Path) -> tuple[Description, dict[str, Any]]:
    """What rank 0 reads for all, in spite of `verify` with hashes: names and positions. Raises ValueError."""
    description = read_description(directory)
    manifest = description.manifest
    for name in (description.name, STATE):
        if name in manifest.files and (problem := _problem(directory, name, manifest)):
            raise ValueError(problem)
    state = read_state(directory)
    check_step(directory, manifest, state)
    return description, state


def _problem(directory: Path, name: str, manifest: Manifest) -> str | None:
    return "; ".join(text for part in manifest.files[name] if (text := problem_of(directory, name, part))) or None
