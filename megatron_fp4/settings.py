"""What a setting may be, and what is written about it: its bound in its annotation, its sentence under it.

    global_batch: Size = 8
    \"\"\"Sequences per optimizer step over all data-parallel ranks; = micro_batch x accumulation x dp.\"\"\"

    clip_norm: Annotated[float, Bound(least=0)] = 1.0
    \"\"\"Largest norm of all gradients together; a larger one is scaled down to it; 0 = off.\"\"\"

The bound is what `check_bounds` refuses by, the sentence is what `megatron-fp4 explain` and a refusal print: neither is
typed a second time. To omegaconf a bounded number is an int or a float (`typing.get_type_hints` drops the rest).

Not here: relations between settings. Those are checked where both are known, first of all in each `__post_init__`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bound:
    """The numbers that a setting may be; NaN and infinity are never among them.

    or_zero: 0 as well (it turns something off). only: one of these.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    or_zero: bool = False
    only: tuple[float, ...] = ()

    def allows(self, value: float) -> bool:
        return (self.or_zero and value == 0) or (
            math.isfinite(value)
            and (not self.only or value in self.only)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """What follows "must be": "in [0, 1)", "at least 1", "positive"."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        if self.only:
            *others, last = (f"{value:g}" for value in self.only)
            text = f"{', '.join(others)} or {last}"
        elif low is not None and high is not None:
            text = f"in {'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"
        elif self.above == 0:
            text = "positive"
        else:
            text = "".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None) or "a number"
        return f"{text}, or 0" if self.or_zero else text


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
STORE = "may name a place in an object store"
Place = Annotated[str, STORE]
"""A path, or a URL of an object store (storage/remote/url.py)."""

Size = Annotated[int, Bound(least=1)]
"""How many of something that must be there."""
Count = Annotated[int, Bound(least=0)]
"""How many of something that may be absent."""


FP32_LEAST, FP32_MOST = 1e-37, 1e3
"""For numbers that meet FP32 tensors. A smaller one may be 0 there: AdamW divides an unused embedding's 0 by it. What
is multiplied by a much larger one overflows, and a weight that has become infinite is saved at the end of the step."""

MAX_SECONDS = 1e9
"""Thirty years; the clocks of Python and of process groups take no number beyond."""


@dataclass(frozen=True)
class Setting:
    """One field of a configuration's dataclass. type: without its bound. sentence: "" if none stands under it."""

    name: str
    type: Any
    default: Any
    bound: Bound | None
    sentence: str
    owner: type
    line: int

    @property
    def choices(self) -> dict[str, str]:
        """The members of an enum, each with the comment on its line; empty for other types."""
        return member_comments(self.type) if isinstance(self.type, type) and issubclass(self.type, Enum) else {}


@dataclass(frozen=True)
class Section:
    """A dataclass at its place in a configuration; its settings, without those of the sections inside it.

    key: such as "optim", "data.sources[]" for each element of a list, "precision.recipes.NAME" for each of a mapping.
    """

    key: str
    cls: type
    settings: tuple[Setting, ...]

    @property
    def declared(self) -> tuple[tuple[type, str], ...]:
        """Where its settings stand: equal for two places of one kind of section."""
        return tuple((setting.owner, setting.name) for setting in self.settings)

    @property
    def about(self) -> str:
        """The first paragraph of the class's docstring."""
        return " ".join(inspect.cleandoc(self.cls.__doc__ or "").split("\n\n")[0].split())


def check_bounds(config: Any, section: str) -> None:
    """Raise ValueError for the first number outside its bound, and for text that is a place beyond this machine.

    section: the key of `config`, as "optim".
    """
    placed = places_of(config.__class__)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (objection := path_objection(text, stores=field.name in placed)):
                shown = "(a URL that is not repeated here)" if URL.match(text) and "@" in text else text
                raise ValueError(f"{section}.{field.name} = {shown}: {objection}")
    for name, bound in bounds_of(config.__class__).items():
        value = getattr(config, name)
        if not bound.allows(value):
            sentence = next(setting.sentence for setting in settings_of(config.__class__) if setting.name == name)
            raise ValueError(f"{section}.{name} = {value}, must be {bound} ({sentence})")


def path_objection(path: str, *, stores: bool = False) -> str:
    """Why `path` cannot be a file or folder of this machine; "" if it can.

    stores: it may lie in an object store as well; whether a URL is one's is for its owner to see.
    """
    if "\0" in path:
        return "no name of a file holds the character NUL"
    if URL.match(path):
        remedy = "mount the store as a file system and give the path, or copy the files (docs/object_stores.md)"
        return "" if stores else f"no store stands behind URLs here; {remedy}"
    return "only a shell expands ~ at the start; give the whole path" if path.startswith("~") else ""


@cache
def places_of(cls: type) -> set[str]:
    """The fields of a dataclass that may name a place in an object store."""
    hints = get_type_hints(cls, include_extras=True)
    return {name for name, hint in hints.items() if STORE in getattr(hint, "__metadata__", ())}


@cache
def bounds_of(cls: type) -> dict[str, Bound]:
    """Field -> bound, for the fields of a dataclass that have one."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        field.name: extra
        for field in dataclasses.fields(cls)
        for extra in getattr(hints[field.name], "__metadata__", ())
        if isinstance(extra, Bound)
    }


@cache
def settings_of(cls: type) -> tuple[Setting, ...]:
    """Every field of a dataclass, in order."""
    hints = get_type_hints(cls)
    written: dict[str, tuple[str, type, int]] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        written |= {name: (sentence, base, line) for name, sentence, line in _fields_in_source(base)}
    return tuple(
        Setting(field.name, hints[field.name], _default(field), bounds_of(cls).get(field.name), *written[field.name])
        for field in dataclasses.fields(cls)
    )


def sections(cls: type, key: str = "") -> Iterator[Section]:
    """The section `cls` and those inside it, depth first; those without a setting of their own are left out."""
    own = tuple(setting for setting in settings_of(cls) if not dataclasses.is_dataclass(setting.type))
    if own:
        yield Section(key, cls, own)
    for setting in settings_of(cls):
        origin, inner = get_origin(setting.type), (setting.type, *get_args(setting.type))[-1]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            suffix = {list: "[]", dict: ".NAME"}.get(origin, "") if origin else ""
            yield from sections(inner, f"{key}.{setting.name}{suffix}".lstrip("."))


def to_json_values(value: Any) -> Any:
    """Settings as checkpoints and loggers store them: dataclasses as dictionaries, enums by name, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(item) for item in value]
    return value.name if isinstance(value, Enum) else value


@cache
def member_comments(enum: type[Enum]) -> dict[str, str]:
    """Member of an enum -> the comment behind it."""
    source = textwrap.dedent(inspect.getsource(enum))
    lines = source.splitlines()
    return {
        node.targets[0].id: lines[node.lineno - 1].partition("  # ")[2]
        for node in _class_body(source)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def _fields_in_source(cls: type) -> Iterator[tuple[str, str, int]]:
    """(field, sentence under it, line) for the annotated names that stand in the class itself."""
    lines, first = inspect.getsourcelines(cls)
    body = _class_body(textwrap.dedent("".join(lines)))
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, _text(below), first + node.lineno - 1


def _class_body(source: str) -> list[ast.stmt]:
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return definition.body


def _text(node: ast.stmt | None) -> str:
    """The string that `node` consists of, on one line; "" for anything else."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
