"""`selftest` says what can be tried here, and names host and device of what failed."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from megatron_fp4.cli import selftest
from megatron_fp4.precision import EmulatedBackend
from megatron_fp4.precision.selftest import trial
from tests.helpers.tiny_run import tiny_run


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "golden_objections", list)  # tests/precision/test_selftest.py
    monkeypatch.setattr(trial, "SIZES", {"T": 32, "N": 32, "K": 64})


def test_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main([]) == 0
    text = capsys.readouterr().out
    host = socket.gethostname()
    assert f"passed    emulated            nvfp4, mxfp4, mxfp8, fp8 on {host} cpu (" in text
    assert "not here  transformer_engine" in text
    assert "not here  triton" in text
    assert text.endswith("verdict: trusted: reference, emulated\n")


def test_what_fails_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = EmulatedBackend.matmul

    def wrong(*arguments: Any, **settings: Any) -> Any:
        return right(*arguments, **settings) * 1.01

    monkeypatch.setattr(EmulatedBackend, "matmul", wrong)
    assert selftest.main([]) == 1
    text = capsys.readouterr().out
    assert "FAILED    emulated            nvfp4 on" in text
    assert f"verdict: do not trust emulated on {socket.gethostname()} cpu" in text


def test_of_a_run_as_json(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main([*tiny_run(tmp_path).overrides, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 0
    assert {(one["backend"], one["recipe"]) for one in report["results"] if one["outcome"] == "passed"} == {
        ("reference", "golden"),
        ("emulated", "run"),
    }


def test_a_run_without_quantization(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main([*tiny_run(tmp_path, "precision=bf16").overrides]) == 2
    assert "quantizes no GEMM" in capsys.readouterr().err
