"""What changed between the checkpoint's settings and this run's, and whether that may be.

One idea: settings are two nested dicts of plain values; rules, by glob over dotted keys, say what a difference means.
The result is a table "checkpoint / config / used" for the log, and a refusal where a rule says so. Pure functions:
the caller reads the settings and logs the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

ABSENT = "(absent)"
MAX_CELL = 44


class Policy(Enum):
    """What a difference leads to."""

    refuse = "refuse"  # never resumed: the tensors would not fit, or would mean something else
    ask = "ask"  # refused unless the key is allowed by name
    note = "note"  # the config's value is used, and the table says so
    ignore = "ignore"  # not even mentioned (paths, logging)


@dataclass(frozen=True)
class Rule:
    """keys: a glob over dotted keys ("model.*"). reason: ends the line in the table."""

    keys: str
    policy: Policy
    reason: str


DEFAULT_RULES = (
    Rule("logging.*", Policy.ignore, ""),
    Rule("checkpoint.*", Policy.ignore, ""),
    Rule("model.*", Policy.refuse, "architecture: the tensors would not fit"),
    Rule("data.*", Policy.ask, "data: the sample order would not go on"),
    Rule("*seed", Policy.ask, "randomness would not go on"),
    Rule("precision.*", Policy.note, "precision may change: tensors are stored without it"),
    Rule("parallel.*", Policy.note, "layout may change: tensors are stored without it"),
    Rule("*", Policy.note, "the config's value is used from here on"),
)


@dataclass(frozen=True)
class Difference:
    """One setting that differs. used: the value that this run takes, "refused" if none."""

    key: str
    saved: Any
    configured: Any
    policy: Policy
    refused: bool
    reason: str

    @property
    def used(self) -> Any:
        return "refused" if self.refused else self.configured


def differences(
    saved: Mapping[str, Any],
    configured: Mapping[str, Any],
    rules: Sequence[Rule] = DEFAULT_RULES,
    allow: Sequence[str] = (),
) -> list[Difference]:
    """Every setting that differs, by key. The first rule whose glob fits decides; no rule: `note`.

    allow: globs of keys whose `ask` is answered. A setting that one side does not have at all (another version of the
    program) is asked about where it would be refused, because only a person can know that its default changes nothing.
    """
    left, right = dict(_leaves(saved)), dict(_leaves(configured))
    found = []
    for key in sorted(left.keys() | right.keys()):
        old, new = left.get(key, ABSENT), right.get(key, ABSENT)
        if type(old) is type(new) is float and old != old and new != new:
            continue
        if old == new and (isinstance(old, bool) == isinstance(new, bool)):
            continue
        rule = next((one for one in rules if fnmatchcase(key, one.keys)), Rule("*", Policy.note, ""))
        policy = rule.policy
        if policy is Policy.ignore:
            continue
        if policy is Policy.refuse and ABSENT in (old, new):
            policy = Policy.ask
        allowed = any(fnmatchcase(key, glob) for glob in allow)
        refused = policy is Policy.refuse or (policy is Policy.ask and not allowed)
        found.append(Difference(key, old, new, policy, refused, rule.reason))
    return found


def check(found: Sequence[Difference], remedy: str) -> None:
    """Raise ValueError with the table of what is refused, if anything is.

    remedy: how the user allows a key here, e.g. "train.resume_allow=[data.*]".
    """
    refused = [one for one in found if one.refused]
    if not refused:
        return
    lines = [f"resume refused, {len(refused)} settings differ from the checkpoint's:", table(refused)]
    if any(one.policy is Policy.refuse for one in refused):
        lines.append("settings marked 'refuse' must be as in the checkpoint; or start a new run")
    if any(one.policy is Policy.ask for one in refused):
        lines.append(f"settings marked 'ask' can be allowed with {remedy}")
    raise ValueError("\n".join(lines))


def table(found: Sequence[Difference]) -> str:
    """Text with the columns setting, checkpoint, config, used, and why."""
    header = ("setting", "checkpoint", "config", "used", "")
    rows = [
        (one.key, *map(_cell, (one.saved, one.configured, one.used)), f"{one.policy.value}: {one.reason}")
        for one in found
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[4]]) for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; a list is one value (its order means something); tuples are as lists, as JSON has none."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."
