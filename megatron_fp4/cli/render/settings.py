"""What is known about settings, as text: one of them, a section as a table, all of them as docs/settings.md."""

from __future__ import annotations

import itertools
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin

from megatron_fp4.settings import Section, Setting
from megatron_fp4.train.resume.differences import Policy, ResumeRule

UNITS = {name: name for name in ("tokens", "steps", "samples", "seconds", "batches", "epochs", "skips", "rollbacks")}
UNITS |= {"mib": "MiB", "batch": "sequences", "length": "tokens", "failures": "saves"}
"""Last word of a setting's name -> unit; other numbers have none, or their sentence says it."""

ON_RESUME = {
    Policy.refuse: "must stay",
    Policy.ask: "if train.resume_allow names it",
    Policy.future: "may change for what is to come, logged",
    Policy.note: "may change, logged",
    Policy.ignore: "may change",
}

HEAD = """# Every setting

What a run can be told: `megatron-fp4 pretrain KEY=VALUE`, a YAML under `configs/`, or a field of `RunConfig`. This page
is what `megatron-fp4 explain --markdown` prints, from the sentences under the fields; `megatron-fp4 explain KEY` says
more about one of them. `[]` stands for each element of a list, `NAME` for any name. Defaults are those of the
dataclasses, and of `configs/` without an override where those differ. On resume: whether the value may differ from the
checkpoint's.
"""

FOOT = """---
Next: [where a setting's room is](architecture.md) · [recipes and rules](precision.md) · [layouts](parallelism.md)
· [all pages](README.md)"""


@dataclass(frozen=True)
class Explained:
    """A setting with what the program knows about it. configured: what configs/ sets without an override; None where
    that is the default. rule: what a difference from the checkpoint's value means. file: where it stands. refusals:
    functions whose errors name it.
    """

    key: str
    setting: Setting
    configured: Any
    rule: ResumeRule
    file: str
    refusals: Sequence[str]


def one(explained: Explained) -> str:
    """All about a setting."""
    setting, rule = explained.setting, explained.rule
    unit = UNITS.get(setting.name.rpartition("_")[2], "") if setting.type in (int, float) else ""
    checked = f", checked when {setting.owner.__name__} is made" if setting.bound else ""
    rows = {
        "type": [] if setting.choices else [type_text(setting.type) + (f", in {unit}" if unit else "")],
        "one of": [f"{name:<12} {comment}".rstrip() for name, comment in setting.choices.items()],
        "default": [_default(explained)],
        "bounds": [f"{setting.bound or 'none'}{checked}"] if setting.type in (int, float) else [],
        "on resume": [ON_RESUME[rule.policy] + (f" ({rule.reason})" if rule.reason else "")],
        "stands in": [f"{explained.file}:{setting.line} ({setting.owner.__name__})"],
        "errors in": explained.refusals,
    }
    lines = [f"  {label if line is texts[0] else '':<10}  {line}" for label, texts in rows.items() for line in texts]
    return "\n".join([explained.key, *_wrapped("  ", setting.sentence, 100), *lines])


def table(section: Section, settings: Iterable[Explained]) -> str:
    """A section, one row a setting."""
    rows = [(each.setting.name, _default(each), _allowed(each.setting), each.setting.sentence) for each in settings]
    limits = (30, 22, 28, 64)
    cells = [[textwrap.wrap(cell, limit) for cell, limit in zip(row, limits, strict=True)] for row in rows]
    widths = [max(len(line) for row in cells for line in [*row[column], ""]) for column in range(3)]
    lines = [
        "  " + "  ".join([*(cell.ljust(n) for cell, n in zip(line, widths, strict=False)), line[3]]).rstrip()
        for row in cells
        for line in itertools.zip_longest(*row, fillvalue="")
    ]
    return "\n".join([*_wrapped("", f"{section.key}: {section.about}", 120), "", *lines])


def options(group: str, sentences: Mapping[str, str]) -> str:
    """The options of a group of configs/, each with what its file says of itself."""
    width = max(map(len, sentences))
    lines = [
        line
        for option, sentence in sentences.items()
        for line in textwrap.wrap(f"{option:<{width}}  {sentence}", 116, subsequent_indent=" " * (width + 2))
    ]
    return "\n".join([f"{group}=... (configs/{group}/):", *(f"  {line}" for line in lines)])


def also(label: str, keys: Sequence[str]) -> str:
    """Where to ask on."""
    return f"{label}: {', '.join(keys)}"


def contents(sections: Iterable[Section]) -> str:
    """The sections, one a line."""
    lines, first = [], dict[object, str]()
    for section in sections:
        key = first.setdefault(section.declared, section.key)
        about = section.about.partition(". ")[0].removesuffix(".") if key == section.key else f"as {key}"
        lines.append(f"{section.key:<32} {about}")
    return "\n".join(lines)


def markdown(parts: Sequence[tuple[Section, Sequence[Explained]]]) -> str:
    """All settings. Sections of one kind at several places have one table, under the first of them."""
    text, places = [HEAD], dict[object, list[str]]()
    for section, _ in parts:
        places.setdefault(section.declared, []).append(section.key)
    for section, settings in parts:
        first, *others = places[section.declared]
        if section.key == first:
            also = f" The same for {', '.join(f'`{key}`' for key in others)}." if others else ""
            text += [f"## `{section.key}`\n", f"{section.about}{also}\n"]
            text += ["| setting | allowed | default | on resume | meaning |", "|---|---|---|---|---|"]
            text += [_row(each) for each in settings] + [""]
    return "\n".join([*text, FOOT])


def _row(explained: Explained) -> str:
    setting = explained.setting
    cells = (_allowed(setting), _default(explained), ON_RESUME[explained.rule.policy], setting.sentence)
    return " | ".join([f"| `{setting.name}`", *(cell.replace("|", r"\|").replace("*", r"\*") for cell in cells)]) + " |"


def type_text(hint: Any) -> str:
    """A type as YAML writes its values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {type_text(arguments[1])}"
    if origin is tuple:
        return f"[{', '.join(type_text(argument) for argument in arguments if argument is not ...)}]"
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    names = {str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, "sections" if is_dataclass(hint) else hint.__name__)


def value_text(value: Any) -> str:
    """A value, short; of a list of sections only how many there are."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return f"{{{', '.join(value)}}}"
    if isinstance(value, list | tuple) and value and is_dataclass(value[0]):
        return f"{len(value)} section{'s' if len(value) > 1 else ''}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value) or '""'


def _allowed(setting: Setting) -> str:
    return ", ".join(setting.choices) or type_text(setting.type) + (f", {setting.bound}" if setting.bound else "")


def _default(explained: Explained) -> str:
    default = value_text(explained.setting.default)
    configured = default if explained.configured is None else value_text(explained.configured)
    return default if configured == default else f"{default}; in configs/ {configured}"


def _wrapped(indent: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
