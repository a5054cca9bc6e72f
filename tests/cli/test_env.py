"""`env` reports what is there and fails on nothing."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from megatron_fp4.cli import env
from megatron_fp4.cli.main import COMMANDS
from tests.precision import te_double


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


def test_commands_are_listed() -> None:
    assert {"env", "preflight", "crosscheck"} <= set(COMMANDS)
