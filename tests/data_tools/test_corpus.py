import json
import os
import subprocess
import sys

from data_tools.cli import main


def test_real_text_counted_and_deterministic(tmp_path, capsys):
    assert main(["make-corpus", "--output", str(tmp_path / "a.jsonl")]) == 0
    out = capsys.readouterr().out
    documents = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sum(len(d["text"].encode()) for d in documents) > 5_000_000
    assert f"total      {len(documents):6d} documents" in out
    assert "skipped" in out  # the library has empty files; they are named, not dropped
    assert len({d["text"] for d in documents}) == len(documents)
    assert {"source", "compiled"} == {d["kind"] for d in documents}
    command = [sys.executable, "-m", "data_tools.make_corpus", "--output", str(tmp_path / "b.jsonl")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_error_is_one_line(tmp_path):
    command = [sys.executable, "-m", "data_tools", "train-tokenizer", str(tmp_path / "no.jsonl"), "--output", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no input file matches")
    assert "Traceback" not in done.stderr
