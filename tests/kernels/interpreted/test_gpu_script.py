"""benchmarks/gpu.sh at tiny sizes on a CPU: every section has rows, and what breaks costs its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_sections
from megatron_fp4.precision.selftest import trial
from tests.helpers.tiny_run import ROOT

Section = Callable[[bool], Iterator[dict[str, Any]]]


@pytest.mark.parametrize(
    ("section", "whats"),
    [
        (gpu_sections.operands, {"nvfp4"}),
        (gpu_sections.kernels, {"tiny 32x64, bf16", "tiny 32x64, nvfp4 by triton", "tiny 32x64, nvfp4 by emulated"}),
        (gpu_sections.training, {"bf16", "triton", "emulated"}),
    ],
    ids=["operands", "kernels", "training"],
)
def test_a_section(section: Section, whats: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "TINY_RECIPES", ("nvfp4",))
    monkeypatch.setattr(trial, "SIZES", dict(trial.SIZES))
    rows = list(section(True))
    assert {one["what"] for one in rows if "seconds" in one} == whats
    assert not [one for one in rows if one["passed"] is False], rows


def test_the_script_writes_a_table(tmp_path: Path) -> None:
    command = [ROOT / "benchmarks/gpu.sh", "--tiny", "--only", "collectives", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("gpu_cpu_*.json")
    report = json.loads(table.read_text())
    assert report["machine"]["card"] == "cpu"
    assert report["rows"][0]["what"] == "gloo all_reduce"
    assert "| collectives | gloo all_reduce |" in table.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import time; print('row: {}', flush=True); time.sleep(30)", "not reached: stopped after 2 s"),
        ("raise RuntimeError('an illegal memory access')", "ended with code 1: RuntimeError: an illegal memory"),
    ],
)
def test_what_hangs_or_breaks_costs_its_own_rows(program: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **rest: real([command[0], "-c", program], **rest))
    rows = gpu.run_section("operands", 2.0)
    assert message in rows[-1]["result"]
    assert rows[-1]["passed"] is False
    assert len(rows) == 1 + ("row:" in program)
