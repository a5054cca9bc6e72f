"""What a person reads of a run from its start to its end, through the whole life of a rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megatron_fp4 import pretrain
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.optim.lr import learning_rate
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.telemetry.announce import MAX_SOURCES, describe_run
from tests.helpers.tiny_run import TinyRun, tiny_run

STEPS = 8


def printed(capsys: pytest.CaptureFixture[str], overrides: Sequence[str], *more: str) -> str:
    capsys.readouterr()
    assert pretrain.main([*overrides, *more]) == 0
    return capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    total = f"train.total_tokens={STEPS * 4 * 32}"
    return tiny_run(tmp_path, total, "model.num_layers=2", "train.save_interval_steps=4", "train.check_gemms=true")


def test_a_run_from_start_to_end_and_started_once_more(
    run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = printed(capsys, run.overrides, "train.stop_after_steps=4")
    head = output.split("\nlinear  ")[0].splitlines()
    assert [line.split()[0] for line in head] == [
        *("model", "layout", "batch", "precision", "rate", "data", "tokenizer", "speed", "where")
    ], "a summary, and not the whole configuration, which is in the run directory"
    assert "rope_base" not in output
    assert "rope_base" in (run.run_dir / "config.yaml").read_text()
    assert str(run.run_dir) in head[-1]
    assert output.count("all GEMMs as planned: 27 of 9 linears, 12 of them quantized") == 1
    assert "checkpoint 4: committed" in output
    assert "writing" not in output
    assert output.splitlines()[-1].startswith(f"stopped after step 4 of {STEPS} (train.stop_after_steps=4);")

    output = printed(capsys, run.overrides)
    assert "resuming after step 4" in output
    assert output.endswith(f"finished: {STEPS} steps, 1,024 tokens; next:\n  megatron-fp4 report {run.run_dir}\n")

    output = printed(capsys, run.overrides)
    assert f"this run was finished already, at step {STEPS}, so nothing was trained" in output
    assert not re.search("^step ", output, re.MULTILINE)


def test_a_finished_run_made_longer_warns_of_its_learning_rate(
    run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the last step and of the next one, as their lines say."""
    steps = printed(capsys, run.overrides, "train.log_interval_steps=1")
    last = re.findall(r"^step .* lr (\S+)", steps, re.MULTILINE)[-1]
    output = printed(capsys, run.overrides, "train.total_tokens=2048")
    following = re.findall(r"^step .* lr (\S+)", output, re.MULTILINE)[0]
    assert f"WARNING: the learning rate jumps from {last} at step {STEPS} to {following} at step {STEPS + 1}" in output
    assert "which were 1,024 and are 2,048" in output
    config = to_run_config(compose_config([*run.overrides, "train.total_tokens=2048"]))
    assert following == f"{learning_rate(config.optim, 1024 + 128, 2048):.2e}"
    assert "jumps" not in printed(capsys, run.overrides, "train.total_tokens=2048"), "it goes on as it was"


def test_a_resume_in_the_schedule_says_nothing_of_jumps(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, run.overrides, "train.stop_after_steps=4")
    assert "jumps" not in printed(capsys, run.overrides, "train.stop_after_steps=5", "optim.lr=3.1e-3")
    assert "jumps from 3.10e-03 at step 5 to 1.00e-03" in printed(capsys, run.overrides, "optim.lr=1e-3")


@pytest.mark.parametrize("world_size", [1, 64, 4096])
def test_the_summary_stays_ten_lines(world_size: int) -> None:
    """However many ranks and sources of data there are."""
    sources = ",".join(f"{{name: s{number}, paths: [p{number}]}}" for number in range(40))
    overrides = ["experiment=paper_12b_10t", "model.vocab_size=131072", "data.tokenizer=''", "data.phases=[]"]
    overrides += [f"data.sources=[{sources}]", "train.global_batch=4096"]
    checked = check_config(to_run_config(compose_config(overrides)), world_size)
    first = describe_run(checked, world_size, torch.device("cpu"), {"s0": 123456})[0]
    assert len(first.splitlines()) <= 10
    assert f"{40 - MAX_SOURCES} more" in first
    assert "s0 (123,456 tokens), s1" in first
    assert "12,310,001,152 parameters: 62 blocks M-M-" in first
