"""What is said of a configuration that hydra did not compose: the override or the line, and what to type instead.

Hydra decides, and this is asked afterwards. Its own messages know neither which key or option is near, nor the name
that a setting has today (train/renamed.py) or has elsewhere (foreign.py), nor how a value is quoted.
"""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from megatron_fp4.cli.overrides.foreign import counterpart
from megatron_fp4.cli.overrides.text import PACKAGE
from megatron_fp4.cli.schema import field_names, hint_at, inner_hint, join
from megatron_fp4.train.renamed import renamed_keys, renamed_option, renaming_message


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is for the user."""


ENDLESS = "an anchor (&name) holds itself (*name), which has no end; write out what is meant"


class Options(Protocol):
    """Groups and their options (places.py)."""

    def __contains__(self, key: object) -> bool: ...
    def options(self, group: str) -> list[str]: ...
    def groups(self) -> list[str]: ...
    def files(self, option: str) -> list[Path]: ...


def explain(error: Exception, overrides: Sequence[str], options: Options) -> str:
    """One sentence about `error`, which hydra raised."""
    if isinstance(error, YAMLError):
        return yaml_mistake(error)
    text = _with_paths(short(error), options)
    sentences = itertools.chain(
        _of_overrides(overrides, options), _of_files(overrides, options), _of_keys(text, options)
    )
    return next((sentence for sentence in sentences if sentence), text)


def unknown_key(key: str, groups: Sequence[str]) -> str:
    """What is said of a key that the schema does not have; "" for one that it has."""
    seen, hint = "", hint_at("")
    for part in key.split("."):
        names = field_names(hint)
        if names and part not in names:
            wrong, siblings = join(seen, part), [join(seen, name) for name in names]
            everything = siblings + _all_keys(hint_at("")) + ([] if seen else list(groups))
            elsewhere = counterpart(key)
            return (
                f"unknown key '{key}'{f'; {elsewhere}' if elsewhere else nearest(wrong if seen else key, everything)}"
            )
        seen, hint = join(seen, part), inner_hint(hint, part)
    return ""


def same_named(option: str) -> str:
    """What is said of an option, such as `--weight-decay`, that has the name of a setting; "" for another one."""
    name = option.lstrip("-").replace("-", "_")
    keys = [key for key in _all_keys(hint_at("")) if name in (key, key.rpartition(".")[2])]
    return f"a setting has no dashes: {' or '.join(f'{key}=VALUE' for key in keys)}" if keys else ""


def nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def yaml_mistake(error: YAMLError) -> str:
    """File, line and what is wrong there."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        context = f" {error.context}" if error.context else ""
        return f'"{mark.name}", line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}'
    return short(error)


def short(error: BaseException) -> str:
    """The lines of a hydra or omegaconf error, and of what caused it, that help a user."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RecursionError):
            return ENDLESS
        if isinstance(cause, GrammarParseError):
            return f"{str(cause).splitlines()[0]}; an interpolation looks like ${{optim.lr}} or ${{oc.env:NAME}}"
        lines += [line.strip() for line in str(cause).splitlines()]
        cause = cause.__cause__
    noise = ("object_type", "reference_type", "To append", "Set the", "See https://hydra.cc")
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))


def _of_overrides(overrides: Sequence[str], options: Options) -> Iterator[str]:
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            yield _unparsed(text, error, options)
            continue
        yield _of_override(override, options)


def _of_override(override: Override, options: Options) -> str:
    """What is wrong with an override by itself; "" if nothing is known to be."""
    key, value = override.key_or_group, override.value()
    if renamed := renamed_option(key, str(value)) or renaming_message(renamed_keys(value, key)):
        return renamed
    if override.is_sweep_override():
        return (
            f"{override.input_line}: a setting has one value; pretrain --multirun runs each of several, [A,B] is a list"
            f" and {_typed(key, 'A,B')} is text"
        )
    if key in options:
        known = options.options(key)
        missing = value is not None and not override.is_delete() and str(value) not in known
        if missing and not options.files(f"{key}/{value}") and not isinstance(value, list):
            return _no_option(key, str(value), options)
        return ""
    if isinstance(value, str) and value in options.options(key.replace(".", "/")):
        return f"{key}={value}: the options of a group are chosen by {key.replace('.', '/')}={value}"
    return "" if key.partition(".")[0] == "hydra" else unknown_key(key, options.groups())


def _no_option(group: str, option: str, options: Options) -> str:
    known = options.options(group)
    return f"{group}={option} does not exist{nearest(option, known)}; {group}: {', '.join(known)}"


def _unparsed(text: str, error: HydraException, options: Options) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        known = [*_all_keys(hint_at("")), *options.groups()]
        elsewhere = counterpart(text)
        what = f"; {elsewhere}" if elsewhere else f"; type {text}=VALUE" if text in known else nearest(text, known)
        return f"{text!r} is no override, which looks like model.num_layers=4{what}"
    if value.startswith("~/"):
        return f'{text}: a shell expands ~ only at the beginning of a word; type "{key}=$HOME{value[1:]}"'
    typed = _typed(key, value)
    try:
        OverridesParser.create().parse_override(shlex.split(typed)[0])
    except HydraException:
        return f"{short(error)}; an override looks like model.num_layers=4"
    return f"{text}: a value with characters that mean something to hydra is quoted; type {typed}"


def _typed(key: str, value: str) -> str:
    """key='value' as it is typed into a shell."""
    quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return shlex.quote(quoted) if re.search(r'[$`"\\!]', quoted) else f'"{quoted}"'


def _of_files(overrides: Sequence[str], options: Options) -> Iterator[str]:
    """What is wrong in the files of the options that are asked for; more is known of an experiment."""
    for override in overrides:
        group, _, option = override.lstrip("+").partition("=")
        for file in options.files(f"{group}/{option.strip(chr(39))}") if group in options else ():
            try:
                header, tree = PACKAGE.search(file.read_text()), OmegaConf.load(file)
            except (OSError, ValueError, OmegaConfBaseException, RecursionError) as error:
                yield f"{file}: {short(error)}"
                continue
            if group != "experiment":
                continue
            yield "".join(_renamed_in(file, tree))
            if header is None or header[1] != "_global_":
                yield f"{file}: an experiment begins with `# @package _global_`, so that it may set everything"
            if not isinstance(tree, DictConfig):
                yield f"{file}: sections and settings are expected, as `optim: {{lr: 1.0e-3}}`"


def _renamed_in(file: Path, tree: Any) -> Iterator[str]:
    """The present names of options in the defaults list of an experiment."""
    for entry in OmegaConf.select(tree, "defaults") or () if isinstance(tree, DictConfig) else ():
        for key, chosen in entry.items() if isinstance(entry, DictConfig) else ():
            name = str(key).removeprefix("override").strip(" /")
            if renamed := renamed_option(name, str(chosen)):
                yield f"{file}: {renamed}"
            elif name == "precision":
                yield f"{file} overrides /precision, which is for the command line; an experiment overrides "
                yield "/precision/recipe and /precision/rules"


def _of_keys(text: str, options: Options) -> Iterator[str]:
    """What is known of the key or option that hydra names, which may stand in a YAML file."""
    if missing := re.search(r"Could not find '(\w[\w/]*)/([^']*)'", text):
        yield _no_option(missing[1], missing[2], options) if missing[1] in options else ""
    if match := re.search(r"full_key: ([\w.\[\]]+)", text):
        key = re.sub(r"\[\d+\]", "", match[1])
        more = renaming_message(renamed_keys({}, key)) or unknown_key(key, options.groups()) or _remedy(text, key)
        yield f"{text}; {more}" if more else ""


def _remedy(text: str, key: str) -> str:
    """What is written instead of a value of another type."""
    if number := re.search(r"Value '(\d+)\.0' of type 'float' could not be converted to Integer", text):
        return f"write {number[1]}"
    if re.search(r"Invalid value '(True|False)', expected one of", text):
        return "YAML reads off and no as False, on and yes as True; write one of the names"
    return ""


def _with_paths(text: str, options: Options) -> str:
    """The text with `experiment/../../mine`, by which hydra calls the file of a path, written as that path."""
    return re.sub(r"(?<=')\w+[\w/]*/\.\./[^']*", lambda name: str(next(iter(options.files(name[0])), name[0])), text)


def _all_keys(hint: Any, prefix: str = "") -> list[str]:
    """Dotted keys of everything below a section of the type `hint`, without what lists and dictionaries hold."""
    keys = []
    for name in field_names(hint):
        key = join(prefix, name)
        keys += [key, *_all_keys(inner_hint(hint, name), key)]
    return keys


REFUSED = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError, RecursionError)
"""What hydra raises for a configuration; ValueError for a defaults list that is none, or a file that is no text;
RecursionError for an anchor that holds itself."""
