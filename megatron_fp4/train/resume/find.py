"""Where a run continues, by `train.resume`."""

from __future__ import annotations

from megatron_fp4.checkpoint import CheckpointStore, Verified
from megatron_fp4.train.sections import Resume


def find_resume(policy: Resume, store: CheckpointStore) -> Verified | None:
    """The newest intact checkpoint, or None to begin anew. Raises ValueError where the policy forbids. Collective."""
    newest = store.latest()
    if policy is Resume.never and newest is not None:
        raise ValueError(
            f"{store.root} already holds checkpoint {newest} and train.resume=never; choose another train.run_dir, or"
            " train.resume=auto to go on from it"
        )
    if policy is Resume.required and newest is None:
        raise ValueError(f"train.resume=required, but there is no complete checkpoint under {store.root}")
    return store.choose() if newest is not None else None
