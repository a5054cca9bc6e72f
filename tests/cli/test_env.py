"""`env` reports what is there and fails on nothing."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_fp4.cli import env
from megatron_fp4.cli.main import COMMANDS
from tests.precision.te import te_double


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    code = env.main([])
    text = capsys.readouterr().out
    assert code == ("REQUIRED" in text)
    assert torch.__version__ in text
    for name in ("python", "nccl", "gpu", "te backend", "c++ compiler", "launcher", "scheduler", "machine"):
        assert any(line.startswith(name) for line in text.splitlines()), f"{name} is missing from the report"


def test_transformer_engine_features(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    env.main([])
    text = capsys.readouterr().out
    assert "Transformer Engine 2.20.2" in text
    assert "te scale_order" in text


def test_a_wrong_version_is_marked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch==1.0.0", "numpy>=1.26", 'x==1.2; extra == "test"'])
    assert env.main([]) == 1
    assert "REQUIRED 1.0.0" in capsys.readouterr().out


def test_variables_that_change_a_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"NVTE_USE_FAST_MATH": "1", "NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "x:y", "OMP_NUM_THREADS": "3"}
    for name, value in {**wanted, "WANDB_API_KEY": "secret", "SLURM_JOB_ID": "17"}.items():
        monkeypatch.setenv(name, value)
    env.main([])
    text = capsys.readouterr().out
    versions = {line.split()[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 1}
    for name, value in wanted.items():
        assert versions[name] == value
    assert "secret" not in text
    assert "in a job of slurm" in text
    for name in [name for name in os.environ if name.startswith(env.VARIABLES)]:
        monkeypatch.delenv(name)
    env.main([])
    assert "no variable NVTE_*" in capsys.readouterr().out


def test_versions_are_compared_with_the_image(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).resolve().parents[2] / "Dockerfile").read_text()
    named = re.search(r"whose torch \((\S+), CUDA (\S+), Python", text)
    engine = re.search(r"Transformer Engine (\S+) and Apex", text)
    assert named is not None
    assert engine is not None
    assert {"torch": named[1], "cuda": named[2], "transformer-engine": engine[1]} == env.IMAGE
    plain = metadata.version
    installed = {"transformer-engine": "2.17.1", "apex": "0.1"}
    monkeypatch.setattr(metadata, "version", lambda name: installed.get(name) or plain(name))
    env.main([])
    assert "image has 2.17" not in capsys.readouterr().out, "2.17.1 is a 2.17"
    installed["transformer-engine"] = "2.1"
    env.main([])
    printed = capsys.readouterr().out
    assert "2.1   (the Dockerfile's image has 2.17)" in printed
    assert re.search(r"^apex +0\.1$", printed, re.MULTILINE)


def test_commands_are_listed() -> None:
    assert {"env", "preflight", "crosscheck"} <= set(COMMANDS)
