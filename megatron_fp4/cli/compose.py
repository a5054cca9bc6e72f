"""From hydra overrides to frozen values.

Hydra composes the YAML groups, the dataclasses of `RunConfig` are the schema (schema.py), and behind this file all
objects are frozen. Hydra's compose API is used instead of its decorator, so no rank writes an output folder, and every
mistake becomes one message with the nearest valid key, or with the name that a setting has today (train/renamed.py).
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_fp4.cli.overrides.text import ambiguous_text, quote_text
from megatron_fp4.cli.schema import build, field_names, hint_at, inner_hint, join, twin
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.effect import idle_settings, named_recipes
from megatron_fp4.train.renamed import renamed_keys, renamed_option, renaming_message

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
PRECISION_RECIPE = re.compile(r"\+*precision\.recipes\.\w+\.")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is for the user."""


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The merged, schema-checked tree. Raises ConfigError."""
    directory = config_dir or CONFIG_DIR
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory} has no config.yaml; install with `pip install -e .`, or pass --config-dir")
    groups = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_dir()}
    overrides = [quote_text(override, groups) for override in overrides]
    _check_keys(overrides, groups)
    try:
        tree = _compose(overrides, directory)
        _drop_other_recipes(overrides, tree)
    except YAMLError as error:
        raise ConfigError(_short(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("".join(_renamed_in_experiments(overrides, directory)) or _short(error)) from None
    _check_effect(overrides, tree)
    return tree


def to_run_config(tree: DictConfig) -> RunConfig:
    """The tree as frozen dataclasses. Raises ConfigError, also for values that the dataclasses refuse."""
    try:
        settings = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        assert isinstance(settings, dict)
        return build(RunConfig, {str(key): value for key, value in settings.items()})
    except OmegaConfBaseException as error:
        raise ConfigError(_short(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def resolve(tree: DictConfig) -> DictConfig:
    """The tree with every interpolation (`${oc.env:NAME}`, `${now:...}`) replaced by its value. Raises ConfigError."""
    resolved = copy.deepcopy(tree)
    try:
        OmegaConf.resolve(resolved)
    except OmegaConfBaseException as error:
        raise ConfigError(_short(error)) from None
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
    if objection := ambiguous_text(stored):
        raise ConfigError(objection)
    try:
        settings = OmegaConf.load(stored)
        if renamed := renamed_keys(OmegaConf.to_container(settings)):
            raise ConfigError(
                f"{stored}: {renaming_message(renamed)}; rename what this version of the program is to read"
            )
        tree = OmegaConf.merge(OmegaConf.structured(twin(RunConfig)), settings)
        tree.train.run_dir = str(run_dir)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{stored}: {_short(error)}") from None
    assert isinstance(tree, DictConfig)
    return to_run_config(tree)


def to_yaml(tree: DictConfig) -> str:
    """The tree as a run stores it in its config.yaml."""
    return OmegaConf.to_yaml(tree)


def _compose(overrides: Sequence[str], directory: Path) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=twin(RunConfig))
    with initialize_config_dir(str(directory), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for used in loader.compute_defaults_list("config", list(overrides), RunMode.RUN).defaults:
            file = directory / f"{used.config_path}.yaml"
            if file.is_file() and (objection := ambiguous_text(file, group=str(used.config_path).rpartition("/")[0])):
                raise ConfigError(objection)
        return compose("config", overrides=list(overrides))


def _drop_other_recipes(overrides: Sequence[str], tree: DictConfig) -> None:
    """`precision=fp8` decides over an experiment: what that changes of nvfp4 is half a recipe, which nothing names."""
    if not any(override.startswith("precision=") for override in overrides):
        return
    typed = {override.lstrip("+").split(".")[2] for override in overrides if PRECISION_RECIPE.match(override)}
    with open_dict(tree):
        for name in set(tree.precision.recipes) - named_recipes(tree.precision) - typed:
            del tree.precision.recipes[name]


def _check_keys(overrides: Sequence[str], groups: Mapping[str, Path]) -> None:
    """Name the nearest valid key or option of every override that has none, which hydra's own message lacks."""
    options = {group: sorted(path.stem for path in folder.glob("*.yaml")) for group, folder in groups.items()}
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{_short(error)}; an override looks like model.num_layers=4") from None
    if {"precision", "precision/recipe"} <= {override.key_or_group for override in parsed}:
        raise ConfigError("precision=... and precision/recipe=... both choose the recipe; leave one out")
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if renamed := renamed_option(key, str(value)) or renaming_message(renamed_keys(value, key)):
            raise ConfigError(renamed)
        if key in options:
            if not override.is_delete() and str(value) not in options[key]:
                nearest = _nearest(str(value), options[key])
                raise ConfigError(f"{key}={value} does not exist{nearest}; {key}: {', '.join(options[key])}")
        elif isinstance(value, str) and value in options.get(key.replace(".", "/"), []):
            raise ConfigError(f"{key}={value}: the options of a group are chosen by {key.replace('.', '/')}={value}")
        elif key.partition(".")[0] == "hydra":
            raise ConfigError(f"{key} has no effect: hydra only merges the YAML; train.run_dir is where a run goes")
        else:
            _check_key(key, list(options))


def _check_effect(overrides: Sequence[str], tree: DictConfig) -> None:
    """Refuse what was typed and changes nothing; what is wrong in itself is said by `to_run_config`."""
    try:
        idle = idle_settings(to_run_config(tree))
    except ConfigError:
        return
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        for setting, reason in idle.items():
            if key == setting or key.startswith(f"{setting}."):
                raise ConfigError(f"{key} has no effect: {reason}; leave it out, or change that")


def _check_key(key: str, groups: list[str]) -> None:
    """Raises ConfigError for a key that the schema does not have."""
    seen, hint = "", hint_at("")
    for part in key.split("."):
        names = field_names(hint)
        if names and part not in names:
            wrong, siblings = join(seen, part), [join(seen, name) for name in names]
            everything = siblings + _all_keys(hint_at("")) + ([] if seen else groups)
            raise ConfigError(f"unknown key '{key}'{_nearest(wrong if seen else key, everything)}")
        seen, hint = join(seen, part), inner_hint(hint, part)


def _all_keys(hint: Any, prefix: str = "") -> list[str]:
    """Dotted keys of everything below a section of the type `hint`, without what lists and dictionaries hold."""
    keys = []
    for name in field_names(hint):
        key = join(prefix, name)
        keys += [key, *_all_keys(inner_hint(hint, name), key)]
    return keys


def _nearest(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _short(error: BaseException) -> str:
    """The lines of a hydra or omegaconf error, and of what caused it, that help a user."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [line.strip() for line in str(cause).splitlines()]
        cause = cause.__cause__
    noise = ("object_type", "reference_type", "To append", "Set the")
    useful = [line for line in [*lines, *_renamed_in_yaml(lines)] if line and not line.startswith(noise)]
    return "; ".join(dict.fromkeys(useful))


def _renamed_in_experiments(overrides: Sequence[str], directory: Path) -> Iterator[str]:
    """The present names of options in the defaults lists of the experiments that are asked for."""
    for override in overrides:
        group, _, option = override.partition("=")
        file = directory / group / f"{option}.yaml"
        if group == "experiment" and file.is_file():
            for entry in OmegaConf.select(OmegaConf.load(file), "defaults") or ():
                for key, chosen in entry.items() if isinstance(entry, DictConfig) else ():
                    name = str(key).removeprefix("override").strip(" /")
                    if renamed := renamed_option(name, str(chosen)):
                        yield f"{file}: {renamed}"
                    elif name == "precision":
                        yield f"{file} overrides /precision, which is for the command line; an experiment overrides "
                        yield "/precision/recipe and /precision/rules"


def _renamed_in_yaml(lines: Sequence[str]) -> Iterator[str]:
    """The present names of what hydra does not find in a YAML file, which the check of overrides does not see."""
    for line in lines:
        if key := re.match(r"full_key: (\S+)", line):
            yield renaming_message(renamed_keys({}, key[1]))
