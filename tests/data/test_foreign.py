"""Shards of another tool with the wrong tokenizer do not train without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4 import pretrain
from megatron_fp4.data.config import DataConfig, EvaluationConfig, SourceConfig
from megatron_fp4.data.evaluation import build_eval_loader
from megatron_fp4.data.foreign import check_unnamed
from megatron_fp4.data.text.tokenizer import Tokenizer, load_tokenizer
from tests.data.text import toy_vocabularies as toy
from tests.data.toy import loader_of, write_set, write_shard
from tests.helpers.tiny_run import tiny_run

TEXT = "return first and then return second "


@pytest.fixture
def right(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(toy.tokenizer_json(tmp_path / "tokenizer.json", {"<|endoftext|>": True}))


@pytest.fixture
def wrong(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(toy.sentencepiece_model(tmp_path / "wrong.model", byte_fallback=True))


def printed(paths: list[str], tokenizer: Tokenizer | None, heldout: str = "") -> list[str]:
    evaluation = [EvaluationConfig("held", [heldout])] if heldout else []
    config = DataConfig([SourceConfig("web", paths)], evaluation=evaluation, seq_length=16)
    loaders = [build_eval_loader(config, item.name, micro_batch=1, dp_rank=0, dp_size=1) for item in evaluation]
    return check_unnamed(loader_of(config), loaders, tokenizer)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.encode_batch([text])[0].tolist(), tokenizer.special.require("eos", "it")]


def test_a_document_is_shown_as_text(tmp_path: Path, right: Tokenizer, wrong: Tokenizer) -> None:
    shards = write_shard(tmp_path / "web", [[], ids(right, TEXT)])
    for tokenizer in (right, wrong):
        (line,) = printed([shards], tokenizer)
        assert f"nothing says which tokenizer made the shards of 'web' ({shards})" in line
        assert f"data.tokenizer = {tokenizer.path} is the wrong one" in line
        assert (TEXT in line) == (tokenizer is right)
        assert line.endswith(f"ended by token 320 {tokenizer.piece(320)!r}")


def test_of_a_long_document_beginning_and_end(tmp_path: Path, right: Tokenizer) -> None:
    text = TEXT * 40 + "an end"
    (line,) = printed([write_shard(tmp_path / "web", [ids(right, text)])], right)
    begins, _, ends = line.splitlines()[1].strip().partition(" ... ")
    assert text.startswith(begins.strip("'"))
    assert text.endswith(ends.partition("<|endoftext|>")[0].strip("'"))
    assert len(line) < 600


def test_every_source_and_set_of_unknown_origin(tmp_path: Path, right: Tokenizer) -> None:
    named = write_set(tmp_path / "set", [[ids(right, TEXT)]], right.fingerprint)
    plain = write_shard(tmp_path / "plain", [ids(right, TEXT)])
    assert printed([named], right, named) == []
    assert printed([plain], None, plain) == []
    assert [line.split("'")[1] for line in printed([named, plain], right, plain)] == ["web", "held"]


def test_ids_beyond_the_tokenizer_prove_that_it_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], right: Tokenizer
) -> None:
    """The rows of an embedding that was padded have room for them."""
    highest = right.vocab_size + 3
    shards = write_shard(tmp_path / "web", [ids(right, TEXT), [highest] * 500])
    with pytest.raises(
        ValueError, match=f"{shards} of 'web' holds token id {highest}, which the tokenizer .* does not"
    ):
        printed([shards], right)
    run = tiny_run(tmp_path, f"data.sources=[{{name: web, paths: ['{shards}'], max_epochs: 0}}]")
    overrides = [*run.overrides, f"data.tokenizer={right.path}", f"model.vocab_size={highest + 1}"]
    assert pretrain.main(overrides) == 2
    assert f"holds token id {highest}" in capsys.readouterr().err
