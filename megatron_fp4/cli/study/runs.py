"""The runs of a study: which there are, which are done, and one process for each of the others.

A run is known by the hash of everything that it is made with, but for where it writes and how it logs. Its result lies
in `results.jsonl` under that hash, so a study that is started again does what is missing and nothing else; a run that
was stopped goes on, because every run does; a changed arm is run anew beside what others have.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from megatron_fp4.cli.compose import ConfigError, as_written, compose_config, to_run_config
from megatron_fp4.cli.processes import RunProcesses
from megatron_fp4.storage.append import AppendFile, read_values
from megatron_fp4.studies.design import Study
from megatron_fp4.studies.measures import ArmResult
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.resume.provenance import git_state, versions
from megatron_fp4.train.telemetry.series import RunSeries

RESULTS = "results.jsonl"
NOT_IN_KEY = ("logging", "checkpoint")
"""Sections of the settings that change no number of a run."""
KEY_DIGITS = 12


@dataclass(frozen=True)
class StudyRun:
    """A run of a study. key: hash of its configuration. steps: at which it is complete."""

    arm: str
    seed: int
    overrides: tuple[str, ...]
    key: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """Its train.run_dir."""
        return root / "runs" / f"{self.arm}-{self.seed}-{self.key}"

    def log(self, root: Path) -> Path:
        """What it prints."""
        return root / "runs" / f"{self.arm}-{self.seed}-{self.key}.log"

    def shell(self, root: Path) -> str:
        """Its command as one types it."""
        return shlex.join(self.command(root))

    def command(self, root: Path) -> list[str]:
        """What makes it, or goes on with it."""
        run_dir = QuotedString(str(self.folder(root)), Quote.single).with_quotes()
        return [sys.executable, "-m", "megatron_fp4.pretrain", *self.overrides, f"train.run_dir={run_dir}"]


def compose_arms(study: Study, config_dirs: Sequence[Path] = ()) -> dict[str, DictConfig]:
    """The configuration of each arm, for the first seed. Raises ConfigError for one that is refused."""
    trees: dict[str, DictConfig] = {}
    for arm in study.arms:
        try:
            trees[arm] = compose_config(study.overrides(arm, study.seeds[0]), config_dirs)
            ranks = to_run_config(trees[arm]).parallel.smallest_world
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}") from None
        if ranks > 1:
            raise ConfigError(
                f"arm {arm} needs {ranks} ranks; a study starts runs of one process, whose numbers a layout would not"
                " change"
            )
    return trees


def with_seed(tree: DictConfig, seed: int) -> DictConfig:
    """The configuration for another seed: what `Study.overrides` says of it."""
    tree = copy.deepcopy(tree)
    tree.train.seed = tree.data.seed = seed
    return tree


def runs_of(study: Study, trees: Mapping[str, DictConfig]) -> list[StudyRun]:
    """All of them, seed by seed, so that a study that is stopped has whole pairs. trees: of `compose_arms`.

    Raises ConfigError for two arms that are the same run.
    """
    runs: list[StudyRun] = []
    arms_by_key: dict[str, str] = {}
    for seed, (arm, tree) in itertools.product(study.seeds, trees.items()):
        key = configuration_key(with_seed(tree, seed))
        if key in arms_by_key:
            raise ConfigError(f"arms {arms_by_key[key]} and {arm} are the same run; without running it their gap is 0")
        arms_by_key[key] = arm
        steps = to_run_config(tree).total_steps
        runs.append(StudyRun(arm, seed, tuple(study.overrides(arm, seed)), key, steps))
    return runs


def check_arms(trees: Mapping[str, DictConfig]) -> None:
    """Refuse what an arm's runs would refuse, before the first one starts. Raises ValueError and FileNotFoundError."""
    for arm, tree in trees.items():
        try:
            check_config(to_run_config(tree), world_size=1)
        except ValueError as error:
            raise ConfigError(f"arm {arm}: {error}") from None


def configuration_key(tree: DictConfig) -> str:
    """Hash of the settings that decide the numbers of a run."""
    settings = {name: values for name, values in as_written(tree).items() if name not in NOT_IN_KEY}
    settings["train"] = {name: value for name, value in settings["train"].items() if name != "run_dir"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def results_of(root: Path, runs: Sequence[StudyRun]) -> list[ArmResult]:
    """The results that the runs have; the newest of each."""
    known = {run.key: run for run in runs}
    results: dict[str, ArmResult] = {}
    for record in read_values(root / RESULTS):
        try:
            result = ArmResult.read(record)
        except (KeyError, TypeError):
            continue  # of another version; the run is made again
        if run := known.get(result.key):
            results[result.key] = replace(result, arm=run.arm, seed=run.seed)
    return list(results.values())


def run_all(root: Path, runs: Sequence[StudyRun], jobs: int) -> Iterator[tuple[StudyRun, int | None]]:
    """Run what has no result, `jobs` at a time; each as it ends, with its exit code, None for one that did not start.

    A run that fails does not end the others; a request to stop does, and is passed on to those that run.
    """
    (root / "runs").mkdir(parents=True, exist_ok=True)
    file = AppendFile(root / RESULTS)
    try:
        with RunProcesses() as processes, ThreadPoolExecutor(jobs) as pool:

            def make(run: StudyRun) -> int | None:
                if processes.stopped:
                    return None
                began = time.monotonic()
                code = processes.run(run.command(root), log=run.log(root))
                if code == 0:
                    file.add(_result(root, run, time.monotonic() - began).json())
                return code

            yield from zip(runs, pool.map(make, runs), strict=True)
    finally:
        file.close()


def _result(root: Path, run: StudyRun, seconds: float) -> ArmResult:
    about = {"seconds": round(seconds, 1), "commit": git_state(), "versions": versions(), "overrides": run.overrides}
    return ArmResult.of(RunSeries.read(run.folder(root)), run.arm, run.seed, run.key, about)
