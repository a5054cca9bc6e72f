"""Bytes of text behind tokens: exactly those of the text that was encoded, or none at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.data.batch import Batch
from megatron_fp4.data.text.text_bytes import TextBytes, text_bytes
from megatron_fp4.data.text.tiktoken_file import CL100K_PATTERN
from megatron_fp4.data.text.tokenizer import Tokenizer, load_tokenizer
from tests.data.text.toy_vocabularies import sentencepiece_model, tiktoken_file, tokenizer_json, unigram_json
from tests.helpers.letters import make_tokenizer

KINDS = ("sentencepiece", "tokenizers", "tiktoken")


def make(kind: str, folder: Path) -> Tokenizer:
    if kind == "sentencepiece":
        return load_tokenizer(sentencepiece_model(folder / "t.model", byte_fallback=True))
    if kind == "tokenizers":
        return load_tokenizer(tokenizer_json(folder / "tokenizer.json", {"<|endoftext|>": True}))
    side = {"pattern": CL100K_PATTERN, "special_tokens": {"<|endoftext|>": 1000}}
    return load_tokenizer(tiktoken_file(folder / "t.tiktoken", side))


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TextBytes]:
    tokenizer = make(request.param, tmp_path_factory.mktemp(request.param))
    known = text_bytes(tokenizer)
    assert known is not None
    return tokenizer, known


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_the_bytes_of_a_text_are_those_of_its_tokens(pair: tuple[Tokenizer, TextBytes], text: str) -> None:
    tokenizer, known = pair
    ids = tokenizer.encode_batch([text])[0].tolist()
    assert float(known.lengths[ids].sum()) == len(text.encode())


def test_what_ends_a_document_is_no_text(pair: tuple[Tokenizer, TextBytes]) -> None:
    tokenizer, known = pair
    assert known.lengths[tokenizer.special.require("eos", "it")] == 0


def batch_of(tokens: list[int], mask: list[bool]) -> Batch:
    rows = torch.tensor([tokens])
    zeros = torch.zeros_like(rows[:, 1:])
    return Batch(
        rows[:, :-1], rows[:, 1:], torch.tensor([mask]), zeros, zeros, zeros, torch.zeros(1, dtype=torch.int64)
    )


def test_only_targets_count_and_an_unknown_one_makes_the_sum_unknown() -> None:
    known = TextBytes(torch.tensor([0.0, 3.0, 5.0, math.nan], dtype=torch.float64), end=0, has_prefix=False)
    assert known.of_targets(batch_of([1, 2, 0, 1, 3], [True, True, True, False])) == 8.0
    assert math.isnan(known.of_targets(batch_of([1, 2, 0, 1, 3], [True, True, True, True])))
    assert math.isnan(known.of_targets(batch_of([1, 2, 9], [True, True]))), "an id beyond the vocabulary"


def test_a_blank_before_each_document_is_no_text() -> None:
    """As sentencepiece's add_dummy_prefix puts it: the first piece behind an end has one byte too many."""
    known = TextBytes(torch.tensor([0.0, 3.0, 5.0], dtype=torch.float64), end=0, has_prefix=True)
    assert known.of_targets(batch_of([1, 2, 0, 1, 2], [True] * 4)) == 5 + 0 + (3 - 1) + 5


def test_letters_that_are_joined_are_their_own_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    known = text_bytes(tokenizer)
    assert known is not None
    assert known.lengths.nan_to_num(-1).tolist() == [-1, 0] + [1] * 27


def test_who_changes_text_gets_no_number(tmp_path: Path) -> None:
    """NFKC writes a ligature as two letters, and lower case what was none."""
    stored = json.loads(tokenizer_json(tmp_path / "tokenizer.json", {"<|endoftext|>": True}).read_text())
    for normalizer in ({"type": "NFKC"}, {"type": "Lowercase"}):
        (tmp_path / "changing.json").write_text(json.dumps({**stored, "normalizer": normalizer}))
        assert text_bytes(load_tokenizer(tmp_path / "changing.json")) is None
    (tmp_path / "silent.json").write_text(json.dumps({**stored, "decoder": None}))
    assert text_bytes(load_tokenizer(tmp_path / "silent.json")) is None, "its pieces may be anything"


def test_an_unknown_piece_has_no_length(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "t.model", byte_fallback=False))
    known = text_bytes(tokenizer)
    assert known is not None
    assert math.isnan(float(known.lengths[tokenizer.special.require("unk", "it")]))


@pytest.mark.parametrize("scheme", ["never", "always"])
def test_blanks_as_characters_and_one_before_each_document(scheme: str, tmp_path: Path) -> None:
    stored = json.loads(unigram_json(tmp_path / "tokenizer.json", ["</s>"]).read_text())
    stored["pre_tokenizer"]["prepend_scheme"] = stored["decoder"]["prepend_scheme"] = scheme
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    known = text_bytes(tokenizer := load_tokenizer(tmp_path / "tokenizer.json"))
    assert known is not None
    assert known.has_prefix == (scheme == "always")
    ids = torch.tensor(tokenizer.encode_batch(["add first"])[0].tolist())
    assert float(known.lengths[ids].sum()) == len("add first") + known.has_prefix
