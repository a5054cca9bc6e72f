"""What is said before the first step."""

from __future__ import annotations

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.telemetry import slow_paths
from megatron_fp4.train.telemetry.announce import describe_run

SMALL = ["model=gpt_tiny", "model.vocab_size=96", "train.global_batch=4", "data.sources=[{name: a, paths: [a]}]"]


def printed(*overrides: str, world_size: int = 1) -> list[str]:
    checked = check_config(to_run_config(compose_config([*SMALL, *overrides])), world_size)
    text = describe_run(checked, world_size, torch.device("cpu"))
    return [paragraph for paragraph in text if paragraph.startswith("Wgrad quantizes")]


@pytest.mark.parametrize(
    ("seq_length", "micro_batch", "cp", "group", "run"),
    [
        (96, 1, 2, 16, 24),
        (24, 2, 1, 16, 24),
        (128, 1, 2, 16, 0),
        (24, 2, 1, 0, 0),
        (32, 1, 1, 16, 0),
    ],
)
def test_wgrad_groups_that_depend_on_the_layout_are_told(
    seq_length: int, micro_batch: int, cp: int, group: int, run: int
) -> None:
    """A group that reaches from one chunk into another holds other tokens than in one process."""
    sizes = [f"data.seq_length={seq_length}", f"train.micro_batch={micro_batch}", f"parallel.cp={cp}"]
    precision = "precision=nvfp4" if group else "precision=bf16"
    lines = printed(*sizes, precision, world_size=cp)
    assert len(lines) == bool(run)
    if run:
        assert f"quantizes {group} tokens together, but a run of tokens on a rank is {run} (" in lines[0]


def test_moments_that_a_machine_converts_eagerly_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_paths, "compile_obstacle", lambda: "there is no C++ compiler")
    for overrides, count in (((), 0), (("optim.moments.second=fp8",), 1)):
        checked = check_config(to_run_config(compose_config([*SMALL, "precision=bf16", *overrides])), 1)
        lines = [
            text for text in describe_run(checked, 1, torch.device("cpu")) if text.startswith("optim.compile is on")
        ]
        assert len(lines) == count
        assert all(
            "there is no C++ compiler: moments are converted eagerly (same numbers, slower)" in one for one in lines
        )
