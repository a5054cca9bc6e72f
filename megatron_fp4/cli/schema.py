"""Frozen dataclasses as omegaconf's schema, and a composed tree back as frozen dataclasses.

omegaconf takes a frozen dataclass for a read-only node and then cannot compose into it. So the schema is a twin of each
class: the same fields and types, not frozen, without checks. `build` makes the real objects, whose `__post_init__`
checks values.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

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


def build(cls: type[T], tree: Mapping[str, Any]) -> T:
    """The dataclass `cls` from nested dictionaries and lists. Raises what the classes' own checks raise."""
    hints = get_type_hints(cls)
    return cls(**{name: _build_value(hints[name], value) for name, value in tree.items()})


def _build_value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _build_value(next(argument for argument in arguments if argument is not type(None)), value)
    if origin is list:
        return [_build_value(arguments[0], item) for item in value]
    if origin is dict:
        return {key: _build_value(arguments[1], item) for key, item in value.items()}
    if origin is tuple:
        return tuple(value)
    return value
