"""Loading: choose, verify, read in place; refuse what is damaged and say what it is.

One idea: nothing is believed before its hash was checked, each rank checking a share of the files; and all ranks take
the same checkpoint, because each step of the choice is agreed upon.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from megatron_fp4.checkpoint.box import Boxes, BoxLoadPlanner
from megatron_fp4.checkpoint.config import CheckpointConfig, OnCorrupt
from megatron_fp4.checkpoint.directory import complete_steps, load_order, present_steps, read_state, step_name
from megatron_fp4.checkpoint.state import Shard, boxes_of, check_matches
from megatron_fp4.comm import collectives
from megatron_fp4.comm.agree import agreed, from_first, shared_error
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.durable import problem_of, read_manifest, share_of

log = logging.getLogger(__name__)


class CorruptCheckpoint(RuntimeError):
    """A checkpoint is torn or altered; the message names files, expected and actual values."""


class Loader:
    """Reads checkpoints under `root`; changes nothing there. beat: see `CheckpointStore`."""

    def __init__(self, root: Path, group: Group, config: CheckpointConfig, beat: Callable[[], None]) -> None:
        self.root, self.group, self.config, self._beat = root, group, config, beat

    def load(self, step: int | None, shards: Sequence[Shard]) -> dict[str, Any]:
        """See `CheckpointStore.load`."""
        state = agreed(lambda: boxes_of(shards), self.group)
        return self._newest_good(step, lambda directory: self._read(directory, state))

    def read_meta(self, step: int | None) -> dict[str, Any]:
        """See `CheckpointStore.read_meta`."""
        return self._newest_good(step, lambda _: None)

    def _newest_good(self, step: int | None, read: Callable[[Path], str | None]) -> dict[str, Any]:
        """Try the candidates; `read` fills tensors and returns all ranks' error (damage) or None."""
        candidates, complete = from_first(lambda: self._candidates(step), self.group)
        if not candidates:
            asked = "no checkpoint" if step is None else f"no checkpoint {step_name(step)}"
            raise FileNotFoundError(f"{asked} under {self.root}; complete ones: {complete}")
        for candidate in candidates:
            directory = self.root / step_name(candidate)
            problem = self._verify(directory) or read(directory)
            state, unreadable = from_first(lambda chosen=directory: _state_of(chosen), self.group)  # type: ignore[misc]
            problem = problem or unreadable
            if problem is None:
                return {"step": state["step"], **state["meta"]}
            if step is not None or self.config.on_corrupt is OnCorrupt.fail:
                raise CorruptCheckpoint(f"checkpoint {directory.name} is refused: {problem}")
            if self.group.rank == 0:
                log.warning("checkpoint %s is refused, trying the previous one: %s", directory.name, problem)
        raise CorruptCheckpoint(f"no intact checkpoint under {self.root}; tried {candidates}; the last: {problem}")

    def _candidates(self, step: int | None) -> tuple[list[int], list[int]]:
        """Steps to try, and the complete ones for the error message."""
        order = load_order(self.root) if step is None else [step]
        present = present_steps(self.root)
        return [one for one in order if one in present], complete_steps(self.root)

    def _verify(self, directory: Path) -> str | None:
        """Each rank checks its share of the files; all ranks return the same problems or None."""
        try:
            files = read_manifest(directory)
            mine = share_of(files, self.group.rank, self.group.size) if self.config.verify else []
            problems = []
            for name in mine:
                if problem := problem_of(directory, name, files[name]):
                    problems.append(problem)
                self._beat()
        except ValueError as error:
            problems = [str(error)]
        found = [one for many in collectives.all_gather_object(problems, self.group) for one in many]
        return "; ".join(dict.fromkeys(found)) or None

    def _read(self, directory: Path, state: dict[str, Boxes]) -> str | None:
        """Fill `state` in place. Raises ValueError on all ranks if names or shapes differ; returns other errors."""
        metadata, error = None, None
        reader = FileSystemReader(directory)
        try:
            metadata = reader.read_metadata()
        except Exception as caught:  # whatever unpickling a damaged file raises
            error = f"{directory / '.metadata'}: {type(caught).__name__}: {caught}"
        if error := shared_error(error, self.group):
            return error
        assert metadata is not None
        check_matches(state, metadata, self.group, str(directory))
        try:
            reader.set_up_storage_reader(metadata, is_coordinator=False)
            planner = BoxLoadPlanner(state, metadata)
            self._beat()
            reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as caught:  # an unreadable file in spite of a good hash: the disk, or verify=False
            error = f"{type(caught).__name__}: {caught}"
        return shared_error(error, self.group)


def _state_of(directory: Path) -> tuple[dict[str, Any], str | None]:
    try:
        return read_state(directory), None
    except ValueError as error:
        return {}, str(error)
