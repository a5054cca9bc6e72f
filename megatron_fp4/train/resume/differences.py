"""What changed between the checkpoint's settings and this run's, and whether that may be.

Settings are two nested dictionaries of JSON values; rules, by glob over dotted keys, say what a difference means. An
element of a list is a key by its number (`data.sources.0.paths`), so that data which only moved is told from other
data. The architecture must be the same; data and seeds only change when named in `train.resume_allow`; the rest takes
effect and stands in a table. The caller logs the table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.settings import to_json_values
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.renamed import current_name
from megatron_fp4.train.resume.past_data import past_changes

ABSENT = "(absent)"
MAX_CELL = 44
CONTEXT = 12
"""Characters that a cut cell shows before the first difference."""
UNQUOTED = re.compile(r"[^\w.-]")
"""What hydra or a shell would not take as it is in a list; `?` stands for it in a glob."""


class Policy(Enum):
    """What a difference leads to."""

    refuse = "refuse"  # never resumed: the tensors would not fit, or would mean something else
    ask = "ask"  # refused unless the key is allowed by name
    future = "future"  # noted where only samples to come are concerned (past_data.py), else asked
    note = "note"  # the config's value is used, and the table says so
    ignore = "ignore"  # not even mentioned (paths, logging)


@dataclass(frozen=True)
class ResumeRule:
    """keys: a glob over dotted keys ("model.*"). reason: ends the line in the table."""

    keys: str
    policy: Policy
    reason: str = ""


OTHER_MOMENTS = "its moments would be missing: begin another train.run_dir with train.init_from=CHECKPOINT"
RULES = (
    ResumeRule("train.run_dir", Policy.ignore),
    ResumeRule("train.resume*", Policy.ignore),
    ResumeRule("train.init_from", Policy.ask, "no effect: a run begins with weights once; others need another run_dir"),
    ResumeRule("train.distillation.teacher", Policy.note, "where it lies; its files are compared with those so far"),
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
    ResumeRule("model.moe.bias_rate", Policy.note, "biases stay, and move by it from here on"),
    ResumeRule("model.moe.sequence_loss", Policy.note, "a coefficient: the same tensors"),
    ResumeRule("model.moe.z_loss", Policy.note, "a coefficient: the same tensors"),
    ResumeRule("model.moe.capacity_factor", Policy.note, "which rows experts take from here on: the same tensors"),
    ResumeRule("model.moe.drop", Policy.note, "which rows experts take from here on: the same tensors"),
    ResumeRule("model.moe.segment_tokens", Policy.note, "what capacities and scales are of: the same tensors"),
    ResumeRule("model.mtp.loss_scale", Policy.note, "a coefficient: the same tensors"),
    ResumeRule("model.*", Policy.refuse, "architecture: the tensors would not fit"),
    ResumeRule("data.tokenizer", Policy.note, "where it lies; its content is checked against the shards"),
    ResumeRule("data.sources.*.paths", Policy.note, "where the shards lie; their content is checked"),
    ResumeRule("data.sources.*.max_epochs", Policy.note, "a limit: the sample order does not depend on it"),
    ResumeRule("data.phases*", Policy.future, "what was read stays; what comes follows the config"),
    ResumeRule("data.skip*", Policy.future, "what was read stays; what comes follows the config"),
    ResumeRule("data.seq_length", Policy.refuse, "samples are cut by it: the order would be another one"),
    ResumeRule("data.seed", Policy.refuse, "the sample order would be another one"),
    ResumeRule("data.evaluation*", Policy.note, "other held-out sets: curves are not comparable"),
    ResumeRule("data.tasks*", Policy.note, "other questions: scores are not comparable"),
    ResumeRule("data.*", Policy.ask, "data: the sample order would not go on"),
    ResumeRule("*seed", Policy.ask, "randomness would not go on"),
    ResumeRule("precision.*", Policy.note, "precision may change: tensors are stored without it"),
    ResumeRule("parallel.*", Policy.note, "layout may change: tensors are stored without it"),
    ResumeRule("optim.algorithm", Policy.refuse, OTHER_MOMENTS),
    ResumeRule("optim.muon.adamw_for", Policy.refuse, OTHER_MOMENTS),
    ResumeRule("optim.main_grads", Policy.note, "sums of the next step are rounded in another way; no state has them"),
    ResumeRule("optim.master", Policy.note, "the same numbers: a checkpoint holds FP32"),
    ResumeRule(
        "optim.moments.*", Policy.note, "a checkpoint holds FP32, which fp32 goes on with and other formats round once"
    ),
    ResumeRule("*", Policy.note, "the config's value is used from here on"),
)
"""The first whose glob fits decides."""

BEFORE_EXPERTS = {"model.moe": MoeConfig(), "model.mtp": MtpConfig()}
"""What a model was whose checkpoint does not have these sections."""


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


def changes_on_resume(meta: Mapping[str, Any], config: RunConfig) -> str:
    """The table of settings that changed since the checkpoint, "" if none. Raises ValueError for what may not change.

    meta: the checkpoint's small state.
    """
    saved, configured = meta["config"], to_json_values(config)
    past = past_changes(meta["data"], saved["data"], configured["data"])
    changes = compare_settings(saved, configured, allow=config.train.resume_allow, past=past)
    refuse_forbidden(changes)
    return as_table(changes) if changes else ""


def compare_settings(
    saved: Mapping[str, Any],
    configured: Mapping[str, Any],
    rules: Sequence[ResumeRule] = RULES,
    allow: Sequence[str] = (),
    past: Collection[str] = (),
) -> list[SettingDifference]:
    """Every setting that differs, by key.

    allow: globs of keys whose `ask` is answered. past: keys of policy `future` that differ in what is over. A setting
    that one side does not have at all (another version of the program) is asked about where it would be refused,
    because only a person can know that its default changes nothing. Saved settings that were renamed since are compared
    under their present name.
    """
    left, right = {current_name(key): value for key, value in _leaves(saved)}, dict(_leaves(configured))
    if "optim.algorithm" in right and "optim.algorithm" not in left:  # before there was a choice it was AdamW
        left |= {key: value for key, value in right.items() if key.startswith("optim.muon.")} | {
            "optim.algorithm": "adamw"
        }
    for section, without in BEFORE_EXPERTS.items():
        in_saved, in_configured = (any(key.startswith(f"{section}.") for key in side) for side in (left, right))
        if in_configured and not in_saved:
            left |= dict(_leaves(to_json_values(without), section))
    parents = {key[:dot] for key in left.keys() | right.keys() for dot in range(len(key)) if key[dot] == "."}
    differences = []
    for key in sorted(left.keys() | right.keys()):
        if key in parents and not (left.get(key) or right.get(key)):  # an empty list, beside the other's elements
            continue
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
        if policy is Policy.future:
            policy = Policy.ask if any(f"{key}.".startswith(f"{one}.") for one in past) else Policy.note
        allowed = any(fnmatchcase(key, glob) for glob in allow)
        refused = policy is Policy.refuse or (policy is Policy.ask and not allowed)
        differences.append(SettingDifference(key, old, new, policy, refused, rule.reason))
    return differences


def rule_of(key: str, rules: Sequence[ResumeRule] = RULES) -> ResumeRule:
    """What happens when the setting `key` differs: the first rule that fits, else `note`."""
    return next((rule for rule in rules if fnmatchcase(key, rule.keys)), ResumeRule("*", Policy.note))


def refuse_forbidden(differences: Sequence[SettingDifference]) -> None:
    """Raise ValueError with the table of what is refused, and what to do about it, if anything is."""
    refused = [one for one in differences if one.refused]
    if not refused:
        return
    lines = [f"resume refused, {len(refused)} settings differ from the checkpoint's:", as_table(refused)]
    if any(one.policy is Policy.refuse for one in refused):
        lines.append("settings marked 'refuse' must be as in the checkpoint; or choose another train.run_dir")
    if any(one.policy is Policy.ask for one in refused):
        # with those that are allowed already: the new list takes the place of the old one
        keys = [UNQUOTED.sub("?", one.key) for one in differences if one.policy is Policy.ask]
        lines.append(f"settings marked 'ask' can be allowed with 'train.resume_allow=[{','.join(keys)}]'")
    raise ValueError("\n".join(lines))


def as_table(differences: Sequence[SettingDifference]) -> str:
    """Text with the columns setting, checkpoint, config, used, and why."""
    header = ("setting", "checkpoint", "config", "used", "")
    rows = []
    for one in differences:
        saved, configured = _cells(one.saved, one.configured)
        used = one.used if one.refused else configured
        rows.append((one.key, saved, configured, used, f"{one.policy.value}: {one.reason}"))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[4]]) for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; a list of mappings has its numbers as keys, another one is one value (its order means something)."""
    numbered = isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value)
    children = dict(enumerate(value)) if numbered else value if isinstance(value, Mapping) else {}
    if key and not children:
        yield key, to_json_values(value)
    for name, child in children.items():
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def _cells(saved: Any, configured: Any) -> list[str]:
    """Both values as text, '' for an empty one; of a long one the part around the first difference."""
    texts = [value if isinstance(value, str) and value else repr(value) for value in (saved, configured)]
    if texts[0] == texts[1]:
        texts = [repr(saved), repr(configured)]
    return around_first_difference(texts, MAX_CELL, CONTEXT)


def around_first_difference(texts: Sequence[str], width: int, context: int) -> list[str]:
    """The texts, each in `width` characters: if one is longer, all from `context` characters before they differ."""
    if max(map(len, texts)) <= width:
        return list(texts)
    shortest = min(map(len, texts))
    first = next((place for place in range(shortest) if len({text[place] for text in texts}) > 1), shortest)
    start = max(0, first - context) if len(set(texts)) > 1 else 0
    windows = [f"...{text[start:]}" if start else text for text in texts]
    return [text if len(text) <= width else f"{text[: width - 3]}..." for text in windows]
