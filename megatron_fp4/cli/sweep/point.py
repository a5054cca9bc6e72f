"""One run of a sweep: a process of its own, started as one would start it by hand.

Hydra's launcher calls a `PointTask` with a composed configuration; what is started gets the overrides of that point,
and train.run_dir. A launcher may do so elsewhere (joblib in other processes, submitit in jobs of slurm), so the task
holds plain values only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from megatron_fp4.cli.processes import RunProcesses
from megatron_fp4.train.faults.signals import EXIT_INTERRUPTED, EXIT_REQUEUE

RUN_DIR = "train.run_dir"
MAX_NAME = 200


@dataclass(frozen=True)
class PointEnd:
    """How a run of a sweep ended. code: None for one that was not started, because an earlier one was stopped."""

    name: str
    run_dir: str
    code: int | None

    def __str__(self) -> str:
        if self.code == 0:
            return "done"
        if self.code is None:
            return "not started"
        return "stopped, state saved" if self.code == EXIT_REQUEUE else f"FAILED with exit code {self.code}"


class PointTask:
    """Starts a run of a sweep and waits for it; never raises for a run that fails.

    root: folder of all runs. keys: what differs between them. command: what starts a run, before its overrides;
    options: what follows those.
    """

    def __init__(self, root: str, keys: Sequence[str], command: Sequence[str], options: Sequence[str] = ()) -> None:
        self.root = root
        self.keys = tuple(keys)
        self.command = tuple(command)
        self.options = tuple(options)
        self.stopped = False

    def __call__(self, _settings: DictConfig) -> PointEnd:
        overrides = [str(override) for override in HydraConfig.get().overrides.task]
        name, run_dir = self.place(overrides)
        if self.stopped:
            return PointEnd(name, run_dir, None)
        own = f"{RUN_DIR}={QuotedString(run_dir, Quote.single).with_quotes()}"
        others = [override for override in overrides if override.partition("=")[0] != RUN_DIR]
        with RunProcesses() as processes:
            code = processes.run([*self.command, *others, own, *self.options])
        self.stopped = code in (EXIT_REQUEUE, EXIT_INTERRUPTED)
        return PointEnd(name, run_dir, code)

    def place(self, overrides: Sequence[str]) -> tuple[str, str]:
        """Name and run directory of the point that has these overrides."""
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = {one.get_key_element(): str(one.value()) for one in parsed if one.get_key_element() in self.keys}
        if RUN_DIR in values:
            return values[RUN_DIR], values[RUN_DIR]
        texts = {one.get_key_element(): one.get_value_element_as_str() for one in parsed}
        name = ",".join(f"{key.lstrip('+')}={texts[key]}" for key in values)
        name = re.sub(r"(?<==)[./]+|\.yaml", "", re.sub("['\"]", "", name))
        name = re.sub(r"[^\w.+=,-]+", "_", name)[:MAX_NAME]
        return name, os.path.join(self.root, name)
