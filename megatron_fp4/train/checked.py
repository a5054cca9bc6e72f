"""A configuration that was checked in one process: arithmetic of the layout, precision plan, tokenizer, shards.

Everything that can be refused without the other ranks is refused here, so a bad setting ends a job before any process
group exists. `megatron-fp4 plan` passes the same checks as a run.

Not here: what depends on this rank's machine (refusals/requirements.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_fp4.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_fp4.models.block import LinearInfo, model_linears
from megatron_fp4.models.layout import check_model_layout
from megatron_fp4.models.partition import split_stages
from megatron_fp4.pipeline.schedules import check_pipeline
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.effect import check_decay, check_distillation, check_qk_clip, idle_notes
from megatron_fp4.train.refusals.experts import check_segments
from megatron_fp4.train.refusals.optimizer_state import check_main_grads, check_muon, check_optimizer_state
from megatron_fp4.train.refusals.precision_plan import make_plan
from megatron_fp4.train.refusals.requirements import check_choices


@dataclass(frozen=True)
class CheckedConfig:
    """What is known before the ranks meet. config: the run's, with the size of the vocabulary filled in.

    notes: a line for each setting without effect. choice: the lines that say what `precision.backend=auto`
    came to, once that is settled.
    """

    config: RunConfig
    linears: list[LinearInfo]
    plan: PrecisionPlan
    dp: int
    tokenizer: Tokenizer | None
    notes: list[str]
    choice: tuple[str, ...] = ()


def check_config(config: RunConfig, world_size: int) -> CheckedConfig:
    """Check the whole configuration in one process. Raises ValueError (or FileNotFoundError) with the remedy."""
    dp = config.parallel.resolve_dp(world_size)
    config.check_timeouts(world_size)
    config.check_evaluations()
    config.logging.check_prometheus_file()
    num_stages = _check_batches(config, dp)
    tokenizer = _tokenizer(config)
    config = _with_vocabulary(config, tokenizer)
    check_choices(config)
    tokens = _tokens(config)
    check_model_layout(config.model, config.parallel, seq_length=config.data.seq_length, tokens=tokens)
    split_stages(config.model, num_stages, config.parallel.stage_split)
    linears = model_linears(config.model)
    plan = make_plan(config, linears, tokens)
    check_segments(config, [table for _, table in plan.phases])
    check_muon(config)
    check_qk_clip(config)
    check_distillation(config)
    check_optimizer_state(config)
    check_main_grads(config)
    check_decay(config)
    return CheckedConfig(config, linears, plan, dp, tokenizer, _notes(config, plan))


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The configuration with the tokenizer's vocabulary where `model.vocab_size` is 0. Raises ValueError."""
    return _with_vocabulary(config, _tokenizer(config))


def settle_decay(checked: CheckedConfig, kept: str, consumed_samples: int) -> CheckedConfig:
    """With a number in place of `train.decay_from=now`: the one that a checkpoint kept, or that of the samples before
    the next step. Raises ValueError.
    """
    config = checked.config
    if not config.train.decay_from or config.decay_start is not None:
        return checked
    start = kept or str(consumed_samples * config.data.seq_length)
    config = replace(config, train=replace(config.train, decay_from=start))
    check_decay(config)
    plan = make_plan(config, checked.linears, _tokens(config))
    return replace(checked, config=config, plan=plan)


def _tokens(config: RunConfig) -> int:
    """Tokens of a rank in one microbatch."""
    return config.train.micro_batch * config.data.seq_length // config.parallel.cp


def _check_batches(config: RunConfig, dp: int) -> int:
    """Stages of the pipeline, after every size of a step was checked against layout and schedule."""
    num_stages, sizes = 0, config.train.batch_sizes
    for samples in sizes:
        try:
            num_stages = check_pipeline(config.parallel, config.train.gradient_accumulation(dp, samples))
        except ValueError as error:
            if len(sizes) == 1:
                raise
            raise ValueError(f"train.batch_ramp, steps of {samples} samples: {error}") from None
    return num_stages


def _tokenizer(config: RunConfig) -> Tokenizer | None:
    return load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None


def _with_vocabulary(config: RunConfig, tokenizer: Tokenizer | None) -> RunConfig:
    if config.model.vocab_size == 0:
        if tokenizer is None:
            raise ValueError("model.vocab_size is 0 (take it from the tokenizer), but data.tokenizer is not set")
        return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    if tokenizer is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {tokenizer.vocab_size} of the tokenizer"
            f" {config.data.tokenizer}; set model.vocab_size to 0 (the tokenizer's), or to as many or more"
        )
    return config


def _notes(config: RunConfig, plan: PrecisionPlan) -> list[str]:
    """What is said of settings without effect that do not mislead: one YAML file serves for runs that are compared."""
    notes = idle_notes(config)
    if config.train.statistics_interval_steps and not any(table.num_quantized_gemms for _, table in plan.phases):
        notes.append(
            "train.statistics_interval_steps measures residual stream and zero gradients only: no GEMM of this run is"
            " quantized"
        )
    return notes
