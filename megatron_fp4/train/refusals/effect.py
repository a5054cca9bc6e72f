"""Settings that change nothing in this run, each with the reason.

Whoever types one that should decide a result expects it to matter and is refused (cli/compose.py). One that a YAML file
holds is a note at start, so that one file serves for runs that are compared; so is one that decides no result, such as
the limits of a rule that is off. What would mislead wherever it stands is refused here.

Not here: numbers outside their bounds (settings.py); parts of one section that exclude each other (its own checks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.layers.rope import RopeScaling, RopeScalingConfig
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.optim.config import Algorithm, Schedule
from megatron_fp4.optim.lr import decay_tokens
from megatron_fp4.precision.config import SAME, PrecisionConfig
from megatron_fp4.settings import settings_of
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.experts import idle_expert_settings
from megatron_fp4.train.refusals.optimizer_state import idle_formats
from megatron_fp4.train.sections import WandbMode

ATTENTION = (
    *("num_heads", "num_kv_heads", "head_dim", "rope_base", "rope_fraction", "qk_norm", "qkv_bias", "sliding_window"),
    *(f"rope_scaling.{item.name}" for item in settings_of(RopeScalingConfig)),
)
ROPE_SCALING = {
    RopeScaling.none: frozenset({"kind"}),
    RopeScaling.linear: frozenset({"kind", "factor"}),
    RopeScaling.llama3: frozenset({"kind", "factor", "original_length", "low_frequency", "high_frequency"}),
    RopeScaling.yarn: frozenset(
        {"kind", "factor", "original_length", "beta_fast", "beta_slow", "truncate", "attention_factor"}
    ),
}
"""The settings of `model.rope_scaling` that each kind reads."""
KERNEL = "mamba_kernel"
SPIKES = ("window_steps", "min_steps", "max_skips", "max_rollbacks")


def idle_settings(config: RunConfig) -> dict[str, str]:
    """The key of every setting that should decide a result and changes nothing, whatever its value -> why."""
    return dict(_without_result(config))


def idle_notes(config: RunConfig) -> list[str]:
    """The settings without effect that are not at their defaults, those of one reason in a line."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in (*_without_result(config), *_switched_off(config)):
        if _is_set(config, key):
            by_reason.setdefault(reason, []).append(key)
    return [f"no effect of {', '.join(keys)}: {reason}" for reason, keys in by_reason.items()]


def check_decay(config: RunConfig) -> None:
    """Raises ValueError for a final learning rate that is never reached, and for a decay of no token."""
    optim = config.optim
    if config.train.decay_from:
        _check_decay_from(config)
        return
    if not optim.schedule.has_last_phase or decay_tokens(optim, config.run_tokens):
        return
    for name, value in {"min_lr": optim.min_lr, "decay_fraction": optim.decay_fraction}.items():
        if value:
            raise ValueError(
                f"optim.{name} = {value:g} has no effect: optim.decay_fraction = {optim.decay_fraction:g} of"
                f" {config.run_tokens} tokens is no decay; set optim.{name}=0, or a larger optim.decay_fraction"
            )


def _check_decay_from(config: RunConfig) -> None:
    text, schedule = config.train.decay_from, config.optim.schedule
    if not schedule.has_last_phase:
        raise ValueError(
            f"train.decay_from={text} has no effect: optim.schedule={schedule.name} has no last phase; wsd has"
        )
    if config.decay_start is not None and config.decay_start >= config.run_tokens:
        raise ValueError(
            f"train.decay_from={text} leaves no step to decay: the run ends at {config.run_tokens} tokens; raise"
            " train.total_tokens, which is where the decay ends"
        )


def check_qk_clip(config: RunConfig) -> None:
    """Raises ValueError where scaled weights of queries and keys scale no logit."""
    threshold, model = config.optim.qk_clip.threshold, config.model
    if not threshold:
        return
    if not set("T*") & model.letters:
        raise ValueError(
            f"optim.qk_clip.threshold = {threshold:g} has no effect: no block of the model has attention"
            " (model.pattern); set it to 0"
        )
    if model.qk_norm is not QkNorm.none:
        raise ValueError(
            f"optim.qk_clip.threshold = {threshold:g} has no effect with model.qk_norm={model.qk_norm.name}, which"
            " normalizes queries and keys whatever the scale of their weights, and bounds the logits itself; set one of"
            " the two to 0 or none"
        )


def check_distillation(config: RunConfig) -> None:
    """Raises ValueError where predictions of a teacher cannot be learned. (Which model it is of: resume/same_model.)"""
    if not config.train.distillation.teacher:
        return
    if config.parallel.pp > 1:
        raise ValueError(
            f"train.distillation.teacher with parallel.pp = {config.parallel.pp}: the teacher runs before each"
            " microbatch of the student, and those of a pipeline overlap; set parallel.pp=1, and divide the model by"
            " parallel.tp (and its experts by parallel.ep) instead"
        )
    if config.model.loss_impl is LossImpl.te:
        raise ValueError(
            "train.distillation.teacher with model.loss_impl=te, whose kernels know labels only; set"
            " model.loss_impl=torch"
        )
    if config.train.label_smoothing:
        raise ValueError(
            f"train.label_smoothing = {config.train.label_smoothing:g} with train.distillation.teacher, whose"
            " predictions take the place of smoothed labels; set train.label_smoothing=0"
        )


def named_recipes(precision: PrecisionConfig) -> set[str]:
    """Recipes that a rule, a switch, the evaluation or `use` names."""
    names = {precision.use, precision.evaluation} | {switch.use for switch in precision.switch}
    for rule in precision.rules:
        names |= {rule.use, rule.fprop, rule.dgrad, rule.wgrad}
    return names - {"", SAME}


def _without_result(config: RunConfig) -> Iterator[tuple[str, str]]:
    schedule = config.optim.schedule
    if not schedule.has_last_phase:
        for name in ("decay_fraction", "decay_style"):
            yield f"optim.{name}", f"optim.schedule={schedule.name} has no last phase; wsd has"
    if not config.optim.weight_decay:
        yield "optim.cautious_decay", "optim.weight_decay = 0 (off)"
    if schedule is not Schedule.power:
        for name in ("power_exponent", "power_from_tokens"):
            yield f"optim.{name}", f"optim.schedule={schedule.name}, not power"
    if config.optim.algorithm is not Algorithm.muon:
        for item in fields(config.optim.muon):
            yield f"optim.muon.{item.name}", f"optim.algorithm={config.optim.algorithm.name}"
    if not config.optim.qk_clip.threshold:
        yield "optim.qk_clip.alpha", "optim.qk_clip.threshold = 0 (off)"
    if not config.train.distillation.teacher:
        for name in ("weight", "temperature"):
            yield f"train.distillation.{name}", "train.distillation.teacher is empty"
    yield from idle_formats(config)
    yield from _without_block(config.model)
    yield from idle_expert_settings(config)
    for name in config.precision.recipes:
        if name not in named_recipes(config.precision):
            yield f"precision.recipes.{name}", "neither precision.use nor a rule, a switch or the evaluation names it"


def _switched_off(config: RunConfig) -> Iterator[tuple[str, str]]:
    if "M" not in config.model.letters:
        yield f"model.{KERNEL}", "no block of the model has Mamba-2 (model.pattern)"
    if not config.train.spikes.enabled:
        for name in SPIKES:
            yield f"train.spikes.{name}", "train.spikes.ratio and train.spikes.z_score are 0 (off)"
    if config.train.decay_from:
        yield "optim.decay_fraction", f"train.decay_from={config.train.decay_from} says where the decay begins"
    if config.logging.wandb is WandbMode.disabled:
        for name in ("wandb_project", "wandb_name"):
            yield f"logging.{name}", "logging.wandb=disabled"
    if not config.train.save_interval_steps:
        yield "checkpoint.keep_every_tokens", "train.save_interval_steps = 0 saves at the end only"


def _without_block(model: ModelConfig) -> Iterator[tuple[str, str]]:
    mamba = [item.name for item in settings_of(ModelConfig) if item.name.startswith("mamba_") and item.name != KERNEL]
    if not model.mtp.depth:
        yield "model.mtp.loss_scale", "model.mtp.depth = 0"
    kind = model.rope_scaling.kind
    for item in settings_of(RopeScalingConfig):
        if item.name not in ROPE_SCALING[kind]:
            yield f"model.rope_scaling.{item.name}", f"model.rope_scaling.kind={kind.name} does not read it"
    needs = (
        ("M", mamba, "Mamba-2"),
        ("T*", ATTENTION, "attention"),
        ("T-", ("ffn_hidden",), "an MLP"),
        ("T-E", ("activation",), "an MLP or experts"),
    )
    for letters, names, what in needs:
        if not set(letters) & model.letters:
            for name in names:
                yield f"model.{name}", f"no block of the model has {what} (model.pattern)"


def _is_set(config: RunConfig, key: str) -> bool:
    """Whether the value at `key` is another one than the default; a recipe has none."""
    section, _, name = key.rpartition(".")
    if section == "precision.recipes":
        return True
    value: Any = config
    for part in section.split("."):
        value = getattr(value, part)
    default = next(setting.default for setting in settings_of(value.__class__) if setting.name == name)
    return bool(getattr(value, name) != default)
