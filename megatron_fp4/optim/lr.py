"""The learning rate as a pure function of consumed tokens.

No scheduler object and no state: a step asks for the rate at the tokens consumed so far, its own batch
included, so that the first step has a positive rate and the last one exactly `min_lr`. A changed batch size or a
resume cannot shift the schedule.
"""

from __future__ import annotations

import math

from megatron_fp4.optim.config import DecayStyle, OptimConfig, Schedule


def decay_tokens(config: OptimConfig, total_tokens: int) -> int:
    """Tokens of the last phase of `wsd` and `power`."""
    return round(config.decay_fraction * total_tokens)


def describe_schedule(config: OptimConfig, total_tokens: int, decay_start: int | None = None) -> str:
    """`3.00e-03, wsd; warm-up 40,960 tokens, decay over the last 122,880, to 3.00e-05`. decay_start: see
    `learning_rate`.
    """
    text = f"{config.lr:.2e}, {config.schedule.name}; warm-up {config.warmup_tokens:,} tokens"
    if config.schedule is Schedule.power:
        text += f", from {config.power_from:,} on as tokens^-{config.power_exponent:g}"
    if decay_start is not None:
        text += f", decay from {decay_start:,} on, over the last {total_tokens - decay_start:,} (train.decay_from)"
    elif config.schedule.has_last_phase and (last := decay_tokens(config, total_tokens)):
        text += f", decay over the last {last:,}"
    return text if config.schedule is Schedule.constant else f"{text}, to {config.min_lr:.2e}"


def check_schedule(config: OptimConfig, total_tokens: int, decay_start: int | None = None) -> None:
    """Raise ValueError, with the numbers, if the phases do not fit into `total_tokens`. decay_start: see
    `learning_rate`.
    """
    if total_tokens < 1:
        raise ValueError(f"the run has {total_tokens} tokens in total, must be at least 1")
    warmup = config.warmup_tokens
    if warmup > total_tokens:
        raise ValueError(
            f"optim.warmup_tokens = {warmup} is more than the {total_tokens} tokens of the run; lower it, or"
            " train longer"
        )
    decay = decay_tokens(config, total_tokens)
    if decay_start is not None:
        if not warmup <= decay_start <= total_tokens:
            raise ValueError(
                f"the decay begins at token {decay_start}, must be between the {warmup} of optim.warmup_tokens and the"
                f" {total_tokens} of the run"
            )
    elif config.schedule.has_last_phase and warmup + decay > total_tokens:
        raise ValueError(
            f"warm-up and decay do not fit: optim.warmup_tokens = {warmup} and optim.decay_fraction ="
            f" {config.decay_fraction} of {total_tokens} = {decay} tokens are {warmup + decay} together; lower one of"
            f" them by {warmup + decay - total_tokens} tokens"
        )
    if config.schedule is Schedule.power:
        start = total_tokens - decay if decay_start is None else decay_start
        if (lowest := _before_decay(config, start)) < config.min_lr:
            raise ValueError(
                f"optim.min_lr = {config.min_lr:g} is above the {lowest:.2e} to which schedule power has fallen at"
                f" token {start}; lower it, or optim.power_exponent"
            )


def learning_rate(config: OptimConfig, tokens_seen: int, total_tokens: int, decay_start: int | None = None) -> float:
    """Rate of the step after which `tokens_seen` of `total_tokens` tokens are consumed.

    decay_start: consumed tokens at which the last phase of `wsd` or `power` begins; None: `decay_fraction` says it.
    Tokens beyond the total keep the final rate. Raises ValueError for negative tokens or phases that do not fit.
    """
    check_schedule(config, total_tokens, decay_start)
    if tokens_seen < 0:
        raise ValueError(f"tokens_seen = {tokens_seen}, must not be negative")
    if tokens_seen < config.warmup_tokens:
        return config.lr * tokens_seen / config.warmup_tokens
    if config.schedule is Schedule.constant:
        return config.lr
    if config.schedule is Schedule.cosine:
        start, style = config.warmup_tokens, DecayStyle.cosine
    elif decay_start is not None:
        start, style = decay_start, config.decay_style
    else:
        start, style = total_tokens - decay_tokens(config, total_tokens), config.decay_style
    if tokens_seen <= start or start == total_tokens:  # before the decay, or without one
        return _before_decay(config, tokens_seen)
    done = min(1.0, (tokens_seen - start) / (total_tokens - start))
    return config.min_lr + decay_factor(style, done) * (_before_decay(config, start) - config.min_lr)


def _before_decay(config: OptimConfig, tokens: int) -> float:
    """Rate between warm-up and last phase."""
    if config.schedule is not Schedule.power or tokens <= config.power_from:
        return config.lr
    return config.lr * float((tokens / config.power_from) ** -config.power_exponent)


def decay_factor(style: DecayStyle, done: float) -> float:
    """Part of the way from `min_lr` up to `lr`, after the part `done` of the decay: 1 at 0, exactly 0 at 1."""
    if style is DecayStyle.linear:
        return 1.0 - done
    if style is DecayStyle.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if style is DecayStyle.minus_sqrt:
        return 1.0 - math.sqrt(done)
    return 2.0 * 0.5**done - 1.0
