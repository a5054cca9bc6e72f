"""What a resumed run may change, and where it continues.

One idea: a checkpoint holds the configuration that wrote it; every difference to the present one is shown in a table
and falls under a rule. The architecture must be the same; data and seeds only change when named in
`train.resume_allow`; the rest takes effect and is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_fp4.checkpoint import CheckpointStore, Verified
from megatron_fp4.train.resume.differences import DEFAULT_RULES, Policy, Rule, check, differences, table
from megatron_fp4.train.sections import Resume

RULES = (
    Rule("train.run_dir", Policy.ignore, ""),
    Rule("train.resume*", Policy.ignore, ""),
    Rule("train.*interval_steps", Policy.ignore, ""),
    Rule("train.check_gemms", Policy.ignore, ""),
    Rule("train.stop_after_steps", Policy.ignore, ""),
    Rule("train.exit_after_seconds", Policy.ignore, ""),
    Rule("train.hang_timeout_seconds", Policy.ignore, ""),
    Rule("data.prefetch_batches", Policy.ignore, ""),
    Rule("data.index_cache", Policy.ignore, ""),
    Rule("model.*_impl", Policy.note, "who computes it: the same tensors, other last bits"),
    Rule("model.mamba_kernel", Policy.note, "who computes it: the same tensors, other last bits"),
    Rule("data.tokenizer", Policy.note, "where it lies; its content is checked against the shards"),
    Rule("data.sources*.paths*", Policy.note, "where the shards lie; their content is checked"),
    Rule("data.evaluation*", Policy.note, "other held-out sets: curves are not comparable"),
    *DEFAULT_RULES,
)


def find_resume(policy: Resume, store: CheckpointStore) -> Verified | None:
    """The newest intact checkpoint, or None. Raises ValueError where the policy forbids."""
    newest = store.latest()
    if policy is Resume.never and newest is not None:
        raise ValueError(
            f"{store.root} already holds checkpoint {newest} and train.resume=never; choose another train.run_dir, or"
            " train.resume=auto to go on from it"
        )
    if policy is Resume.required and newest is None:
        raise ValueError(f"train.resume=required, but there is no complete checkpoint under {store.root}")
    return store.choose() if newest is not None else None


def settle_differences(saved: dict[str, Any], configured: dict[str, Any], allow: Sequence[str]) -> str:
    """The table of settings that changed since the checkpoint ("" if none). Raises ValueError for what may not."""
    found = differences(saved, configured, RULES, allow)
    check(found, 'train.resume_allow=["data.*"] (globs of settings)')
    return table(found) if found else ""
