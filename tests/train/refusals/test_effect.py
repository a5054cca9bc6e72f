"""Settings without effect: refused where typed or misleading, a note where one YAML file serves for several runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.train.checked import check_config
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import make_trainer

SWITCH_TO_BF16 = "precision.switch=[{%s, use: bf16}]"


def notes(*overrides: str) -> list[str]:
    config = to_run_config(compose_config(["model.vocab_size=512", "data.tokenizer=", *overrides]))
    return check_config(config, config.parallel.smallest_world).notes


@pytest.mark.parametrize(
    ("overrides", "key", "reason"),
    [
        (["optim.schedule=cosine", "optim.decay_fraction=0.3"], "optim.decay_fraction", "cosine has no last phase"),
        (["optim.schedule=cosine", "optim.decay_style=cosine"], "optim.decay_style", "cosine has no last phase"),
        (["model.mamba_state=64"], "model.mamba_state", "no block of the model has Mamba-2"),
        (["optim.moments.muon=bf16"], "optim.moments.muon", "optim.algorithm=adamw"),
        (["optim.master=remainder", "precision.compute_dtype=fp32"], "optim.master", "the weights are the masters"),
        (
            ["optim.moments.second=fp8", "model.hidden=96", "model.ffn_hidden=96", "model.head_dim=24"],
            "optim.moments.second",
            "no matrix .* multiple of 64",
        ),
        (
            ["model=hybrid_tiny", "model.num_layers=2", "model.pattern=M-", "model.num_heads=2"],
            "model.num_heads",
            "atten",
        ),
        (["model.num_layers=2", "model.pattern=**", "model.ffn_hidden=64"], "model.ffn_hidden", "no block .* an MLP"),
        (
            ["precision/recipe=nemotron3", "precision.recipes.mxfp8.fprop.x.format=mxfp4"],
            "precision.recipes.mxfp8.fprop.x.format",
            "neither precision.use nor a rule, a switch or the evaluation names it",
        ),
    ],
)
def test_what_is_typed_and_changes_nothing_is_refused(overrides: list[str], key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} has no effect: .*{reason}.*leave it out"):
        compose_config(["model.vocab_size=512", *overrides])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["experiment=quickstart", "optim.schedule=cosine"], ["no effect of optim.decay_fraction: "]),
        (["experiment=hybrid_quick"], []),
        (
            ["experiment=hybrid_quick", "precision=bf16"],
            ["train.statistics_interval_steps measures residual stream and zero gradients only: no GEMM"],
        ),
        (
            ["precision=bf16", "train.statistics_interval_steps=5"],
            ["train.statistics_interval_steps measures residual "],
        ),
        (["precision/recipe=nemotron3"], ["no effect of precision.recipes.mxfp8: "]),
        (
            ["model=hybrid_tiny", "model.pattern=TT", "model.num_layers=2"],
            ["no effect of model.mamba_num_heads, model.m"],
        ),
        (["optim.schedule=constant", "optim.min_lr=0"], []),
        (["train.spikes.max_skips=3"], ["no effect of train.spikes.max_skips: train.spikes.ratio and"]),
        (["logging.wandb_name=mine"], ["no effect of logging.wandb_name: logging.wandb=disabled"]),
        (["checkpoint.keep_every_tokens=1000"], ["no effect of checkpoint.keep_every_tokens: train.save_interval_st"]),
    ],
)
def test_what_a_file_says_or_decides_no_result_is_a_note(overrides: list[str], expected: list[str]) -> None:
    assert [note[: len(start)] for note, start in zip(notes(*overrides), expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optim.decay_fraction=0"], "optim.min_lr = 3e-06 has no effect: optim.decay_fraction = 0 of"),
        (["optim.decay_fraction=1e-9"], "is no decay; set optim.min_lr=0"),
        (["optim.decay_fraction=1e-9", "optim.min_lr=0"], "optim.decay_fraction = 1e-09 has no effect"),
        ([SWITCH_TO_BF16 % "at_fraction: 1e-9"], "switch at token 0 leaves no step"),
        ([SWITCH_TO_BF16 % "at_tokens: 0.5"], "switch at token 0 leaves no step"),
        ([SWITCH_TO_BF16 % "at_decay: true", "optim.decay_fraction=1.0"], "switch at token 0 leaves no step"),
        ([SWITCH_TO_BF16 % "at_fraction: 0.9999"], "has no effect: the last step begins after 997376 tokens"),
        ([SWITCH_TO_BF16 % "at_decay: true", "optim.schedule=cosine"], "at_decay with optim.schedule=cosine"),
    ],
)
def test_what_misleads_is_refused_wherever_it_stands(overrides: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        notes(*overrides)


def test_the_last_step_may_switch() -> None:
    assert notes(SWITCH_TO_BF16 % "at_tokens: 997376") == []


def test_a_bf16_run_with_statistics_trains(tmp_path: Path) -> None:
    """Two runs that are compared share their YAML; statistics of nothing are no reason to refuse one of them."""
    overrides = ("precision=bf16", "train.statistics_interval_steps=1", "train.stop_after_steps=2")
    trainer, _ = make_trainer(tiny_run(tmp_path, *overrides).overrides)
    trainer.fit()
    assert trainer.position.step == 2
