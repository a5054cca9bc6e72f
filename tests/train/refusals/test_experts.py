"""Experts and layouts that do not suit each other are refused in one process, with the numbers and the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.train.checked import check_config

EXPERTS = ("model.pattern='*E*'", "model.num_layers=3", "model.moe.num_experts=8", "model.moe.ffn_hidden=64")
BATCH = ("data.seq_length=64", "train.micro_batch=2", "train.global_batch=16", "train.total_tokens=4096")


def check(*overrides: str, precision: str = "nvfp4") -> None:
    typed = ["model.vocab_size=512", "data.tokenizer=", f"precision={precision}", *EXPERTS, *BATCH, *overrides]
    config = to_run_config(compose_config(typed))
    check_config(config, config.parallel.smallest_world)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.ep=16", "train.global_batch=32"], "model.moe.num_experts = 8 is not divisible by parallel.ep = 16"),
        (
            ["parallel.tp=2"],
            r"parallel.ep = 1 is no multiple of parallel.tp \* parallel.cp = 2 \* 1 = 2.*divisor of 64",
        ),
        (["parallel.cp=2", "parallel.tp=2", "parallel.ep=2"], r"ep = 2 is no multiple of .* = 4.*to a divisor of 16"),
        (["parallel.tp=2", "model.moe.segment_tokens=128"], "is no multiple of"),
        (["model.moe.segment_tokens=48"], "segment_tokens = 48 does not divide the 128 tokens of a microbatch"),
    ],
)
def test_what_would_depend_on_the_layout_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check(*overrides)


def test_ep_without_experts_is_refused() -> None:
    config = to_run_config(compose_config(["model.vocab_size=512", "data.tokenizer=", "parallel.ep=2", *BATCH]))
    with pytest.raises(ValueError, match=r"parallel.ep = 2 has no effect: no block of the model has experts"):
        check_config(config, 2)


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
def test_a_width_that_tiles_do_not_divide(activation: str) -> None:
    """Experts take any number of rows and are on no tensor-parallel rank in parts: neither is said."""
    with pytest.raises(ValueError, match=r"multiple of 16, got 24 \(tp = 1, parts \{[^}]*\}\); change the size, leave"):
        check("model.moe.ffn_hidden=24", f"model.activation={activation}")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["precision=bf16", "model.moe.segment_tokens=32"], "segment_tokens"),
        (["precision.rules=[{match: '*.experts.*', use: bf16}]", "model.moe.segment_tokens=32"], "segment_tokens"),
        (["model.moe.capacity_factor=4"], "capacity_factor"),
        (["model.moe.num_groups=8", "model.moe.top_groups=4"], "num_groups"),
        (["model.moe.top_k=8", "model.moe.sequence_loss=1e-4"], "sequence_loss"),
        (["model.moe.top_k=8", "model.moe.global_loss=1e-4"], "global_loss"),
        (["model.moe.top_k=8", "model.moe.expert_bias=true", "model.moe.bias_rate=1e-3"], "expert_bias"),
        (["model.moe.top_k=8", "model.moe.score=softmax", "model.moe.normalize=true"], "normalize"),
    ],
)
def test_what_changes_nothing_is_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=f"model.moe.{key} has no effect: .*leave it out"):
        check(*overrides)


def test_segments_without_effect_in_a_file_are_a_note() -> None:
    """One file serves for runs in several precisions that are compared."""
    typed = ["model.vocab_size=512", "data.tokenizer=", *EXPERTS, *BATCH, "model.moe.segment_tokens=32"]
    config = to_run_config(compose_config([*typed, "precision=nvfp4"]))
    assert not any("segment_tokens" in note for note in check_config(config, 1).notes)
    bf16 = replace(config, precision=PrecisionConfig())
    assert any("no effect of model.moe.segment_tokens: " in note for note in check_config(bf16, 1).notes)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.moe.num_groups=3"], "num_experts = 8 is not divisible by .*num_groups = 3; choose a divisor of 8"),
        (["model.moe.top_k=9"], "top_k = 9 is more than model.moe.num_experts = 8; lower it"),
        (["model.moe.num_experts=1", "model.moe.top_k=1", "model.moe.score=softmax", "model.moe.normalize=false"],
         "score=softmax .* weight 1.*; set model.moe.score=sigmoid"),
    ],
)  # fmt: skip
def test_what_cannot_be_has_a_remedy(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check(*overrides)


def test_what_does_not_is_not() -> None:
    check("parallel.tp=2", "parallel.ep=2")
    check("parallel.tp=2", "parallel.ep=4")
    check("parallel.tp=2", "model.moe.segment_tokens=32")
    check("parallel.tp=2", precision="bf16")
    check("parallel.ep=4")
