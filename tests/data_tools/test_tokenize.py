import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main as tools
from data_tools.tokenize import main
from megatron_fp4.data.shards.documents import open_documents
from megatron_fp4.data.shards.manifest import MANIFEST, PROGRESS, read_manifest
from megatron_fp4.data.text.tokenizer import load_tokenizer
from tests.data_tools.conftest import text_of


def write_documents(path, number, words=60):
    with open(path, "w") as file:
        for n in range(number):
            file.write(json.dumps({"text": f"{n} " + text_of(n % 97, words)}) + "\n")
    return path


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("shard_*"))}


def documents_of(folder, tokenizer):
    source = open_documents("x", [str(folder)])
    texts = []
    for number in range(source.num_documents):
        ids = source.document(number)
        assert ids[-1] == tokenizer.special.eos
        assert (ids[:-1] != tokenizer.special.eos).all()
        texts.append(tokenizer.decode(ids[:-1].tolist()))
    return texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus") / "c.jsonl", 16000)


def test_documents_come_back_in_order_with_one_eos(corpus, model, tmp_path, capsys):
    assert main([str(corpus), "--output", str(tmp_path / "o"), "--tokenizer", str(model), "--workers", "1"]) == 0
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert documents_of(tmp_path / "o", load_tokenizer(model)) == texts
    manifest = read_manifest(tmp_path / "o")
    source = open_documents("x", [str(tmp_path / "o")])
    assert manifest["tokenizer"]["fingerprint"] == load_tokenizer(model).fingerprint
    assert manifest["max_token_id"] == max(int(s.tokens.max()) for s in source.shards)
    assert manifest["counters"]["documents"] == 16000
    assert manifest["special_tokens"] == {
        "bos": 1,
        "eos": 2,
        "pad": 3,
        "unk": 0,
        "policy": "one eos after every document, no bos",
    }
    assert manifest["sources"] == [{"name": "c.jsonl", "bytes": corpus.stat().st_size}]
    assert len(manifest["shards"][0]["files"]["bin"]["sha256"]) == 64
    printed = capsys.readouterr()
    assert "16,000 documents" in printed.out
    assert re.search(r"100\.0% +\d+\.\d\d MB/s  left +0 s", printed.err)
    assert not (tmp_path / "o" / PROGRESS).exists()


def test_same_bytes_for_any_number_of_workers_and_after_kills(corpus, model, tmp_path):
    """SIGKILL in the middle, three times: no document twice, none lost, the very same files as without a kill."""
    options = [str(corpus), "--tokenizer", str(model), "--shard-tokens", "60000", "--heldout-fraction", "0.1"]
    assert main([*options, "--output", str(tmp_path / "whole"), "--workers", "1"]) == 0
    command = [sys.executable, "-m", "data_tools.tokenize", *options, "--output", str(tmp_path / "killed")]
    kills = 0
    for _ in range(3):
        process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        seen = done_shards(tmp_path / "killed")
        while process.poll() is None and done_shards(tmp_path / "killed") == seen:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert not any((tmp_path / "killed" / s / MANIFEST).exists() for s in ("train", "heldout")) or not kills
    assert kills
    with pytest.raises(ValueError, match="not committed"):
        read_manifest(tmp_path / "killed" / "train")
    assert subprocess.run([*command, "--workers", "2"], capture_output=True).returncode == 0
    for split in ("train", "heldout"):
        assert contents(tmp_path / "killed" / split) == contents(tmp_path / "whole" / split)
        a, b = (read_manifest(tmp_path / name / split) for name in ("killed", "whole"))
        assert a == b
        assert len(a["shards"]) > 3


def done_shards(folder, split="train"):
    try:
        return len(json.loads((folder / PROGRESS).read_text())["shards"][split])
    except FileNotFoundError:
        return 0


def test_split_is_by_content_and_complete(model, tmp_path):
    texts = [text_of(n % 50, 20) for n in range(400)]  # each text eight times
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    output = tmp_path / "o"
    options = ["--output", str(output), "--tokenizer", str(model), "--heldout-fraction", "0.3", "--workers", "1"]
    main([str(tmp_path / "c.jsonl"), *options])
    train, held = (documents_of(output / name, load_tokenizer(model)) for name in ("train", "heldout"))
    assert sorted(train + held) == sorted(texts)
    assert not set(train) & set(held)
    assert held


def test_second_run_does_nothing_and_another_job_is_refused(corpus, model, tmp_path, capsys):
    options = [str(corpus), "--output", str(tmp_path / "o"), "--tokenizer", str(model), "--workers", "1"]
    main(options)
    before = (tmp_path / "o" / MANIFEST).stat().st_mtime_ns
    main(options)
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "o" / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"its shard_tokens is \d+, this command has 5000000.*--restart"):
        main([*options, "--shard-tokens", "5000000"])
    assert main([*options, "--shard-tokens", "5000000", "--restart"]) == 0


def test_peak_memory_does_not_grow_with_the_file(model, tmp_path):
    """A file of 80 MB, 20 times the growth allowed over a file of 4 MB (parent and workers, peak RSS)."""
    words = (word * 8 for word in text_of(1, 2000).split())  # long words: fewer lookups per MB
    line = json.dumps({"text": " ".join(words)}).encode() + b"\n"
    peaks = {}
    for size in (4, 80):
        with open(tmp_path / f"{size}.jsonl", "wb") as file:
            for _ in range(size * 1_000_000 // len(line)):
                file.write(line)
        code = (
            "import resource as r, sys; from data_tools.tokenize import main; main(sys.argv[1:]);"
            "print(*(r.getrusage(w).ru_maxrss for w in (r.RUSAGE_SELF, r.RUSAGE_CHILDREN)))"
        )
        options = ["--output", str(tmp_path / f"o{size}"), "--tokenizer", str(model), "--workers", "2"]
        command = [sys.executable, "-c", code, str(tmp_path / f"{size}.jsonl"), *options, "--shard-tokens", "500000"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[size] = np.array(out.split()[-2:], np.int64) / 1000
        (tmp_path / f"{size}.jsonl").unlink()
    assert (peaks[80] - peaks[4]).max() < 4, peaks


def test_a_killed_worker_is_reported_and_the_job_can_go_on(corpus, model, tmp_path):
    command = [sys.executable, "-m", "data_tools.tokenize", str(corpus), "--output", str(tmp_path / "o")]
    command += ["--tokenizer", str(model), "--workers", "2", "--shard-tokens", "60000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and not done_shards(tmp_path / "o", "all"):
        time.sleep(0.002)
    for worker in workers_of(process.pid):
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process died" in errors
    assert "Traceback" not in errors
    assert subprocess.run(command, capture_output=True).returncode == 0


def workers_of(pid):
    """Children that run the pool's workers (not the resource tracker)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def test_inputs_that_changed_since_the_kill_are_refused(model, tmp_path):
    path = write_documents(tmp_path / "c.jsonl", 50)
    options = [str(path), "--output", str(tmp_path / "o"), "--tokenizer", str(model), "--workers", "1"]
    main(options)
    manifest = json.loads((tmp_path / "o" / MANIFEST).read_text())
    (tmp_path / "o" / MANIFEST).unlink()
    state = {"job": manifest["job"], "position": [0, 0], "counters": {}, "shards": {"all": manifest["shards"]}}
    (tmp_path / "o" / PROGRESS).write_text(json.dumps(state))
    write_documents(path, 51)
    with pytest.raises(ValueError, match=r"its inputs is \[\['c.jsonl'"):
        main(options)
    with pytest.raises(ValueError, match=r"its empty is skip, this command has keep"):
        main([*options, "--on-empty", "keep"])


def test_a_job_that_made_no_shard_yet_may_be_changed(model, tmp_path):
    """A policy that ended it, for instance: there is nothing to delete."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "good"}\n{broken\n')
    options = [str(path), "--output", str(tmp_path / "o"), "--tokenizer", str(model), "--workers", "1"]
    with pytest.raises(ValueError, match="--on-invalid-json skip"):
        main(options)
    assert main([*options, "--on-invalid-json", "skip"]) == 0
    assert len(documents_of(tmp_path / "o", load_tokenizer(model))) == 1


def test_inputs_in_the_output_folder_are_kept(model, tmp_path):
    path = write_documents(tmp_path / "shard_00000.jsonl", 5)
    for more in ([], ["--restart"]):
        main([str(path), "--output", str(tmp_path), "--tokenizer", str(model), "--workers", "1", *more])
    assert path.exists()


def test_no_document_no_shard_set(model, tmp_path, capsys):
    """A set of nothing would pass for done until a run refuses it, perhaps weeks later."""
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    options = ["tokenize", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "o"), "--tokenizer", str(model)]
    assert tools([*options, "--workers", "1"]) == 2
    assert "no document came out of the input (empty: skip 1), so nothing is committed" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text('{"text": "now"}\n')
    assert tools([*options, "--workers", "1"]) == 0  # the folder holds nothing that could be lost


def test_the_tokenizer_trainer_has_the_same_policies(tmp_path, capsys):
    lines = [json.dumps({"text": text_of(n, 200)}) for n in range(40)]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"text": ""})]))
    argv = ["train-tokenizer", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "t.model"), "--vocab-size", "380"]
    assert tools([*argv]) == 2
    assert "--on-invalid-json skip" in capsys.readouterr().err
    assert tools([*argv, "--on-invalid-json", "skip"]) == 0
    out = capsys.readouterr().out
    assert "1 invalid json: skip" in out
    assert "1 empty: skip" in out
