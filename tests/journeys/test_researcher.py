"""A researcher with a laptop: own text, own tokenizer, own YAML, from nothing to a comparison of formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.helpers.tiny_run import ROOT
from tests.journeys.shell import Shell

MINE = """# @package _global_
model: {num_layers: 2, hidden: 64, ffn_hidden: 128, num_heads: 2, num_kv_heads: 1, head_dim: 32}
precision:
  compile: false
  keep_bf16: {last: 1}
data:
  tokenizer: tokenizer.model
  seq_length: 64
  sources:
    - {name: news, paths: [shards/news/train]}
    - {name: wiki, paths: [shards/wiki]}
  phases:
    - {name: all, weights: {news: 0.7, wiki: 0.3}}
  evaluation:
    - {name: heldout, paths: [shards/news/heldout]}
optim: {lr: 3.0e-3, warmup_tokens: 2048}
train:
  run_dir: runs/mine
  device: cpu
  micro_batch: 4
  global_batch: 4
  total_tokens: 10240
  log_interval_steps: 5
  eval_interval_steps: 20
  save_interval_steps: 20
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Text of one's own: compressed lines, and a table; both with a title beside the text."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    pages = sorted((ROOT / "docs").glob("*.md"))
    parts = [part for page in pages for part in page.read_text().split("\n\n") if len(part) > 80]
    documents = [{"title": f"part {number}", "text": text} for number, text in enumerate(parts)]
    (tmp_path / "text").mkdir()
    lines = "".join(json.dumps(document) + "\n" for document in documents[::2])
    (tmp_path / "text/news.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(arrow.Table.from_pylist(documents[1::2]), tmp_path / "text/wiki.parquet")
    return Shell(tmp_path)


def test_from_text_to_a_comparison(shell: Shell) -> None:
    shell("megatron-fp4 data train-tokenizer text/* --output tokenizer.model --vocab-size 512")
    shell(
        "megatron-fp4 data tokenize text/news.jsonl.gz --tokenizer tokenizer.model --output shards/news"
        " --heldout-fraction 0.1 --workers 1"
    )
    shell("megatron-fp4 data tokenize text/wiki.parquet --tokenizer tokenizer.model --output shards/wiki --workers 1")
    shell.write("mine.yaml", MINE)
    assert "wiki" in shell("megatron-fp4 data blend --plan mine.yaml --tokens 10240")

    run = "megatron-fp4 pretrain experiment=mine.yaml"
    stopped = shell.interrupted(run, at="step     10/40")
    assert "stopped on request (SIGINT)" in stopped
    assert "the same command again goes on" in stopped
    resumed = shell(run)
    assert "resuming after step" in resumed
    assert "finished: 40 steps, 10,240 tokens; next:\n  megatron-fp4 report runs/mine" in resumed
    assert "finished" in shell("megatron-fp4 status runs/mine")

    swept = shell(f"{run} --multirun precision=bf16,nvfp4 train.run_dir=runs/formats train.total_tokens=5120")
    assert "precision=bf16: done" in swept
    assert "precision=nvfp4: done" in swept
    assert "eval/heldout/loss" in swept, "it ends in a comparison"
    assert (shell.folder / "runs/formats/report.html").stat().st_size > 10_000
    shell("megatron-fp4 report runs/formats/precision=bf16 runs/mine --plot loss.png")
    shell("megatron-fp4 generate runs/mine --tokens 8")
