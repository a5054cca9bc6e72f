"""`megatron-fp4 report --html`: one file without anything from outside, with the numbers of the runs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from megatron_fp4.cli.report import main


def write_run(folder: Path, factor: float, *, spikes: bool = False) -> Path:
    folder.mkdir()
    records = [
        {"step": step, "loss": factor * 4 / step, "grad_norm": 1.0, "consumed_tokens": 1e6 * step, "lr": 1e-3}
        | {"tokens_per_second": 100.0, "tflops": 1.0, "skipped_steps": 0.0}
        for step in range(1, 31)
    ]
    extra = [{"step": 30, "eval/held<out/loss": 2.0}, {"step": 20, "save/seconds": 1.5, "save/blocking_seconds": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, *extra]))
    if spikes:
        (folder / "spikes.jsonl").write_text(json.dumps({"step": 7, "action": "skip", "loss": 9.0}) + "\n")
    return folder


def test_a_comparison_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = write_run(tmp_path / "bf16", 1.0), write_run(tmp_path / "a&b", 1.02, spikes=True)
    page = tmp_path / "out" / "report.html"
    assert main([str(base), str(other), "--html", str(page)]) == 0
    text = page.read_text()
    titles = re.findall(r">([^<]*)</text>", text)
    for title in (
        "loss (nats per token)",
        "loss against bf16, percent",
        "gradient norm",
        "seconds of a save: blocking",
    ):
        assert any(found.startswith(title) for found in titles), f"no plot of {title}"
    assert "utilization" not in text, "a plot without a single point"
    assert not re.search(r'(src|href)="(?!#)', text.replace('xlink:href="#', "")), "the page needs another file"
    assert "<script" not in text
    assert "a&amp;b" in text
    assert "held&lt;out" in text, "names must be escaped"
    assert "Loss spikes of a&amp;b" in text
    assert "+2.00%" in capsys.readouterr().out
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)  # raises for broken markup


def test_one_run(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main([str(write_run(tmp_path / "run", 1.0)), "--html", str(page)]) == 0
    assert "percent" not in page.read_text(), "there is nothing to compare with"
