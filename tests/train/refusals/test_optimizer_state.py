"""Formats of optimizer state that the layout or the implementation cannot have are refused before a rank starts."""

from __future__ import annotations

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.train.checked import check_config

DISTILLED = [
    "optim.main_grads=bf16",
    "train.distillation.teacher=run",
    "model.mtp={depth: 1, pattern: T, loss_scale: 1}",
]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optim.moments.first=fp8", "parallel.tp=2"], "attention.out.weight: rows of 64 over parallel.tp = 2"),
        (["optim.moments.first=int8"], "first=int8 with optim.moments.second=fp32.*set optim.moments.first=fp8"),
        (["optim.moments.first=int8", "optim.moments.second=fp8"], "first=int8 with optim.moments.second=fp8"),
        (["optim.moments.second=bf16", "optim.impl=te"], "optim.moments.second=bf16 with optim.impl=te"),
        (["optim.master=remainder", "optim.impl=apex"], "optim.master=remainder with optim.impl=apex"),
        (
            ["optim.main_grads=bf16", "model.mtp.depth=2", "model.mtp.pattern=*"],
            "embedding.weight and head.weight get.* of scale 1, .*of scale 0.05 .*lose 4.3; set optim.main_grads=fp32",
        ),
        (
            [*DISTILLED, "train.distillation.weight=0.875"],
            "of scale 0.125 beside the divergence from a teacher.*of scale 1 .*lose 3.0; set optim.main_grads=fp32",
        ),
        (DISTILLED, "of scale 0 beside the divergence from a teacher, which may vanish.*lose all; set"),
    ],
)
def test_what_cannot_be_kept_is_refused(overrides: list[str], reason: str) -> None:
    config = to_run_config(compose_config(["model=gpt_tiny", "model.vocab_size=512", "data.tokenizer=", *overrides]))
    with pytest.raises(ValueError, match=reason):
        check_config(config, config.parallel.smallest_world)


@pytest.mark.parametrize(("first", "second"), [("fp8", "fp8"), ("fp8", "int8"), ("int8", "int8")])
def test_moments_that_fit_are_accepted(first: str, second: str) -> None:
    overrides = [f"optim.moments.first={first}", f"optim.moments.second={second}", "optim.master=remainder"]
    overrides.append("optim.main_grads=bf16")
    config = to_run_config(compose_config(["model=gpt_tiny", "model.vocab_size=512", "data.tokenizer=", *overrides]))
    assert not check_config(config, 1).notes


def test_losses_of_labels_of_like_scale_are_summed_in_bf16_beside_a_teacher() -> None:
    base = ["model=gpt_tiny", "model.vocab_size=512", "data.tokenizer=", *DISTILLED, "train.distillation.weight=0.5"]
    check_config(to_run_config(compose_config(base)), 1)
