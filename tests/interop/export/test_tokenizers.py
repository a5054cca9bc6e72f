"""Tokenizers of every kind leave as a tokenizer.json with the ids of training, or are refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import processors

from megatron_fp4.data.config import DataConfig, SourceConfig
from megatron_fp4.data.shards.manifest import commit
from megatron_fp4.data.text.special import UNSAID, SpecialChoice
from megatron_fp4.data.text.tiktoken_file import CL100K_PATTERN, O200K_PATTERN, R50K_PATTERN
from megatron_fp4.data.text.tokenizer import load_tokenizer
from megatron_fp4.interop.export.text import exported_text
from tests.data.text import toy_vocabularies as toy
from tests.interop.export.test_hf import TEXT


def with_a_template(path: Path) -> Path:
    """As Llama 3's: a post-processor that begins every text with bos, which training does not."""
    toy.tokenizer_json(path, {"<s>": True, "</s>": True})
    model = tokenizers.Tokenizer.from_file(str(path))
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))])
    model.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    assert model.encode("a").tokens[0] == "<s>"
    model.save(str(path))
    return path


PATTERN = r"\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def sentencepiece_as_llamas(path: Path) -> Path:
    """With the dummy space in front of a text, and unknown characters as bytes."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for _ in range(30) for line in toy.TEXT.splitlines() if line]),
            model_writer=file,
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


JOINS = ["12", "34", "1234", "45", "  ", "\n\n", "re", "'s", "it", "it's", " f", "!?", "\r\n", "\t\u65e5", "23", " x"]
"""Tokens that a text split elsewhere would hold: across digits, lines, blanks and signs."""


def tiktoken(pattern: str, path: Path) -> Path:
    """Bytes, and what they join to; between them and the special token is a gap."""
    tokens = [*(bytes([byte]) for byte in range(256)), *(join.encode() for join in JOINS)]
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)))
    side = {"pattern": pattern, "special_tokens": {"<|endoftext|>": 300}}
    Path(f"{path}.json").write_text(json.dumps(side))
    return path


KINDS = {
    "sentencepiece": lambda folder: toy.sentencepiece_model(folder / "t.model", byte_fallback=True),
    "without bytes": lambda folder: toy.sentencepiece_model(folder / "t.model", byte_fallback=False),
    "as Llama's": lambda folder: sentencepiece_as_llamas(folder / "t.model"),
    "tokenizer.json": lambda folder: toy.tokenizer_json(folder / "t.json", {"</s>": True}, truncation=5),
    "with a template": lambda folder: with_a_template(folder / "t.json"),
    "unigram": lambda folder: toy.unigram_json(folder / "t.json", ["</s>"]),
    "a pattern of one's own": lambda folder: tiktoken(PATTERN, folder / "t.tiktoken"),
    "r50k": lambda folder: tiktoken(R50K_PATTERN, folder / "t.tiktoken"),
    "cl100k": lambda folder: tiktoken(CL100K_PATTERN, folder / "t.tiktoken"),
    "o200k": lambda folder: tiktoken(O200K_PATTERN, folder / "t.tiktoken"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_gives_the_ids_of_training(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = KINDS[kind](tmp_path)
    text = exported_text(str(path), DataConfig(), UNSAID, 512)
    (tmp_path / "out").mkdir()
    for name, data in text.files.items():
        (tmp_path / "out" / name).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(path)
    for one in (TEXT, toy.TEXT, "a", " 1234567 \r\n  x", "it's 12 3456!?\n\n\n foo"):
        ids = ours.encode_batch([one])[0].tolist()
        assert theirs(one)["input_ids"] == ids
        if ours.special.unk not in ids:  # which sentencepiece shows as \u2047, and others by its name
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    assert theirs.eos_token_id == text.ids["eos"] == ours.special.eos


def test_what_a_tokenizer_json_cannot_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiktoken(CL100K_PATTERN, tmp_path / "t.tiktoken")
    monkeypatch.setattr("megatron_fp4.interop.export.tokenizer_json._portable", lambda pattern: r"\S+|\s+")
    with pytest.raises(
        ValueError, match=r"AutoTokenizer would encode .* as .*, training as .*--no-tokenizer leaves it"
    ):
        exported_text(str(path), DataConfig(), UNSAID, 64)


def test_what_ended_the_documents_ends_a_text(tmp_path: Path) -> None:
    """The user may have named it when the shards were made; the tokenizer's own end would never be generated."""
    path = toy.tokenizer_json(tmp_path / "t.json", {"</s>": True, "<end>": True})
    tokenizer = load_tokenizer(path, SpecialChoice(eos="<end>"))
    shards = tmp_path / "shards"
    shards.mkdir()
    facts = {"tokenizer": {"fingerprint": tokenizer.fingerprint}, "special_tokens": {"eos": tokenizer.special.eos}}
    commit(shards, [], **facts)
    data = DataConfig(sources=[SourceConfig("a", [str(shards)])])
    assert exported_text(str(path), data, UNSAID, 64).ids["eos"] == tokenizer.special.eos
    assert exported_text(str(path), data, SpecialChoice(eos="</s>"), 64).ids["eos"] != tokenizer.special.eos
    commit(shards, [], **{**facts, "tokenizer": {"fingerprint": "another"}})
    with pytest.raises(ValueError, match="was made with the tokenizer another"):
        exported_text(str(path), data, UNSAID, 64)
