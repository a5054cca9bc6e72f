"""Where a run begins and how it has ended, in words.

Not here: what is said of every start (telemetry/announce.py), which state a run begins with (origin.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fp4.data.text.files import fingerprint_of
from megatron_fp4.data.text.tokenizer import Tokenizer
from megatron_fp4.precision.table import difference_to_stored
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.run import Position

JUMP = 1.1
"""A learning rate that changes by this factor at a resume is warned of."""


def describe_origin(origin: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[str]:
    """Where the weights of a new run came from; a warning if the folder has another tokenizer than the run.

    The files are compared, not what they do: one that was saved anew may number the same tokens.
    """
    paragraphs = ["; ".join([f"weights of {origin['from']} ({origin['format']})", *origin.get("notes", ())])]
    if tokenizer is None:
        return paragraphs
    beside = Path(origin["from"]) / f"tokenizer{Path(tokenizer.path).suffix}"
    if beside.is_file() and fingerprint_of(beside.read_bytes()) != tokenizer.fingerprint:
        paragraphs.append(
            f"WARNING: data.tokenizer={tokenizer.path} is another file than {beside}, whose ids the weights know; the"
            " data must be tokenized as the model's were"
        )
    return paragraphs


def describe_resume(checked: CheckedConfig, meta: dict[str, Any], changes: str, rollback: str) -> list[str]:
    """Where the run goes on, and in what it differs from the checkpoint whose small state is `meta`.

    changes: table of the settings that differ; rollback: one of which the checkpoint does not know; "" for none, each.
    """
    config, plan = checked.config, checked.plan
    paragraphs = [f"resuming after step {meta['step']} of {config.train.run_dir}"]
    if rollback:
        paragraphs.append(rollback)
    if changes:
        paragraphs.append(f"settings that differ from the checkpoint's:\n{changes}")
    paragraphs += _jump(meta, config)
    table = plan.table(plan.phase_at(meta["consumed_samples"] * config.data.seq_length))
    if precision := difference_to_stored(meta["precision"], table):
        paragraphs.append("precision differs from the checkpoint's:\n" + "\n".join(precision))
    return paragraphs


def _jump(meta: Mapping[str, Any], config: RunConfig) -> list[str]:
    """A warning if the schedule of this configuration gives the last step another rate than that step had.

    The rate is a function of the tokens of the whole run: of a run that had ended its decay and is made longer, it is
    what it was before the decay.
    """
    seen, had = meta["consumed_samples"] * config.data.seq_length, meta.get("lr")
    step, total = meta["step"], config.run_tokens
    has = config.learning_rate(seen)
    if had is None or seen >= total or max(had, has) <= JUMP * min(had, has):
        return []
    following = config.learning_rate(seen + config.tokens_per_step)
    text = f"WARNING: the learning rate jumps from {had:.2e} at step {step} to {following:.2e} at step {step + 1}"
    was, now = meta["config"]["train"]["total_tokens"], config.train.total_tokens
    if was != now:
        text += (
            f": it is a function of the whole run's tokens, which were {was:,.0f} and are {now:,.0f}; without one, go"
            " on from a checkpoint of before the decay, or begin a new run with these weights (train.init_from) and a"
            " warm-up of its own"
        )
    return [text]


def describe_end(config: RunConfig, begin: Position, *, stopped: bool) -> str:
    """What has become of a run that began at `begin`, and the command that comes next. stopped: on request."""
    last = config.last_step(begin.step, begin.samples)
    whole = begin.step + sum(stage.num_steps for stage in config.stages(begin.samples))
    if stopped:
        return "the state is saved; the same command again goes on from there"
    if last < whole:
        stop = f"train.stop_after_steps={config.train.stop_after_steps}"
        return f"stopped after step {last} of {whole} ({stop}); the same command with a larger one, or none, goes on"
    run = shlex.quote(config.train.run_dir)
    text = f"finished: {last:,} steps, {config.run_tokens:,} tokens"
    if begin.step == last:
        text = (
            f"this run was finished already, at step {last}, so nothing was trained; a larger train.total_tokens goes"
            " on, another train.run_dir begins anew"
        )
    commands = [f"megatron-fp4 report {run}"]
    commands += [f"megatron-fp4 evaluate {run}"] if config.data.evaluation else []
    commands += [f"megatron-fp4 generate {run}"] if config.data.tokenizer else []
    return "\n  ".join([f"{text}; next:", *commands])
