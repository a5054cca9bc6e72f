"""Experts and layouts that do not suit each other are refused in one process, with the numbers and the remedy."""

from __future__ import annotations

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
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


def test_what_does_not_is_not() -> None:
    check("parallel.tp=2", "parallel.ep=2")
    check("parallel.tp=2", "parallel.ep=4")
    check("parallel.tp=2", "model.moe.segment_tokens=32")
    check("parallel.tp=2", precision="bf16")
    check("parallel.ep=4")
