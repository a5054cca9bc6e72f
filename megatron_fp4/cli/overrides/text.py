"""Text stays text: where the schema says string, the characters count that stand in the override or the YAML file.

Hydra reads `train.run_dir=20251129_01` as a number and `1e3` as 1000.0, and text is made of the number: two runs share
a directory. So `quote_text` puts quotes around such a value of an override, also inside lists and dictionaries. A YAML
file is not rewritten: `ambiguous_text` objects to the line.

Not here: keys that do not exist (compose.py).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf._utils import get_yaml_loader

from megatron_fp4.cli.schema import hint_at, inner_hint

CONVERTED = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


def quote_text(override: str, groups: Container[str] = ()) -> str:
    """The override with quotes around every value that is text to the schema and something else to hydra.

    groups: keys whose values are names of options. An override that cannot be parsed comes back as it is.
    """
    parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(override))))
    for listened in (parser, parser.getTokenStream().tokenSource):
        listened.removeErrorListeners()
    tree = parser.override()
    if parser.getNumberOfSyntaxErrors() or tree.value() is None:
        return override
    key = tree.key().getText()
    spans = list(_text_spans(tree.value(), str if key in groups else hint_at(key)))
    for first, last in reversed(spans):
        override = f"{override[:first]}'{override[first : last + 1]}'{override[last + 1 :]}"
    return override


def _text_spans(value: Any, hint: Any) -> Iterator[tuple[int, int]]:
    """First and last character of what is to be quoted below a node of the parser's tree."""
    if isinstance(value, OverrideParser.ValueContext):
        sweep = value.simpleChoiceSweep()
        if sweep is None:
            yield from _text_spans(value.element(), hint)
        elif hint is str and all(_is_word(element) for element in sweep.element()):
            yield sweep.start.start, sweep.stop.stop  # `stage_split=9,8,7`: hydra takes it for three runs
    elif (primitive := value.primitive()) is not None:
        if hint is str and len(primitive.children) == 1 and primitive.start.type in CONVERTED:
            yield primitive.start.start, primitive.stop.stop
    elif (listed := value.listContainer()) is not None:
        for element in listed.element():
            yield from _text_spans(element, inner_hint(hint, ""))
    elif (entries := value.dictContainer()) is not None:
        for entry in entries.dictKeyValuePair():
            yield from _text_spans(entry.element(), inner_hint(hint, entry.dictKey().getText()))


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
