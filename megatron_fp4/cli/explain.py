"""`megatron-fp4 explain [KEY | SECTION | --markdown | --names]`: what a setting means, and what it may be.

    megatron-fp4 explain                      the sections
    megatron-fp4 explain optim                a section as a table
    megatron-fp4 explain train.global_batch   meaning, unit, default, bounds, owner, whether a resume may change it
    megatron-fp4 explain precision/recipe     the options of a group of configs/
    megatron-fp4 explain --markdown           docs/settings.md
    megatron-fp4 explain --names              docs/names.md: what Megatron-LM and transformers call a setting

Everything is read from the dataclasses and their source (settings.py), the rules of a resume, and the composed
configuration; nothing is written here a second time.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import megatron_fp4
from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.compose import CONFIG_DIR, compose_config, to_run_config
from megatron_fp4.cli.overrides import foreign
from megatron_fp4.cli.render import settings as render
from megatron_fp4.cli.render.settings import Explained
from megatron_fp4.settings import Section, Setting, sections
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.renamed import current_name, renaming_message
from megatron_fp4.train.resume.differences import rule_of

PACKAGE = Path(megatron_fp4.__file__).parent

EXITS = {0: "done"}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 2 for a key that does not exist."""
    parser = CommandParser("explain", __doc__, EXITS, "train.global_batch")
    parser.add_argument("key", nargs="?", help="a setting or a section; none: the sections")
    parser.add_argument("--markdown", action="store_true", help="print all settings as docs/settings.md has them")
    parser.add_argument("--names", action="store_true", help="print the names that settings have elsewhere")
    args = parser.parse_args(arguments)
    try:
        if args.names:
            print(foreign.page())
        elif args.markdown:
            print(page())
        else:
            print(explain(args.key) if args.key else render.contents(sections(RunConfig)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def page() -> str:
    """docs/settings.md."""
    configured = _configured()
    everything = [
        (section, [_explained(section, setting, configured) for setting in section.settings])
        for section in sections(RunConfig)
    ]
    return render.markdown(everything)


def explain(asked: str) -> str:
    """The text about a setting, a section or a group; a list or mapping of sections is both. Raises ValueError."""
    settings = {
        f"{section.key}.{setting.name}": (section, setting)
        for section in sections(RunConfig)
        for setting in section.settings
    }
    tables = {section.key: section for section in sections(RunConfig)}
    if (options := config_group(asked)) and asked not in tables:
        return render.options(asked, options)
    key = _find(asked, [*settings, *tables])
    texts = [render.one(_explained(*settings[key], _configured(), list(refusals(key))))] if key in settings else []
    for part in (tables[name] for name in (key, f"{key}[]", f"{key}.NAME") if name in tables):
        rows = [_explained(part, setting, _configured()) for setting in part.settings]
        texts.append(render.table(part, rows))
    if inner := [name for name in tables if name.startswith(f"{key}.") and key in tables]:
        texts.append(render.also("inside", inner))
    if options:
        texts.append(render.options(asked, options))
    if groups := [group.name for group in (CONFIG_DIR / asked).glob("*") if group.is_dir()]:
        texts.append(render.also("groups of configs/", [f"{asked}/{group}" for group in sorted(groups)]))
    return "\n\n".join(texts)


def config_group(name: str) -> dict[str, str]:
    """Option -> the first sentence of its YAML file, of a group of configs/; nothing where it is no group."""
    texts = {path.stem: path.read_text() for path in sorted((CONFIG_DIR / name).glob("*.yaml"))}
    comments = {option: re.match(r"(?:# @package.*\n)?((?:#.*\n)*)", text) for option, text in texts.items()}
    sentences = {option: " ".join(re.findall(r"# ?(.*)", head[1])) for option, head in comments.items() if head}
    return {option: re.split(r"(?<=[.;])\s", sentence)[0].rstrip(".;") for option, sentence in sentences.items()}


def refusals(key: str) -> Iterator[str]:
    """The functions that can raise and name `key` in a text, as "models/layout.py:10 check_model_layout"."""
    name = re.compile(rf"(?<![\w.]){re.escape(key)}(?!\w)")
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if name.search(source) else ():
            if isinstance(node, ast.FunctionDef) and any(isinstance(part, ast.Raise) for part in ast.walk(node)):
                texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                texts.discard(ast.get_docstring(node, clean=False))
                if any(name.search(text) for text in texts if isinstance(text, str)):
                    yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}"


@cache
def _configured() -> RunConfig:
    """What configs/ sets without an override."""
    return to_run_config(compose_config([]))


def _explained(section: Section, setting: Setting, configured: RunConfig, refusals: Sequence[str] = ()) -> Explained:
    key = f"{section.key}.{setting.name}"
    compared = key.replace("[]", ".0")  # a resume compares element by element
    source = Path(inspect.getsourcefile(setting.owner) or "").relative_to(PACKAGE.parent)
    return Explained(key, setting, _value(configured, key), rule_of(compared), str(source), refusals)


def _value(config: RunConfig, key: str) -> Any:
    """What `config` has there; None inside lists and mappings."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _find(asked: str, keys: Sequence[str]) -> str:
    """The key that `asked` means: "data.sources[0].name" and "data.sources.name" are data.sources[].name, any recipe's
    name stands for NAME. Raises ValueError, with the nearest key, for anything else.
    """
    if asked in keys:
        return asked
    if (now := current_name(asked)) != asked:
        raise ValueError(renaming_message({asked: now}))
    wanted = re.sub(r"\[\w*\]|\.\d+(?=\.|$)", "", asked).split(".")
    for key in keys:
        parts = key.replace("[]", "").split(".")
        if len(parts) == len(wanted) and all(part in (name, "NAME") for part, name in zip(parts, wanted, strict=True)):
            return key
    same_name = [key for key in keys if key.rpartition(".")[2] == wanted[-1]][:4]
    near = same_name or difflib.get_close_matches(asked, keys, n=3, cutoff=0.5)
    if elsewhere := foreign.counterpart(asked):
        raise ValueError(f"there is no setting or section {asked!r}; {elsewhere}")
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `megatron-fp4 explain` lists the sections"
    raise ValueError(f"there is no setting or section {asked!r}{hint}")
