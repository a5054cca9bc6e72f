import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.train_tokenizer import train
from megatron_fp4.data.text.sentencepiece_model import SentencePieceTokenizer
from megatron_fp4.data.text.tiktoken_file import CL100K_PATTERN
from megatron_fp4.data.text.tokenizer import describe_tokenizer, eos_of, load_tokenizer

TEXT = """def add(first, second):
    '''Return the sum, 12345 + 678; it's "simple".'''
    return first + second  # naïve, π, 日本

"""


def make_model(path, **options):
    lines = (line for _ in range(30) for line in TEXT.splitlines() if line)
    train(
        lines, path, vocab_size=options.get("vocab_size", 400), model_type=options.get("model_type", "bpe"), threads=1
    )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="module")
def pair(model):
    return SentencePieceTokenizer(model), SentencePieceTokenizer(model, fast=False)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(), st.text(" \n\tdefadrtu_rn(),'1²\u2581é", max_size=60)))
def test_the_chunk_cache_changes_no_id(pair, text):
    fast, plain = pair
    assert fast._chunks is not None
    assert fast.encode_batch([text])[0].tolist() == plain.encode_batch([text])[0].tolist()


def test_lossless(pair):
    for text in (TEXT, "  leading and trailing  ", "tabs\tand\r\nreturns", "emoji \U0001f600"):
        assert pair[0].decode(pair[0].encode_batch([text])[0]) == text


def test_training_is_deterministic(model, tmp_path):
    assert make_model(tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_unigram_has_no_chunk_cache(tmp_path):
    tokenizer = SentencePieceTokenizer(make_model(tmp_path / "u.model", model_type="unigram", vocab_size=308))
    assert tokenizer._chunks is None
    assert tokenizer.decode(tokenizer.encode_batch([TEXT])[0]) == TEXT


def test_start_up_lines(pair):
    text = describe_tokenizer(pair[0])
    assert "eos 2 '</s>'" in text
    assert f"vocabulary {pair[0].vocab_size}, not padded" in text
    assert pair[0].fingerprint in text
    assert f"vocabulary {pair[0].vocab_size}, padded to 512" in describe_tokenizer(pair[0], 512)


def test_hugging_face(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["[UNK]", "<|endoftext|>"], initial_alphabet=alphabet
    )
    model.train_from_iterator([TEXT] * 10, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode_batch([TEXT, ""])
    assert tokenizer.decode(ids[0]) == TEXT
    assert len(ids[1]) == 0
    assert (eos_of(tokenizer), tokenizer.special.unk, tokenizer.special.bos) == (1, 0, None)
    assert "bos none" in describe_tokenizer(tokenizer)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"].append({**stored["added_tokens"][-1], "id": 999, "content": "<|far|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    gap = load_tokenizer(tmp_path / "tokenizer.json")
    assert max(gap.encode_batch(["<|far|>"])[0]) < gap.vocab_size, "the embedding would lack a row for the last id"


def test_tiktoken(tmp_path):
    pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)} | {b"re": 256, b"tu": 257}
    lines = b"\n".join(base64.b64encode(t) + b" %d" % r for t, r in ranks.items())
    (tmp_path / "v.tiktoken").write_bytes(lines)
    side = {"pattern": CL100K_PATTERN, "special_tokens": {"<|endoftext|>": 258}}
    (tmp_path / "v.tiktoken.json").write_text(json.dumps(side))
    tokenizer = load_tokenizer(tmp_path / "v.tiktoken")
    ids = tokenizer.encode_batch([TEXT])[0]
    assert tokenizer.decode(ids) == TEXT
    assert 256 in ids
    assert (eos_of(tokenizer), tokenizer.vocab_size) == (258, 259)
    plain = tokenizer.fingerprint
    (tmp_path / "v.tiktoken.json").write_text(json.dumps({**side, "special_tokens": {"<|end_of_text|>": 300}}))
    assert eos_of(load_tokenizer(tmp_path / "v.tiktoken")) == 300
    assert load_tokenizer(tmp_path / "v.tiktoken").fingerprint != plain  # the special ids are part of what it is
    (tmp_path / "bad.tiktoken").write_text("no ranks here")
    with pytest.raises(ValueError, match=r"bad\.tiktoken, line 1"):
        load_tokenizer(tmp_path / "bad.tiktoken")


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ending must be one of"):
        load_tokenizer(tmp_path / "t.bin")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_text("not a model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "t.model")
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    (tmp_path / "t.tiktoken").write_text("")
    with pytest.raises(ValueError, match="pip install tiktoken"):
        load_tokenizer(tmp_path / "t.tiktoken")
