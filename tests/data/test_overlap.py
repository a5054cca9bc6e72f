"""Held-out text that is trained on too is found before a step is made."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from megatron_fp4 import pretrain
from megatron_fp4.data.config import DataConfig, EvaluationConfig, SourceConfig
from megatron_fp4.data.evaluation import build_eval_loader
from megatron_fp4.data.overlap import any_hashes, check_heldout, common_documents, stored_hashes
from megatron_fp4.data.shards.documents import open_documents
from megatron_fp4.data.shards.shard import TokenShard
from tests.data.toy import loader_of, write_set, write_shard
from tests.helpers.tiny_run import tiny_run

WEB = [list(range(n, n + 12)) for n in range(100)]
HELD = [list(range(n, n + 12)) for n in range(500, 520)]


def config(source: str, heldout: str, *, may_overlap: bool = False) -> DataConfig:
    held = EvaluationConfig("held", [heldout], may_overlap=may_overlap)
    return DataConfig([SourceConfig("web", [source])], evaluation=[held])


def heldout_lines(source: str, heldout: str, *, may_overlap: bool = False) -> list[str]:
    settings = config(source, heldout, may_overlap=may_overlap)
    evaluation = build_eval_loader(settings, "held", micro_batch=1, dp_rank=0, dp_size=1)
    return check_heldout(loader_of(settings), [evaluation])


def test_common_documents_are_those_of_a_comparison_of_all_pairs(tmp_path):
    """In another dtype, another order and another shard; short and empty ones do not count."""
    shared = [WEB[3], WEB[77], [1, 2], []]
    write_shard(tmp_path / "web_0", [*WEB[:50], [1, 2], []])
    write_shard(tmp_path / "web_1", WEB[50:])
    held = write_shard(tmp_path / "held", [*HELD, *shared], dtype="<i4")
    source, heldout = open_documents("web", [f"{tmp_path}/web_*"]), open_documents("held", [held])
    for hashes in (stored_hashes, any_hashes):
        common = common_documents(heldout, source, hashes)
        assert common is not None
        assert common.tolist() == [len(HELD), len(HELD) + 1]


def test_a_run_that_would_train_on_its_heldout_text_is_refused(tmp_path):
    web, held = write_shard(tmp_path / "web", WEB), write_shard(tmp_path / "held", [*HELD, WEB[5]])
    with pytest.raises(ValueError, match=r"'held' holds 1 document\(s\) that source 'web' trains on.*document 20 of"):
        heldout_lines(web, held)
    assert heldout_lines(web, held, may_overlap=True) == []
    assert heldout_lines(web, write_shard(tmp_path / "other", HELD)) == []


def test_the_command_refuses_it_before_a_step(tmp_path, capsys):
    run = tiny_run(tmp_path)
    sets = f"data.evaluation=[{{name: held, paths: ['{tmp_path}/shards/toy']}}]"
    assert pretrain.main([*run.overrides, sets, "train.eval_interval_steps=2"]) == 2
    assert "documents that source 'toy' trains on" in capsys.readouterr().err.replace("document(s)", "documents")
    assert not (run.run_dir / "checkpoints").exists()


def test_sets_whose_documents_end_differently_are_refused(tmp_path, capsys):
    """Equal text would not be equal, and the model would learn two ends."""
    web, held = (
        write_set(tmp_path / name, [documents], special_tokens={"eos": eos})
        for name, documents, eos in (("web", WEB, 0), ("held", HELD, 1))
    )
    with pytest.raises(ValueError, match="documents of 'web' end with token 0, those of 'held' with 1: tokenize one"):
        heldout_lines(web, held)
    assert main(["merge", web, held, "--output", str(tmp_path / "both")]) == 2
    assert "end with token" in capsys.readouterr().err


def test_what_was_not_compared_is_said(tmp_path):
    web, held = write_shard(tmp_path / "web", WEB), write_shard(tmp_path / "held", [WEB[5]])
    os.unlink(f"{web}.hashes")
    (line,) = heldout_lines(web, held)
    assert "'held' was not compared with source 'web'" in line
    assert "data verify SOURCE --heldout SET" in line


def test_verify_compares_shards_without_hashes_too(tmp_path, capsys):
    web, held = write_shard(tmp_path / "web", WEB), write_shard(tmp_path / "held", [*HELD, WEB[5]])
    os.unlink(f"{web}.hashes")
    assert main(["verify", web, "--heldout", held]) == 1
    out = capsys.readouterr().out
    assert "21 held-out documents against 100: 1 in common" in out
    assert f"document 20 of {held} is in the source too" in out


@pytest.mark.parametrize("documents", [[], [[1, 2, 3], [4] * 7]])
def test_held_out_documents_that_are_all_too_short_prove_nothing(tmp_path, capsys, documents):
    web, held = write_shard(tmp_path / "web", WEB), write_shard(tmp_path / "held", documents)
    assert main(["verify", web, "--heldout", held]) == 2
    assert "has 8 tokens or more" in capsys.readouterr().err


def test_stale_hashes_are_damage(tmp_path, capsys):
    """A shard that was replaced under its hashes would pass for another."""
    web = write_shard(tmp_path / "web", WEB)
    path = Path(f"{web}.hashes")
    hashes = np.frombuffer(path.read_bytes(), "<u8").copy()
    assert (hashes == TokenShard(web).hash_documents()).all()
    hashes[7] += 1
    path.write_bytes(hashes.tobytes())
    assert main(["verify", web]) == 1
    assert "the hash of document 7 is not that of its tokens" in capsys.readouterr().out
    path.write_bytes(hashes.tobytes()[:-8])
    assert main(["verify", web]) == 1
    assert TokenShard(web).document_hashes() is None
