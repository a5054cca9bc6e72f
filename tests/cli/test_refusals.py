"""Bad input ends with one clear message, exit code 2 and no traceback, before any process group is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_fp4 import pretrain
from megatron_fp4.train.signals import EXIT_CONFIG
from tests.helpers.tiny_run import TinyRun, tiny_run


def refused(capsys: pytest.CaptureFixture[str], run: TinyRun, *overrides: str) -> str:
    """Run the program in this process and return what it said."""
    code = pretrain.main([*run.overrides, *overrides])
    said = capsys.readouterr()
    assert code == EXIT_CONFIG, f"expected a refusal, got {code}: {said.out}"
    assert said.err.startswith("error: "), said.err
    assert "Traceback" not in said.err
    assert not run.run_dir.exists(), "a refused run must leave nothing behind"
    return said.err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_layer=4"], "did you mean 'model.num_layers'"),
        (["modle=gpt_tiny"], "did you mean 'model'"),
        (["model=gpt_tinny"], "did you mean 'gpt_tiny'"),
        (["precision.backend=emulate"], "emulated"),
        (["optim.lr=fast"], "optim.lr"),
        (["optim.lr=-1"], "must be positive"),
        (["parallel.tp=3"], "tp * pp * cp * dp = 3 * 1 * 1"),
        (["train.global_batch=5"], "5 is not a multiple of 2 * 1"),
        (["model.num_heads=3"], "num_heads"),
        (["model.hidden=72", "model.head_dim=16"], "multiple of 16"),
        (["data.seq_length=24", "train.micro_batch=1"], "tokens per microbatch"),
        (["precision.rules=[{match: '*', use: bf16}]"], "every GEMM in bf16"),
        (["precision.rules=[{match: 'blocks.9.*', use: bf16}, {match: '*', use: nvfp4}]"], "matches no linear"),
        (["precision.rules=[{match: '*', use: nvfp5}]"], "nvfp4"),
        (["precision.evaluation=fp9"], "fp9"),
        (["train.total_tokens=64"], "less than one step"),
        (["--frobnicate"], "unknown option"),
        (["optim.warmup_tokens=999999"], "999999"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str) -> None:
    assert expected in refused(capsys, tiny_run(tmp_path), *overrides)


def test_heads_not_divisible_by_tp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = refused(capsys, tiny_run(tmp_path), "parallel.tp=4", "model.num_kv_heads=2")
    assert "model.num_kv_heads = 2 is not divisible by parallel.tp = 4" in said


def test_hidden_not_a_multiple_of_16_per_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(capsys, tiny_run(tmp_path), "parallel.tp=2", "model.ffn_hidden=272")
    assert "136" in said, "the local size must be named"
    assert "multiple of 16" in said


def test_missing_truncated_and_foreign_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path)
    assert "nowhere" in refused(capsys, run, "data.sources=[{name: toy, paths: [/nowhere/shard]}]")
    assert "/nowhere/tokenizer.model" in refused(capsys, run, "data.tokenizer=/nowhere/tokenizer.model")
    shard = tmp_path / "shards/toy.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    said = refused(capsys, run)
    assert "toy" in said
    assert str(shard.stat().st_size) in said.replace(",", ""), "expected and actual size must be named"


def test_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    output = run.with_overrides("model.vocab_size=50").run(expect=1)
    assert "beyond the vocabulary of 50" in output
