"""Small vocabularies of every kind that is read, made in the tests: sentencepiece, tokenizer.json, tiktoken."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = """def add(first, second):
    '''Return the sum, 12345 + 678; it's "simple".'''
    return first + second  # naïve, π, 日本

"""
LETTERS = {bytes([b]): b for b in range(256)} | {b"re": 256, b"tu": 257}


def sentencepiece_model(path: Path, *, byte_fallback: bool, users: Sequence[str] = (), eos_id: int = 2) -> Path:
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for _ in range(30) for line in TEXT.splitlines() if line]),
            model_writer=file,
            vocab_size=400 if byte_fallback else 120,
            model_type="bpe",
            byte_fallback=byte_fallback,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t", *users],
            eos_id=eos_id,
            pad_id=3,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def tokenizer_json(path: Path, special: dict[str, bool], *, truncation: int = 0) -> Path:
    """A byte-level BPE. special: added tokens in order, and whether each is declared special."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([TEXT] * 10, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    for token, is_special in special.items():
        model.add_tokens([tokenizers.AddedToken(token, special=is_special, normalized=False)])
    if truncation:
        model.enable_truncation(truncation)
    model.save(str(path))
    return path


def tiktoken_file(path: Path, side: dict[str, Any] | None) -> Path:
    """Bytes and two merges; side: what stands in <file>.json."""
    lines = (base64.b64encode(token) + b" %d" % rank for token, rank in LETTERS.items())
    path.write_bytes(b"\n".join(lines))
    if side is not None:
        Path(f"{path}.json").write_text(json.dumps(side))
    return path


def unigram_json(path: Path, special: Sequence[str]) -> Path:
    """A unigram model as converted from sentencepiece: its special tokens are pieces of score 0, so that they win."""
    letters = sorted(set(f"{TEXT}</>maskb") - set(" \n"))
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in special), ("\u2581", -2.0), *((one, -3.0) for one in letters)]
    model = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    model.decoder = decoders.Metaspace(prepend_scheme="never")
    model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    model.save(str(path))
    return path
