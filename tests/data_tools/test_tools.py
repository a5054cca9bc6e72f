import json
import os

import numpy as np
import pytest

from data_tools.cli import TOOLS, main
from data_tools.shard_set import SplitWriter
from megatron_fp4.data.config import DataConfig, SourceConfig
from megatron_fp4.data.ledger import LedgerWriter, step_hash
from megatron_fp4.data.shards.documents import open_documents
from megatron_fp4.data.shards.manifest import BLOCK_BYTES, PROGRESS, read_manifest
from megatron_fp4.data.text.tokenizer import load_tokenizer
from tests.data.toy import loader_of, numbered, write_set, write_shard


def documents_of(*paths):
    source = open_documents("x", [str(path) for path in paths])
    return [source.read(n, 0, int(length)).tolist() for n, length in enumerate(source.lengths)]


def run(capsys, *argv):
    code = main([str(item) for item in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def shards(tmp_path):
    return write_set(tmp_path / "set", [numbered([5, 1, 9]), numbered([20, 3], start=50)])


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_help(tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([tool, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: megatron-fp4 data {tool} ")


def test_usage_and_unknown_tool(capsys):
    assert run(capsys, "--help")[0] == 0
    code, _, err = run(capsys, "tokenise")
    assert code == 2
    assert "unknown tool 'tokenise'" in err


def test_verify_good(shards, capsys):
    code, out, _ = run(capsys, "verify", shards, "--vocab-size", 100)
    assert code == 0
    assert out.count("good ") == 2


def test_verify_names_the_flipped_byte(tmp_path, capsys):
    """One bit in the second of three blocks: shard, offsets, expected and actual digest."""
    folder = write_set(tmp_path / "big", [[list(range(100)) * 50_000]])
    path = tmp_path / "big" / "shard_00000.bin"
    with open(path, "r+b") as file:
        file.seek(BLOCK_BYTES + 123)
        byte = file.read(1)
        file.seek(BLOCK_BYTES + 123)
        file.write(bytes([byte[0] ^ 1]))
    code, out, _ = run(capsys, "verify", folder)
    assert code == 1
    assert f"{path}: bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES} differ: expected digest " in out
    assert out.count("differ") == 1


def test_verify_truncation_index_and_ids(tmp_path, shards, capsys):
    code, out, _ = run(capsys, "verify", shards, "--vocab-size", 50)
    assert code == 1
    assert "token 22 (byte offset 44) is 72, beyond the vocabulary of 50" in out
    os.truncate(tmp_path / "set" / "shard_00001.bin", 44)
    code, out, _ = run(capsys, "verify", shards)
    assert code == 1
    assert "shard_00001.bin: expected 46 bytes, found 44" in out
    assert "good" in out  # the other shard is still checked


def test_verify_of_nothing_is_refused(tmp_path, capsys):
    code, out, err = run(capsys, "verify", write_set(tmp_path / "empty", []))
    assert (code, out) == (2, "")
    assert "the manifest names no shard, so there is nothing to verify" in err


def test_verify_plain_megatron_shard(tmp_path, capsys):
    prefix = write_shard(tmp_path / "plain", [[1, 2], [3]])
    code, out, _ = run(capsys, "verify", prefix)
    assert code == 0
    assert "no manifest: no checksums" in out


def test_inspect_refuses_another_tokenizer(shards, tmp_path, model, capsys):
    fingerprint = load_tokenizer(model).fingerprint
    expected = f"was tokenized with tokenizer tok, but {fingerprint} is used here"
    assert expected in run(capsys, "inspect", shards, "--document", 4, "--tokenizer", model)[2]
    LedgerWriter(
        tmp_path, loader_of(DataConfig([SourceConfig("web", [shards], 0)], seq_length=4)), step=0, first_sample=0
    )
    assert expected in run(capsys, "inspect", "--run", tmp_path, "--sample", 1, "--tokenizer", model)[2]


def test_inspect_document(shards, capsys):
    code, out, _ = run(capsys, "inspect", shards, "--document", 4)
    assert code == 0
    assert "document 1 of" in out
    assert "shard_00001, 3 tokens" in out
    assert "ids [70, 71, 72]" in out
    assert run(capsys, "inspect", shards, "--document", 5)[2].startswith("error: document 5 is not in 0..4")


def test_inspect_sample_and_ledger_of_a_run(shards, tmp_path, capsys):
    config = DataConfig([SourceConfig("web", [shards], 0)], seq_length=4, skip=[[2, 3]])
    loader = loader_of(config)
    writer = LedgerWriter(tmp_path, loader, step=0, first_sample=0)
    for step in range(3):
        writer.add(step, step * 2, 2, step_hash(loader.batch(step * 2, 2)))
    code, out, _ = run(capsys, "inspect", "--run", tmp_path, "--sample", 4)
    assert code == 0
    assert f"ids {loader.batch(3, 1).tokens[0].tolist()}" in out
    assert "was skipped" in run(capsys, "inspect", "--run", tmp_path, "--sample", 2)[2]
    assert "ids begin with 0" in run(capsys, "inspect", "--run", tmp_path, "--sample=-1")[2]
    code, out, _ = run(capsys, "ledger", "--run", tmp_path, "--step", 1)
    assert code == 0
    assert "as logged by the run" in out
    assert "sample        3 " in out
    code, out, _ = run(capsys, "ledger", "--run", tmp_path, "--step", 1, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["sample_id"] for row in rows} == {3, 4}
    assert run(capsys, "ledger", "--run", tmp_path, "--step", 9)[2].startswith("error: ")


def test_stats(shards, capsys):
    code, out, _ = run(capsys, "stats", shards)
    assert code == 0
    assert "shortest 1," in out
    assert "median 5," in out
    assert "longest 20; empty 0" in out


def test_merge_and_split_keep_every_document(shards, tmp_path, capsys):
    plain = write_shard(tmp_path / "plain", numbered([4, 4], start=80))
    assert run(capsys, "merge", shards, plain, "--output", tmp_path / "m", "--shard-tokens", 10)[0] == 0
    assert documents_of(tmp_path / "m") == documents_of(shards) + documents_of(plain)
    assert read_manifest(tmp_path / "m")["tokenizer"]["fingerprint"] == "tok"
    assert run(capsys, "verify", tmp_path / "m")[0] == 0
    argv = ["split", tmp_path / "m", "--part", "a=0.5", "--part", "b=0.5", "--output", tmp_path / "s"]
    assert run(capsys, *argv)[0] == 0
    parts = [documents_of(tmp_path / "s" / name) for name in ("a", "b")]
    assert sorted(parts[0] + parts[1]) == sorted(documents_of(tmp_path / "m"))
    assert all(parts)


def test_merge_refuses_two_tokenizers(shards, tmp_path, capsys):
    other = write_set(tmp_path / "other", [[[1]]], fingerprint="another")
    code, _, err = run(capsys, "merge", shards, other, "--output", tmp_path / "m")
    assert code == 2
    assert "['another', 'tok']" in err


def test_blend_plan(shards, tmp_path, capsys):
    code = write_set(tmp_path / "code", [numbered([100])])
    (tmp_path / "data.yaml").write_text(
        f"""
data:
  sources: [{{name: web, paths: ["{shards}"], max_epochs: 2}}, {{name: code, paths: ["{code}"]}}]
  phases: [{{name: early, tokens: 40, weights: {{web: 0.5, code: 0.5}}}}, {{name: late, weights: {{code: 1.0}}}}]
  seq_length: 4
"""
    )
    status, out, _ = run(capsys, "blend", "--plan", tmp_path / "data.yaml", "--tokens", "80")
    assert status == 0
    rows = [line.split() for line in out.splitlines()[2:6]]
    assert [row[:4] for row in rows] == [
        ["early", "web", "0.500000", "20"],
        ["early", "code", "0.500000", "20"],
        ["late", "web", "0.000000", "0"],
        ["late", "code", "1.000000", "40"],
    ]
    assert rows[3][4] == "0.600"
    for text in ("data: [1", "- 1", "data: 5", "data: {sources: [{name: a, paths: b}]}"):
        (tmp_path / "bad.yaml").write_text(text)
        assert run(capsys, "blend", "--plan", tmp_path / "bad.yaml", "--tokens", "400")[2].startswith("error: ")
    for tokens in ("0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            main(["blend", "--plan", str(tmp_path / "data.yaml"), f"--tokens={tokens}"])
    status, _, err = run(capsys, "blend", "--plan", tmp_path / "data.yaml", "--tokens", "400")
    assert status == 2
    assert "'code' is too small" in err


def test_nothing_is_overwritten(shards, tmp_path, capsys):
    """An output that is an input, another job's set, or foreign shards: refused, and every file is as before."""
    other = write_set(tmp_path / "other", [numbered([7])])
    (tmp_path / "plain").mkdir()
    write_shard(tmp_path / "plain" / "shard_00000", [[1, 2]])
    before = {path: path.read_bytes() for path in tmp_path.rglob("shard_*")}
    for folder, message in ((shards, "is an input"), (tmp_path / "plain", "already holds shard_00000")):
        status, _, err = run(capsys, "merge", shards, "--output", folder)
        assert (status, message in err) == (2, True), err
    status, _, err = run(capsys, "merge", shards, "--output", shards, "--restart")
    assert "is an input" in err
    status, _, err = run(capsys, "merge", shards, "--output", other)
    assert status == 2
    assert "belongs to another job" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("shard_*")} == before
    assert run(capsys, "merge", shards, "--output", other, "--restart")[0] == 0
    assert documents_of(other) == documents_of(shards)
    code, out, _ = run(capsys, "merge", shards, "--output", other)
    assert code == 0
    assert "already complete" in out


@pytest.mark.parametrize("inside", ["a/manifest.json", "a/b/manifest.json", "a/progress.json", "a/b/c/progress.json"])
def test_an_output_around_other_sets_is_refused(shards, tmp_path, capsys, inside):
    """However deep they lie, and unfinished ones too."""
    path = tmp_path / "out" / inside
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    status, _, err = run(capsys, "merge", shards, "--output", tmp_path / "out")
    assert (status, f"would contain the shard set {path.parent.resolve()}" in err) == (2, True)
    assert run(capsys, "merge", shards, "--output", tmp_path / "beside")[0] == 0


def test_two_writers_at_once(shards, tmp_path, capsys):
    with SplitWriter(tmp_path / "m", {"all": tmp_path / "m"}, np.dtype("<u2"), {}):
        status, _, err = run(capsys, "merge", shards, "--output", tmp_path / "m")
        assert status == 2
        assert "another process is writing to" in err
    (tmp_path / "m" / PROGRESS).unlink()
    assert run(capsys, "merge", shards, "--output", tmp_path / "m")[0] == 0
    assert not (tmp_path / "m" / ".lock").exists()


def test_empty_sets(tmp_path, capsys):
    folder = write_set(tmp_path / "none", [])
    assert "documents" in run(capsys, "stats", folder)[1]
    for tool in (["merge", folder], ["split", folder, "--part", "a=1"]):
        assert "error: 0 documents in" in run(capsys, *tool, "--output", tmp_path / "o")[2]


@pytest.mark.parametrize("parts", [["a=0.5", "a=0.5"], ["a=nan"], ["../b=1"], ["a"], ["a=-1"], ["a=0"], ["=1"]])
def test_impossible_parts(shards, tmp_path, capsys, parts):
    options = [word for part in parts for word in ("--part", part)]
    assert run(capsys, "split", shards, *options, "--output", tmp_path / "o")[2].startswith("error: ")


def test_an_operating_system_error_is_one_line(shards, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, "merge", shards, "--output", tmp_path / "file" / "o")
    assert status == 2
    assert err.startswith("error: ")
