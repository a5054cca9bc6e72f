"""The value of an override means what its setting can be: text stays text, `1e3` is an integer, `off` is a choice.

Hydra reads `train.run_dir=20251129_01` as a number and `1e3` as 1000.0, and text is made of the number: two runs share
a directory. So `as_meant` puts quotes around such a value of an override, also inside lists and dictionaries. Where the
schema says integer it writes `1e3` as 1000, and where it says a choice with and without, `true` and `off` as the names
of these. A YAML file is not rewritten: `ambiguous_text` objects to the line.

Not here: keys that do not exist (mistakes.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from antlr4 import CommonTokenStream, InputStream
from antlr4.error.ErrorListener import ErrorListener
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf._utils import get_yaml_loader

from megatron_fp4.cli.schema import hint_at, inner_hint

CONVERTED = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
MAX_DIGITS = 30
"""More digits than any setting has; `1e999999999` must not be written out."""
PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)
OFF, ON = ("off", "never", "disabled", "none"), ("always", "auto")
"""Members of an enum that mean without and with; `false`, `no`, `off` and `true`, `yes`, `on` stand for them."""
SWITCHES = {**dict.fromkeys(("false", "no", "off"), OFF), **dict.fromkeys(("true", "yes", "on"), ON)}


class _Errors(ErrorListener):
    """Counts what lexer and parser cannot read."""

    def __init__(self) -> None:
        self.count = 0

    def syntaxError(self, *_: Any) -> None:
        self.count += 1


class Groups(Protocol):
    """The keys whose values are names of options, or paths of files."""

    def __contains__(self, key: object) -> bool: ...

    def option(self, group: str, value: str) -> str:
        """The option that a value of a group names."""
        ...


def as_meant(override: str, groups: Groups | None = None, *, sweep: bool = False) -> str:
    """The override with every value in it that hydra would read as another type written as its setting's type.

    sweep: a comma separates the values of several runs, for text too. What `groups.option` raises is raised.
    An override that cannot be parsed comes back as it is.
    """
    parser, errors = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(override)))), _Errors()
    for listened in (parser, parser.getTokenStream().tokenSource):
        listened.removeErrorListeners()
        listened.addErrorListener(errors)
    tree = parser.override()
    if errors.count or tree.value() is None:
        return override
    key = tree.key().getText()
    hint = partial(groups.option, key) if groups and key in groups else hint_at(key)
    changes = list(_changes(tree.value(), hint, sweep=sweep))
    for first, last, text in reversed(changes):
        changed = text or f"'{override[first : last + 1]}'"
        override = f"{override[:first]}{changed}{override[last + 1 :]}"
    return override


def _changes(value: Any, hint: Any, *, sweep: bool = False) -> Iterator[tuple[int, int, str]]:
    """First and last character of what changes below a node of the parser's tree, and the new text; "": in quotes."""
    if isinstance(value, OverrideParser.ValueContext):
        several = value.simpleChoiceSweep()
        if several is None:
            yield from _changes(value.element(), hint)
        elif sweep:
            for element in several.element():
                yield from _changes(element, hint)
        elif hint is str and all(_is_word(element) for element in several.element()):
            yield several.start.start, several.stop.stop, ""  # `stage_split=9,8,7`: hydra takes it for three runs
    elif (primitive := value.primitive()) is not None:
        word = primitive.start.type if len(primitive.children) == 1 else OverrideLexer.UNQUOTED_CHAR
        if (text := _as(hint, word, primitive.getText())) is not None:
            yield primitive.start.start, primitive.stop.stop, text
    elif (listed := value.listContainer()) is not None:
        for element in listed.element():
            yield from _changes(element, inner_hint(hint, ""))
    elif (entries := value.dictContainer()) is not None:
        for entry in entries.dictKeyValuePair():
            yield from _changes(entry.element(), inner_hint(hint, entry.dictKey().getText()))


def _as(hint: Any, token: int, text: str) -> str | None:
    """What a word, or words, are written as where the schema says `hint`; "": the same in quotes, None: no change.

    hint: of the name of an option: what makes it of its path.
    """
    if isinstance(hint, partial) and token not in (OverrideLexer.NULL, OverrideLexer.INTERPOLATION):
        option = hint(text.strip("'\""))
        return (
            "" if token in CONVERTED else None if option in text else QuotedString(option, Quote.single).with_quotes()
        )
    if hint is str:
        return "" if token in CONVERTED else None
    if hint is int and token == OverrideLexer.FLOAT and (number := Decimal(text.replace("_", ""))).is_finite():
        return str(int(number)) if number.adjusted() < MAX_DIGITS and number == int(number) else None
    if isinstance(hint, type) and issubclass(hint, Enum) and text not in hint.__members__:
        off, on = (next((name for name in names if name in hint.__members__), None) for names in (OFF, ON))
        if off and on and (names := SWITCHES.get(text.lower())):
            return off if names is OFF else on
    return None


def _is_word(element: Any) -> bool:
    primitive = element.primitive()
    return primitive is not None and primitive.QUOTED_VALUE() is None


def ambiguous_text(path: Path, group: str = "") -> str:
    """What is said of the first value that is text to the schema and not to YAML; "" for none, or for no valid YAML."""
    return _ambiguous_text(path, path.stat().st_mtime_ns, group)


@cache
def _ambiguous_text(path: Path, _changed_ns: int, group: str) -> str:
    source = path.read_text()
    header = PACKAGE.search(source)
    package = header[1] if header else group.replace("/", ".")
    loader = get_yaml_loader()(source)
    try:
        tree = loader.get_single_node()
        for line, raw, value in _converted(tree, hint_at("" if package == "_global_" else package), loader):
            return f"{path}, line {line}: {raw} is text here, but YAML reads it as {value!r}; write '{raw}' in quotes"
    except yaml.YAMLError:
        return ""  # hydra says where
    finally:
        loader.dispose()
    return ""


def _converted(node: Any, hint: Any, loader: Any) -> Iterator[tuple[int, str, Any]]:
    """(line, characters, value) of the scalars below `node` that the schema calls text and that lose characters."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _converted(value, inner_hint(hint, str(key.value)), loader)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _converted(item, inner_hint(hint, ""), loader)
    elif isinstance(node, yaml.ScalarNode) and hint is str and node.style is None:
        value = loader.construct_object(node)
        if value is not None and str(value) != node.value:
            yield node.start_mark.line + 1, node.value, value
