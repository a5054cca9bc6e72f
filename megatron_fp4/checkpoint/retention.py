"""Which checkpoints stay: a pure function of (step, tokens, score) of those that exist.

One idea: stateless, so that a resumed run decides like an uninterrupted one. Deleting is the store's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fp4.checkpoint.config import CheckpointConfig


@dataclass(frozen=True)
class Saved:
    """tokens: consumed until then. score: the lower the better (held-out loss); None: not evaluated."""

    step: int
    tokens: int | None = None
    score: float | None = None


def steps_to_delete(saved: Sequence[Saved], newest: int, config: CheckpointConfig) -> list[int]:
    """Steps that no rule keeps. Steps above `newest` (of a run that was rolled back) are left alone and not counted."""
    past = sorted((one for one in saved if one.step <= newest), key=lambda one: one.step)
    kept = {one.step for one in past[-config.keep_last :]}
    if config.keep_every_tokens:
        firsts: dict[int, int] = {}
        for one in past:
            if one.tokens is not None and one.tokens >= config.keep_every_tokens:
                firsts.setdefault(one.tokens // config.keep_every_tokens, one.step)
        kept |= set(firsts.values())
    scored = sorted((one.score, one.step) for one in past if one.score is not None and one.score == one.score)
    kept |= {step for _, step in scored[: config.keep_best]}
    return [one.step for one in past if one.step not in kept]
