"""Frozen dataclasses as omegaconf's schema, and a composed tree back as frozen dataclasses.

omegaconf takes a frozen dataclass for a read-only node and then cannot compose into it. So the schema is a twin of each
class: the same fields and types, not frozen, without checks. `build` makes the real objects, whose `__post_init__`
checks values.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_fp4.train.config import RunConfig

T = TypeVar("T")


@cache
def twin(cls: type) -> type:
    """The schema of the dataclass `cls`."""
    hints = get_type_hints(cls)
    fields = [(f.name, _twin_type(hints[f.name]), _twin_default(f)) for f in dataclasses.fields(cls)]
    return dataclasses.make_dataclass(cls.__name__, fields)


def _twin_type(hint: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return twin(hint)
    arguments = tuple(_twin_type(argument) for argument in get_args(hint))
    if not arguments:
        return hint
    if isinstance(hint, types.UnionType):
        return Union[arguments]  # noqa: UP007  (omegaconf knows this spelling only)
    return get_origin(hint)[arguments]


def _twin_default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return dataclasses.field(default=field.default)
    factory = field.default_factory
    assert factory is not dataclasses.MISSING, f"{field.name} needs a default"
    return dataclasses.field(default_factory=lambda: _to_twin(factory()))


def _to_twin(value: Any) -> Any:
    """A value with every dataclass in it replaced by its twin."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _to_twin(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return twin(type(value))(**parts)
    if isinstance(value, list):
        return [_to_twin(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_twin(item) for key, item in value.items()}
    return value


def field_names(hint: Any) -> list[str]:
    """The fields of a dataclass; none of any other type."""
    return [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []


def inner_hint(hint: Any, part: str) -> Any:
    """The type of `part` of a value of type `hint`, an element where `hint` is a list; None where there is no such."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return get_type_hints(hint).get(part)
    return get_args(hint)[-1] if get_origin(hint) in (list, dict) else None


def hint_at(key: str) -> Any:
    """The type of a setting or section of a run by its key, such as "optim.lr"; None where there is no such."""
    hint: Any = RunConfig
    for part in key.split(".") if key else []:
        hint = inner_hint(hint, part)
    return hint


def build(cls: type[T], tree: Mapping[str, Any], key: str = "") -> T:
    """The dataclass `cls` from nested dictionaries and lists. key: of the whole, for messages.

    Raises ValueError for a name that no field has, and what the classes' own checks raise.
    """
    hints = get_type_hints(cls)
    names = field_names(cls)
    for name in tree:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(names)}"
            raise ValueError(f"unknown key {join(key, name)!r}; {meant}")
    return cls(**{name: _build_value(hints[name], value, join(key, name)) for name, value in tree.items()})


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _build_value(hint: Any, value: Any, key: str) -> Any:
    if value is None:
        return None
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _build_value(next(argument for argument in arguments if argument is not type(None)), value, key)
    if origin is list:
        return [_build_value(arguments[0], item, f"{key}[{number}]") for number, item in enumerate(value)]
    if origin is dict:
        return {name: _build_named(arguments[1], item, join(key, name)) for name, item in value.items()}
    if origin is tuple:
        return tuple(value)
    return value


def _build_named(hint: Any, value: Any, key: str) -> Any:
    """An entry of a dictionary, whose own checks do not know by which name it is there."""
    try:
        return _build_value(hint, value, key)
    except ValueError as error:
        raise ValueError(str(error) if key in str(error) else f"{key}: {error}") from None
