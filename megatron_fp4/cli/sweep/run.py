"""`megatron-fp4 pretrain --multirun optim.lr=1e-3,3e-3 precision=bf16,nvfp4`: a run for each combination.

Hydra's basic sweeper makes the combinations and its launcher (hydra/launcher=basic, or a plug-in such as joblib and
submitit_slurm) starts them, each as a process of its own (point.py), in a directory that is named by what differs. What
can be refused is refused before the first one starts; a run that fails does not end the others. The same command goes
on where a sweep was stopped, because each run does.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from megatron_fp4.cli import report
from megatron_fp4.cli.compose import as_hydra_says_it, compose_config, to_run_config
from megatron_fp4.cli.overrides.mistakes import REFUSED, ConfigError, short
from megatron_fp4.cli.overrides.places import CONFIG_DIR, SEARCHPATH, Places
from megatron_fp4.cli.schema import twin
from megatron_fp4.cli.sweep.point import PointEnd, PointTask
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.signals import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE

TAKEN = re.compile(r"hydra/launcher|hydra\.launcher\..+|hydra\.sweep\.dir|hydra\.sweeper\.max_batch_size")
QUIET = ("hydra.sweep.subdir=.", "hydra.output_subdir=null", "hydra/job_logging=none")
"""Hydra makes no folder of its own for a run."""


def sweep(overrides: Sequence[str], config_dirs: Sequence[Path], launch: str) -> int:
    """Run every point and compare them; returns the exit code. launch: what starts the ranks of a run, "" for one rank.

    Raises ConfigError.
    """
    places = Places.of(overrides, config_dirs)
    hydras = [one for one in overrides if re.match(r"\+*hydra[./]", one) and not one.lstrip("+").startswith(SEARCHPATH)]
    for override in hydras:
        if not TAKEN.fullmatch(override.partition("=")[0].lstrip("+")) and override != "hydra/sweeper=basic":
            raise ConfigError(
                f"{override} has no effect in a sweep; hydra/launcher=..., hydra.launcher.* and hydra.sweep.dir have"
            )
    own = [
        as_hydra_says_it(override, places, sweep=True)
        for override in overrides
        if override not in hydras and not override.lstrip("+").startswith(SEARCHPATH)
    ]
    command = shlex.split(launch) or [sys.executable, "-m", "megatron_fp4.pretrain"]
    options = [f"--config-dir={folder}" for folder in places.folders[1:]]
    try:
        with initialize_config_dir(str(CONFIG_DIR), job_name="sweep", version_base="1.3"):
            keys, points = _points([*own, *places.searchpath()])
        root = _root(points[0], hydras, config_dirs)
        task = PointTask(root, keys, command, options)
        _check(points, task, config_dirs, launch)
        hydras = [*hydras, *QUIET, f"hydra.sweep.dir={QuotedString(root, Quote.single).with_quotes()}"]
        with initialize_config_dir(str(CONFIG_DIR), job_name="sweep", version_base="1.3"):
            ConfigStore.instance().store(name="schema", node=_plain_schema())
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            batches = hydra.multirun("config", task, [*own, *places.searchpath(), *dict.fromkeys(hydras)])
    except ConfigError:
        raise
    except REFUSED as error:
        raise ConfigError(short(error)) from None
    return _conclude(root, [job.return_value for batch in batches for job in batch])


def _plain_schema() -> dict[str, Any]:
    """The schema without types: its classes are made here, and cannot go to a launcher's other processes.

    What a type would refuse was refused before.
    """
    settings = OmegaConf.to_container(OmegaConf.structured(twin(RunConfig)), enum_to_str=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _points(overrides: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The keys that have several values, and the overrides of each combination."""
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    keys = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    if not keys:
        raise ConfigError("--multirun: no setting has several values, as optim.lr=1e-3,3e-3")
    (points,) = BasicSweeper.split_arguments(parsed, None)
    return keys, [[override for override in point if not override.startswith(SEARCHPATH)] for point in points]


def _root(point: Sequence[str], hydras: Sequence[str], config_dirs: Sequence[Path]) -> str:
    """The folder of the sweep: hydra.sweep.dir if that is given, else train.run_dir."""
    given = [override for override in hydras if override.startswith("hydra.sweep.dir=")]
    if given:
        return str(OverridesParser.create().parse_override(given[-1]).value())
    return str(compose_config(point, config_dirs).train.run_dir)


def _check(points: Sequence[Sequence[str]], task: PointTask, config_dirs: Sequence[Path], launch: str) -> None:
    """Refuse what is wrong with any point before the first one starts. Raises ConfigError."""
    names: dict[str, str] = {}
    for point in points:
        name, run_dir = task.place(point)
        try:
            config = to_run_config(compose_config(point, config_dirs))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        world = config.parallel.smallest_world
        if world > 1 and not launch:
            raise ConfigError(
                f"{name} needs {world} ranks: start the sweep by launch/torchrun.sh --nproc-per-node {world} --multirun"
                ' ..., or say by --launch "COMMAND" what starts the ranks of a run'
            )
        if run_dir in names:
            raise ConfigError(f"two runs of the sweep would be {run_dir}; leave out what stands twice")
        names[run_dir] = name


def _conclude(root: str, ends: Sequence[PointEnd]) -> int:
    """Say how each run ended and compare those that have metrics; returns the exit code."""
    print(f"\nsweep of {len(ends)} runs in {root}")
    for end in ends:
        print(f"  {end.name}: {end}")
    runs = [end.run_dir for end in ends if os.path.exists(os.path.join(end.run_dir, "metrics.jsonl"))]
    compared = report.main([*runs, "--html", os.path.join(root, "report.html")]) if runs else EXIT_CONFIG
    codes = {end.code for end in ends}
    if codes == {0}:
        return compared
    stopped = {EXIT_REQUEUE, EXIT_INTERRUPTED, None} & codes
    return EXIT_REQUEUE if EXIT_REQUEUE in stopped else EXIT_INTERRUPTED if EXIT_INTERRUPTED in stopped else EXIT_FAILED
