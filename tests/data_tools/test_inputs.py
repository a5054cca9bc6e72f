"""Inputs as they come: what can be read is read, what cannot is refused in one sentence, what is lost is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from megatron_fp4.data.shards.documents import open_documents
from megatron_fp4.data.text.tokenizer import load_tokenizer
from tests.data.text import toy_vocabularies as toy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.sentencepiece_model(tmp_path_factory.mktemp("vocabulary") / "t.model", byte_fallback=True)


def corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["tokenize", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "MB/s" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_json_array_says_what_is_expected(tmp_path, capsys, model):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    error = refusal(capsys, tmp_path / "a.json", "--tokenizer", model, "--output", tmp_path / "o")
    assert "is one JSON array; one object per line is expected" in error


def test_long_windows_of_zstd_are_read(tmp_path, model):
    """`zstd --long=31` was called damaged."""
    zstandard = pytest.importorskip("zstandard")
    texts = ["hello world", "again"]
    plain = corpus(tmp_path / "a.jsonl", texts).read_bytes()
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(plain) + frame.flush())
    assert main(["tokenize", f"{tmp_path}/a.jsonl.zst", "--tokenizer", str(model), "--output", f"{tmp_path}/o"]) == 0
    assert documents(tmp_path / "o", model) == texts


@pytest.mark.parametrize(("policy", "texts"), [("replace", ["good", "bad \ufffd"]), ("skip", ["good"])])
def test_invalid_utf8_in_parquet_follows_the_policy(tmp_path, model, policy, texts):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = arrow.array([b"good", b"bad \xff"], arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    options = ["--tokenizer", str(model), "--output", f"{tmp_path}/o", "--on-invalid-utf8", policy]
    assert main(["tokenize", f"{tmp_path}/a.parquet", *options]) == 0
    assert documents(tmp_path / "o", model) == texts


def test_invalid_utf8_in_parquet_is_refused_if_wanted(tmp_path, capsys, model):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = arrow.array([b"bad \xff"], arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    where = (tmp_path / "a.parquet", "--tokenizer", model, "--output", tmp_path / "o")
    assert "invalid utf8" in refusal(capsys, *where, "--on-invalid-utf8", "error")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_without_an_end_is_one_sentence(tmp_path, capsys, workers):
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"<tool>": True})
    text = corpus(tmp_path / "a.jsonl", ["x"])
    where = (text, "--tokenizer", path, "--output", tmp_path / "o", "--workers", workers)
    assert "--eos TOKEN_OR_ID" in refusal(capsys, *where)
    assert not (tmp_path / "o").exists()
    assert main(["tokenize", *map(str, where), "--eos", "<tool>"]) == 0
    assert "documents end with" in capsys.readouterr().out


def test_another_end_is_another_job(tmp_path, capsys):
    """A resumed job that ends its documents otherwise would mix two ends in one set."""
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {"<a>": True, "<b>": True})
    where = (corpus(tmp_path / "a.jsonl", ["x"]), "--tokenizer", path, "--output", tmp_path / "o")
    assert main(["tokenize", *map(str, where), "--eos", "<a>"]) == 0
    assert "Choose another --output" in refusal(capsys, *where, "--eos", "<b>")


def test_an_error_of_a_worker_names_file_and_reason(tmp_path, capsys):
    """Not "killed, or out of memory"."""
    path = toy.tokenizer_json(tmp_path / "tokenizer.json", {})
    text = corpus(tmp_path / "a.jsonl", ["an a"])
    where = (text, "--tokenizer", path, "--output", tmp_path / "o", "--workers", 2)
    error = refusal(capsys, *where, "--eos", "a")
    assert "a.jsonl, byte 0: ordinary text is encoded as" in error


def test_a_refusal_in_the_initializer_of_a_worker_is_told():
    code = (
        "from data_tools.pool import ordered_map\n"
        "import operator\n"
        "try:\n"
        "    list(ordered_map(abs, [1, 2], workers=2, initializer=operator.truediv, initargs=(1, 0)))\n"
        "except ZeroDivisionError as error:\n"
        "    print('told', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("told division"), done.stderr


def test_what_a_vocabulary_loses_is_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_tools.tokenize.RESTORED_ONE_IN", 1)
    model = toy.sentencepiece_model(tmp_path / "t.model", byte_fallback=False)
    text = corpus(tmp_path / "a.jsonl", ["return first", "Ä return", "a \u2581 d"])
    where = (text, "--tokenizer", model, "--output", tmp_path / "o", "--workers", 1)
    assert main(["tokenize", *map(str, where)]) == 0
    counted = {line.split(maxsplit=1)[1]: line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert counted["unknown tokens"] == "1"
    assert counted["decoded again to another text"] == "2"


def test_an_output_around_or_inside_another_set_is_refused(tmp_path, capsys, model):
    """Tokenized again into the parent of train/ and heldout/, a run would train on its own held-out text."""
    text = corpus(tmp_path / "a.jsonl", [f"text {number}" for number in range(50)])
    common = (text, "--tokenizer", model)
    assert main(["tokenize", *map(str, common), "--output", f"{tmp_path}/o", "--heldout-fraction", "0.2"]) == 0
    assert "would contain the shard set" in refusal(capsys, *common, "--output", tmp_path / "o")
    assert "would lie inside the shard set" in refusal(capsys, *common, "--output", tmp_path / "o" / "train" / "more")
    assert main(["tokenize", *map(str, common), "--output", f"{tmp_path}/o", "--heldout-fraction", "0.2"]) == 0


def documents(folder: Path, tokenizer: Path) -> list[str]:
    opened, model = open_documents("x", [str(folder)]), load_tokenizer(tokenizer)
    whole = [opened.document(number) for number in range(opened.num_documents)]
    return [model.decode(np.asarray(ids)[:-1].tolist()) for ids in whole]
