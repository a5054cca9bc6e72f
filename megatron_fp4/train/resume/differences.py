"""What changed between the checkpoint's settings and this run's, and whether that may be.

Settings are two nested dictionaries of JSON values; rules, by glob over dotted keys, say what a difference means. The
architecture must be the same; data and seeds only change when named in `train.resume_allow`; the rest takes effect and
stands in a table. Pure functions: the caller reads the settings and logs the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from megatron_fp4.settings import to_json_values
from megatron_fp4.train.renamed import current_name

ABSENT = "(absent)"
MAX_CELL = 44


class Policy(Enum):
    """What a difference leads to."""

    refuse = "refuse"  # never resumed: the tensors would not fit, or would mean something else
    ask = "ask"  # refused unless the key is allowed by name
    note = "note"  # the config's value is used, and the table says so
    ignore = "ignore"  # not even mentioned (paths, logging)


@dataclass(frozen=True)
class ResumeRule:
    """keys: a glob over dotted keys ("model.*"). reason: ends the line in the table."""

    keys: str
    policy: Policy
    reason: str = ""


RULES = (
    ResumeRule("train.run_dir", Policy.ignore),
    ResumeRule("train.resume*", Policy.ignore),
    ResumeRule("train.*interval_steps", Policy.ignore),
    ResumeRule("train.check_gemms", Policy.ignore),
    ResumeRule("train.stop_after_steps", Policy.ignore),
    ResumeRule("train.exit_after_seconds", Policy.ignore),
    ResumeRule("train.hang_timeout_seconds", Policy.ignore),
    ResumeRule("data.prefetch_batches", Policy.ignore),
    ResumeRule("data.index_cache", Policy.ignore),
    ResumeRule("logging.*", Policy.ignore),
    ResumeRule("checkpoint.*", Policy.ignore),
    ResumeRule("model.*_impl", Policy.note, "who computes it: the same tensors, other last bits"),
    ResumeRule("model.mamba_kernel", Policy.note, "who computes it: the same tensors, other last bits"),
    ResumeRule("model.*", Policy.refuse, "architecture: the tensors would not fit"),
    ResumeRule("data.tokenizer", Policy.note, "where it lies; its content is checked against the shards"),
    ResumeRule("data.sources*.paths*", Policy.note, "where the shards lie; their content is checked"),
    ResumeRule("data.evaluation*", Policy.note, "other held-out sets: curves are not comparable"),
    ResumeRule("data.*", Policy.ask, "data: the sample order would not go on"),
    ResumeRule("*seed", Policy.ask, "randomness would not go on"),
    ResumeRule("precision.*", Policy.note, "precision may change: tensors are stored without it"),
    ResumeRule("parallel.*", Policy.note, "layout may change: tensors are stored without it"),
    ResumeRule("*", Policy.note, "the config's value is used from here on"),
)
"""The first whose glob fits decides."""


@dataclass(frozen=True)
class SettingDifference:
    """One setting that differs."""

    key: str
    saved: Any
    configured: Any
    policy: Policy
    refused: bool
    reason: str

    @property
    def used(self) -> Any:
        """The value that this run takes, "refused" if none."""
        return "refused" if self.refused else self.configured


def changes_on_resume(saved: Mapping[str, Any], configured: Mapping[str, Any], allow: Sequence[str]) -> str:
    """The table of settings that changed since the checkpoint, "" if none. Raises ValueError for what may not change.

    allow: `train.resume_allow`.
    """
    changes = compare_settings(saved, configured, allow=allow)
    refuse_forbidden(changes, 'train.resume_allow=["data.*"] (globs of settings)')
    return as_table(changes) if changes else ""


def compare_settings(
    saved: Mapping[str, Any],
    configured: Mapping[str, Any],
    rules: Sequence[ResumeRule] = RULES,
    allow: Sequence[str] = (),
) -> list[SettingDifference]:
    """Every setting that differs, by key.

    allow: globs of keys whose `ask` is answered. A setting that one side does not have at all (another version of the
    program) is asked about where it would be refused, because only a person can know that its default changes nothing.
    Saved settings that were renamed since are compared under their present name.
    """
    left, right = {current_name(key): value for key, value in _leaves(saved)}, dict(_leaves(configured))
    differences = []
    for key in sorted(left.keys() | right.keys()):
        old, new = left.get(key, ABSENT), right.get(key, ABSENT)
        if type(old) is type(new) is float and old != old and new != new:
            continue
        if old == new and (isinstance(old, bool) == isinstance(new, bool)):
            continue
        rule = rule_of(key, rules)
        policy = rule.policy
        if policy is Policy.ignore:
            continue
        if policy is Policy.refuse and ABSENT in (old, new):
            policy = Policy.ask
        allowed = any(fnmatchcase(key, glob) for glob in allow)
        refused = policy is Policy.refuse or (policy is Policy.ask and not allowed)
        differences.append(SettingDifference(key, old, new, policy, refused, rule.reason))
    return differences


def rule_of(key: str, rules: Sequence[ResumeRule] = RULES) -> ResumeRule:
    """What happens when the setting `key` differs: the first rule that fits, else `note`."""
    return next((rule for rule in rules if fnmatchcase(key, rule.keys)), ResumeRule("*", Policy.note))


def refuse_forbidden(differences: Sequence[SettingDifference], remedy: str) -> None:
    """Raise ValueError with the table of what is refused, if anything is.

    remedy: how the user allows a key here, e.g. "train.resume_allow=[data.*]".
    """
    refused = [one for one in differences if one.refused]
    if not refused:
        return
    lines = [f"resume refused, {len(refused)} settings differ from the checkpoint's:", as_table(refused)]
    if any(one.policy is Policy.refuse for one in refused):
        lines.append("settings marked 'refuse' must be as in the checkpoint; or start a new run")
    if any(one.policy is Policy.ask for one in refused):
        lines.append(f"settings marked 'ask' can be allowed with {remedy}")
    raise ValueError("\n".join(lines))


def as_table(differences: Sequence[SettingDifference]) -> str:
    """Text with the columns setting, checkpoint, config, used, and why."""
    header = ("setting", "checkpoint", "config", "used", "")
    rows = [
        (one.key, *map(_cell, (one.saved, one.configured, one.used)), f"{one.policy.value}: {one.reason}")
        for one in differences
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
            yield f"{prefix}{name}", to_json_values(value)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."
