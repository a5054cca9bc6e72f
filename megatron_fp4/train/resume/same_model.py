"""Whether weights are of the model that is configured: a norm's epsilon or a rotary base leaves no trace in a shape.

Not here: names and shapes of the tensors, which are compared when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint import offline
from megatron_fp4.checkpoint.directory import read_state, step_to_load
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.source import is_foreign, open_source
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.settings import to_json_values
from megatron_fp4.storage.remote.url import check_url, is_url
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.resume.differences import ABSENT, compare_settings

FREE = (
    *("dropout", "init_std", "scale_residual_init", "mamba_chunk"),
    *("mamba_kernel", "norm_impl", "loss_impl", "pointwise_impl"),
)
"""Settings of the model that may be others than those of the weights: they do not say what the weights mean."""
FREE_INSIDE = {
    "moe": (
        *("bias_rate", "sequence_loss", "global_loss", "z_loss"),
        *("capacity_factor", "drop", "segment_tokens"),
    ),
    "mtp": ("shared", "loss_scale"),
}
"""The same within a group of settings. Depths that share their blocks are as one."""


def check_origin(config: RunConfig) -> None:
    """Whether a run that would begin now can begin from `train.init_from`, and learn from its teacher; one process,
    reads no weights.

    Raises ValueError and FileNotFoundError, with the settings that are others than those of the weights; ValueError too
    for a URL that this machine cannot reach without an extra. What lies in a store is not known here: then weights are
    looked at when they are read.
    """
    if config.train.distillation.teacher:
        check_teacher(Path(config.train.distillation.teacher), config.model)
    if config.checkpoint.mirror:
        check_url(config.checkpoint.mirror, "checkpoint.mirror")
    if is_url(config.train.init_from):
        check_url(config.train.init_from, "train.init_from")
        return
    goes_on = config.checkpoint.mirror or step_to_load(Path(config.train.run_dir) / "checkpoints") is not None
    if config.train.init_from and not goes_on:
        check_model(Path(config.train.init_from), config.model)


def check_model(folder: Path, model: ModelConfig, origin: str = "") -> None:
    """Raises ValueError for settings that are others than those of the weights in `folder`; FileNotFoundError.

    Multi-token prediction may begin with weights that have none: what it adds is drawn then. origin: what a user has
    called the folder, "" for its path.
    """
    if listed := differences_from(folder, _as_far_as_in(folder, model)):
        raise ValueError(
            f"train.init_from={origin or folder} holds another model; set these as they are in it:\n{listed}"
        )


def check_teacher(folder: Path, model: ModelConfig) -> None:
    """The same of `train.distillation.teacher`, a checkpoint of ours; it predicts the next token only."""
    if is_foreign(folder):
        raise ValueError(
            f"train.distillation.teacher={folder} is a folder of transformers or Megatron-LM; make it a checkpoint:"
            " megatron-fp4 checkpoint import"
        )
    if listed := differences_from(folder, _as_far_as_in(folder, model)):
        raise ValueError(f"train.distillation.teacher={folder} holds another model than this run's:\n{listed}")


def has_mtp(folder: Path) -> bool:
    """Whether the weights in `folder` have multi-token prediction; True where nothing is said of their model."""
    saved = _saved_model(folder)
    return saved is None or bool(saved.get("mtp", {}).get("depth"))


def _as_far_as_in(folder: Path, model: ModelConfig) -> ModelConfig:
    """Without multi-token prediction where the weights in `folder` have none."""
    return model if has_mtp(folder) else model.with_blocks(model.blocks, MtpConfig())


def differences_from(folder: Path, model: ModelConfig) -> str:
    """The settings that are others than those of the weights in `folder`, a line for each. Raises FileNotFoundError.

    model: with its vocabulary filled in (`CheckedConfig.config`), as the weights have it.
    """
    saved = _saved_model(folder)
    if saved is None:
        return ""
    defaults = to_json_values(ModelConfig())
    groups = {key: value | saved.get(key, {}) for key, value in defaults.items() if isinstance(value, dict)}
    complete = {**defaults, **saved, **groups}  # older checkpoints know fewer settings
    differences = compare_settings({"model": _comparable(complete)}, {"model": _comparable(to_json_values(model))})
    return "\n".join(
        f"  {one.key}: {one.saved} in the weights, {one.configured} in this run"
        for one in differences
        if ABSENT not in (one.saved, one.configured)
    )


def _saved_model(folder: Path) -> Mapping[str, Any] | None:
    if is_foreign(folder):
        foreign: Mapping[str, Any] = to_json_values(open_source(folder).config)
        return foreign
    settings = read_state(checkpoint_in(folder))["meta"].get("config")
    return settings.get("model") if isinstance(settings, dict) else None


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest one in it or in its run. Raises FileNotFoundError."""
    inside = folder / "checkpoints"
    return offline.resolve(inside if inside.is_dir() else folder)


def _comparable(model: Mapping[str, Any]) -> dict[str, Any]:
    """Without what may differ; one value for what can be said in two ways."""
    values = {key: value for key, value in model.items() if key not in FREE}
    for group, free in FREE_INSIDE.items():
        values[group] = {key: value for key, value in model[group].items() if key not in free}
    depth = model["mtp"]["depth"]
    values["mtp"]["depth"] = min(depth, 1) if model["mtp"]["shared"] else depth
    values["pattern"] = model["pattern"] or "T" * model["num_layers"]
    values["head_dim"] = model["head_dim"] or model["hidden"] // model["num_heads"]
    if "M" not in values["pattern"]:
        values = {key: value for key, value in values.items() if not key.startswith("mamba_")}
    return values
