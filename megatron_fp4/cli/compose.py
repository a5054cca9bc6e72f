"""From hydra overrides to frozen values.

Hydra composes the YAML groups, the dataclasses of `RunConfig` are the schema (schema.py), and behind this file all
objects are frozen. Hydra's compose API is used instead of its decorator, so no rank writes an output folder. Values are
written as their settings' types before (overrides/text.py), and every mistake becomes one message after it
(overrides/mistakes.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_fp4.cli.overrides.mistakes import REFUSED, ConfigError, explain, short, unknown_key, yaml_mistake
from megatron_fp4.cli.overrides.places import CONFIG_DIR, SEARCHPATH, Places
from megatron_fp4.cli.overrides.text import ambiguous_text, as_meant
from megatron_fp4.cli.schema import build, twin
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.effect import idle_settings, named_recipes
from megatron_fp4.train.renamed import renamed_keys, renaming_message

PRECISION_RECIPE = re.compile(r"\+*precision\.recipes\.\w+\.")

__all__ = ["CONFIG_DIR", "ConfigError", "compose_config", "load_run_config", "to_run_config"]


def compose_config(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """The merged, schema-checked tree. config_dirs: where YAML files are looked for besides configs/.

    Raises ConfigError.
    """
    places = Places.of(overrides, config_dirs)
    overrides = [as_hydra_says_it(override, places) for override in overrides if not _is_searchpath(override)]
    try:
        tree = _compose(overrides, places)
        _drop_other_recipes(overrides, tree)
    except ConfigError:
        raise
    except REFUSED as error:
        raise ConfigError(explain(error, overrides, places)) from None
    _check_effect(overrides, tree, places)
    return tree


def as_hydra_says_it(override: str, places: Places, *, sweep: bool = False) -> str:
    """The override with values of their settings' types. sweep: a comma separates the values of several runs."""
    key, _, value = override.partition("=")
    return f"~{key}" if value.lower() == "null" and key in places else as_meant(override, places, sweep=sweep)


def _is_searchpath(override: str) -> bool:
    return override.partition("=")[0].lstrip("+") == SEARCHPATH


def to_run_config(tree: DictConfig) -> RunConfig:
    """The tree as frozen dataclasses. Raises ConfigError, also for values that the dataclasses refuse."""
    try:
        settings = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        assert isinstance(settings, dict)
        return build(RunConfig, {str(key): value for key, value in settings.items()})
    except OmegaConfBaseException as error:
        raise ConfigError(short(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def resolve(tree: DictConfig) -> DictConfig:
    """The tree with every interpolation (`${oc.env:NAME}`, `${now:...}`) replaced by its value. Raises ConfigError."""
    resolved = copy.deepcopy(tree)
    try:
        OmegaConf.resolve(resolved)
    except OmegaConfBaseException as error:
        raise ConfigError(short(error)) from None
    return resolved


def as_written(tree: DictConfig) -> dict[str, Any]:
    """The settings as nested dictionaries, interpolations as they were written."""
    settings = OmegaConf.to_container(tree, resolve=False, enum_to_str=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def from_yaml(text: str) -> DictConfig:
    """The tree of which `to_yaml` made `text`."""
    tree = OmegaConf.merge(OmegaConf.structured(twin(RunConfig)), OmegaConf.create(text))
    assert isinstance(tree, DictConfig)
    return tree


def load_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run stored in its directory, wherever that lies now. Raises ConfigError if none."""
    stored = run_dir / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"{run_dir} holds no config.yaml; is it the train.run_dir of a run?")
    try:
        if objection := ambiguous_text(stored):
            raise ConfigError(objection)
        settings = OmegaConf.load(stored)
        if renamed := renamed_keys(OmegaConf.to_container(settings)):
            raise ConfigError(
                f"{stored}: {renaming_message(renamed)}; rename what this version of the program is to read"
            )
        tree = OmegaConf.merge(OmegaConf.structured(twin(RunConfig)), settings)
        tree.train.run_dir = str(run_dir)
    except YAMLError as error:
        raise ConfigError(yaml_mistake(error)) from None
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{stored}: {short(error)}") from None
    assert isinstance(tree, DictConfig)
    return to_run_config(tree)


def to_yaml(tree: DictConfig) -> str:
    """The tree as a run stores it in its config.yaml."""
    return OmegaConf.to_yaml(tree)


def _compose(overrides: Sequence[str], places: Places) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=twin(RunConfig))
    written = [*overrides, *places.searchpath()]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for used in loader.compute_defaults_list("config", written, RunMode.RUN).defaults:
            option = str(used.config_path)
            if (other := places.shadowed(option)) is not None:
                read = places.files(option)[0]
                raise ConfigError(f"{other} is not read, because {read} has its name; rename it")
            for file in places.files(option)[:1]:
                if objection := ambiguous_text(file, group=option.rpartition("/")[0]):
                    raise ConfigError(objection)
        return compose("config", overrides=written)


def _drop_other_recipes(overrides: Sequence[str], tree: DictConfig) -> None:
    """`precision=fp8` decides over an experiment: what that changes of nvfp4 is half a recipe, which nothing names."""
    if not any(override.startswith("precision=") for override in overrides):
        return
    typed = {override.lstrip("+").split(".")[2] for override in overrides if PRECISION_RECIPE.match(override)}
    with open_dict(tree):
        for name in set(tree.precision.recipes) - named_recipes(tree.precision) - typed:
            del tree.precision.recipes[name]


def _check_effect(overrides: Sequence[str], tree: DictConfig, places: Places) -> None:
    """Refuse what was typed and changes nothing; what is wrong in itself is said by `to_run_config`."""
    for added in (override.partition("=")[0].lstrip("+") for override in overrides if override.startswith("+")):
        if added not in places and (wrong := unknown_key(added, places.groups())):
            raise ConfigError(wrong)
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    if {"precision", "precision/recipe"} <= set(keys):
        raise ConfigError("precision=... and precision/recipe=... both choose the recipe; leave one out")
    for key in keys:
        if key.startswith(("hydra.", "hydra/")):
            raise ConfigError(f"{key} has no effect: {_instead(key)}")
    try:
        idle = idle_settings(to_run_config(tree))
    except ConfigError:
        return
    for key in keys:
        for setting, reason in idle.items():
            if key == setting or key.startswith(f"{setting}."):
                raise ConfigError(f"{key} has no effect: {reason}; leave it out, or change that")


def _instead(key: str) -> str:
    """What is used instead of a setting of hydra's."""
    if key.startswith(("hydra.sweep", "hydra/sweeper", "hydra/launcher", "hydra.launcher")):
        return "it is for several runs; pretrain --multirun starts them"
    return "hydra only merges the YAML; train.run_dir is where a run goes"
